// Runs examples/vite and the snippets of docs/frontend.md with Vite, in a real Chromium:
//
//   node vite-example.mjs FOLDER CHROMIUM ORIGIN TOKEN [throttled | screenshots FOLDER]
//
// FOLDER is the folder of this script's package.json with its packages installed, ORIGIN the address of an Afterimage and TOKEN
// one that may write there. Prints a line of JSON for each check, {"check", "ok", …}, and ends with 1 if one isn't ok.
//
// `throttled` measures in place of the checks: the page as it is built, and three plain <img> of the same originals, with
// 200 KiB/s. `screenshots` saves the page at three moments in two widths.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, request as send } from "node:http";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { gzipSync } from "node:zlib";
import { docs } from "./frontend-docs.mjs";
import { args } from "./chromium.mjs";

const [folder, executablePath, origin, token, mode, saved] = process.argv.slice(2);
const repository = fileURLToPath(new URL("../..", import.meta.url));
// `import` ignores NODE_PATH.
const { resolve: find } = createRequire(join(resolve(folder), "package.json"));
const { chromium } = await import(pathToFileURL(find("playwright-core"))).then((it) => it.default);
const vite = await import(pathToFileURL(find("vite")));

const ids = ["hero_abc123", "logo_def456", "photo_ghi789"];
const throughput = 200 * 1024;
const patience = 30_000;

function report(check, ok, more = {}) {
  console.log(JSON.stringify({ check, ok, ...more }));
  if (!ok) process.exitCode = 1;
}

/** A copy of the example below FOLDER, where it finds the packages of that folder. */
function example() {
  const copy = join(resolve(folder), "vite-example");
  rmSync(copy, { recursive: true, force: true });
  const sources = (path) => !/\/(node_modules|dist)$/.test(path);
  cpSync(join(repository, "examples/vite"), copy, { recursive: true, filter: sources });
  const web = join(copy, "node_modules/afterimage-web");
  cpSync(join(repository, "clients/web"), web, { recursive: true, filter: (path) => !path.endsWith("/node_modules") });
  return copy;
}

/** Passes on everything to Afterimage and keeps the heads, to see what Vite's proxy lets through. */
async function recorder() {
  const seen = [];
  const server = createServer((incoming, answer) => {
    seen.push({ method: incoming.method, url: incoming.url, headers: incoming.headers });
    const options = { method: incoming.method, headers: incoming.headers };
    const onward = send(new URL(incoming.url, origin), options, (got) => {
      answer.writeHead(got.statusCode, got.headers);
      got.pipe(answer);
    });
    onward.on("error", () => answer.destroy());
    answer.on("close", () => onward.destroy());
    incoming.pipe(onward);
  });
  await once(server.listen(0, "127.0.0.1"), "listening");
  return { seen, server, url: `http://127.0.0.1:${server.address().port}` };
}

/** Runs the example's script, which stores the images one after another. */
async function store(...some) {
  const env = { ...process.env, AFTERIMAGE_URL: origin, AFTERIMAGE_TOKEN: token, SECONDS_BETWEEN: "0" };
  const stdio = ["ignore", "ignore", "inherit"];
  const [code] = await once(spawn(process.execPath, [join(root, "backend/images.mjs"), ...some], { env, stdio }), "exit");
  if (code !== 0) throw new Error(`images.mjs ended with ${code}`);
}

const remove = (id) =>
  fetch(`${origin}/images/${id}`, { method: "DELETE", headers: { authorization: `Bearer ${token}` } });
const head = (id) => fetch(`${origin}/images/${id}`, { method: "HEAD" });
const version = async (id) => (await head(id)).headers.get("etag").replaceAll('"', "");
const versions = async () => Object.fromEntries(await Promise.all(ids.map(async (id) => [id, await version(id)])));

/** Counts layout shifts, the largest paint and blocked time from the very start of a page. */
function observe() {
  window.vitals = { cls: 0, lcp: 0, tbt: 0 };
  const on = (type, use) => new PerformanceObserver((list) => list.getEntries().forEach(use)).observe({ type, buffered: true });
  on("layout-shift", (it) => (vitals.cls += it.value));
  on("largest-contentful-paint", (it) => Object.assign(vitals, { lcp: it.startTime, element: it.element?.outerHTML.slice(0, 40) }));
  on("longtask", (it) => (vitals.tbt += Math.max(0, it.duration - 50)));
}

