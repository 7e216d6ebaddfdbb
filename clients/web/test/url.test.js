import assert from "node:assert/strict";
import { test } from "node:test";
import { imageUrl, placeholderUrl, sources, srcset } from "../src/index.js";
import createdLoader, { createLoader } from "../src/next.js";

test("parameters have one order, whatever the order of the options", () => {
  const url = "/images/a?w=256&h=128&fit=cover&q=80&dpr=2&format=webp&fallback=placeholder&v=5d41";
  assert.equal(imageUrl("a", { v: "5d41", fallback: "placeholder", format: "webp", dpr: 2, q: 80, fit: "cover", h: 128, w: 256 }), url);
  assert.equal(imageUrl("a"), "/images/a");
  assert.equal(imageUrl("a", { v: null, w: undefined }), "/images/a");
});

test("a version may be an ETag", () => {
  for (const v of ["5d41-2", '"5d41-2"', 'W/"5d41-2"']) assert.equal(imageUrl("a", { v }), "/images/a?v=5d41-2");
  assert.throws(() => imageUrl("a", { v: "5d41&w=1" }), /`v` must match/);
});

test("ids are checked as by the server", () => {
  for (const id of ["a", "_a", "0", "a.b:c~d-e", "a.webp.x", "x".repeat(128)]) assert.equal(imageUrl(id), `/images/${id}`);
  for (const id of ["", ".a", "-a", "a/b", "a b", "ä", "a.webp", "a.png", "a\n", "x".repeat(129)]) assert.throws(() => imageUrl(id), /`id` must match/, id);
});

test("a base is another origin or a folder, with or without a slash", () => {
  assert.equal(imageUrl("a", { base: "https://images.example/" }), "https://images.example/images/a");
  assert.equal(imageUrl("a", { base: "/under" }), "/under/images/a");
});

test("a srcset has widths, or densities where a size is given", () => {
  assert.equal(srcset("a", { v: "1", widths: [640, 256] }), "/images/a?w=256&v=1 256w,/images/a?w=640&v=1 640w");
  assert.equal(srcset("a", { v: "1", w: 256, dprs: [1, 2] }), "/images/a?w=256&v=1 1x,/images/a?w=256&dpr=2&v=1 2x");
  assert.deepEqual(sources("a", { w: 256, dprs: [2] }), { src: "/images/a?w=256", srcset: "/images/a?w=256&dpr=2 2x" });
  assert.deepEqual(sources("a", { widths: [256, 384, 640], sizes: "50vw" }), {
    src: "/images/a?w=384",
    srcset: "/images/a?w=256 256w,/images/a?w=384 384w,/images/a?w=640 640w",
    sizes: "50vw",
  });
});

test("no candidate is wider than the image needs", () => {
  const widths = (natural) => srcset("a", { widths: [256, 384, 640], natural }).match(/\d+w/g);
  assert.deepEqual(widths(100), ["256w"]);
  assert.deepEqual(widths(256), ["256w"]);
  assert.deepEqual(widths(257), ["256w", "384w"]);
  assert.deepEqual(widths(4000), ["256w", "384w", "640w"]);
  assert.deepEqual(widths(null), ["256w", "384w", "640w"]);
});

test("placeholders are drawn in permitted sizes, and their text is escaped", () => {
  assert.equal(placeholderUrl(300, 200), "/placeholders/384x256");
  assert.equal(placeholderUrl(9000, 1, { fg: "fff", bg: "f80,08f", text: "a & b" }), "/placeholders/1080x256?bg=f80%2C08f&fg=fff&text=a%20%26%20b");
});

test("the loader for Next.js keeps to permitted widths and qualities", () => {
  assert.equal(createdLoader({ src: "hero?v=5d41", width: 700, quality: 72 }), "/images/hero?w=750&q=75&format=auto&v=5d41");
  assert.equal(createdLoader({ src: "/images/hero", width: 9000 }), "/images/hero?w=3840&format=auto");
  const load = createLoader({ base: "https://images.example", widths: [100], qualities: [50], format: "webp" });
  assert.equal(load({ src: "hero", width: 64, quality: 90 }), "https://images.example/images/hero?w=100&q=50&format=webp");
});
