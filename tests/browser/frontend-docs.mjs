// Runs the snippets of docs/frontend.md. Called by vite-example.mjs, which has a browser, a copy of the example and its images.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

/** The fenced snippets of a page: language, text and the line at which each begins. */
function snippets(text) {
  const found = [];
  for (const { 1: language, 2: code, index } of text.matchAll(/^```(\w+)\n(.*?)^```$/gms)) {
    found.push({ language, code, line: text.slice(0, index).split("\n").length });
  }
  return found;
}

/** The values of a table's row: its cells without backticks. */
function row(text, first) {
  const cells = text.split("\n").find((line) => line.startsWith(`| \`${first}\``)).split("|");
  return cells.slice(2, -1).map((cell) => cell.trim().replaceAll("`", ""));
}

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  return port;
}

/** Sends requests through nginx with the page's locations. */
async function nginx(locations, origin, report) {
  const [folder, port] = [mkdtempSync(join(tmpdir(), "nginx-")), await freePort()];
  const places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((it) => `${it}_temp_path ${it};`).join("\n");
  const configuration = `error_log error.log; pid nginx.pid; events {}
http { access_log off; ${places} server { listen 127.0.0.1:${port};
${locations.replaceAll("http://127.0.0.1:8000", origin)}
} }`;
  writeFileSync(join(folder, "nginx.conf"), configuration);
  const child = spawn("nginx", ["-p", folder, "-c", join(folder, "nginx.conf"), "-g", "daemon off;"], { stdio: "inherit" });
  child.on("error", (error) => report("nginx starts", false, { error: String(error) }));
  const url = `http://127.0.0.1:${port}`;
  for (;;) {
    if (await fetch(url).then(() => true, () => false)) break;
    if (child.exitCode !== null || child.pid === undefined) return report("nginx starts", false, { configuration });
    await new Promise((done) => setTimeout(done, 20));
  }
  const requests = [
    ["GET", "/images/hero_abc123", true],
    ["HEAD", "/images/hero_abc123", true],
    ["GET", "/placeholders/64x64", true],
    ["PUT", "/images/hero_abc123", false],
    ["DELETE", "/images/hero_abc123", false],
    ["GET", "/images?prefix=", false],
    ["GET", "/events?prefix=h", false],
    ["GET", "/status", false],
  ];
  for (const [method, path, passes] of requests) {
    const answer = await fetch(url + path, { method, headers: { authorization: "Bearer none" } });
    await answer.arrayBuffer();
    // Each answer of Afterimage has this header.
    const ok = passes ? answer.ok : !answer.ok && !answer.headers.has("x-request-id");
    report(`nginx ${passes ? "passes on" : "refuses"} ${method} ${path}`, ok, { status: answer.status });
  }
  // The first event comes while the stream is open: it isn't buffered.
  const stop = new AbortController();
  const stream = await fetch(`${url}/events?ids=hero_abc123`, { signal: stop.signal });
  let text = "";
  for await (const piece of stream.body.pipeThrough(new TextDecoderStream())) {
    text += piece;
    if (text.includes("concept_progress")) break;
  }
  report("nginx passes events on as they come", text.includes("concept_progress"));
  stop.abort();
  child.kill();
  await once(child, "exit");
  rmSync(folder, { recursive: true });
}

/** Waits until each image of a page is drawn, no larger than its pixels and under an address with a version. */
async function drawn(page) {
  const shown = () => {
    const images = [...document.images];
    const isSharp = (img) => img.naturalWidth > 64 && img.naturalWidth >= img.clientWidth;
    const all = images.every((img) => img.complete && isSharp(img) && /[?&]v=[0-9a-f]{32}/.test(img.currentSrc));
    return images.length > 0 && all && images.map((img) => new URL(img.currentSrc).search);
  };
  return (await page.waitForFunction(shown)).jsonValue();
}

export async function docs({ file, root, vite, newPage, origin, version, report }) {
  const text = readFileSync(file, "utf8");
  const all = snippets(text);
  const pick = (language, part = "") => all.filter((it) => it.language === language && it.code.includes(part));
  const pages = [];
  for (const { code, line } of pick("html")) {
    writeFileSync(join(root, `line-${line}.html`), `<!doctype html>\n${code.replaceAll("VERSION", version)}`);
    pages.push({ line, path: `/line-${line}.html` });
  }
  for (const { code, line } of pick("tsx", "export default")) {
    writeFileSync(join(root, `line-${line}.tsx`), code);
    const mount = `import { createElement } from "react"; import { createRoot } from "react-dom/client"; import Page from "./line-${line}";
      createRoot(document.getElementById("root")).render(createElement(Page));`;
    writeFileSync(join(root, `line-${line}.html`), `<!doctype html><div id="root"></div><script type="module">${mount}</script>`);
    pages.push({ line, path: `/line-${line}.html` });
  }
  const policy = `default-src 'none'; script-src 'self'; style-src 'self'; img-src ${row(text, "img-src")[0]}; connect-src ${row(text, "connect-src")[0]}`;
  writeFileSync(join(root, "strict.js"), 'import "afterimage-web/element"; import { imageUrl } from "afterimage-web"; window.imageUrl = imageUrl;');
  writeFileSync(join(root, "strict.html"), `<!doctype html><meta http-equiv="content-security-policy" content="${policy}">
    <script type="module" src="/strict.js"></script><after-image src-id="hero_abc123" alt="" width="256" height="256"></after-image>`);
  pages.push({ line: "with its Content-Security-Policy", path: "/strict.html" });

  // The pages are served with the proxy of the page.
  const [{ code }] = pick("ts", "defineConfig");
  const configFile = join(root, "line-vite.config.ts");
  writeFileSync(configFile, code.replace("http://127.0.0.1:8000", origin));
  const server = await vite.createServer({ root, configFile, logLevel: "error", resolve: { dedupe: ["react"] }, server: { host: "127.0.0.1", port: 0 } });
  await server.listen();
  const url = `http://127.0.0.1:${server.httpServer.address().port}`;
  for (const { line, path } of pages) {
    const page = await newPage();
    const refused = [];
    page.on("console", (it) => /Content Security Policy/.test(it.text()) && refused.push(it.text()));
    await page.goto(url + path);
    const shown = await drawn(page).catch((error) => error);
    report(`docs/frontend.md, line ${line}: its images are shown`, Array.isArray(shown) && refused.length === 0, { shown: String(shown), refused });
    await page.context().close();
  }
  const put = await fetch(`${url}/images/hero_abc123`, { method: "PUT", body: "x" });
  const listed = await fetch(`${url}/events?prefix=h`);
  report("the page's Vite proxy passes on reads only", put.status === 405 && listed.status === 404);
  await server.close();

  const [{ code: loader, line }] = pick("js", "afterimage-web/next");
  writeFileSync(join(root, "image-loader.js"), loader);
  const { default: load } = await import(pathToFileURL(join(root, "image-loader.js")));
  const loaded = await fetch(origin + load({ src: `hero_abc123?v=${version}`, width: 700, quality: 75 }));
  const kept = loaded.headers.get("cache-control");
  report(`docs/frontend.md, line ${line}: the loader's address is kept for a year`, loaded.ok && kept.includes("31536000"), { kept });
  await nginx(pick("nginx")[0].code, origin, report);
}
