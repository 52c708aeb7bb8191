// The released package azure-iothub against the hub's registry: its own connection strings, SAS code and HTTP.
'use strict';

const assert = require('node:assert/strict');
const { Registry } = require('azure-iothub');
const { file, tell } = require('./world');

const registry = () => Registry.fromConnectionString(file('owner.connection'));
const body = async (answer) => (await answer).responseBody;
const key = (byte) => Buffer.alloc(32, byte).toString('base64');

async function devices_are_created_read_listed_updated_and_deleted() {
  const made = await body(registry().create({ deviceId: 'node-made', status: 'enabled' }));
  assert.equal(made.deviceId, 'node-made');
  assert.equal(Buffer.from(made.authentication.symmetricKey.primaryKey, 'base64').length, 32);

  const read = await body(registry().get('node-made'));
  assert.deepEqual(read, made);

  const chosen = { symmetricKey: { primaryKey: key(1), secondaryKey: key(2) } };
  const given = await body(registry().create({ deviceId: 'with:keys@home', authentication: chosen }));
  assert.equal(given.authentication.symmetricKey.secondaryKey, key(2));

  const listed = await body(registry().list());
  assert.deepEqual(listed.map((device) => device.deviceId).sort(), ['node-made', 'with:keys@home']);

  const updated = await body(registry().update({ ...read, status: 'disabled', statusReason: 'in repair' }));
  assert.equal(updated.status, 'disabled');
  assert.equal(updated.statusReason, 'in repair');
  assert.notEqual(updated.etag, read.etag);
  assert.deepEqual(updated.authentication, read.authentication, 'keys stay');

  await registry().delete('node-made');
  await assert.rejects(registry().get('node-made'), (error) => error.response.statusCode === 404);
  await assert.rejects(registry().delete('node-made'), (error) => error.response.statusCode === 404);
  await registry().delete('with:keys@home');
  assert.deepEqual(await body(registry().list()), []);
}

async function errors_come_as_the_packages_types() {
  await registry().create({ deviceId: 'twice' });
  await assert.rejects(registry().create({ deviceId: 'twice' }), (error) => error.name === 'DeviceAlreadyExistsError' || error.response.statusCode === 409);
  await assert.rejects(registry().create({ deviceId: 'sla/sh' }), (error) => error.response.statusCode === 400);
  await assert.rejects(registry().update({ deviceId: 'nobody' }), (error) => error.response.statusCode === 404);
  const wrong = Registry.fromConnectionString(file('owner.connection').replace(/SharedAccessKey=.*/, `SharedAccessKey=${key(9)}`));
  await assert.rejects(wrong.list(), (error) => error.name === 'UnauthorizedError' || error.response.statusCode === 401);
  const weak = Registry.fromConnectionString(file('service.connection'));
  await assert.rejects(weak.list(), (error) => error.response.statusCode === 401 || error.response.statusCode === 403);
}

async function modules_are_created_read_listed_updated_and_deleted() {
  await registry().create({ deviceId: 'with-modules' });
  const made = await body(registry().addModule({ deviceId: 'with-modules', moduleId: 'camera' }));
  assert.equal(made.moduleId, 'camera');
  const read = await body(registry().getModule('with-modules', 'camera'));
  assert.deepEqual(read, made);
  const listed = await body(registry().getModulesOnDevice('with-modules'));
  assert.deepEqual(listed.map((module) => module.moduleId), ['camera']);
  const update = { ...read, authentication: { type: 'sas', symmetricKey: { primaryKey: key(3), secondaryKey: key(4) } } };
  const updated = await body(registry().updateModule(update));
  assert.equal(updated.authentication.symmetricKey.primaryKey, key(3));
  await registry().removeModule('with-modules', 'camera');
  await assert.rejects(registry().getModule('with-modules', 'camera'), (error) => error.response.statusCode === 404);
  await assert.rejects(registry().addModule({ deviceId: 'nobody', moduleId: 'm' }), (error) => error.response.statusCode === 404);
}

async function certificates_are_registered() {
  const thumbprint = 'ab'.repeat(32).toUpperCase();
  const authentication = { type: 'selfSigned', x509Thumbprint: { primaryThumbprint: thumbprint, secondaryThumbprint: 'cd'.repeat(20) } };
  const made = await body(registry().create({ deviceId: 'x509', authentication }));
  assert.equal(made.authentication.type, 'selfSigned');
  assert.equal(made.authentication.x509Thumbprint.primaryThumbprint.toUpperCase(), thumbprint);
  assert.equal(made.authentication.symmetricKey.primaryKey, null);
  const signed = await body(registry().create({ deviceId: 'signed', authentication: { type: 'certificateAuthority' } }));
  assert.equal(signed.authentication.type, 'certificateAuthority');
}

tell({
  devices_are_created_read_listed_updated_and_deleted,
  errors_come_as_the_packages_types,
  modules_are_created_read_listed_updated_and_deleted,
  certificates_are_registered,
});
