// Parses the scripts of documents, and looks at their pages. Started by tests/docs.py:
//
//   node docs.mjs FOLDER CHROMIUM
//
// Answers each line of JSON that it reads with one that has the `error`, null if there is none:
//
//   {"script": "…", "loader": "js"}    parses a script
//   {"open": "http://…"}               opens a page, and waits until it is loaded and its images are drawn
//   {"see": "3 images"}                waits until so many images are drawn
//   {"see": "another image"}           waits until an image is drawn from another address than before
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { args } from "./chromium.mjs";

const [folder, executablePath] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const require = createRequire(join(resolve(folder), "package.json"));
const PATIENCE = 30_000;

let browser, page, seen;

/** The addresses of a page's images, once all are drawn; false before. Previews and what keeps room for an image don't count. */
function drawn() {
  const images = [...document.images].filter((it) => it.currentSrc.startsWith("http"));
  if (!images.every((it) => it.complete && it.naturalWidth > 0)) return false;
  return images.map((it) => it.currentSrc);
}

async function until(enough) {
  const deadline = Date.now() + PATIENCE;
  let shown;
  while (Date.now() < deadline) {
    shown = await page.evaluate(drawn);
    if (shown && enough(shown)) return (seen = shown);
    await page.waitForTimeout(50);
  }
  throw new Error(`the page shows ${JSON.stringify(shown)}`);
}

async function work(question) {
  if (question.script !== undefined) {
    const { transform } = require("esbuild");
    // As a module, in which `await` is allowed.
    await transform(question.script, { loader: question.loader, format: "esm", logLevel: "silent" });
  } else if (question.open) {
    browser ??= await require("playwright-core").chromium.launch({ executablePath, headless: true, args });
    page = await browser.newPage({ viewport: { width: 1000, height: 700 } });
    const answer = await page.goto(question.open, { timeout: PATIENCE });
    if (!answer.ok()) throw new Error(`${question.open} is ${answer.status()}`);
    await until(() => true);
  } else {
    const many = /^(\d+) images?$/.exec(question.see);
    if (!many && question.see !== "another image") throw new Error(`nobody knows how to see ${question.see}`);
    const before = seen;
    await until((shown) => (many ? shown.length === Number(many[1]) : shown.some((it) => !before.includes(it))));
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const error = await work(JSON.parse(line)).then(() => null, (error) => error.message);
  console.log(JSON.stringify({ error }));
}
await browser?.close();
