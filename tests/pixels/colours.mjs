// Compares pictures with what a real Chromium shows of their originals. Started by tests/it/:
//
//   node colours.mjs MODULES CHROMIUM FOLDER
//
// MODULES has playwright-core. FOLDER/list.json has a list of {"original", "product"}: names of files in FOLDER, the original as
// tests/pixels/tagged.py makes it, the product a PNG without a word about colours. Prints a list of {"original", "product", "error",
// "worst", "psnr"}: the mean and the largest difference of a channel, of 255, and the PSNR in decibels, on black and on white; or
// "failure" if a file isn't shown or the sizes differ.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { extname, join, resolve } from "node:path";
import { args } from "../browser/chromium.mjs";

const [modules, executablePath, folder] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const require = createRequire(join(resolve(modules), "package.json"));
const { chromium } = require("playwright-core");

const TYPES = { ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp", ".ico": "image/x-icon" };
// Chromium tells the type of an image by its signature.
const typeOf = (name) => TYPES[extname(name)] ?? "image/png";

const url = (name) => `data:${typeOf(name)};base64,${readFileSync(join(folder, name)).toString("base64")}`;

/** Runs in the page. */
async function compare([original, product]) {
  const pixels = async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", { colorSpace: "srgb", willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  };
  let one, other;
  try {
    [one, other] = [await pixels(original), await pixels(product)];
  } catch (error) {
    return { failure: `a file isn't shown: ${error}` };
  }
  if (one.width !== other.width || one.height !== other.height) {
    return { failure: `the sizes differ: ${one.width}x${one.height}, ${other.width}x${other.height}` };
  }
  let worst = 0;
  let squares = 0;
  const errors = [0, 255].map((ground) => {
    let sum = 0;
    let square = 0;
    const on = (data, at, channel) => (data[at + channel] * data[at + 3] + ground * (255 - data[at + 3])) / 255;
    for (let at = 0; at < one.data.length; at += 4) {
      for (let channel = 0; channel < 3; channel++) {
        const difference = Math.abs(on(one.data, at, channel) - on(other.data, at, channel));
        sum += difference;
        square += difference * difference;
        worst = Math.max(worst, difference);
      }
    }
    squares = Math.max(squares, square);
    return sum / (one.data.length / 4) / 3;
  });
  // At most 99, as in reference.py.
  const psnr = 10 * Math.log10((255 * 255 * (one.data.length / 4) * 3) / Math.max(squares, 1e-9));
  return { error: Math.max(...errors), worst, psnr: Math.min(psnr, 99) };
}

const browser = await chromium.launch({ executablePath, args: [...args, "--force-color-profile=srgb"] });
let page = await browser.newPage();
const results = [];
for (const { original, product } of JSON.parse(readFileSync(join(folder, "list.json"), "utf8"))) {
  let compared;
  try {
    compared = await page.evaluate(compare, [url(original), url(product)]);
  } catch (error) {
    // A picture may end the page.
    compared = { failure: `the page ended: ${error}` };
    page = await browser.newPage();
  }
  results.push({ original, product, ...compared });
}
await browser.close();
console.log(JSON.stringify(results));
