/**
 * Live states of images. All tabs of an origin share one event stream: browsers open six connections to a host over HTTP/1.1, so
 * with a stream per tab the seventh tab would hang.
 *
 * The visible tabs queue for a Web Lock. Its holder, the leader, opens the stream for the ids of all tabs, and passes states on over a
 * BroadcastChannel. A hidden tab leaves the queue. So the stream is closed while every tab is hidden, the leader's timers aren't
 * throttled, and a tab that crashes gives up its lock. A new leader's stream begins with the state of every image, so no change is
 * missed.
 *
 * Web Locks need a secure context (HTTPS or localhost). A SharedWorker doesn't, but needs a script at an address of its own, which
 * bundlers and content security policies get in the way of, and Chrome on Android has none. Without locks each visible tab has a
 * stream.
 */
import { checkBase, checkId } from "./url.js";

/**
 * @typedef {object} Present
 * @property {string} id
 * @property {"present"} state
 * @property {string} v Version, for `imageUrl`.
 * @property {string} url Address of the image in this version.
 * @property {string | null} thumbnail Address of 64×64 pixels, mostly a `data:` URL; null if none can be drawn.
 * @property {string | null} type Media type. Null, like the five below, if it isn't known.
 * @property {number | null} bytes
 * @property {number | null} width
 * @property {number | null} height
 * @property {string | null} thumbhash In base64, for `thumbhashUrl`.
 * @property {number | null} expiresAt In seconds since 1970, when this version was first seen; null also if it never expires.
 */

/**
 * @typedef {object} Absent
 * @property {string} id
 * @property {"absent"} state
 * @property {string} [reason] Fault of a record that is there but is no image.
 */

/** @typedef {Present | Absent} ImageState */

/**
 * @typedef {object} FollowOptions
 * @property {string} [base] Address of the server; "" for the page's own origin. Another origin must allow this one in
 *   `[http] cors_origins`.
 */

/**
 * @typedef {object} Following
 * @property {(ids: string | readonly string[]) => void} unfollow Ends the calls for these ids.
 * @property {() => void} close Ends all calls.
 */

/** @typedef {[ids: Set<string>, callback: (state: ImageState) => void]} Subscription */

/**
 * A message between tabs. `ids`: all that the tab follows. `states`: sent by the leader's streams. Without either, a new leader asks for
 * the `ids` of all.
 *
 * @typedef {{ tab: number, ids?: string[], states?: ImageState[] }} Message
 */

/** Most ids of a stream: the server's `[events] ids`. */
const MAX_IDS = 100;

/** Longest list of ids, in characters: nginx takes request lines of up to 8 KiB. */
const MAX_LENGTH = 7500;

/** Delay before new ids are followed, in milliseconds, so that ids that come together share a stream. */
const SETTLE = 20;

/** @type {Map<string, ReturnType<typeof connect>>} */
const hubs = new Map();

/**
 * Calls back with the state of each image, and again after each change, in order. Two changes in quick succession may be one
 * call, with the newer state. Nothing happens outside of a browser's page.
 *
 * @param {string | readonly string[]} ids
 * @param {(state: ImageState) => void} callback
 * @param {FollowOptions} [options]
 * @returns {Following}
 */
export function follow(ids, callback, options = {}) {
  const base = checkBase(options.base);
  const own = new Set([ids].flat().map(checkId));
  const unfollow = (/** @type {string | readonly string[]} */ ids) => {
    for (const id of [ids].flat()) own.delete(id);
    hub?.settle();
  };
  let hub = hubs.get(base);
  if (!hub && globalThis.document && globalThis.EventSource) hubs.set(base, (hub = connect(base)));
  hub?.add([own, callback]);
  return { unfollow, close: () => unfollow([...own]) };
}

/**
 * Returns the last known state of an image that this page follows, or undefined. It is the same object until it changes.
 *
 * @param {string} id
 * @param {FollowOptions} [options]
 */
export const known = (id, { base } = {}) => hubs.get(checkBase(base))?.states.get(id);

/** @param {(ImageState & { v?: string, reason?: string }) | undefined} a @param {ImageState & { v?: string, reason?: string }} b */
const same = (a, b) => a?.state === b.state && a.v === b.v && a.reason === b.reason;

