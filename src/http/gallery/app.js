"use strict";
// The gallery. Text from the server is only ever set as text or as a property, never parsed as HTML. The token is sent
// once, to /session, and stored nowhere.

const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((it) => [it.id, it]));
const main = document.querySelector("main");
/** Makes an element: h("b.dim", {title: "…"}, "text", element). */
function h(name, properties, ...children) {
  const [tag, className = ""] = name.split(".");
  const isChild = properties?.constructor !== Object;
  const element = Object.assign(document.createElement(tag), { className }, !isChild && properties);
  element.append(...(isChild ? [properties ?? ""] : []), ...children);
  return element;
}
const press = (text, onclick, more) => h("button", { type: "button", onclick, ...more }, text);
const row = (name, value) => h("tr", h("th", { scope: "row" }, name), h("td", value ?? "–"));
/** Sets a text if it differs: an unchanged one then costs no layout. */
const say = (element, text = "") => element.textContent === text || (element.textContent = text);

// Not `toLocaleString`: its first call takes as long as all the rest of the start.
const grouped = (number) => `${number}`.replace(/\B(?=(\d{3})+$)/g, ",");
const count = (number, word) => `${grouped(number)} ${word}${number === 1 ? "" : "s"}`;
const micros = (it) => (it == null ? "–" : it < 1000 ? `${Math.round(it)} µs` : `${(it / 1000).toFixed(it < 1e4 ? 1 : 0)} ms`);
const percent = (share) => (share == null ? "–" : `${(share * 100).toFixed(1)} %`);
const pixels = (it) => it.width && `${it.width}×${it.height}`;
function size(bytes) {
  let unit = 0;
  for (; bytes >= 1000; unit++) bytes /= 1024;
  return bytes == null ? "" : `${unit && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${["B", "KiB", "MiB", "GiB"][unit]}`;
}
function duration(seconds) {
  const days = Math.floor(seconds / 86400);
  const time = new Date(seconds * 1000).toISOString();
  return days ? `${days} d ${time.slice(11, 13)} h` : time.slice(11, 19).replace(/^00:0?/, "");
}
let clockOffset = 0; // of the server's clock
const now = () => Date.now() + clockOffset;
const expiry = (seconds) => (seconds == null ? null : now() + seconds * 1000);
const left = ({ expires }) => (expires == null ? "no expiry" : expires < now() ? "expired" : duration((expires - now()) / 1000));

const pathOf = (id) => `/images/${encodeURIComponent(id).replaceAll("%3A", ":")}`;
const address = (item, suffix = "", variant) => `${pathOf(item.id)}${suffix}?${new URLSearchParams({ ...variant, v: item.v })}`;

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
/** Work on many items pauses in between, so that the page answers at once. */
let resumed = 0;
async function breathe() {
  if (performance.now() - resumed < 10) return;
  await wait();
  resumed = performance.now();
}
function debounced(milliseconds, action) {
  let timer;
  return () => (clearTimeout(timer), (timer = setTimeout(action, milliseconds)));
}

// Requests and rights

function problem(status, text) {
  try {
    return `${JSON.parse(text).detail} (${status})`;
  } catch {
    return `the server answered ${status}`;
  }
}
/** Fetches. A refusal is thrown; one for want of a token shows the form for it. */
async function ask(path, options) {
  const answer = await fetch(path, { cache: "no-store", ...options });
  if (answer.ok) return answer;
  if (answer.status === 401 && path !== "/session") showLogin();
  throw Object.assign(new Error(problem(answer.status, await answer.text())), { status: answer.status });
}
const askJson = async (path) => (await ask(path)).json();

let locked = false; // without the right to list
function showLogin(text) {
  say(ui.refused, text);
  if (locked) return;
  locked = true;
  source?.close();
  forget();
  ui.token.focus();
}
function logIn(token) {
  ask("/session", { method: "POST", headers: { authorization: `Bearer ${token}` } }).then(() => {
    ui.token.value = "";
    locked = false;
    begin();
  }, (error) => showLogin(`Not logged in: ${error.message}.`));
}
ui.login.onsubmit = () => {
  logIn(ui.token.value.trim());
  return false;
};
ui.logout.onclick = () => fetch("/session", { method: "DELETE" }).finally(() => showLogin());

// Items. All have the same fields, which keeps 100,000 of them small.

const BLANK = { state: "unread", v: null, type: null, bytes: null, record_bytes: null, width: null, height: null, expires: null, created: null, hits: 0, in_memory: false, reason: null };
const newItem = (id) => ({ id, ...BLANK, rank: null, matches: true, moving: false, broken: false, gone: false, listed: 0, touched: 0, stamp: 0 });
const MOST = 250_000; // items that are listed; beyond these a prefix is needed
const items = new Map();
const removed = new Map(); // ids that went while a page of the listing that has them may still come, and when
const changed = new Set(); // items that may be in the wrong place
let sorted = []; // all items
let shown = []; // those that pass the filter

