/** A decoder for ThumbHash, written from its published algorithm (Evan Wallace, https://evanw.github.io/thumbhash, MIT). */

/**
 * Returns a blurred preview of at most 32×32 pixels as a `data:` URL, or undefined if the text is no ThumbHash. It is drawn on a canvas, so it
 * needs a page.
 *
 * @param {string | null | undefined} base64 ThumbHash, as in `thumbhash` of an event or of `/images/{id}/info`.
 * @returns {string | undefined}
 */
export function thumbhashUrl(base64) {
  try {
    if (!base64) return;
    const { width, height, rgba } = thumbhashPixels(Uint8Array.from(atob(base64), (it) => it.charCodeAt(0)));
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d")?.putImageData(new ImageData(Uint8ClampedArray.from(rgba), width), 0, 0);
    return canvas.toDataURL();
  } catch {
    return undefined;
  }
}

/**
 * Decodes a ThumbHash. The values of pixels may lie outside of 0 to 255, and are to be clamped.
 *
 * @param {Uint8Array} hash
 * @returns {{ width: number, height: number, rgba: number[] }}
 */
export function thumbhashPixels(hash) {
  const header = hash[0] | (hash[1] << 8) | (hash[2] << 16);
  const header2 = hash[3] | (hash[4] << 8);
  const alpha = header >> 23;
  // Terms along the longer side, and along the shorter one.
  const long = alpha ? 5 : 7;
  const short = header2 & 7;
  const [lx, ly] = header2 >> 15 ? [long, short] : [short, long];
  const ratio = lx / ly;
  const width = Math.round(ratio > 1 ? 32 : 32 * ratio);
  const height = Math.round(ratio > 1 ? 32 / ratio : 32);

  let nibble = alpha ? 12 : 10;
  /**
   * Reads the terms of a channel, and returns its value at a point.
   *
   * @param {number} nx @param {number} ny @param {number} dc @param {number} scale
   * @returns {(x: number, y: number) => number}
   */
  const channel = (nx, ny, dc, scale) => {
    /** @type {[number, number, number][]} */
    const terms = [];
    for (let cy = 0; cy < ny; cy++)
      for (let cx = cy ? 0 : 1; cx * ny < nx * (ny - cy); cx++, nibble++)
        terms.push([cx, cy, (((hash[nibble >> 1] >> ((nibble & 1) * 4)) & 15) / 7.5 - 1) * scale * 2]);
    return (x, y) => terms.reduce((sum, [cx, cy, ac]) => sum + ac * Math.cos(x * cx) * Math.cos(y * cy), dc);
  };
  const channels = [
    channel(Math.max(3, lx), Math.max(3, ly), (header & 63) / 63, ((header >> 18) & 31) / 31),
    channel(3, 3, ((header >> 6) & 63) / 31.5 - 1, (((header2 >> 3) & 63) / 63) * 1.25),
    channel(3, 3, ((header >> 12) & 63) / 31.5 - 1, (((header2 >> 9) & 63) / 63) * 1.25),
    alpha ? channel(5, 5, (hash[5] & 15) / 15, (hash[5] >> 4) / 15) : () => 1,
  ];

  /** @type {number[]} */
  const rgba = [];
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++) {
      const [light, yellow, red, opaque] = channels.map((it) => it((Math.PI / width) * (column + 0.5), (Math.PI / height) * (row + 0.5)));
      const b = light - (2 / 3) * yellow;
      const r = (3 * light - b + red) / 2;
      rgba.push(...[r, r - red, b, opaque].map((it) => 255 * it));
    }
  return { width, height, rgba };
}
