import assert from "node:assert/strict";
import { test } from "node:test";
import { thumbhashPixels, thumbhashUrl } from "../src/index.js";

/** Sizes and pixels (first, middle, last) of the reference decoder, thumbhash 0.1.1. */
const KNOWN = {
  "1QcSHQRnh493V4dIh4eXh1h4kJUI": [23, 32, [64, 77, 113, 255], [140, 109, 88, 255], [0, 4, 39, 255]],
  "3OcRJYB4d3h/iIeHeEh3eIhw+j2w": [32, 23, [124, 136, 159, 255], [112, 124, 139, 255], [86, 99, 46, 255]],
  "YJqGPQw7sFlslqhFafSE+Q6oJ1h2iHB2Rw==": [32, 32, [228, 75, 51, 0], [107, 102, 109, 255], [255, 136, 0, 0]],
  "2YqDBQQnxnj0JoLYdM3P8ahpuDeHiHdwZw==": [32, 32, [245, 18, 39, 20], [232, 32, 39, 0], [218, 45, 39, 38]],
};

test("pixels are those of the reference decoder, but for rounding", () => {
  for (const [base64, [width, height, ...pixels]] of Object.entries(KNOWN)) {
    const got = thumbhashPixels(Buffer.from(base64, "base64"));
    assert.deepEqual([got.width, got.height, got.rgba.length], [width, height, width * height * 4]);
    const rgba = Uint8ClampedArray.from(got.rgba);
    const middle = (height >> 1) * width + (width >> 1);
    for (const [index, at] of [0, middle, width * height - 1].entries()) {
      const pixel = [...rgba.slice(at * 4, at * 4 + 4)];
      assert.ok(pixel.every((it, channel) => Math.abs(it - pixels[index][channel]) <= 1), `${base64}: ${pixel}`);
    }
  }
});

test("a text that is no ThumbHash has no preview", () => {
  for (const text of [null, undefined, "", "?"]) assert.equal(thumbhashUrl(text), undefined);
});
