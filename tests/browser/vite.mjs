// Runs Vite's development server with the short form of its proxy, which passes everything on. Started by tests/it/access.rs:
//
//   node vite.mjs FOLDER PORT ORIGIN
//
// FOLDER is the folder with vite, ORIGIN the address that requests are passed on to.
import { createRequire } from "node:module";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, port, origin] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const { createServer } = await import(
  pathToFileURL(createRequire(join(resolve(folder), "package.json")).resolve("vite"))
);
const root = mkdtempSync(join(tmpdir(), "vite-"));
const server = await createServer({
  root,
  configFile: false,
  logLevel: "warn",
  cacheDir: join(root, "cache"),
  optimizeDeps: { noDiscovery: true },
  server: {
    host: "127.0.0.1",
    port: Number(port),
    strictPort: true,
    proxy: Object.fromEntries(["/images", "/placeholders", "/events"].map((path) => [path, origin])),
  },
});
await server.listen();