/** Sets what is known of an image. Its pixels stay those of the same version. */
function learn(id, facts) {
  const item = items.get(id) ?? newItem(id);
  const { v, width, height, hits, created } = item;
  items.set(id, Object.assign(item, BLANK, { hits, created }, facts.v && v === facts.v && { width, height }, facts));
  mark(item);
}
function drop(item) {
  item.gone = true;
  items.delete(item.id);
  if (!loaded || again != null) removed.set(item.id, performance.now());
  mark(item);
}
function mark(item) {
  item.stamp++;
  changed.add(item);
  soon();
}
function forget() {
  items.forEach(drop);
  loaded = false;
  listing++;
  route();
}

// Order and filter

// Ranks ascend. An image without a time of its own is taken to have been given two hours.
const RANKS = {
  newest: (it) => -(it.created ?? (it.expires == null ? 0 : it.expires - 7_200_000)),
  id: () => 0,
  size: (it) => -(it.bytes ?? it.record_bytes * 0.75),
  hits: (it) => -it.hits,
  left: (it) => it.expires ?? Number.MAX_VALUE,
};
const compare = (a, b) => a.rank - b.rank || (a.id < b.id ? -1 : 1);
let words = []; // of the filter; an item must have all
let corrupt = 0;
let placing = false;

/** Merges few sorted items into many. */
function merge(many, few) {
  const parts = [];
  let from = 0;
  for (const it of few) {
    let [low, high] = [from, many.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (compare(many[middle], it) < 0) low = middle + 1;
      else high = middle;
    }
    parts.push(many.slice(from, low), it);
    from = low;
  }
  return [].concat(...parts, many.slice(from));
}
/** Puts changed items in their places, some at a time: a few milliseconds, even among 100,000. */
async function placeAll() {
  placing = true;
  resumed = performance.now();
  while (changed.size) {
    const some = [];
    for (const it of changed) if (some.push(it) === 2000) break;
    const moved = some.some((it) => it.rank != null);
    for (const it of some) {
      changed.delete(it);
      it.moving = true;
      const broken = !it.gone && it.state === "corrupt";
      corrupt += broken - it.broken;
      it.broken = broken;
      it.rank = RANKS[ui.order.value](it);
      const text = `${it.id} ${it.type} ${it.state} ${it.in_memory ? "memory" : ""}`.toLowerCase();
      it.matches = words.every((word) => text.includes(word));
    }
    sorted = merge(moved ? sorted.filter((it) => !it.moving) : sorted, some.filter((it) => !it.gone).sort(compare));
    for (const it of some) it.moving = false;
    await breathe();
  }
  placing = false;
  shown = words.length ? sorted.filter((it) => it.matches) : sorted;
}
async function arrange() {
  words = ui.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = sorted;
  sorted = [];
  main.scrollTop = 0;
  for (const it of all) {
    it.rank = null;
    changed.add(it);
    if (changed.size % 1000 === 0) await breathe();
  }
  soon();
}

// Listing

let prefix = "";
let listing = 0; // changes when what is being listed isn't wanted any more
let loaded = false; // whether all were listed once
let again = null; // whether another listing shall follow the one under way; null while none is

/** Asks for a page. An event since then is newer. So is the whole list, if a first page comes after it. */
async function page(cursor, limit, round) {
  const [mine, since] = [listing, performance.now()];
  const { images, next } = await askJson(`/images?${new URLSearchParams({ prefix, cursor, limit })}`);
  if (mine !== listing || (loaded && !round)) return;
  for (const { id, expires_in, created_at, ...facts } of images) {
    if (removed.get(id) >= since) continue;
    const item = items.get(id);
    if (created_at) facts.created = created_at * 1000;
    facts.expires = expiry(expires_in);
    if (Math.abs(item?.expires - facts.expires) < 2000) facts.expires = item.expires; // it is told in seconds
    if (!item || (item.touched < since && Object.keys(facts).some((it) => item[it] !== facts[it]))) learn(id, facts);
    if (round) items.get(id).listed = round;
  }
  return next;
}
/** Lists all, and drops those that are gone. */
async function list() {
  if (again != null) return void (again = true);
  again = false;
  const [mine, since] = [listing, performance.now()];
  let cursor = "";
  for (let delay = 1000; cursor != null && items.size < MOST && mine === listing; await breathe()) {
    try {
      cursor = await page(cursor, 1000, since);
      warn("list");
    } catch (error) {
      if (error.status === 400) cursor = ""; // it isn't known any more
      warn("list", `The list can’t be read: ${error.message}.`);
      await wait((delay = Math.min(delay * 2, 30_000)) * (0.5 + Math.random()));
    }
  }
  const more = again;
  again = null;
  if (mine === listing) {
    if (cursor == null) for (const it of items.values()) if (it.listed !== since && it.touched < since) drop(it);
    removed.clear();
    loaded = true;
    route();
  }
  if (more && !locked) list();
}

