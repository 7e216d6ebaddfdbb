// Uses the page of examples/backend in a real Chromium. Started by tests/it/concepts.rs:
//
//   node concepts.mjs FOLDER CHROMIUM PAGE SCREENSHOT
//
// Prints a line of JSON when all images are made and drawn: what each showed, in turn. Then each line that it reads is
// answered by another one, when all of them are drawn in another version.
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, executablePath, url, screenshot] = process.argv.slice(2);
// NODE_PATH means nothing to `import`.
const { chromium } = createRequire(join(resolve(folder), "package.json"))("playwright-core");

const browser = await chromium.launch({
  executablePath,
  headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 1000, height: 560 } });
page.setDefaultTimeout(60_000);
await page.addInitScript(() => {
  // What each image of the page was set to, in turn.
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

/** Asks the page again until it says yes; the test around this gives up at some time. */
async function until(ask, argument) {
  while (!(await page.evaluate(ask, argument))) await page.waitForTimeout(100);
}

/** Waits until each image is drawn in full, in the version that the server has now, which isn't one of those before. */
async function drawn(before = []) {
  await until(async (before) => {
    const all = [...document.querySelectorAll("figure img")];
    const newest = await Promise.all(all.map(async (img, index) => {
      if (!img.complete || img.naturalWidth !== 512 || img.src === before[index]) return false;
      const asked = fetch(img.src.split("?")[0], { method: "HEAD", cache: "no-store" });
      const answer = await asked.catch(() => null);
      return answer?.ok && img.src.endsWith(answer.headers.get("etag").replaceAll('"', ""));
    }));
    return newest.length === 3 && newest.every(Boolean);
  }, before);
  return page.evaluate(() => ({
    sources: [...document.querySelectorAll("figure img")].map((img) => img.src),
    shown: Object.values(window.shown),
  }));
}

// Rough first, then finished: the backend says when.
await until(async (job) => (await (await fetch(`/concepts/${job}`)).json()).done === 3, job);
let state = await drawn();
await page.screenshot({ path: screenshot });
console.log(JSON.stringify({ job, ...state }));
for await (const _line of createInterface({ input: process.stdin })) {
  state = await drawn(state.sources);
  console.log(JSON.stringify({ job, ...state }));
}
await browser.close();
