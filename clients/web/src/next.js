/**
 * A loader for `next/image`. Widths and qualities are raised to those that the server permits.
 *
 * @module
 */
import { atLeast, imageUrl } from "./url.js";

/** The server's default `[pictures] widths` and `qualities`. */
const WIDTHS = [16, 32, 48, 64, 96, 128, 256, 320, 384, 512, 640, 750, 828, 1024, 1080, 1200, 1280, 1920, 2048, 3840];
const QUALITIES = [50, 60, 70, 75, 80, 85, 90, 95];

/**
 * @typedef {object} LoaderOptions
 * @property {string} [base] Address of the server; "" for the site's own origin.
 * @property {readonly number[]} [widths] The server's `[pictures] widths`, ascending.
 * @property {readonly number[]} [qualities] The server's `[pictures] qualities`, ascending.
 * @property {import("./url.js").Variant["format"]} [format] `auto` by default.
 */

/**
 * Returns a loader. Its `src` is an id, or an id with a version: `hero?v=5d41…`; `/images/` may stand before it.
 *
 * @param {LoaderOptions} [options]
 * @returns {(image: { src: string, width: number, quality?: number }) => string}
 */
export function createLoader({ base, widths = WIDTHS, qualities = QUALITIES, format = "auto" } = {}) {
  return ({ src, width, quality }) => {
    const [id, query] = src.replace(/^(.*\/)?images\//, "").split("?");
    return imageUrl(id, {
      base,
      v: new URLSearchParams(query).get("v"),
      w: atLeast(widths, width),
      q: quality && atLeast(qualities, quality),
      format,
    });
  };
}

/** The loader for a server under the site's own origin. */
export const loader = createLoader();

export default loader;
