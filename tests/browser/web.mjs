// Uses clients/web in a real Chromium: in many tabs, through a proxy that fails, and while images change. Started by
// tests/it/web.rs:
//
//   node web.mjs FOLDER CHROMIUM SERVER TOKEN [SCREENSHOTS]
//
// FOLDER is the folder with playwright-core, vite, react and react-dom, SERVER the origin of an Afterimage without other streams, and TOKEN
// one that may write to it. Prints a line of JSON for each check: {"check": name, "ok": true}, or false with an `error`.
import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer, request } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { crc32, deflateSync } from "node:zlib";
import { args } from "./chromium.mjs";

const [folder, executablePath, server, token, screenshots] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const require = createRequire(join(resolve(folder), "package.json"));
const { chromium } = require("playwright-core");
const sources = new URL("../../clients/web/src/", import.meta.url);

/** Longest wait for anything, in milliseconds. */
const patience = 20_000;

/** A PNG in one colour. */
function png(width, height, [red, green, blue]) {
  const chunk = (name, data) => {
    const body = Buffer.concat([Buffer.from(name), data]);
    const [length, check] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(data.length);
    check.writeUInt32BE(crc32(body));
    return Buffer.concat([length, body, check]);
  };
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 2, 0, 0, 0], 8);
  const row = Buffer.concat([Buffer.from([0]), Buffer.alloc(width * 3, Buffer.from([red, green, blue]))]);
  const pixels = deflateSync(Buffer.concat(Array(height).fill(row)));
  const signature = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);
  return Buffer.concat([signature, chunk("IHDR", header), chunk("IDAT", pixels), chunk("IEND", Buffer.alloc(0))]);
}

const colours = { red: [220, 0, 0], green: [0, 160, 0], blue: [0, 0, 220], grey: [90, 90, 90], yellow: [230, 200, 0] };
const authorization = `Bearer ${token}`;

/** Stores an image, and returns its version. */
async function put(id, colour = "red", width = 500, height = 375) {
  const body = png(width, height, colours[colour] ?? colour);
  const answer = await fetch(`${server}/images/${id}`, { method: "PUT", headers: { authorization }, body });
  if (!answer.ok) throw new Error(`PUT ${id}: ${answer.status} ${await answer.text()}`);
  return answer.headers.get("etag").replaceAll('"', "");
}

const remove = (id) => fetch(`${server}/images/${id}`, { method: "DELETE", headers: { authorization } });

/** Streams that are open at the server. */
async function streams() {
  const metrics = await (await fetch(`${server}/metrics`)).text();
  return Number(/^afterimage_event_streams (\d+)/m.exec(metrics)[1]);
}

/** Polls until the result of `ask` passes `check`, and returns it. */
async function until(what, ask, check = Boolean) {
  const end = Date.now() + patience;
  for (;;) {
    const result = await ask();
    if (check(result)) return result;
    if (Date.now() > end) throw new Error(`waited in vain until ${what}: ${JSON.stringify(result)}`);
    await new Promise((done) => setTimeout(done, 25));
  }
}

function assert(holds, what, ...shown) {
  if (!holds) throw new Error(`${what} ${shown.map((it) => JSON.stringify(it)).join(" ")}`);
}

