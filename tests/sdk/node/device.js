// The released packages azure-iot-device and azure-iot-device-mqtt as a device on the hub's control channel.
'use strict';

const assert = require('node:assert/strict');
const { once } = require('node:events');
const { Client, ModuleClient, Message } = require('azure-iot-device');
// The package's own class for this; its index does not name it.
const { SharedAccessKeyAuthenticationProvider } = require('azure-iot-device/dist/sak_authentication_provider');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');
const { file, tell } = require('./world');

async function connected(name, transport) {
  const client = Client.fromConnectionString(file(name), transport);
  client.on('error', (error) => console.log('client error', error));
  await client.open();
  return client;
}

async function everything(client) {
  for (let number = 0; number < 5; number++) {
    const message = new Message(JSON.stringify({ number }));
    message.properties.add('a key', 'a value/with?signs');
    const result = await client.sendEvent(message);
    assert.equal(result.constructor.name, 'MessageEnqueued', 'acknowledged');
  }
  const twin = await client.getTwin();
  assert.equal(typeof twin.properties.desired.$version, 'number');
  await new Promise((resolve, reject) =>
    twin.properties.reported.update({ mood: 'fine' }, (error) => (error ? reject(error) : resolve())));
}

async function over_mqtt() {
  const client = await connected('device-sdk.connection', Mqtt);
  await everything(client);
  await client.close();
}

async function over_websocket() {
  const client = await connected('device-sdk.connection', MqttWs);
  await everything(client);
  await client.close();
}

async function as_a_module() {
  for (const transport of [Mqtt, MqttWs]) {
    const client = ModuleClient.fromConnectionString(file('module-sdk-m.connection'), transport);
    await client.open();
    await everything(client);
    await client.close();
  }
}

/** Until the client has reconnected: what it sends in between goes nowhere, and it tells nobody. */
async function until_acknowledged(client) {
  const soon = () => new Promise((resolve) => setTimeout(resolve, 500, 'nothing'));
  while ((await Promise.race([client.sendEvent(new Message('again')), soon()])) === 'nothing');
}

/** Renewal by reconnecting, as the package does it a while before a token expires. */
async function tokens_are_renewed() {
  for (const transport of [Mqtt, MqttWs]) {
    const provider = SharedAccessKeyAuthenticationProvider.fromConnectionString(file('device-sdk.connection'), 6, 3);
    const client = new Client(new transport(provider));
    client.on('error', (error) => assert.fail(error));
    client.on('disconnect', (reason) => console.log('disconnect', reason));
    await client.open();
    for (let renewals = 0; renewals < 2; renewals++) {
      await once(provider, 'newTokenAvailable');
      await until_acknowledged(client);
      await everything(client);
    }
    await client.close();
  }
}

async function with_a_certificate() {
  for (const transport of [Mqtt, MqttWs]) {
    for (const name of ['self-signed', 'ca-signed']) {
      const client = Client.fromConnectionString(`HostName=hub.culvert.test;DeviceId=${name};x509=true`, transport);
      await client.setOptions({ cert: file(`${name}.pem`), key: file(`${name}.key`) });
      await client.open();
      await everything(client);
      await client.close();
    }
  }
}

/** `GatewayHostName` says where to connect; names in tokens and user names stay the hub's. */
async function by_way_of_a_gateway() {
  for (const transport of [Mqtt, MqttWs]) {
    const client = await connected('device-sdk-gateway.connection', transport);
    await everything(client);
    await client.close();
    const module = ModuleClient.fromConnectionString(file('module-sdk-m-gateway.connection'), transport);
    await module.open();
    await everything(module);
    await module.close();
  }
}

/** `SharedAccessSignature=...` in the string, and the token alone. */
async function with_a_ready_made_token() {
  for (const transport of [Mqtt, MqttWs]) {
    const text = file('device-sdk-token.connection');
    for (const client of [
      Client.fromConnectionString(text, transport),
      Client.fromSharedAccessSignature(text.split(';SharedAccessSignature=')[1], transport),
    ]) {
      await client.open();
      await everything(client);
      await client.close();
    }
  }
}

async function refused() {
  const key = Buffer.alloc(32, 7).toString('base64');
  const wrong = file('device-sdk.connection').replace(/SharedAccessKey=.*/, `SharedAccessKey=${key}`);
  for (const transport of [Mqtt, MqttWs]) {
    const client = Client.fromConnectionString(wrong, transport);
    client.setRetryPolicy({ shouldRetry: () => false, nextRetryTimeout: () => 0 });
    await assert.rejects(client.open(), (error) => error.name === 'UnauthorizedError' || /[Nn]ot authorized/.test(error.message));
  }
}

/** What the hub does not serve is refused in the SUBACK, and the rest goes on. */
async function unknown_subscriptions_are_refused() {
  const client = await connected('device-sdk.connection', Mqtt);
  const refusal = await new Promise((resolve) => {
    client.on('error', resolve);
    client.onDeviceMethod('reboot', () => assert.fail('nobody calls'));
    client.on('message', () => assert.fail('nobody writes'));
    setTimeout(resolve, 1500, 'tolerated');
  });
  console.log(String(refusal));
  await client.close();
  const again = await connected('device-sdk.connection', Mqtt);
  await everything(again);
  await again.close();
}

tell({
  over_mqtt,
  over_websocket,
  as_a_module,
  tokens_are_renewed,
  with_a_certificate,
  by_way_of_a_gateway,
  with_a_ready_made_token,
  refused,
  unknown_subscriptions_are_refused,
});
