import { follow, known } from "./follow.js";
import { thumbhashUrl } from "./thumbhash.js";
import { placeholderUrl, sources } from "./url.js";

/**
 * @typedef {object} DisplayOptions
 * @property {string} id
 * @property {string} [base]
 * @property {string | null} [v] Version that is shown until the current one is known.
 * @property {string | null} [thumbhash] Preview until the image is known.
 * @property {string} [sizes]
 * @property {readonly number[]} [widths]
 * @property {import("./url.js").Variant["format"]} [format]
 * @property {number} [q]
 * @property {boolean} [placeholder]
 * @property {boolean} [keep]
 * @property {number | string | null} [width]
 * @property {number | string | null} [height]
 * @property {string} [aspectRatio]
 */

/** Stands in for an image, so that the room is kept and no broken image is drawn. */
export const EMPTY = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>";

/**
 * Returns the attributes for a version.
 *
 * @param {DisplayOptions} options
 * @param {string} v
 * @param {boolean} [auto] True for a lazy image whose room doesn't depend on it: the browser then measures the room.
 * @param {number | null} [natural]
 */
export const attributes = (options, v, auto, natural) => {
  const { id, format = "auto", width, sizes = (auto ? "auto, " : "") + (Number(width) ? `(max-width:${width}px) 100vw, ${width}px` : "100vw") } = options;
  return sources(id, { ...options, format, sizes, v, natural });
};

/**
 * Shows an image in an `<img>`, live, until `close` is called. `box` gets the preview as its background, the aspect ratio as
 * `--after-image-ratio`, the width as `--after-image-width`, and `data-state`: `waiting` while there is no image, then `loading`, `shown` or `failed`.
 *
 * @param {HTMLImageElement} img
 * @param {HTMLElement} box
 * @param {DisplayOptions} options
 * @param {(state: import("./follow.js").ImageState) => void} [changed]
 */
export function display(img, box, options, changed) {
  const { id, base, aspectRatio } = options;
  const [width, height] = [options.width, options.height].map(Number);
  /** State of the image; an absent one has no version. @type {Partial<import("./follow.js").Present> | undefined} */
  let image = /** @type {any} */ (known(id, options));
  /** Version in the `<img>`. @type {string | undefined} */
  let shown;
  /** Version that is being decoded. @type {string | undefined} */
  let next;
  let failures = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;

  const preview = (/** @type {string | null} */ url = null) => (box.style.backgroundImage = url ? `url("${url}")` : "");
  const enter = (/** @type {string} */ state) => {
    box.dataset.state = state;
    box.style.backgroundColor = state === "shown" ? "" : "var(--after-image-skeleton, #8883)";
  };

  const standIn = (/** @type {boolean | undefined} */ drawn) => {
    const across = width || box.clientWidth;
    img.srcset = "";
    img.src = drawn ? placeholderUrl(across, height || box.clientHeight || across, { base }) : EMPTY;
  };

  /** @param {string} version */
  const show = (version) => {
    const { src, srcset, sizes = "" } = attributes(options, version, img !== box && img.loading === "lazy", image?.width);
    const first = !shown;
    shown = version;
    next = undefined;
    if (img.srcset === srcset && img.sizes === sizes) {
      // It was there before this script.
      if (img.complete) img.naturalWidth ? loaded() : failed();
      return;
    }
    if (first) {
      preview(thumbhashUrl(image?.thumbhash ?? options.thumbhash) ?? image?.thumbnail);
      enter("loading");
    }
    img.sizes = sizes;
    img.srcset = srcset;
    img.src = src;
  };

  const update = () => {
    clearTimeout(timer);
    const version = image ? image.v : options.v;
    const known = aspectRatio ?? (width && height ? `${width}/${height}` : image?.width && `${image.width}/${image.height}`);
    if (known) box.style.setProperty("--after-image-ratio", known);

    if (!version) {
      // What the page has put there stays until the state is known.
      if (image ? shown && options.keep : (img.getAttribute("src") ?? EMPTY) !== EMPTY) return;
      shown = next = undefined;
      preview(thumbhashUrl(options.thumbhash));
      enter("waiting");
      standIn(options.placeholder);
    } else if (!shown || shown === version || box.dataset.state !== "shown") show(version);
    else {
      next = version;
      // The same picture of the new version is decoded before it is swapped in, so that nothing flashes. If that fails, so does the swap.
      const picture = new Image();
      picture.src = img.currentSrc.replace(/\bv=[^&]*$/, `v=${version}`);
      const swap = () => next === version && show(version);
      picture.decode().then(swap, swap);
    }
  };

  const loaded = async () => {
    if (!img.srcset) return;
    failures = 0;
    enter("shown");
    await Promise.allSettled(img.getAnimations().map(({ finished }) => finished));
    // It would be seen through a transparent image.
    if (box.dataset.state === "shown") preview();
  };
  const failed = () => {
    // The placeholder failed as well.
    if (!img.srcset) return img.getAttribute("src") === EMPTY || standIn(false);
    enter("failed");
    standIn(true);
    timer = setTimeout(update, 1000 * Math.min(60, 2 ** ++failures));
  };

  box.style.setProperty("--after-image-width", width ? `${width}px` : "");
  img.decoding = "sync";
  img.addEventListener("load", loaded);
  img.addEventListener("error", failed);
  const following = follow(
    id,
    (state) => {
      image = /** @type {any} */ (state);
      changed?.(state);
      update();
    },
    options,
  );
  update();
  return () => {
    following.close();
    clearTimeout(timer);
    next = undefined;
    img.removeEventListener("load", loaded);
    img.removeEventListener("error", failed);
  };
}
