import type { AfterImageElement } from "afterimage-web/element";

/** Properties of `<after-image>`. Each reflects an attribute: `src-id` is `srcId`. */
export interface AfterImageProperties {
  srcId: string | null;
  base: string | null;
  v: string | null;
  thumbhash: string | null;
  sizes: string | null;
  widths: string | null;
  width: string | number | null;
  height: string | number | null;
  aspectRatio: string | null;
  format: string | null;
  q: string | number | null;
  alt: string | null;
  fetchpriority: string | null;
  loading: string | null;
  placeholder: boolean;
  keep: boolean;
}

declare global {
  interface HTMLElementTagNameMap {
    "after-image": AfterImageElement & AfterImageProperties;
  }
}
