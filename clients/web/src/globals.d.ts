import type { AfterImageElement } from "./element.js";

declare global {
  interface HTMLElementTagNameMap {
    "after-image": AfterImageElement;
  }
}
