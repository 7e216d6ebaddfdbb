// Performs actions in a real Chromium, and reports images and requests. Started by tests/it/browser.rs:
//
//   node images.mjs FOLDER CHROMIUM PROFILE
//
// FOLDER is the folder with playwright-core, CHROMIUM the program, PROFILE a folder for the user data and the browser's
// disk cache. Each line of standard input is an action, {"open": "http://…"}; its result is a line of JSON on standard
// output. The end of standard input closes the browser.
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { args } from "./chromium.mjs";

const [folder, executablePath, profile] = process.argv.slice(2);
// `import` ignores NODE_PATH.
const { chromium } = createRequire(join(resolve(folder), "package.json"))("playwright-core");

/** Longest duration of anything, in milliseconds. The test around this script gives up later. */
const patience = 60_000;

// No interception (page.route): it would turn the browser's cache off.
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  timeout: patience,
  viewport: { width: 800, height: 200 },
  args,
});
browser.setDefaultTimeout(patience);

/** The current tab, and its DevTools session. */
let tab, session;

/** The requests for images in the tab since `requests` was last emptied, by DevTools' id. */
const requests = new Map();

async function newTab() {
  const old = tab;
  tab = await browser.newPage();
  session = await browser.newCDPSession(tab);
  const request = (id) => {
    if (!requests.has(id)) requests.set(id, { wire: null, conditional: false, cache: null });
    return requests.get(id);
  };
  session.on("Network.requestWillBeSent", (event) => {
    request(event.requestId).address = event.request.url;
  });
  session.on("Network.requestServedFromCache", (event) => {
    request(event.requestId).cache = "memory";
  });
  session.on("Network.responseReceived", (event) => {
    const { fromDiskCache } = event.response;
    const it = request(event.requestId);
    it.answered = true;
    if (fromDiskCache) it.cache ??= "disk";
    // From the memory cache comes the event of the first load: no extra event follows, whatever this one says.
    it.more = event.hasExtraInfo && it.cache !== "memory";
  });
  session.on("Network.loadingFailed", (event) => {
    Object.assign(request(event.requestId), { answered: true, failed: event.errorText });
  });
  // The events above show what the renderer got: 200 even for a 304. These show the response on the wire.
  session.on("Network.requestWillBeSentExtraInfo", (event) => {
    const names = Object.keys(event.headers).map((name) => name.toLowerCase());
    request(event.requestId).conditional = names.includes("if-none-match");
  });
  session.on("Network.responseReceivedExtraInfo", (event) => {
    request(event.requestId).wire = event.statusCode;
  });
  await session.send("Network.enable");
  await old?.close();
}

/** Loads a page, and returns its images and their requests once they are drawn and complete. */
async function load(how) {
  requests.clear();
  await how();
  const images = await tab.evaluate(() =>
    Promise.all(
      [...document.images].map(async (image) => {
        await image.decode().catch(() => {});
        return { address: image.currentSrc, width: image.naturalWidth, height: image.naturalHeight };
      }),
    ),
  );
  const about = () => [...requests.values()].filter((it) => it.address?.includes("/images/"));
  await until(() => about().every((it) => it.answered && (!it.more || it.wire !== null)));
  return { images, requests: about() };
}

async function until(ready) {
  const end = Date.now() + patience;
  while (!ready()) {
    if (Date.now() > end) throw new Error(`waited in vain for ${ready}: ${JSON.stringify([...requests.values()])}`);
    await new Promise((done) => setTimeout(done, 5));
  }
}

const actions = {
  /** Opens a page in a new tab. */
  async open(url) {
    await newTab();
    return load(() => tab.goto(url));
  },
  reload: () => load(() => tab.reload()),
  /** Reloads past the cache, as Ctrl+Shift+R does. */
  reload_past_cache: () =>
    load(async () => {
      const loaded = tab.waitForEvent("load");
      await session.send("Page.reload", { ignoreCache: true });
      await loaded;
    }),
  async leave_and_come_back() {
    await tab.goto("data:text/html,elsewhere");
    return load(() => tab.goBack());
  },
  /** Result of `fetch` in a script of the page. */
  fetch: ([url, headers]) =>
    tab.evaluate(
      async ([url, headers]) => {
        try {
          const answer = await fetch(url, { headers });
          const length = (await answer.arrayBuffer()).byteLength;
          return { status: answer.status, length, headers: Object.fromEntries(answer.headers) };
        } catch (error) {
          return { error: String(error) };
        }
      },
      [url, headers],
    ),
  /** Resource timings of the images, as a script in the page sees them. */
  timings: () =>
    tab.evaluate(() =>
      performance
        .getEntriesByType("resource")
        .filter((it) => it.initiatorType === "img")
        .map((it) => ({
          ...it.toJSON(),
          serverTiming: it.serverTiming.map(({ name, duration }) => ({ name, duration })),
        })),
    ),
  screenshot: (path) => tab.screenshot({ path }),
};

for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    const [[action, argument]] = Object.entries(JSON.parse(line));
    answer = (await actions[action](argument)) ?? null;
    if (action === "screenshot") answer = null;
  } catch (error) {
    answer = { failed: String(error) };
  }
  console.log(JSON.stringify(answer));
}
// A browser that doesn't close must not block the test: it ends with this process.
setTimeout(() => process.exit(1), 10_000).unref();
await browser.close();
