import assert from "node:assert/strict";
import { test } from "node:test";
import { delay, read, split } from "../src/follow.js";
import { follow, known } from "../src/index.js";

const event = (type, data) => ({ type, data: JSON.stringify({ type, data }) });

test("an event becomes a state", () => {
  const data = {
    ...{ concept_id: "a", full: "/images/a?v=5d41", thumbnail: "data:image/webp;base64,AA", type: "image/png", bytes: 9, width: 2, height: 3 },
    ...{ thumbhash: "AAAA", expires_at: 1764260000 },
  };
  assert.deepEqual(read(event("concept_progress", data), ""), {
    ...{ id: "a", state: "present", v: "5d41", url: "/images/a?v=5d41", thumbnail: "data:image/webp;base64,AA", type: "image/png" },
    ...{ bytes: 9, width: 2, height: 3, thumbhash: "AAAA", expiresAt: 1764260000 },
  });
  assert.equal(read(event("concept_absent", { concept_id: "a" }), "").state, "absent");
  assert.equal(read(event("concept_absent", { concept_id: "a", reason: "no JSON" }), "").reason, "no JSON");
});

test("an older server's event leaves values unknown, and addresses get the base", () => {
  const data = { concept_id: "a", full: "/images/a?v=5d41", thumbnail: "/images/a/thumbnail?v=5d41" };
  assert.deepEqual(read(event("concept_progress", data), "https://images.example"), {
    ...{ id: "a", state: "present", v: "5d41", url: "https://images.example/images/a?v=5d41" },
    ...{ thumbnail: "https://images.example/images/a/thumbnail?v=5d41", type: null, bytes: null, width: null, height: null },
    ...{ thumbhash: null, expiresAt: null },
  });
});

test("a stream has at most 100 ids, and an address that nginx takes", () => {
  const ids = (count, length) => Array.from({ length: count }, (_, index) => `${index}`.padStart(length, "x"));
  for (const all of [ids(1, 3), ids(100, 4), ids(250, 4), ids(500, 128)]) {
    const lists = split(all);
    assert.deepEqual(lists.flat().sort(), [...all].sort());
    for (const list of lists) assert.ok(list.length <= 100 && `${list}`.length <= 7500);
    assert.equal(lists.length, Math.max(Math.ceil(all.length / 100), Math.ceil((`${all}`.length + 1) / 7501)));
  }
  assert.deepEqual(split([]), []);
});

test("delays grow up to 30 seconds, and differ", () => {
  for (const [failures, most] of [[0, 1000], [1, 2000], [4, 16_000], [5, 30_000], [2000, 30_000]])
    for (let round = 0; round < 50; round++) {
      const it = delay(failures);
      assert.ok(it >= most / 2 && it <= most, `${failures}: ${it}`);
    }
  assert.ok(new Set(Array.from({ length: 50 }, () => delay(3))).size > 10);
});

test("nothing is followed outside of a page, and a wrong id is refused there, too", () => {
  const following = follow(["a", "b"], () => assert.fail());
  following.unfollow("a");
  following.close();
  assert.equal(known("a"), undefined);
  assert.throws(() => follow("a/b", () => {}), /`id` must match/);
});

test("every entry can be imported on a server", async () => {
  assert.equal(typeof (await import("../src/element.js")).AfterImageElement, "function");
  assert.equal(typeof (await import("../src/next.js")).default, "function");
});