/** The site: pages, the package, and a proxy to the server, over HTTP/1.1. */
const proxy = { status: 200, fails: /^$/, streams: 0, refused: 0, open: new Set() };
const pages = new Map();
const site = createServer(async (incoming, answer) => {
  const { pathname } = new URL(incoming.url, "http://site");
  if (/^\/(images|placeholders|events)\b/.test(pathname)) {
    const isStream = pathname === "/events";
    if (proxy.status !== 200 || proxy.fails.test(incoming.url)) {
      if (isStream) proxy.refused++;
      return answer.writeHead(proxy.status === 200 ? 503 : proxy.status).end();
    }
    if (isStream) proxy.streams++;
    const outgoing = request(server + incoming.url, { method: incoming.method, headers: incoming.headers }, (got) => {
      answer.writeHead(got.statusCode, got.headers);
      answer.flushHeaders();
      got.pipe(answer);
      got.on("error", () => answer.destroy());
    });
    outgoing.on("error", () => answer.destroy());
    if (isStream) proxy.open.add(answer);
    answer.on("close", () => {
      proxy.open.delete(answer);
      outgoing.destroy();
    });
    outgoing.end();
    return;
  }
  const script = pathname.startsWith("/web/") && (await readFile(new URL(pathname.slice(5), sources)));
  const body = script || pages.get(pathname);
  const headers = { "content-type": /\.js$/.test(pathname) ? "text/javascript" : "text/html;charset=utf-8" };
  // Not `no-store`: that would keep pages out of the back-forward cache.
  answer.writeHead(body ? 200 : 404, headers).end(body || "");
});
await new Promise((done) => site.listen(0, "127.0.0.1", done));
const origin = `http://127.0.0.1:${site.address().port}`;

/** Makes the proxy answer with this status, and cuts the streams. */
function fail(status) {
  proxy.status = status;
  for (const answer of proxy.open) answer.destroy();
}

/** Test page that follows `ids` and keeps all calls in `calls`. */
pages.set(
  "/follow",
  `<!doctype html><link rel=icon href=data:,><title>follow</title><script type=module>
  import { follow } from "/web/index.js";
  window.calls = [];
  window.following = follow(new URLSearchParams(location.search).get("ids").split(","), (state) => calls.push(state));
  </script>`,
);
pages.set("/empty", "<!doctype html><link rel=icon href=data:,><title>empty</title>");

// Started here and not by Playwright, which would tell every page that it is visible, and turn the back-forward cache off.
const userData = await mkdtemp(join(tmpdir(), "web-"));
const chromiumProcess = spawn(
  // It ends with this process, even if that is killed.
  "setpriv",
  [
    "--pdeathsig=KILL",
    executablePath,
    "--headless",
    ...args,
    "--remote-debugging-port=0",
    `--user-data-dir=${userData}`,
  ],
  { stdio: ["ignore", "ignore", "pipe"] },
);
const ended = new Promise((done) => chromiumProcess.on("exit", done));
const devtools = await new Promise((found, failed) => {
  let log = "";
  chromiumProcess.stderr.on("data", (data) => {
    log += data;
    const address = /^DevTools listening on (\S+)$/m.exec(log);
    if (address) found(address[1]);
  });
  chromiumProcess.on("error", failed);
  ended.then(() => failed(new Error(`Chromium ended: ${log}`)));
});
const browser = await chromium.connectOverCDP(devtools, { noDefaults: true, timeout: 60_000 });

/** Prepares a profile for the tests. */
async function prepared(context) {
  context.setDefaultTimeout(patience);
  const errors = [];
  context.on("weberror", (error) => errors.push(String(error.error())));
  await context.addInitScript(() => {
    window.sources = [];
    window.EventSource = class extends EventSource {
      constructor(...them) {
        super(...them);
        window.sources.push(this);
      }
    };
  });
  return Object.assign(context, {
    errors,
    async tab(path) {
      const page = await context.newPage();
      await page.goto(origin + path);
      return page;
    },
  });
}

/** A new profile, whose tabs are all visible to themselves. */
const profile = async (options) => prepared(await browser.newContext({ viewport: { width: 1000, height: 700 }, ...options }));

/** Last state of an image that the page's callback got. */
const last = (page, id) => page.evaluate((id) => window.calls?.filter((it) => it.id === id).at(-1), id);

/** Waits until each page was called with this version, or with an absent image. */
const seen = (pages, id, v) =>
  Promise.all(pages.map((page) => until(`${id} is ${v}`, () => last(page, id), (it) => it && (v ? it.v === v : it.state === "absent"))));

/** True for the page that has the stream. */
const leads = (page) => page.evaluate(() => window.sources.some((it) => it.readyState !== EventSource.CLOSED));