// Events

let source;
let sourceDelay = 1000;
const events = []; // the newest, for the detail view

/** Follows all changes. A listing follows each connection: changes may have been missed before it. */
function listen() {
  source?.close();
  const mine = (source = new EventSource("/events?prefix=&from=now&inline=none"));
  mine.onopen = () => {
    sourceDelay = 1000;
    ui.live.className = "on";
    say(ui.live, "Live");
    list();
  };
  mine.onerror = () => {
    ui.live.className = "";
    say(ui.live, "Connecting…");
    if (!loaded) list();
    if (mine.readyState !== EventSource.CLOSED) return; // the browser connects again
    setTimeout(() => mine === source && !locked && listen(), sourceDelay * (0.5 + Math.random()));
    sourceDelay = Math.min(sourceDelay * 2, 30_000);
  };
  for (const name of ["concept_progress", "concept_absent"]) mine.addEventListener(name, take);
  mine.addEventListener("concept_resync", list);
}
function take(event) {
  const { concept_id: id, reason, type, bytes, expires_at } = JSON.parse(event.data).data;
  const v = event.type === "concept_progress" ? event.lastEventId : null;
  events.push({ id, time: new Date(), kind: v ? "stored" : reason ? "corrupt" : "gone", text: v ?? reason ?? "" });
  if (events.length > 1000) events.shift();
  const item = items.get(id);
  if (id.startsWith(prefix) && (v || reason)) {
    learn(id, { state: v ? "present" : "corrupt", reason, v, type, bytes, expires: expires_at && expires_at * 1000, created: item?.v === v ? item.created : now() });
    items.get(id).touched = performance.now();
  } else drop(item ?? newItem(id));
  if (id === opened?.id) open(id);
}

// The grid. Only tiles in view are elements; they are placed by transforms, so none moves another.

const GAP = 12;
const tiles = new Map(); // by item
let shape = {}; // of the grid
let current; // the item whose tile has the focus, or had it last
let lastTop = 0;
let frame;
let variants; // that the server permits

function measure() {
  const [width, rem] = [ui.tiles.clientWidth, parseFloat(getComputedStyle(document.body).fontSize)];
  if (!width) return;
  const columns = Math.max(2, Math.floor((width + GAP) / (10.5 * rem + GAP)));
  const side = (width - GAP * (columns - 1)) / columns;
  shape = { columns, side, line: side + 4.5 * rem + GAP, top: ui.tiles.offsetTop, view: main.clientHeight };
  ui.tiles.style.setProperty("--tile", `${side}px`);
}
new ResizeObserver(() => (measure(), soon())).observe(main);
main.onscroll = soon;
function soon() {
  frame ??= requestAnimationFrame(async () => {
    frame = null;
    if (!placing) await placeAll();
    draw();
  });
}
function draw() {
  if (!opened && !locked && bare() === ui.empty.hidden) return route();
  const total = count(items.size, "image");
  say(ui.count, [!loaded && !items.size ? "Listing…" : words.length ? `${grouped(shown.length)} of ${total}` : total, corrupt && `${corrupt} corrupt`, !loaded && items.size > 999 && "listing…", items.size >= MOST && "use a prefix to see others"].filter(Boolean).join(" · "));
  say(ui.nothing, loaded && !shown.length ? "No image matches." : "");
  if (ui.list.hidden || !(shown.length || tiles.size)) return;
  if (!shape.view) measure();
  const { columns, side, line, top, view } = shape;
  const scrolled = main.scrollTop - top; // read before anything is written, which costs a layout
  ui.tiles.style.height = `${Math.ceil(shown.length / columns) * line}px`;
  const first = Math.max(0, Math.floor(scrolled / line) - 1) * columns;
  const wanted = shown.slice(first, Math.ceil((scrolled + view) / line + 1) * columns);
  const keep = new Set(wanted);
  const focused = document.activeElement.closest(".tile"); // stays, or the focus would be lost
  for (const [item, tile] of tiles) {
    if (keep.has(item) || (tile.element === focused && !item.gone)) continue;
    tile.image.removeAttribute("src"); // stops its request
    tile.element.remove();
    tiles.delete(item);
  }
  let next = ui.tiles.firstElementChild;
  wanted.forEach((item, at) => {
    if (!tiles.has(item)) tiles.set(item, makeTile(item));
    const { element, stops, paint } = tiles.get(item);
    if (element === next) next = next.nextElementSibling;
    else ui.tiles.insertBefore(element, next);
    at += first;
    element.style.transform = `translate(${(at % columns) * (side + GAP)}px, ${Math.floor(at / columns) * line}px)`;
    element.ariaPosInSet = at + 1;
    element.ariaSetSize = loaded ? shown.length : -1;
    // One tile is in the tab order, and arrows go to the others.
    for (const it of stops) it.tabIndex = item === (keep.has(current) ? current : wanted[0]) ? 0 : -1;
    paint();
  });
  // A jump over thousands loads the images of the place where it ends.
  if (Math.abs(scrolled - lastTop) > 2 * view) loadLater();
  else loadTiles();
  lastTop = scrolled;
}
const loadTiles = () => [...tiles.values()].reverse().forEach((it) => it.load());
const loadLater = debounced(120, loadTiles);

