// A service program in Node: the preview SDK's POST, then the WebSocket library that it used (ws 3.3.3 through
// websocket-stream 5.1.2), and today's ws.
'use strict';

const assert = require('node:assert/strict');
const crypto = require('node:crypto');
const { once } = require('node:events');
const https = require('node:https');
const { SharedAccessSignature, ConnectionString } = require('azure-iot-common');
const websocketStream = require('websocket-stream');
const WebSocket = require('ws');
const { HUB, file, tell } = require('./world');

const agent = new https.Agent({ keepAlive: true });

/** What `Client.initiateStream` of azure-iothub 1.10.0-preview.0 sends. */
function initiateStream(device, stream) {
  const parts = ConnectionString.parse(file('service.connection'));
  const expiry = Math.floor(Date.now() / 1000) + 3600;
  const token = SharedAccessSignature.create(HUB, parts.SharedAccessKeyName, parts.SharedAccessKey, expiry).toString();
  const headers = {
    'iothub-streaming-connect-timeout-in-seconds': 30,
    'iothub-streaming-response-timeout-in-seconds': 30,
    Authorization: token,
    'Request-Id': crypto.randomUUID(),
    'User-Agent': 'azure-iothub/1.10.0-preview.0',
    'Content-Length': 0,
  };
  const path = `/twins/${encodeURIComponent(device)}/streams/${stream}?api-version=2018-10-20-preview`;
  return new Promise((resolve, reject) => {
    const request = https.request({ host: HUB, path, method: 'POST', headers, agent }, (response) => {
      response.resume();
      response.on('end', () => resolve(response));
    });
    request.on('error', reject);
    request.end();
  });
}

async function open(device) {
  const { statusCode, headers } = await initiateStream(device, 'TestStream');
  assert.equal(statusCode, 200);
  assert.equal(headers['iothub-streaming-is-accepted'], 'True');
  return { url: headers['iothub-streaming-url'], token: headers['iothub-streaming-auth-token'] };
}

async function websocket_stream_5_as_the_preview_used_it() {
  const data = crypto.randomBytes(1 << 20);
  const several = Array.from({ length: 4 }, async () => {
    const { url, token } = await open('device-sdk');
    const stream = websocketStream(url, { headers: { Authorization: `Bearer ${token}` } });
    const back = [];
    let size = 0;
    stream.on('data', (chunk) => {
      back.push(chunk);
      size += chunk.length;
      if (size === data.length) stream.end();
    });
    for (let at = 0; at < data.length; at += 65536) stream.write(data.subarray(at, at + 65536));
    await once(stream, 'close');
    assert.ok(Buffer.concat(back).equals(data));
  });
  await Promise.all(several);
}

async function ws_8_as_it_is_today() {
  const data = crypto.randomBytes(1 << 20);
  const { url, token } = await open('device-sdk');
  const leg = new WebSocket(url, { headers: { Authorization: `Bearer ${token}` } });
  await once(leg, 'open');
  assert.equal(leg.extensions, '', 'never an extension');
  leg.send(data);
  let size = 0;
  const back = [];
  await new Promise((resolve) =>
    leg.on('message', (chunk) => {
      back.push(chunk);
      size += chunk.length;
      if (size === data.length) resolve();
    }));
  assert.ok(Buffer.concat(back).equals(data));
  leg.close();
  const [code] = await once(leg, 'close');
  assert.ok([1000, 1005].includes(code), `closed with ${code}`);
  // A ticket admits once.
  const again = new WebSocket(url, { headers: { Authorization: `Bearer ${token}` } });
  const [error] = await once(again, 'error');
  assert.match(error.message, /401/);
}

tell({ websocket_stream_5_as_the_preview_used_it, ws_8_as_it_is_today });
