// Uses the page of examples/backend in a real Chromium. Started by tests/it/concepts.rs:
//
//   node concepts.mjs FOLDER CHROMIUM PAGE SCREENSHOT
//
// Prints a line of JSON once all images are made and drawn: the addresses that each showed, in order. For each line that
// it reads then, it prints another one once all images are drawn in another version.
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { args } from "./chromium.mjs";

const [folder, executablePath, url, screenshot] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const { chromium } = createRequire(join(resolve(folder), "package.json"))("playwright-core");

const browser = await chromium.launch({
  executablePath,
  headless: true,
  args,
});
const page = await browser.newPage({ viewport: { width: 1000, height: 560 } });
page.setDefaultTimeout(60_000);
await page.addInitScript(() => {
  // Addresses that each image of the page was set to, in order.
  window.shown = {};
  const { set, get } = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, "src");
  Object.defineProperty(HTMLImageElement.prototype, "src", {
    get,
    set(value) {
      set.call(this, value);
      const figures = [...document.querySelectorAll("figure img")];
      const index = figures.indexOf(this);
      if (index >= 0) (window.shown[index] ??= []).push(value.split(",")[0]);
    },
  });
});
await page.goto(url);
const [answer] = await Promise.all([page.waitForResponse(/concepts/), page.click("button")]);
const { job } = await answer.json();

/** Polls the page until the condition holds; the test around this script has a deadline. */
async function until(ask, argument) {
  while (!(await page.evaluate(ask, argument))) await page.waitForTimeout(100);
}

/** Waits until each image is drawn in full, in the server's current version, which must differ from those before. */
async function drawn(before = []) {
  await until(async (before) => {
    const all = [...document.querySelectorAll("figure img")];
    const newest = await Promise.all(all.map(async (img, index) => {
      if (!img.complete || img.naturalWidth !== 512 || img.src === before[index]) return false;
      const head = fetch(img.src.split("?")[0], { method: "HEAD", cache: "no-store" });
      const answer = await head.catch(() => null);
      return answer?.ok && img.src.endsWith(answer.headers.get("etag").replaceAll('"', ""));
    }));
    return newest.length === 3 && newest.every(Boolean);
  }, before);
  return page.evaluate(() => ({
    sources: [...document.querySelectorAll("figure img")].map((img) => img.src),
    shown: Object.values(window.shown),
  }));
}

// First the rough images, then the finished ones; the backend reports when.
await until(async (job) => (await (await fetch(`/concepts/${job}`)).json()).done === 3, job);
let state = await drawn();
await page.screenshot({ path: screenshot });
console.log(JSON.stringify({ job, ...state }));
for await (const _line of createInterface({ input: process.stdin })) {
  state = await drawn(state.sources);
  console.log(JSON.stringify({ job, ...state }));
}
await browser.close();
