// Prints the size of each entry, minified and compressed, and fails if all together are over the limit.
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const LIMIT = 5 * 1024;

/** Size of a bundle of the given entries, in bytes. */
async function size(...entries) {
  const contents = entries.map((entry) => `export * from "./src/${entry}.js";`).join("\n");
  const { outputFiles } = await build({
    stdin: { contents, resolveDir: new URL("..", import.meta.url).pathname },
    bundle: true,
    minify: true,
    format: "esm",
    target: "es2022",
    external: ["react"],
    write: false,
    logLevel: "error",
  });
  return gzipSync(outputFiles[0].contents, { level: 9 }).length;
}

const entries = ["index", "element", "react"];
for (const entry of [...entries, "next"]) console.log(`${entry}: ${await size(entry)} bytes`);
// Code that entries share counts once.
const all = await size(...entries);
console.log(`all: ${all} bytes of ${LIMIT}`);
if (all > LIMIT) process.exit(1);