/** Reads metadata, three at a time (browsers have six connections to a host); those asked for last are in view. */
const queue = [];
let reading = 0;
function readNext() {
  if (reading > 2 || !queue.length) return;
  reading++;
  queue.pop()().finally(() => (reading--, readNext()));
}

function makeTile(item) {
  const { id } = item;
  const image = h("img", { alt: "", decoding: "async", draggable: false });
  const [reason, type, facts, time, hits] = ["span.reason", "span.type", "span", "span", "span.hits"].map((it) => h(it));
  const memory = h("i", { title: "in memory", role: "img", ariaLabel: "in memory" });
  const link = h("a", { href: `#image/${id}` }, h("span.picture", image, reason, type), h("b", { title: id }, id), h("span.facts", facts), h("span.facts", time, hits, memory));
  const acts = [press("Copy", () => copy(location.origin + address(item))), press("Replace", () => choose(id)), press("Delete", () => askRemove(item))];
  const element = h("li.tile", link, h("div.acts", ...acts));
  element.dataset.id = id;
  let stamp; // of the item when it was painted
  let loading; // the version that is loaded
  let sharp; // whether a sharper picture follows the thumbnail
  const here = () => tiles.get(item)?.image === image && loading === item.v;
  image.onload = () => {
    element.classList.add("drawn");
    const w = variants?.widths.find((it) => it >= Math.min(500, shape.side * devicePixelRatio) && variants.heights.includes(it));
    if (!w || !item.width || sharp) return;
    sharp = true;
    setTimeout(() => here() && (image.src = address(item, "", { w, h: w, fit: "cover", format: "webp" })), 300);
  };
  image.onerror = () => (sharp ? (image.src = address(item, "/thumbnail")) : element.classList.remove("drawn"));
  const tick = () => {
    say(time, left(item));
    time.className = item.expires && item.expires < now() + 60_000 ? "soon" : "";
  };
  return {
    element, image, tick, stops: [link, ...acts],
    paint() {
      if (stamp === item.stamp) return;
      stamp = item.stamp;
      element.dataset.state = item.state;
      const broken = item.state === "corrupt";
      say(type, item.type?.replace(/^image\/|\+xml$/g, "").toUpperCase());
      say(facts, [broken ? "corrupt" : pixels(item), size(item.bytes ?? item.record_bytes)].filter(Boolean).join(" · "));
      say(reason, broken ? item.reason ?? "no image" : "");
      say(hits, item.hits ? count(item.hits, "hit") : "");
      memory.hidden = !item.in_memory;
      tick();
    },
    /** Loads the thumbnail. If nobody has read the image yet, its metadata come first. */
    load() {
      if (item.state === "corrupt" || loading === item.v) return;
      const known = (loading = item.v);
      sharp = false;
      if (known) image.src = address(item, "/thumbnail");
      if (item.width) return;
      queue.push(async () => {
        const info = here() && (await readInfo(item));
        if (!info) return;
        loading = item.v;
        // Where the server can draw none, the browser may know the format.
        if (!known || !info.thumbnail) image.src = info.thumbnail ?? (item.bytes < 500_000 ? address(item) : "");
      });
      readNext();
    },
  };
}

/** Reads the metadata of an image into its item, unless an event says something newer meanwhile. */
async function readInfo(item) {
  const { touched } = item;
  const [info, error] = await askJson(`${pathOf(item.id)}/info`).then((it) => [it], (it) => [null, it]);
  if (item.touched !== touched) return;
  if (info) {
    const { type, width, height, bytes, etag, expires_in } = info;
    Object.assign(item, { type, width, height, bytes, state: "present", v: etag.slice(1, 33), expires: expiry(expires_in) });
  } else if (error.status === 502) {
    Object.assign(item, { state: "corrupt", v: null, reason: error.message.replace(" (502)", "") });
    if (!item.gone) changed.add(item);
  } else if (error.status === 404) drop(item);
  item.stamp++;
  soon();
  return info;
}

// One timer for all countdowns in view.
setInterval(() => {
  if (document.hidden) return;
  if (opened) say(ui.left, left(opened));
  else tiles.forEach((it) => it.tick());
}, 1000);

// Keys