/** Versions of an image in the order of the calls. */
const versions = (page, id) => page.evaluate((id) => window.calls.filter((it) => it.id === id).map((it) => it.v ?? null), id);

/** Versions come in the order in which they were written, each once; the newest is the last. */
function inOrder(got, written) {
  let at = -1;
  for (const v of got) {
    const next = written.indexOf(v, at + 1);
    if (next < 0) return false;
    at = next;
  }
  return got.at(-1) === written.at(-1);
}

const checks = [];
const check = (name, run) => checks.push([name, run]);

check("twelve tabs share one stream, and each sees each change once and in order", async () => {
  const context = await profile();
  const written = [await put("shared")];
  const tabs = [];
  for (let index = 0; index < 12; index++) tabs.push(await context.tab(`/follow?ids=shared,own${index}`));
  await seen(tabs, "shared", written[0]);
  for (const [index, tab] of tabs.entries()) await seen([tab], `own${index}`, null);
  const [state] = await Promise.all([last(tabs[3], "shared")]);
  assert(state.url === `/images/shared?v=${written[0]}`, "the address is versioned", state);
  assert(state.thumbnail.startsWith("data:image/webp"), "there is a thumbnail", state);
  await until("one stream is open", streams, (it) => it === 1);
  // As fast as the server takes them: some may be skipped.
  for (let index = 0; index < 8; index++) written.push(await put("shared", [index * 20, 9, 9]));
  await seen(tabs, "shared", written.at(-1));
  for (const tab of tabs) assert(inOrder(await versions(tab, "shared"), written), "in order", await versions(tab, "shared"), written);

  // A later tab, for images that are followed already, needs no request for a stream.
  const before = proxy.streams;
  const late = await context.tab("/follow?ids=shared,own3");
  await seen([late], "shared", written.at(-1));
  await seen([late], "own3", null);
  assert(proxy.streams === before && (await streams()) === 1, "no stream was opened", proxy.streams - before, await streams());
  tabs.push(late);

  // Images of one tab only.
  const v = await put("own7", "blue");
  await seen([tabs[7]], "own7", v);
  assert((await versions(tabs[6], "own7")).length === 0, "others aren't called");

  for (const round of [1, 2]) {
    const leading = await Promise.all(tabs.map(leads));
    assert(leading.filter(Boolean).length === 1, "one tab leads", leading);
    const [leader] = tabs.splice(leading.indexOf(true), 1);
    const closed = leader.close();
    written.push(await put("shared", [5, round, 250]));
    await closed;
    written.push(await put("shared", [9, round, 200]));
    await seen(tabs, "shared", written.at(-1));
  }
  for (const tab of tabs) assert(inOrder(await versions(tab, "shared"), written), "in order after the leader's end", await versions(tab, "shared"), written);
  await until("one stream is open", streams, (it) => it === 1);

  // After a 502 the browser's EventSource has given up.
  fail(502);
  await until("no stream is open", streams, (it) => it === 0);
  written.push(await put("shared", "grey"));
  // The first 502 is the browser's attempt, the second the package's.
  await until("two attempts got a 502", () => proxy.refused, (it) => it >= 2);
  proxy.status = 200;
  await seen(tabs, "shared", written.at(-1));
  await until("one stream is open", streams, (it) => it === 1);

  // Nobody follows any longer.
  for (const tab of tabs) await tab.evaluate(() => following.close());
  await until("no stream is open", streams, (it) => it === 0);
  written.push(await put("shared", "red"));
  const first = tabs[0];
  await first.evaluate(async () => {
    const { follow } = await import("/web/index.js");
    window.calls = [];
    follow("shared", (state) => calls.push(state));
  });
  await seen([first], "shared", written.at(-1));
  assert(!context.errors.length, "no error", context.errors);
  await context.close();
  await until("no stream is open", streams, (it) => it === 0);
});

