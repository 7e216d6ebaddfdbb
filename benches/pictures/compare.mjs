// Encodes pictures by sharp for `compare.py`: a job is a line of standard input, its answer a line of standard output.

import { readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { createRequire } from "node:module";
import process from "node:process";

// sharp is found in the folder that the script is started in.
const require = createRequire(pathToFileURL(`${process.cwd()}/`));
const sharp = require("sharp");
sharp.concurrency(1);
sharp.cache(false);

console.log(JSON.stringify(sharp.versions));
for await (const line of createInterface({ input: process.stdin })) {
  const { source, format, quality, file } = JSON.parse(line);
  const options = {
    jpeg: { quality, chromaSubsampling: quality > 90 ? "4:4:4" : "4:2:0" },
    webp: { quality, effort: 4 },
    png: { compressionLevel: 9, adaptiveFiltering: true },
    avif: { quality, effort: 4 },
  }[format];
  const picture = sharp(readFileSync(source));
  if (format === "jpeg") {
    picture.flatten({ background: "white" });
  }
  const bytes = await picture.toFormat(format, options).toBuffer();
  writeFileSync(file, bytes);
  console.log(JSON.stringify({ bytes: bytes.length }));
}