function focusTile(index) {
  if (!shown.length) return ui.filter.focus();
  const at = Math.max(0, Math.min(shown.length - 1, index));
  current = shown[at];
  const { columns, line, top, view } = shape;
  const y = Math.floor(at / columns) * line + top;
  if (y < main.scrollTop) main.scrollTop = at < columns ? 0 : y - GAP;
  else if (y + line > main.scrollTop + view) main.scrollTop = y + line - view;
  draw();
  tiles.get(current).stops[0].focus({ preventScroll: true });
}
ui.tiles.addEventListener("focusin", (event) => {
  current = items.get(event.target.closest(".tile").dataset.id);
  soon();
});
addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (locked || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const { columns } = shape;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity }[key];
  const tile = target.closest(".tile");
  if (key === "/" && !target.matches("input, select")) {
    location.hash = "";
    route();
    ui.filter.select();
  } else if (key === "Escape" && opened) location.hash = "";
  else if (key === "ArrowDown" && target === ui.filter) focusTile(0);
  else if (tile && key === "Delete") askRemove(current);
  else if (tile && step) focusTile(shown.indexOf(current) + step);
  else return;
  event.preventDefault();
});
ui.tools.onsubmit = () => false;
ui.filter.oninput = debounced(80, arrange);
ui.order.onchange = arrange;
ui.prefix.oninput = debounced(300, () => {
  prefix = ui.prefix.value.trim();
  forget();
  list();
});

// Messages

const warnings = new Map();
/** Shows a warning at the top until there is none for the same cause. */
function warn(cause, text) {
  warnings.set(cause, text);
  const first = [...warnings.values()].find(Boolean);
  ui.banner.hidden = !first;
  say(ui.trouble, first);
}
ui.retry.onclick = () => (poll(), listen());
const untoast = debounced(3000, () => say(ui.toast));
const toast = (text) => (say(ui.toast, text), untoast());
function copy(text) {
  // Only secure contexts have a clipboard.
  if (!navigator.clipboard) return prompt("To copy:", text);
  navigator.clipboard.writeText(text).then(() => toast("Copied"));
}
const snippet = (label, text) => h("div.snippet", h("span.dim", label), h("code", { tabIndex: 0 }, text), press("Copy", () => copy(text), { ariaLabel: `Copy: ${label}` }));

// Writing. Only the version that the page has shown is replaced or deleted.

const versionOf = (id) => ask(pathOf(id), { method: "HEAD" }).then((it) => it.headers.get("etag").slice(1, 33), () => null);
/** Returns the precondition for a write: `v` is null for an unread or corrupt image, and undefined for none. */
async function precondition(id, v) {
  if (v === undefined) return { "if-none-match": "*" };
  v ??= await versionOf(id);
  return v ? { "if-match": `"${v}"` } : {};
}

let rows = []; // of the dialog
/** Makes a valid id of a file's name. */
function idFor(name) {
  const id = name.replace(/\.[^.]*$/, "").normalize("NFKD").replace(/\p{M}/gu, "").replace(/[^\w.:~-]+/g, "-").replace(/^\W+/, "");
  return id.slice(0, 128).replace(/(\.(webp|avif|jpg|png)|-)+$/, "") || "image";
}
function offer(files, id) {
  rows.push(...files.map((it) => makeRow(it, files.length === 1 ? id : null)));
  if (!ui.upload.open) ui.upload.showModal();
  checkRows();
  rows.at(-1).input.focus();
}
const checkRows = () => rows.forEach((it) => it.check());
function makeRow(file, id) {
  const { name } = file;
  const input = h("input", { value: id ?? idFor(name), readOnly: id != null, ariaLabel: `Id for ${name}`, oninput: checkRows });
  const note = h("p", { role: "status" });
  const progress = h("progress", { value: 0, ariaLabel: `Sent of ${name}`, hidden: true });
  const picture = h("img", { src: URL.createObjectURL(file), alt: "" });
  const element = h("li", picture, h("div", input, note, progress), h("span.dim", size(file.size)), press("×", () => it.close(), { ariaLabel: `Leave out ${name}` }));
  const tell = (text, className) => (say(note, text), (note.className = className));
  const transfer = new XMLHttpRequest(); // fetch doesn't tell how much was sent
  let before; // the version that is replaced
  const it = {
    input,
    check() {
      if (it.done) return;
      const wrong = !/^\w[\w.:~-]{0,127}$/.test(input.value) || /\.(webp|avif|jpg|png)$/.test(input.value)
        ? "An id has 1 to 128 of A–Z a–z 0–9 . _ : ~ - and begins with a letter, a digit or _. It doesn’t end in .webp, .avif, .jpg or .png."
        : rows.some((row) => row !== it && row.input.value === input.value) ? "Another file here has this id." : "";
      before = items.get(input.value)?.v;
      input.setCustomValidity(wrong);
      tell(wrong || (before === undefined ? "New" : "Replaces the image that is there."), wrong ? "bad" : before === undefined ? "dim" : "soon");
    },
    close() {
      transfer.abort();
      URL.revokeObjectURL(picture.src);
      element.remove();
      rows = rows.filter((row) => row !== it);
      if (!rows.length) ui.upload.close();
    },
    async send() {
      const is = input.value;
      tell("Sending…", "dim");
      progress.hidden = false;
      const headers = await precondition(is, before);
      transfer.open("PUT", pathOf(is) + (ui.ttl.value && `?ttl=${ui.ttl.value}`));
      transfer.setRequestHeader("content-type", "application/octet-stream"); // the type is told from the bytes
      for (const header of Object.entries(headers)) transfer.setRequestHeader(...header);
      transfer.upload.onprogress = (event) => (progress.value = event.loaded / event.total);
      await new Promise((done) => ((transfer.onloadend = done), transfer.send(file)));
      progress.hidden = true;
      const { status, responseText } = transfer;
      it.done = status >= 200 && status < 300;
      if (status === 412) before = (await versionOf(is)) ?? undefined;
      tell(it.done ? "Stored" : status === 412 ? `Not stored: the image to replace ${before ? "has changed since this page last saw it" : "is gone"} (412). Store again to store it all the same.`
        : `Not stored: ${status ? problem(status, responseText) : "the connection broke"}.`, it.done ? "good" : "bad");
    },
  };
  ui.rows.append(element);
  return it;
}
ui.upload.firstElementChild.onsubmit = (event) => {
  event.preventDefault();
  const waiting = rows.filter((it) => !it.done);
  const bad = waiting.find((it) => it.input.validationMessage);
  if (bad) return bad.input.focus();
  ui.send.disabled = true;
  const worker = async () => {
    for (let it; (it = waiting.shift()); ) await it.send();
  };
  Promise.all([worker(), worker()]).then(() => {
    ui.send.disabled = false;
    if (!rows.every((it) => it.done)) return;
    toast(`Stored ${count(rows.length, "image")}`);
    ui.upload.close();
  });
};
ui.upload.onclose = () => rows.forEach((it) => it.close());
ui.cancel.onclick = () => ui.upload.close();