check("the stream is closed while all tabs are hidden, and they catch up", async () => {
  // In the profile that Chromium began with, one tab of the window is visible.
  const context = await prepared(browser.contexts()[0]);
  const elsewhere = await context.tab("/empty");
  const written = [await put("seen", "red")];
  const tabs = [await context.tab("/follow?ids=seen"), await context.tab("/follow?ids=seen,other")];
  const visible = () => Promise.all(tabs.map((tab) => tab.evaluate(() => !document.hidden)));
  for (const [index, tab] of tabs.entries()) {
    await tab.bringToFront();
    await until("one tab is visible", visible, (it) => it.filter(Boolean).length === 1 && it[index]);
    // Both, whichever of them is visible.
    written.push(await put("seen", [index, 0, 250]));
    await seen(tabs, "seen", written.at(-1));
    await until("one stream is open", streams, (it) => it === 1);
    assert((await leads(tab)) && !(await leads(tabs[1 - index])), "the visible tab leads");
  }
  await seen([tabs[1]], "other", null);
  await elsewhere.bringToFront();
  await until("no tab is visible", visible, (it) => !it.includes(true));
  await until("no stream is open", streams, (it) => it === 0);
  await put("seen", "grey");
  written.push(await put("seen", "green"));
  await tabs[0].bringToFront();
  await seen(tabs, "seen", written.at(-1));
  await until("one stream is open", streams, (it) => it === 1);
  for (const tab of tabs) assert(inOrder(await versions(tab, "seen"), written), "in order", await versions(tab, "seen"), written);
  for (const tab of [...tabs, elsewhere]) await tab.close();
  await until("no stream is open", streams, (it) => it === 0);
});

check("a page in the back-forward cache holds no stream, and catches up when it comes back", async () => {
  const context = await profile();
  const written = [await put("back", "red")];
  const tab = await context.tab("/follow?ids=back");
  await seen([tab], "back", written[0]);
  await tab.evaluate(() => addEventListener("pageshow", (event) => (window.persisted = event.persisted)));
  await tab.goto(`${origin}/empty`);
  await until("no stream is open", streams, (it) => it === 0);
  written.push(await put("back", "blue"));
  // A page from the cache isn't loaded again.
  await tab.goBack({ waitUntil: "commit" });
  await seen([tab], "back", written.at(-1));
  assert(await tab.evaluate(() => window.persisted), "the page came from the cache");
  assert(inOrder(await versions(tab, "back"), written), "in order", await versions(tab, "back"), written);
  await context.close();
});

check("without Web Locks each tab has a stream", async () => {
  const context = await profile();
  await context.addInitScript(() => Object.defineProperty(navigator, "locks", { value: undefined }));
  await put("alone", "red");
  const tabs = [await context.tab("/follow?ids=alone"), await context.tab("/follow?ids=alone")];
  await until("two streams are open", streams, (it) => it === 2);
  await seen(tabs, "alone", await put("alone", "blue"));
  await context.close();
});

check("more ids than a stream takes are followed by several", async () => {
  const context = await profile();
  const ids = Array.from({ length: 150 }, (_, index) => `m${index}`);
  const v = await put("m149");
  const tab = await context.tab("/empty");
  await tab.evaluate(async (ids) => {
    const { follow } = await import("/web/index.js");
    window.calls = [];
    follow(ids, (state) => calls.push(state));
  }, ids);
  await until("each id has a state", () => tab.evaluate(() => new Set(calls.map((it) => it.id)).size), (it) => it === 150);
  await seen([tab], "m149", v);
  assert((await streams()) === 2, "two streams are open", await streams());
  await context.close();
});

/** Colour in the middle of an image, as it is drawn. */
const middle = (page, selector = "img") =>
  page.evaluate(async (selector) => {
    const img = document.querySelector(selector);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const drawing = canvas.getContext("2d");
    drawing.drawImage(img, img.naturalWidth / 2, img.naturalHeight / 2, 1, 1, 0, 0, 1, 1);
    return [...drawing.getImageData(0, 0, 1, 1).data].slice(0, 3);
  }, selector);

const near = (colour) => (got) => colours[colour].every((it, index) => Math.abs(it - got[index]) < 12);

