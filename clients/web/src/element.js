/// <reference path="./globals.d.ts" preserve="true" />
/**
 * `<after-image src-id="hero" alt="…">`: an image that shows a preview, loads in the right size, and is replaced live. Importing this
 * file registers the element.
 *
 * It has no shadow root. It holds one `<img>`, which the page's styles, `document.images` and extensions see as any other, and which
 * the page may bring along for browsers without scripts.
 */
import { display } from "./display.js";

/** Attributes that are set on the `<img>` as they are. */
const PASSED = ["alt", "fetchpriority", "loading"];

/** Attributes without a value. */
const FLAGS = ["placeholder", "keep"];

/** Each attribute, and the property that reflects it: `src-id`, `srcId`. */
const ATTRIBUTES = ["src-id", "base", "v", "thumbhash", "sizes", "widths", "width", "height", "aspect-ratio", "format", "q", ...PASSED, ...FLAGS].map(
  (name) => [name, name.replace(/-./g, (it) => it[1].toUpperCase())],
);

// `:where` has no specificity, so any rule of the page wins. The colour behind an image changes with the state: `--after-image-skeleton`.
const STYLE = `:where(after-image){display:block;max-width:var(--after-image-width);aspect-ratio:var(--after-image-ratio,1);background:center/cover}
after-image>img{display:block;width:100%;height:100%}
:where(after-image>img){object-fit:cover}
@media(prefers-reduced-motion:no-preference){:where(after-image>img){transition:opacity .3s}:where(after-image[data-state=loading]>img){opacity:0}}`;

/** @type {CSSStyleSheet | undefined} */
let sheet;

const Base = /** @type {typeof HTMLElement} */ (globalThis.HTMLElement ?? class {});

/** Fires `statechange`, with the state of the image as its `detail`, when the image appears, changes or goes. */
export class AfterImageElement extends Base {
  static observedAttributes = ATTRIBUTES.map(([name]) => name);

  /** @type {HTMLImageElement | undefined} */
  #img;

  /** Last state that an event was fired for. @type {import("./follow.js").ImageState | undefined} */
  #state;

  /** @type {(() => void) | undefined} */
  #close;

  connectedCallback() {
    const root = /** @type {Document | ShadowRoot} */ (this.getRootNode());
    if (!sheet) (sheet = new CSSStyleSheet()).replaceSync(STYLE);
    if (!root.adoptedStyleSheets.includes(sheet)) root.adoptedStyleSheets.push(sheet);
    this.#img ??= this.querySelector("img") ?? this.appendChild(document.createElement("img"));
    if (!this.hasAttribute("alt") && !this.#img.alt) console.warn('<after-image> needs `alt`; "" for decoration', this);
    this.#start();
  }

  disconnectedCallback() {
    this.#close?.();
  }

  /** @param {string} name @param {string | null} before @param {string | null} now */
  attributeChangedCallback(name, before, now) {
    if (!this.#img || !this.isConnected || before === now) return;
    if (/^(src-id|base)$/.test(name)) for (const it of ["src", "srcset"]) this.#img.removeAttribute(it);
    this.#start();
  }

  #start() {
    this.#close?.();
    const img = /** @type {HTMLImageElement} */ (this.#img);
    for (const name of PASSED) {
      const value = this.getAttribute(name) ?? img.getAttribute(name) ?? (name === "loading" && "lazy");
      if (value !== false) img.setAttribute(name, value);
    }
    /** @type {Record<string, any>} */
    const options = {};
    for (const [name, property] of ATTRIBUTES) options[property] = /** @type {any} */ (this)[property] ?? undefined;
    // The page may have given its `<img>` a size.
    for (const name of ["width", "height"]) options[name] ??= img.getAttribute(name);
    const { srcId: id, widths } = options;
    if (id)
      this.#close = display(img, this, { ...options, id, widths: widths?.split(/[\s,]+/).map(Number) }, (detail) => {
        // Not again after a change of attributes.
        if (this.#state !== detail) this.dispatchEvent(new CustomEvent("statechange", { detail: (this.#state = detail) }));
      });
  }
}

for (const [name, property] of ATTRIBUTES)
  Object.defineProperty(AfterImageElement.prototype, property, {
    /** @this {HTMLElement} */
    get() {
      return FLAGS.includes(name) ? this.hasAttribute(name) : this.getAttribute(name);
    },
    /** @this {HTMLElement} */
    set(value) {
      if (value == null || value === false) this.removeAttribute(name);
      else this.setAttribute(name, value === true ? "" : value);
    },
  });

globalThis.customElements?.get("after-image") ?? globalThis.customElements?.define("after-image", AfterImageElement);
