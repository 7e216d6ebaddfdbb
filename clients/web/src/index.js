/** Images of an Afterimage server: their addresses, and their live states. */
export { WIDTHS, imageUrl, placeholderUrl, sources, srcset } from "./url.js";
export { follow, known } from "./follow.js";
export { thumbhashPixels, thumbhashUrl } from "./thumbhash.js";

/** @typedef {import("./url.js").Variant} Variant */
/** @typedef {import("./url.js").Candidates} Candidates */
/** @typedef {import("./follow.js").ImageState} ImageState */
/** @typedef {import("./follow.js").Present} Present */
/** @typedef {import("./follow.js").Absent} Absent */
/** @typedef {import("./follow.js").Following} Following */
/** @typedef {import("./follow.js").FollowOptions} FollowOptions */