let chosenFor; // the id that the chosen file replaces
function choose(id) {
  chosenFor = id;
  ui.files.multiple = !id;
  ui.files.value = "";
  ui.files.click();
}
ui.files.onchange = () => offer([...ui.files.files], chosenFor);
ui.add.onclick = ui.drop.onclick = () => choose();
ui.replace.onclick = () => choose(opened.id);

/** The id that a file dropped here replaces. */
const dropId = (event) => event.target.closest(".tile")?.dataset.id ?? opened?.id;
addEventListener("dragover", (event) => {
  if (locked || !event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  const id = dropId(event);
  ui.veil.hidden = false;
  say(ui.veil, id ? `Drop to replace ${id}` : "Drop to store");
});
addEventListener("dragleave", (event) => event.relatedTarget || (ui.veil.hidden = true));
function takeFiles(event) {
  ui.veil.hidden = true;
  const files = [...(event.dataTransfer ?? event.clipboardData).files];
  if (locked || !files.length) return;
  event.preventDefault();
  offer(files, event.dataTransfer && dropId(event));
}
addEventListener("drop", takeFiles);
addEventListener("paste", takeFiles);

let removing;
function askRemove({ id, v }) {
  removing = { id, v };
  say(ui.removed, id);
  say(ui.problem);
  ui.remove.showModal();
}
ui.remove.firstElementChild.onsubmit = async (event) => {
  event.preventDefault();
  const { id, v } = removing;
  try {
    await ask(pathOf(id), { method: "DELETE", headers: await precondition(id, v) });
  } catch (error) {
    if (error.status === 412) {
      removing.v = await versionOf(id);
      error.message = "it was replaced since this page last saw it (412). Delete again to delete the new one";
    }
    if (error.status !== 404) return say(ui.problem, `Not deleted: ${error.message}.`);
  }
  ui.remove.close();
  toast(`Deleted ${id}`);
  const at = shown.findIndex((it) => it.id === id);
  if (items.has(id)) drop(items.get(id));
  if (opened) return void (location.hash = "");
  await placeAll();
  focusTile(at);
};
ui.keep.onclick = () => ui.remove.close();
ui.delete.onclick = () => askRemove(opened);

// Detail view

let opened; // the item that is shown
let shots = []; // variants that were fetched, the original first
let selected; // the one that is shown
let newest; // the path that was asked for last
ui.left = h("span");
ui.picture.onload = () => (ui.frame.className = "drawn");

/** Shows an image from its start; also when it has changed. */
async function open(id) {
  const item = (opened = items.get(id) ?? newItem(id));
  for (const it of shots) URL.revokeObjectURL(it.url);
  shots = [];
  selected = null;
  ui.frame.className = ui.picture.src = "";
  for (const it of ["shots", "headers", "uses"]) say(ui[it]);
  paintDetail();
  inspect();
  const info = await readInfo(item);
  if (opened !== item) return;
  paintDetail();
  if (info) fetchShot();
}
function paintDetail() {
  const { id, state, v, gone, type, bytes, width, height, reason } = opened;
  say(ui.title, id);
  ui.picture.alt = `The image ${id}`;
  say(ui.state, gone ? "not there" : state);
  const bad = gone || state === "corrupt";
  ui.state.className = bad ? "bad" : "";
  ui.detail.className = bad ? "bare" : "";
  ui.frame.hidden = !v || gone;
  if (v) ui.blurred.src = address(opened, "/thumbnail");
  say(ui.message, gone ? "No image has this id. It shows here once one is stored." : state === "corrupt" ? `Corrupt record: ${reason}` : "");
  // The room is reserved before the picture is there.
  ui.frame.style.setProperty("--ratio", width ? width / height : 1);
  ui.frame.style.setProperty("--pixels", width ? `${width}px` : "100%");
  ui.facts.replaceChildren(row("Pixels", pixels(opened)), row("Type", type), row("Bytes", bytes && `${grouped(bytes)} (${size(bytes)})`), row("Version", v), row("Time left", ui.left));
  say(ui.left, left(opened));
  const lines = events.filter((it) => it.id === id).slice(-50).reverse();
  ui.log.replaceChildren(...(lines.length ? lines.map((it) => h("li", it.time.toLocaleTimeString("en", { hour12: false }), h(`b.${it.kind}`, it.kind), it.text)) : ["None since this page was opened."]));
  if (variants && !ui.fields.children.length) buildFields();
  if (!v || !width) return;
  const url = (variant) => location.origin + address(opened, "", variant);
  const widths = variants?.widths.filter((it) => it <= width && it % 256 === 0) ?? [];
  ui.uses.replaceChildren(
    snippet("Address", url()),
    snippet("curl", `curl -o ${id} '${url()}'`),
    snippet("Python", `image = base64.b64decode(json.loads(r.get("image:${id}"))["base64_data"])`),
    snippet("HTML", `<img src="${url()}" srcset="${widths.map((w) => `${url({ w, format: "webp" })} ${w}w`).join(", ")}" sizes="100vw" width="${width}" height="${height}" alt="">`));
}
/** Makes the form of variants, from the lists that the server permits. */
function buildFields() {
  const field = (label, name, first, values) => h("label", label, h("select", { name }, h("option", { value: "" }, first), ...values.map((it) => h("option", `${it}`))));
  const { widths, heights, qualities, formats, dprs } = variants;
  ui.fields.append(field("Width", "w", "–", widths), field("Height", "h", "–", heights), field("Fit", "fit", "contain", ["cover", "fill"]), field("Quality", "q", "default", qualities), field("Format", "format", "its own", formats), field("Density", "dpr", "1", dprs.filter((it) => it !== 1)),
    press("Compare formats", async () => {
      for (const format of formats) await fetchShot({ ...chosen(), format });
    }));
  ui.fields.onchange = () => fetchShot(chosen());
}
function chosen() {
  const all = Object.fromEntries([...new FormData(ui.fields)].filter((it) => it[1]));
  if (!all.w || !all.h) delete all.fit;
  if (!all.w && !all.h) delete all.dpr;
  return all;
}
/** Fetches the original or a variant, past the browser's cache, and shows it with its bytes and headers. */
async function fetchShot(variant = {}) {
  const [item, path, start] = [opened, address(opened, "", variant), performance.now()];
  newest = path;
  const shot = { path, title: Object.entries(variant).map((it) => it.join("=")).join(" ") || "original", headers: [] };
  try {
    const answer = await fetch(path, { cache: "no-store" });
    const blob = await answer.blob();
    Object.assign(shot, { time: (performance.now() - start) * 1000, status: answer.status, headers: [...answer.headers], bytes: blob.size });
    if (answer.ok) {
      shot.url = URL.createObjectURL(blob);
      const image = h("img", { src: shot.url });
      await image.decode().catch(() => {});
      shot.pixels = `${image.naturalWidth}×${image.naturalHeight}`;
    } else shot.problem = problem(answer.status, await blob.text());
  } catch (error) {
    shot.problem = error.message;
  }
  if (opened !== item || !path.endsWith(item.v)) return;
  shots = [...shots.filter((it) => it.path !== path), shot];
  select(path === newest ? shot : selected ?? shot);
}
const LAST = ["last-modified", "age", "content-length", "content-type", "cache-control", "etag", "server-timing", "cache-status"];
function select(shot) {
  selected = shot;
  if (shot.url) ui.picture.src = shot.url;
  say(ui.message, shot.problem);
  const place = ([name]) => -LAST.indexOf(name);
  ui.headers.replaceChildren(row("status", shot.status), ...shot.headers.sort((a, b) => place(a) - place(b)).map((it) => row(...it)));
  ui.shots.replaceChildren(...shots.map((it) => {
    const [share, bar] = [it.bytes / shots[0].bytes, h("i")];
    bar.style.setProperty("--share", Math.min(1, share));
    const cells = [it.pixels ?? "", it.url ? size(it.bytes) : `${it.status ?? "–"}`, it.url ? h("span", bar, percent(share)) : "", micros(it.time), press("Copy", () => copy(location.origin + it.path))];
    return h("tr", h("th", { scope: "row" }, press(it.title, () => select(it), { ariaPressed: it === shot })), ...cells.map((cell) => h("td", cell)));
  }));
}
async function inspect() {
  const item = opened;
  const known = await askJson(`/debug${pathOf(item.id)}`).catch((error) => ({ "not available": error.message }));
  if (opened !== item) return;
  ui.debug.replaceChildren(...Object.entries(known).flatMap(([name, value]) => [value].flat().map((it) => row(name.replaceAll("_", " "), it?.constructor === Object ? Object.values(it).join(", ") : it == null ? null : `${it}`))));
}

// `#image/{id}` is the detail view, anything else the list.

let listTop = 0;
const bare = () => loaded && !items.size && !prefix;
function route() {
  const was = opened?.id;
  const id = locked ? null : location.hash.match(/^#image\/([\w.:~-]+)$/)?.[1];
  const view = locked ? ui.login : id ? ui.detail : bare() ? ui.empty : ui.list;
  if (id && !was && !ui.list.hidden) listTop = main.scrollTop;
  for (const it of main.children) it.hidden = it !== view;
  ui.tools.hidden = ui.buttons.hidden = locked;
  document.title = id ? `${id} · Afterimage` : "Afterimage";
  if (!id) opened = null;
  if (id && id !== was) {
    open(id);
    main.scrollTop = 0;
    ui.title.focus();
  } else if (!id && was) {
    main.scrollTop = listTop;
    measure();
    draw();
    tiles.get(items.get(was))?.stops[0].focus({ preventScroll: true });
  }
  soon();
}
addEventListener("hashchange", route);

// Status

const [state, why, memory, version] = ["b", "span", "span", "span"].map((it) => h(it));
const meter = h("meter", { ariaLabel: "Memory used for images" });
const [coherence, hits, used, times, store, streams, cause, links] = [..."12345678"].map(() => ui.status.appendChild(h("li")));
coherence.append(h("i"), state, why);
used.append("Memory ", meter, memory);
links.append(version, h("a", { href: "/metrics" }, "metrics"), h("a", { href: "/openapi.json" }, "API"));

function showStatus(status) {
  clockOffset = status.now * 1000 - Date.now();
  const { since, reason, state: name } = status.coherence;
  ui.status.className = "known";
  coherence.dataset.state = name;
  say(state, { coherent: "Coherent", unverified: "Unverified", unreachable: "Store unreachable" }[name]);
  say(why, ` for ${duration(status.now - since)}`);
  say(cause, reason ?? "");
  say(store, status.store.address ?? status.store.kind);
  const reads = ["10s", "1m", "10m"].map((it) => [it.replace(/\D/, " $&"), status.reads[it]]);
  say(hits, `Hits ${reads.map(([span, it]) => `${span} ${percent(it.hit_ratio)}`).join(" · ")}`);
  const [span, timed] = reads.find(([, it]) => it.p50_us != null) ?? reads[2];
  say(times, `p50 ${micros(timed.p50_us)} · p99 ${micros(timed.p99_us)} (${span})`);
  const { bytes, limit_bytes, images } = status.memory;
  meter.value = bytes / limit_bytes;
  say(memory, ` ${size(bytes)} of ${size(limit_bytes)} · ${count(images, "image")}`);
  say(streams, count(status.event_streams, "stream"));
  say(version, `v${status.version}`);
  const { write_failure } = status.store;
  warn("writes", write_failure && `The store takes no writes: ${write_failure}.`);
  warn("server");
  const first = !variants;
  variants = status.variants;
  if (first) tiles.forEach(({ image }) => image.naturalWidth && image.onload());
  if (opened) first ? paintDetail() : inspect();
}
async function poll() {
  if (!document.hidden && !locked) {
    await askJson("/status").then(showStatus, (error) => {
      coherence.dataset.state = "";
      say(state, "No status");
      say(why);
      say(cause, error.status ? error.message : "");
      warn("server", !error.status && "The server doesn’t answer. This page asks it again every two seconds.");
    });
  }
  clearTimeout(poll.timer);
  poll.timer = setTimeout(poll, 2000);
}
document.onvisibilitychange = poll;
ui.more.onclick = () => (ui.more.ariaExpanded = ui.more.parentElement.classList.toggle("open"));

// Start

ui.ways.append(
  snippet("Shell", `curl -T picture.png -H "Authorization: Bearer $(cat TOKEN_FILE)" ${location.origin}/images/hero`),
  snippet("Python", 'r.set(f"image:{id}", json.dumps({"base64_data": base64.b64encode(png).decode()}), ex=7200)'));

/** Shows a first page at once. The whole list comes when changes are followed. */
function begin() {
  page("", 60).then(placeAll).then(draw, () => {});
  route();
  listen();
  poll();
}
const token = location.hash.match(/^#token=(.*)$/)?.[1];
if (token) {
  history.replaceState(null, "", location.pathname);
  logIn(decodeURIComponent(token));
} else begin();
