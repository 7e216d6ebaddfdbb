// Does in a real Chromium what it is told, and says what it saw. Started by tests/it/browser.rs:
//
//   node images.mjs FOLDER CHROMIUM PROFILE
//
// FOLDER is where playwright-core is installed, CHROMIUM the program, PROFILE a folder for the user data, which
// has the browser's disk cache. Every line of standard input is an action, {"open": "http://…"}; it is answered
// by one line of JSON on standard output. The end of standard input closes the browser.
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, executablePath, profile] = process.argv.slice(2);
// NODE_PATH means nothing to `import`.
const { chromium } = createRequire(join(resolve(folder), "package.json"))("playwright-core");

/** How long anything may take, in milliseconds. The test around this gives up later. */
const patience = 60_000;

// Nothing may be intercepted here (page.route): it would switch the browser's cache off.
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  timeout: patience,
  viewport: { width: 800, height: 200 },
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
browser.setDefaultTimeout(patience);

/** The tab that the actions are about, and a session of DevTools with it. */
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
    // Out of memory comes the event of the first time: nothing more follows, whatever it says.
    it.more = event.hasExtraInfo && it.cache !== "memory";
  });
  session.on("Network.loadingFailed", (event) => {
    Object.assign(request(event.requestId), { answered: true, failed: event.errorText });
  });
  // The events above tell what the renderer was given: 200 for a 304, too. These tell what was on the wire.
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

/** Loads something, and tells of its images once they are drawn and all is known about their requests. */
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
    if (Date.now() > end) throw new Error(`in vain: ${ready} ${JSON.stringify([...requests.values()])}`);
    await new Promise((done) => setTimeout(done, 5));
  }
}

const actions = {
  /** In a tab of its own. */
  async open(url) {
    await newTab();
    return load(() => tab.goto(url));
  },
  reload: () => load(() => tab.reload()),
  /** As with Ctrl+Shift+R. */
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
  /** What a script in the page gets from `fetch`. */
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
  /** What a script in the page may know of how its images were loaded. */
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
// A browser that doesn't close must not keep the test: it ends with this process.
setTimeout(() => process.exit(1), 10_000).unref();
await browser.close();
