// The peer of the pictures' bench: sharp, which is libvips, behind a line protocol.
//
// It says hello with its versions, then answers each line of standard input, which is a job, with one of standard
// output: how long an image took by the clock and of all cores together, and the last product where it is to be kept.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import sharp from "sharp";

// One thread an image, as afterimage has, and nothing remembered from one image to the next.
sharp.concurrency(1);
sharp.cache(false);

function make(source, { width, height, fit, format, options }) {
  const picture = sharp(source);
  if (width) {
    picture.resize({ width, height, fit, withoutEnlargement: fit === "inside" });
  }
  return picture.toFormat(format, options).toBuffer();
}

async function run({ file, job, iterations, parallelism, keep }) {
  const source = await readFile(file);
  let left = iterations;
  let product;
  const lane = async () => {
    while (left > 0) {
      left -= 1;
      product = await make(source, job);
    }
  };
  const processor = process.cpuUsage();
  const begin = performance.now();
  await Promise.all(Array.from({ length: parallelism }, lane));
  const wall = performance.now() - begin;
  const { user, system } = process.cpuUsage(processor);
  return {
    wall_ms: wall / iterations,
    cpu_ms: (user + system) / 1000 / iterations,
    bytes: product.length,
    product: keep ? product.toString("base64") : "",
  };
}

const say = (value) => console.log(JSON.stringify(value));
say({ sharp: sharp.versions.sharp, vips: sharp.versions.vips });
for await (const line of createInterface({ input: process.stdin })) {
  try {
    say(await run(JSON.parse(line)));
  } catch (error) {
    say({ error: error.message });
  }
}
