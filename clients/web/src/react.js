"use client";
/** `<AfterImage>` and `useImage` for React. */
import { createElement, forwardRef, useCallback, useEffect, useImperativeHandle, useMemo, useRef, useSyncExternalStore } from "react";
import { EMPTY, attributes, display } from "./display.js";
import { follow, known } from "./follow.js";

/** @typedef {import("./follow.js").ImageState} ImageState */

/**
 * @typedef {object} OwnProps
 * @property {string} id
 * @property {string} alt What the image shows; "" for decoration.
 * @property {string} [base] Address of the server; "" for the page's own origin.
 * @property {string | null} [v] Version that is shown until the current one is known, and in HTML from the server.
 * @property {string | null} [thumbhash] Preview until the image is known, in base64.
 * @property {readonly number[]} [widths] Widths to choose from, of `[pictures] widths`.
 * @property {import("./url.js").Variant["format"]} [format] `auto` by default.
 * @property {number} [q] Quality, one of `[pictures] qualities`.
 * @property {boolean} [placeholder] Shows a drawn placeholder while there is no image.
 * @property {boolean} [keep] Keeps the last version on show when the image is removed.
 */

/** @typedef {OwnProps & Omit<import("react").ImgHTMLAttributes<HTMLImageElement>, keyof OwnProps | "src" | "srcSet">} AfterImageProps */

/**
 * Returns the state of an image, and renders again when it changes. Undefined until the state is known, and on the server.
 *
 * @param {string} id
 * @param {import("./follow.js").FollowOptions} [options]
 * @returns {ImageState | undefined}
 */
export function useImage(id, { base } = {}) {
  return useSyncExternalStore(
    useCallback((/** @type {() => void} */ changed) => follow(id, changed, { base }).close, [id, base]),
    () => known(id, { base }),
    () => undefined,
  );
}

/**
 * An `<img>` that shows a preview, loads in the right size, and is replaced live. Other props, and `ref`, are those of `<img>`. `width` and
 * `height` reserve its room.
 */
export const AfterImage = forwardRef(
  /** @param {AfterImageProps} props @param {import("react").ForwardedRef<HTMLImageElement>} ref */
  function AfterImage({ id, base, v, thumbhash, widths, format, q, placeholder, keep, sizes, style, ...rest }, ref) {
    const img = useRef(/** @type {HTMLImageElement | null} */ (null));
    useImperativeHandle(ref, () => /** @type {HTMLImageElement} */ (img.current));
    const { width, height } = rest;
    const options = { id, base, v, thumbhash, widths, format, q, placeholder, keep, sizes, width, height };
    // React sets these once for each image. They stay the same for it, so `display` may change them.
    const first = useMemo(() => {
      const { srcset: srcSet, ...others } = v ? attributes(options, v) : { srcset: undefined, src: EMPTY };
      return { srcSet, ...others };
    }, [id, base]);
    useEffect(() => (img.current ? display(img.current, img.current, options) : undefined), [JSON.stringify(options)]);
    return createElement("img", {
      loading: "lazy",
      ...rest,
      ref: img,
      style: {
        maxWidth: "100%",
        height: "auto",
        aspectRatio: width && height ? undefined : "var(--after-image-ratio)",
        backgroundSize: "cover",
        ...style,
      },
      ...first,
      key: `${base} ${id}`,
    });
  },
);
