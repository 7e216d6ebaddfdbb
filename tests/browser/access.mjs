// Lets a page in a real Chromium send requests, and prints what each got. Started by tests/it/access.rs:
//
//   node access.mjs FOLDER CHROMIUM PROFILE PAGE MAP ATTEMPTS
//
// PAGE is the address that is opened, MAP a rule for host names (`MAP evil.example 127.0.0.1`) or nothing. ATTEMPTS is a list of
// [address, options of fetch]; `image` puts an image into the body. The result is a list of statuses, or of errors.
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { args } from "./chromium.mjs";

const [folder, executablePath, profile, page, map, attempts] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const { chromium } = createRequire(join(resolve(folder), "package.json"))("playwright-core");

const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  timeout: 60_000,
  args: [...args, ...(map ? [`--host-resolver-rules=${map}`] : [])],
});
const tab = await browser.newPage();
await tab.goto(page);
const told = await tab.evaluate(async (attempts) => {
  const image = Uint8Array.from(atob("R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="), (it) => it.charCodeAt(0));
  const told = [];
  for (const [address, { image: sends, ...options }] of attempts) {
    // Without a type, so that no preflight asks for leave.
    if (sends) options.body = new Blob([image]);
    const stop = new AbortController();
    try {
      const answer = await fetch(address, { ...options, signal: stop.signal });
      told.push(answer.status);
      // A stream of events doesn't end by itself.
      stop.abort();
    } catch (error) {
      told.push(String(error));
    }
  }
  return told;
}, JSON.parse(attempts));
console.log(JSON.stringify(told));
setTimeout(() => process.exit(0), 10_000).unref();
await browser.close();
