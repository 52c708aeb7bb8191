// What every script of this folder needs: the world's files, and a story runner.
'use strict';

const fs = require('node:fs');
const path = require('node:path');

const HUB = 'hub.culvert.test';

/** A file of the world, as text. */
const file = (name) => fs.readFileSync(path.join(process.env.WORLD, name), 'utf8').trim();

/** Runs the stories that the command line names, one after the other; a failure is the process's. */
async function tell(stories) {
  for (const name of process.argv.slice(2)) {
    const began = Date.now();
    await stories[name]();
    console.log(`${name}: ${Date.now() - began} ms`);
  }
  // The SDKs keep timers of their own.
  process.exit(0);
}

process.on('unhandledRejection', (error) => {
  console.error(error);
  process.exit(1);
});

module.exports = { HUB, file, tell };