/** Watches a page for layout shifts, and for frames in which the image is blank. */
const watch = (page) =>
  page.evaluate(() => {
    window.shift = 0;
    window.blank = 0;
    window.frames = 0;
    new PerformanceObserver((list) => list.getEntries().forEach((it) => (window.shift += it.value))).observe({ type: "layout-shift", buffered: true });
    const look = () => {
      const img = document.querySelector("img");
      window.frames++;
      if (window.isShown && !(img.complete && img.naturalWidth)) window.blank++;
      requestAnimationFrame(look);
    };
    look();
  });

const stateOf = (page, selector = "after-image") => page.evaluate((selector) => document.querySelector(selector).dataset.state, selector);
const currentSrc = (page) => page.evaluate(() => document.querySelector("img").currentSrc);

/** What an element does from nothing to a removed image, the same for React. */
async function live(tab, id, selector) {
  await watch(tab);
  await until("it waits", () => stateOf(tab, selector), (it) => it === "waiting");
  const room = await tab.evaluate((selector) => document.querySelector(selector).getBoundingClientRect().toJSON(), selector);
  assert(room.width === 400 && room.height === 300, "room is reserved", room);
  const first = await put(id, "red");
  await until("it is shown", () => stateOf(tab, selector), (it) => it === "shown");
  assert(near("red")(await middle(tab)), "it is red", await middle(tab));
  const address = await currentSrc(tab);
  assert(address.includes("w=640&") && address.endsWith(`v=${first}`), "the variant for 400 pixels", address);
  await until("the preview is gone", () => tab.evaluate((selector) => document.querySelector(selector).style.backgroundImage, selector), (it) => !it);
  if (screenshots) await writeFile(join(screenshots, `${id}.png`), await tab.screenshot());

  await tab.evaluate(() => (window.isShown = true));
  for (const colour of ["blue", "green"]) {
    const v = await put(id, colour);
    await until("it is replaced", () => currentSrc(tab), (it) => it.endsWith(`v=${v}`));
    await until(`it is ${colour}`, () => middle(tab), near(colour));
  }
  await tab.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  const { shift, blank, frames } = await tab.evaluate(() => ({ shift, blank, frames }));
  assert(shift === 0 && blank === 0 && frames > 2, "no shift and no flash", { shift, blank, frames });

  await tab.evaluate(() => (window.isShown = false));
  await remove(id);
  await until("it waits again", () => stateOf(tab, selector), (it) => it === "waiting");
  await put(id, "grey");
  await until("it is shown again", () => stateOf(tab, selector), (it) => it === "shown");
  await until("it is grey", () => middle(tab), near("grey"));

  // The image can't be had, and comes back by itself.
  proxy.fails = new RegExp(`^/images/${id}\\b`);
  // Of a version that the browser hasn't seen.
  await put(id, "yellow");
  await until("it has failed", () => stateOf(tab, selector), (it) => it === "failed");
  await until("a placeholder is there", () => currentSrc(tab), (it) => /\/placeholders\/640x384$/.test(it));
  await until("the placeholder is drawn", () => tab.evaluate(() => document.querySelector("img").naturalWidth), (it) => it === 640);
  proxy.fails = /^$/;
  await until("it is shown again", () => stateOf(tab, selector), (it) => it === "shown");
  await until("it is yellow", () => middle(tab), near("yellow"));
}

const elementPage = (body) => `<!doctype html><link rel=icon href=data:,><title>element</title><style>after-image, after-image > img { display: block }</style><body style="margin:0">
  <script type=module>import "/web/element.js"; import { thumbhashUrl } from "/web/index.js"; window.thumbhashUrl = thumbhashUrl;</script>${body}`;

