/**
 * Addresses of images. They have their parameters in one order, so that equal pictures have equal addresses and caches
 * keep each once.
 */

/**
 * @typedef {object} Variant
 * @property {string} [base] Address of the server, such as `https://images.example`; "" for the page's own origin.
 * @property {string | null} [v] Version or ETag, with or without quotes. Browsers keep an address with a version for a year.
 * @property {number} [w] Width in CSS pixels, one of `[pictures] widths`.
 * @property {number} [h] Height in CSS pixels, one of `[pictures] heights`.
 * @property {"contain" | "cover" | "fill"} [fit] Use of the space, with both `w` and `h`.
 * @property {number} [q] Quality, one of `[pictures] qualities`.
 * @property {number} [dpr] Factor for `w` and `h`, one of `[pictures] dprs`.
 * @property {"webp" | "avif" | "jpg" | "png" | "auto"} [format] `auto` follows the browser's `Accept`.
 * @property {"placeholder"} [fallback] Draws a placeholder where there is no image.
 */

/**
 * @typedef {object} Candidates
 * @property {readonly number[]} [widths] Widths to choose from, of `[pictures] widths`. Ignored with `w`.
 * @property {readonly number[]} [dprs] Densities to choose from, with `w` or `h`.
 * @property {number | null} [natural] Width of the image itself. Wider candidates are left out, since nothing is enlarged.
 */

/** Widths of a `srcset`, a part of the server's default `[pictures] widths`. */
export const WIDTHS = [256, 384, 640, 828, 1080, 1280, 1920, 3840];

/** Widths and heights of placeholders, in both of the server's default `[pictures]` lists. */
const SIDES = [256, 384, 640, 1080];

const ORDER = /** @type {const} */ (["w", "h", "fit", "q", "dpr", "format", "fallback", "v"]);

/** @param {string} name @param {string} value @param {RegExp} pattern @returns {string} */
function check(name, value, pattern) {
  if (pattern.test(value)) return value;
  throw new TypeError(`\`${name}\` must match ${pattern}, unlike ${value}`);
}

/**
 * Returns the id, which needs no escapes in an address.
 *
 * @param {string} id
 * @throws {TypeError} for a text that the server takes for no id
 */
export const checkId = (id) => check("id", id, /^(?!.*\.(webp|avif|jpg|png)$)\w[\w.:~-]{0,127}$/);

/** @param {string | undefined} base */
export const checkBase = (base = "") => base.replace(/\/+$/, "");

/** @param {string} path @param {[name: string, value: unknown][]} parameters */
const address = (path, parameters) =>
  [path, ...parameters.filter(([, value]) => value != null && value !== "").map(([name, value]) => `${name}=${encodeURIComponent(String(value))}`)]
    .join("&")
    .replace("&", "?");

/**
 * Returns the address of an image or of a variant.
 *
 * @param {string} id
 * @param {Variant} [variant]
 * @throws {TypeError} for a text that is no id, or no version
 */
export function imageUrl(id, variant = {}) {
  const v = variant.v && check("v", variant.v.replace(/^(W\/)?"(.*)"$/, "$2"), /^[\da-z-]+$/i);
  return address(
    `${checkBase(variant.base)}/images/${checkId(id)}`,
    ORDER.map((name) => [name, name === "v" ? v : variant[name]]),
  );
}

/**
 * Returns the first of an ascending list that is at least `size`, or the last.
 *
 * @param {readonly number[]} list
 * @param {number} size
 */
export const atLeast = (list, size) => list.find((it) => it >= size) ?? list[list.length - 1];

/**
 * Returns the address of a drawn placeholder in about this size. The server draws only the sizes on its lists.
 *
 * @param {number} width
 * @param {number} height
 * @param {{ base?: string, text?: string, bg?: string, fg?: string }} [options]
 */
export const placeholderUrl = (width, height, { base, ...drawing } = {}) =>
  address(`${checkBase(base)}/placeholders/${atLeast(SIDES, width)}x${atLeast(SIDES, height)}`, Object.entries(drawing).sort());

/**
 * Returns the attributes of an `<img>` that shows the image in the right size: by width (`640w`), or by density (`2x`) where `w` or `h` is
 * given.
 *
 * @param {string} id
 * @param {Variant & Candidates & { sizes?: string }} [options] `sizes` is the attribute's text, `100vw` by default.
 * @returns {{ src: string, srcset: string, sizes?: string }}
 */
export function sources(id, { widths = WIDTHS, dprs = [1, 2, 3], natural, sizes = "100vw", ...variant } = {}) {
  if (variant.w || variant.h)
    return {
      src: imageUrl(id, variant),
      srcset: `${dprs.map((dpr) => `${imageUrl(id, { ...variant, dpr: dpr > 1 ? dpr : undefined })} ${dpr}x`)}`,
    };
  const list = [...widths].sort((a, b) => a - b).filter((w, index, all) => !natural || !index || all[index - 1] < natural);
  const urls = list.map((w) => imageUrl(id, { ...variant, w }));
  // `src` is for previews of links and the like: neither the smallest nor the largest.
  return { src: urls[urls.length >> 1], srcset: `${urls.map((url, index) => `${url} ${list[index]}w`)}`, sizes };
}

/**
 * Returns the `srcset` of `sources`.
 *
 * @param {string} id
 * @param {Variant & Candidates} [options]
 */
export const srcset = (id, options) => sources(id, options).srcset;