async function newPage(size = { width: 1280, height: 800 }) {
  const context = await browser.newContext({ viewport: size });
  const page = await context.newPage();
  page.setDefaultTimeout(patience);
  await page.addInitScript(observe);
  page.on("pageerror", (error) => report("no error in the page", false, { error: String(error) }));
  return page;
}

/** Waits until each figure shows a decoded picture of this version, and returns their addresses and widths. */
async function complete(page, wanted) {
  const shown = (wanted) => {
    const images = [...document.querySelectorAll("figure img")].filter((img) => img.complete && img.naturalWidth > 0);
    const all = Object.entries(wanted).map(([id, v]) =>
      images.find((img) => img.currentSrc.includes(`/images/${id}`) && img.currentSrc.includes(`v=${v}`)));
    return all.every(Boolean) && all.map((img) => ({ src: img.currentSrc, natural: img.naturalWidth, css: img.clientWidth }));
  };
  return (await page.waitForFunction(shown, wanted)).jsonValue();
}

/** Waits until what is painted has been observed: two frames later. */
const vitals = (page) =>
  page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(window.vitals)))));

async function checks() {
  const upstream = await recorder();
  process.env.AFTERIMAGE_URL = upstream.url;
  const server = await vite.createServer({ root, logLevel: "error", server: { host: "127.0.0.1", port: 0 } });
  await server.listen();
  const url = `http://127.0.0.1:${server.httpServer.address().port}`;

  const rights = { authorization: `Bearer ${token}`, cookie: "afterimage_8000=1; other=2" };
  const writes = [["PUT", "/images/vite"], ["POST", "/images"], ["DELETE", `/images/${ids[0]}`], ["PATCH", "/images/vite"]];
  for (const [method, path] of writes) {
    const answer = await fetch(url + path, { method, headers: rights, body: method === "DELETE" ? undefined : "picture" });
    report(`${method} is refused`, answer.status === 405 && upstream.seen.length === 0, { status: answer.status });
  }
  for (const path of ["/images", "/images?prefix=", "/events?prefix=h", "/events", "/session", "/status", "/metrics"]) {
    await (await fetch(url + path, { headers: rights })).arrayBuffer();
    report(`${path} isn't passed on`, upstream.seen.length === 0);
  }
  await (await fetch(`${url}/images/nothing?v=1`, { headers: rights })).arrayBuffer();
  const { headers } = upstream.seen[0];
  const apart = !headers.cookie && !headers.authorization && `http://${headers.host}` === upstream.url;
  report("a read has neither cookie nor token, and the server's own Host", apart, { headers });

  await Promise.all(ids.map(remove));
  const page = await newPage();
  await page.goto(url);
  await page.waitForFunction(() => document.querySelectorAll("figure").length === 3);
  const rooms = () => page.evaluate(() => [...document.querySelectorAll("figure")].map((it) => it.getBoundingClientRect().height));
  const reserved = await rooms();
  report("room is reserved before there is an image", reserved.every((height) => height > 300), { reserved });

  await store();
  const wanted = await versions();
  const first = await complete(page, wanted);
  report("each image appears when it is stored", true);
  // One of the permitted widths, enough for the room and under twice of it, in a format made for pages.
  const fits = ({ src, natural, css }) => natural >= css && natural < 2 * css && /[?&]w=\d+/.test(src);
  report("the right variant is chosen", first.every(fits), { first });
  report("the room stays as it was", String(await rooms()) === String(reserved), { rooms: await rooms() });

  await page.evaluate(() => (window.sameDocument = true));
  await store(ids[1]);
  const replaced = { ...wanted, [ids[1]]: await version(ids[1]) };
  await complete(page, replaced);
  const live = replaced[ids[1]] !== wanted[ids[1]] && (await page.evaluate(() => window.sameDocument));
  report("a replaced image is shown without a reload", live);
  const { cls } = await vitals(page);
  report("nothing shifts", cls === 0, { cls });
  await page.context().close();
  await server.close();
  upstream.server.closeAllConnections();
  upstream.server.close();

  const file = join(repository, "docs/frontend.md");
  await docs({ file, root, vite, newPage, origin, version: replaced[ids[0]], report });
}