check("an element waits, shows its image, replaces it without a shift or a flash, and survives errors", async () => {
  pages.set("/element", elementPage(`<after-image src-id="element" alt="a colour"><img width=400 height=300></after-image><p>below</p>`));
  const context = await profile();
  const tab = await context.tab("/element");
  await live(tab, "element", "after-image");
  assert(!context.errors.length, "no error", context.errors);

  const reflected = await tab.evaluate(() => {
    const element = document.createElement("after-image");
    Object.assign(element, { srcId: "element", alt: "made by a script", widths: "256,384", keep: true, loading: "eager", fetchpriority: "high", aspectRatio: "2 / 1" });
    element.addEventListener("statechange", ({ detail }) => (window.changed = detail));
    document.body.append(element);
    return element.outerHTML;
  });
  assert(/^<after-image src-id="element" alt="made by a script" widths="256,384" keep="" loading="eager" fetchpriority="high" aspect-ratio="2 \/ 1"/.test(reflected), "properties are reflected", reflected);
  await until("it is shown", () => stateOf(tab, "after-image:last-of-type"), (it) => it === "shown");
  const made = await tab.evaluate(() => {
    const [, element] = document.querySelectorAll("after-image");
    const { alt, loading, fetchPriority, srcset } = element.firstChild;
    const { width, height } = element.getBoundingClientRect();
    return { alt, loading, fetchPriority, candidates: srcset.split(",").length, ratio: width / height, changed: window.changed };
  });
  assert(made.alt === "made by a script" && made.loading === "eager" && made.fetchPriority === "high", "attributes are passed on", made);
  assert(made.candidates === 2 && made.ratio === 2 && made.changed.state === "present", "widths, ratio and event", made);

  // Another image in the same element; a removed one stays with `keep`.
  const v = await put("element2", "blue", 300, 300);
  await tab.evaluate(() => (document.querySelectorAll("after-image")[1].srcId = "element2"));
  await until("it shows the other", () => tab.evaluate(() => document.querySelectorAll("img")[1].currentSrc), (it) => it.endsWith(v));
  await until("it is shown", () => stateOf(tab, "after-image:last-of-type"), (it) => it === "shown");
  // Nothing wider than the image.
  const candidates = await tab.evaluate(() => document.querySelectorAll("img")[1].srcset);
  assert(/ 384w$/.test(candidates), "the candidates", candidates);
  await remove("element2");
  await until("it is gone", () => tab.evaluate(() => window.changed), (it) => it.state === "absent");
  assert((await stateOf(tab, "after-image:last-of-type")) === "shown", "it is kept");
  await context.close();
});

check("a preview from a ThumbHash looks like the image", async () => {
  await put("hash", "green", 320, 200);
  const { thumbhash } = await (await fetch(`${server}/images/hash/info`)).json();
  pages.set("/hash", elementPage(`<after-image src-id="nothing" alt="" thumbhash="${thumbhash}" width=320 height=200></after-image>`));
  const context = await profile({ reducedMotion: "reduce" });
  const tab = await context.tab("/hash");
  const preview = await until("there is a preview", () => tab.evaluate(() => document.querySelector("after-image").style.backgroundImage), (it) => it?.startsWith('url("data:image/png'));
  const got = await tab.evaluate(async (url) => {
    const img = document.body.appendChild(new Image());
    img.id = "preview";
    img.src = url;
    await img.decode();
    return [img.naturalWidth, img.naturalHeight];
  }, preview.slice(5, -2));
  assert(got[0] === 32 && got[1] < 24 && got[1] > 16, "its ratio", got);
  assert(near("green")(await middle(tab, "#preview")), "it is green", await middle(tab, "#preview"));
  const transition = await tab.evaluate(() => getComputedStyle(document.querySelector("after-image img")).transitionDuration);
  assert(transition === "0s", "nothing moves", transition);
  await context.close();
});

/** Bundles a script with React's development build, which StrictMode needs. */
async function bundle(code) {
  const { rolldown } = await import(pathToFileURL(require.resolve("rolldown")));
  const made = await rolldown({
    input: "page",
    platform: "browser",
    transform: { define: { "process.env.NODE_ENV": '"development"' } },
    resolve: { modules: [join(resolve(folder), "node_modules")] },
    // "use client" is for servers.
    onLog: (level, log, handle) => log.code === "MODULE_LEVEL_DIRECTIVE" || handle(level, log),
    plugins: [{
      name: "page",
      resolveId: (id) => (id === "page" ? "\0page" : id.startsWith("/web/") ? new URL(id.slice(5), sources).pathname : null),
      load: (id) => (id === "\0page" ? code : null),
    }],
  });
  return (await made.generate({ format: "esm" })).output[0].code;
}