/**
 * Calls back from a microtask, so that a callback may use the result of `follow`, and an error in one ends no other.
 *
 * @param {Subscription} subscription @param {ImageState} state
 */
const call = ([ids, callback], state) => queueMicrotask(() => ids.has(state.id) && callback(state));

/**
 * Follows the images of one server for this page.
 *
 * @param {string} base
 */
function connect(base) {
  const name = `afterimage ${new URL(`${base}/`, location.href)}`;
  const tab = Math.random();
  /** @type {Set<Subscription>} */
  const subscriptions = new Set();
  /** Last states of the ids that this page follows. @type {Map<string, ImageState>} */
  const states = new Map();
  /** Tab of the last leader that asked. States of another tab are a former leader's. @type {number | undefined} */
  let current;
  /** @type {ReturnType<typeof lead> | undefined} */
  let leader;
  /** Gives up the lock, or the wait for it. @type {AbortController | undefined} */
  let candidacy;
  /** @type {BroadcastChannel | undefined} */
  let channel;
  /** True while the page is in the back-forward cache, or about to go. */
  let left = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;

  const following = () => [...new Set([...subscriptions].flatMap(([ids]) => [...ids]))];

  /** @param {{ ids?: string[], states?: ImageState[] }} message */
  const post = (message) => channel?.postMessage({ ...message, tab });

  /** Tells the leader which ids this tab follows. */
  const tell = () => post({ ids: left ? [] : following() });

  /** @param {ImageState} state */
  const receive = (state) => {
    const wanting = [...subscriptions].filter(([ids]) => ids.has(state.id));
    if (!wanting.length || same(states.get(state.id), state)) return;
    states.set(state.id, state);
    for (const subscription of wanting) call(subscription, state);
  };

  /** Brings this tab, the others and the streams up to date, a little later. */
  const settle = () => {
    timer ??= setTimeout(() => {
      timer = undefined;
      for (const subscription of subscriptions) if (!subscription[0].size) subscriptions.delete(subscription);
      const ids = following();
      for (const id of states.keys()) if (!ids.includes(id)) states.delete(id);
      update();
      tell();
      leader?.sync();
    }, SETTLE);
  };

  /** Takes part as far as ids and visibility demand. */
  const update = () => {
    const takesPart = !left && subscriptions.size;
    if (!takesPart || document.hidden) {
      leader?.close();
      candidacy?.abort();
      leader = candidacy = undefined;
    }
    if (!takesPart) {
      tell();
      channel?.close();
      channel = undefined;
      return;
    }
    // Without locks each tab leads itself alone.
    if (!channel && navigator.locks) {
      channel = new BroadcastChannel(name);
      channel.onmessage = hear;
      current = undefined;
      tell();
    }
    if (document.hidden || candidacy) return;
    const { signal } = (candidacy = new AbortController());
    const elected = () => {
      if (signal.aborted) return;
      leader = lead();
      return new Promise((release) => signal.addEventListener("abort", release));
    };
    // In a sandboxed frame they fail.
    if (channel) navigator.locks.request(name, { signal }, elected).catch(elected);
    else elected();
  };

  /** @param {MessageEvent<Message>} event */
  const hear = ({ data: { tab, ids, states } }) => {
    if (ids) leader?.include(tab, ids);
    else if (!states) {
      current = tab;
      tell();
    } else if (!leader && (current ?? tab) === tab) states.forEach(receive);
  };

  /** Opens the streams for the ids of all tabs. */
  const lead = () => {
    /** Ids of the other tabs. @type {Map<number, string[]>} */
    const tabs = new Map();
    /** Ids in the order in which they came, so that new ones change the last stream only. @type {Set<string>} */
    const followed = new Set();
    /** States that these streams sent. Others may be out of date. @type {Map<string, ImageState>} */
    const fresh = new Map();
    /** @type {Map<string, ReturnType<typeof stream>>} */
    const streams = new Map();

    /** @param {MessageEvent<string>} event */
    const take = (event) => {
      const state = read(event, base);
      if (!followed.has(state.id) || same(fresh.get(state.id), state)) return;
      fresh.set(state.id, state);
      post({ states: [state] });
      receive(state);
    };

    post({});
    // The other tabs' ids come meanwhile.
    settle();
    return {
      /** @param {number} tab @param {string[]} ids */
      include(tab, ids) {
        const before = new Set(tabs.get(tab));
        tabs.set(tab, ids);
        const states = ids.flatMap((id) => (!before.has(id) && fresh.get(id)) || []);
        if (states[0]) post({ states });
        settle();
      },
      sync() {
        const wanted = new Set([...following(), ...[...tabs.values()].flat()]);
        for (const id of followed) if (!wanted.has(id)) followed.delete(id) && fresh.delete(id);
        for (const id of wanted) {
          followed.add(id);
          // This page follows an id that another one followed already.
          const state = fresh.get(id);
          if (state) receive(state);
        }
        const urls = split(followed).map((ids) => `${base}/events?ids=${ids}`);
        for (const [url, end] of streams)
          if (!urls.includes(url)) {
            end();
            streams.delete(url);
          }
        for (const url of urls) if (!streams.has(url)) streams.set(url, stream(url, take));
      },
      close: () => streams.forEach((end) => end()),
    };
  };

  document.addEventListener("visibilitychange", update);
  // A page in the back-forward cache must hold neither a lock nor a channel.
  for (const event of ["pagehide", "pageshow"])
    addEventListener(event, () => {
      left = event === "pagehide";
      update();
    });

  return {
    states,
    settle,
    /** @param {Subscription} subscription */
    add(subscription) {
      subscriptions.add(subscription);
      for (const id of subscription[0]) {
        const state = states.get(id);
        if (state) call(subscription, state);
      }
      // The lock is requested at once.
      queueMicrotask(update);
      settle();
    },
  };
}