/** Compresses scripts, as a host in production does and `vite preview` doesn't. */
const compressed = {
  name: "compressed",
  configurePreviewServer({ middlewares }) {
    middlewares.use("/assets", ({ url }, answer, next) => {
      if (!url.endsWith(".js")) return next();
      answer.writeHead(200, { "content-type": "text/javascript", "content-encoding": "gzip" });
      answer.end(gzipSync(readFileSync(join(root, "dist/assets", url))));
    });
  },
};

/** Builds the example and serves it as `npm run preview` does. */
async function preview() {
  process.env.AFTERIMAGE_URL = origin;
  await vite.build({ root, logLevel: "error" });
  const settings = { root, logLevel: "error", plugins: [compressed], preview: { host: "127.0.0.1", port: 0 } };
  const server = await vite.preview(settings);
  return { server, url: `http://127.0.0.1:${server.httpServer.address().port}` };
}

async function measure() {
  const { server, url } = await preview();
  await store();
  const wanted = await versions();
  const images = ids.map((id) => `<figure><img src="/images/${id}?v=${wanted[id]}" width="384" height="384"></figure>`);
  writeFileSync(join(root, "dist/plain.html"), `<!doctype html><html lang="en"><title>Plain</title>${images.join("")}</html>`);
  const lcp = {};
  for (const [name, path] of [["example", "/"], ["plain", "/plain.html"]]) {
    for (const width of [1280, 360]) {
      const page = await newPage({ width, height: 800 });
      const devtools = await page.context().newCDPSession(page);
      await devtools.send("Network.enable");
      const network = { offline: false, latency: 0, downloadThroughput: throughput, uploadThroughput: throughput };
      await devtools.send("Network.emulateNetworkConditions", network);
      page.setDefaultTimeout(120_000);
      const started = performance.now();
      await page.goto(url + path, { waitUntil: "commit" });
      const shown = width === 1280 ? wanted : { [ids[0]]: wanted[ids[0]] };
      await complete(page, shown);
      const whole = Math.round(performance.now() - started);
      await page.waitForFunction(() => vitals.element?.startsWith("<img"));
      const { lcp: largest, cls, tbt, element } = await vitals(page);
      lcp[`${name} ${width}`] = largest;
      report(`${name}, ${width} px wide, 200 KiB/s`, name === "plain" || cls === 0, {
        lcp_ms: Math.round(largest), cls, tbt_ms: Math.round(tbt), complete_ms: whole, element,
      });
      await page.context().close();
    }
  }
  for (const width of [1280, 360]) {
    const times = lcp[`plain ${width}`] / lcp[`example ${width}`];
    report(`the largest paint is ten times sooner, ${width} px wide`, times >= 10, { times: Number(times.toFixed(1)) });
  }
  await server.close();
}

async function screenshots() {
  const { server, url } = await preview();
  mkdirSync(saved, { recursive: true });
  for (const width of [1280, 360]) {
    const save = (page, name) => page.screenshot({ path: join(saved, `vite-${name}-${width}.png`), fullPage: true });
    await Promise.all(ids.map(remove));
    const page = await newPage({ width, height: 800 });
    await page.goto(url);
    await page.waitForFunction(() => document.querySelectorAll("figure").length === 3);
    await save(page, "1-waiting");
    // Variants wait until the pictures in the events have been looked at.
    let release;
    const looked = new Promise((done) => (release = done));
    await page.route(/\/images\/[^/]*w=/, async (route) => {
      await looked;
      await route.continue();
    });
    await store();
    const wanted = await versions();
    await page.waitForFunction((wanted) => Object.values(wanted).every((v) => document.body.innerText.includes(v.slice(0, 6))), wanted);
    await save(page, "2-preview");
    release();
    await page.evaluate(() => document.querySelectorAll("figure").forEach((it) => it.scrollIntoView()));
    await complete(page, wanted);
    await page.evaluate(() => scrollTo(0, 0));
    await save(page, "3-complete");
    await page.context().close();
  }
  await server.close();
}

const root = example();
const browser = await chromium.launch({
  executablePath,
  headless: true,
  args,
});
try {
  await { throttled: measure, screenshots, undefined: checks }[mode]();
} catch (error) {
  report(`the script runs to its end`, false, { error: String(error) });
}
await browser.close();
// Vite's connections may outlive it.
process.exit();
