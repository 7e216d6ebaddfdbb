import assert from "node:assert/strict";
import test from "node:test";
import { createElement } from "react";
import { renderToString } from "react-dom/server";
import { imageUrl } from "../src/index.js";
import { AfterImage, useImage } from "../src/react.js";
import loader from "../src/next.js";
import "../src/element.js";

test("a server imports every module and renders the component and the hook", () => {
  assert.equal(typeof globalThis.window, "undefined");
  const State = () => createElement("output", null, useImage("hero")?.state ?? "unknown");
  const v = "0".repeat(32);
  const html = renderToString(createElement("main", null, createElement(AfterImage, { id: "hero", v, alt: "a lighthouse", width: 400, height: 300 }), createElement(State)));
  assert.match(html, /srcSet="\/images\/hero\?w=256&amp;format=auto&amp;v=0{32} 256w,/i);
  assert.match(html, /<output>unknown<\/output>/);
  // Without a version, the server doesn't know any image.
  assert.match(renderToString(createElement(AfterImage, { id: "hero", alt: "" })), /src="data:image\/svg\+xml,/);
  assert.equal(loader({ src: `hero?v=${v}`, width: 250 }), imageUrl("hero", { w: 256, format: "auto", v }));
});