/**
 * Splits ids into lists for one stream each.
 *
 * @param {Iterable<string>} ids
 */
export function split(ids) {
  /** @type {string[][]} */
  const lists = [];
  let length = Infinity;
  for (const id of ids) {
    length += id.length + 1;
    if (length > MAX_LENGTH || lists[0].length === MAX_IDS) {
      lists.unshift([]);
      length = id.length;
    }
    lists[0].push(id);
  }
  return lists;
}

/**
 * Opens an EventSource that doesn't give up, and returns its end.
 *
 * @param {string} url
 * @param {(event: MessageEvent<string>) => void} take
 */
function stream(url, take) {
  let failures = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  /** @type {EventSource} */
  let source;

  const open = () => {
    source = new EventSource(url);
    source.onopen = () => {
      failures = 0;
    };
    // The browser connects again by itself after a cut connection, and gives up after any status but 200.
    source.onerror = () => {
      if (source.readyState === 2) timer = setTimeout(open, delay(failures++));
    };
    for (const name of ["concept_progress", "concept_absent"]) source.addEventListener(name, take);
  };
  open();
  return () => {
    clearTimeout(timer);
    source.close();
  };
}

/**
 * Returns the delay before the next attempt, in milliseconds: up to one second, doubled after each failure, up to 30 s. It is random,
 * so that pages don't come back all at once.
 *
 * @param {number} failures
 */
export const delay = (failures) => Math.min(30_000, 1000 * 2 ** failures) * (0.5 + Math.random() / 2);

/**
 * @param {MessageEvent<string>} event
 * @param {string} base
 * @returns {ImageState}
 */
export function read({ type, data }, base) {
  const { concept_id: id, full, thumbnail, reason, expires_at, ...others } = JSON.parse(data).data;
  if (type === "concept_absent") return { id, state: "absent", reason };
  // A `data:` URL stays as it is.
  const based = (/** @type {string | undefined} */ address) => address?.replace(/^\//, `${base}/`) ?? null;
  return {
    ...{ id, state: "present", v: full.replace(/.*v=/, ""), url: /** @type {string} */ (based(full)), thumbnail: based(thumbnail) },
    // An older server doesn't send all of these.
    ...{ type: null, bytes: null, width: null, height: null, thumbhash: null, ...others, expiresAt: expires_at ?? null },
  };
}