check("a React component under StrictMode does the same, after a server's render", async () => {
  pages.set(
    "/react.js",
    await bundle(`
      import { StrictMode, createElement } from "react";
      import { createRoot, hydrateRoot } from "react-dom/client";
      import { renderToString } from "react-dom/server";
      import { AfterImage, useImage } from "/web/react.js";
      const complaints = (window.complaints = []);
      console.error = (...them) => complaints.push(them.join(" "));
      function State({ id }) {
        const state = useImage(id);
        (window.states ??= []).push(state);
        return createElement("output", null, state?.state ?? "unknown");
      }
      const page = (props) => createElement(StrictMode, null,
        createElement(AfterImage, { id: "react", alt: "a colour", width: 400, height: 300, ref: (it) => (window.img = it), ...props }),
        createElement(State, { id: "react" }));
      const box = document.getElementById("root");
      const v = new URLSearchParams(location.search).get("v");
      if (v) {
        box.innerHTML = renderToString(page({ v }));
        window.rendered = box.innerHTML;
        window.root = hydrateRoot(box, page({ v }));
      } else {
        window.root = createRoot(box);
        root.render(page());
      }
      window.show = (props) => root.render(page(props));
    `),
  );
  pages.set("/react", `<!doctype html><link rel=icon href=data:,><title>react</title><body style="margin:0"><div id=root></div><script type=module src=/react.js></script>`);
  const context = await profile();
  const tab = await context.tab("/react");
  await live(tab, "react", "img");
  const output = () => tab.evaluate(() => document.querySelector("output").textContent);
  await until("the hook knows it", output, (it) => it === "present");
  await remove("react");
  await until("the hook knows that it is gone", output, (it) => it === "absent");
  assert(await tab.evaluate(() => window.img === document.querySelector("img")), "ref is the img");
  assert((await streams()) === 1, "one stream is open");
  // Another id, then none.
  const v = await put("react2", "blue");
  await tab.evaluate(() => window.show({ id: "react2" }));
  await until("it shows the other", () => currentSrc(tab), (it) => it.endsWith(v));
  await tab.evaluate(() => window.root.unmount());
  await until("no stream is open", streams, (it) => it === 0);
  assert(!(await tab.evaluate(() => window.complaints)).length, "no complaint", await tab.evaluate(() => window.complaints));

  const known = await put("react", "green");
  const rendered = await context.tab(`/react?v=${known}`);
  const html = await until("it is rendered", () => rendered.evaluate(() => window.rendered));
  assert(html.includes(`srcset="/images/react?w=256&amp;format=auto&amp;v=${known} 256w`), "the server's render has the version", html);
  await until("it is shown", () => stateOf(rendered, "img"), (it) => it === "shown");
  const next = await put("react", "blue");
  await until("it is replaced", () => currentSrc(rendered), (it) => it.endsWith(next));
  assert(!(await rendered.evaluate(() => window.complaints)).length, "no complaint", await rendered.evaluate(() => window.complaints));
  await context.close();
});

for (const [check, run] of checks) {
  const begun = Date.now();
  try {
    await run();
    console.log(JSON.stringify({ check, ok: true, ms: Date.now() - begun }));
  } catch (error) {
    console.log(JSON.stringify({ check, ok: false, error: error.stack, ms: Date.now() - begun }));
    for (const context of browser.contexts().slice(1)) await context.close();
    Object.assign(proxy, { status: 200, fails: /^$/ });
  }
}
chromiumProcess.kill("SIGKILL");
await ended;
// Its other processes end a little later, and write until then.
await rm(userData, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
process.exit(0);
