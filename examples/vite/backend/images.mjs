// The backend's part: draws three images and stores them one after another, with a token.
//
//   npm run images                     all three
//   npm run images hero_abc123         this one
//
// Each run draws them in other colours, so a page that is open shows them replaced. The token is AFTERIMAGE_TOKEN, or the one
// in the file that Afterimage makes at its start, where they share a machine.
import { existsSync, readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { crc32, deflateSync } from "node:zlib";

const afterimage = new URL(process.env.AFTERIMAGE_URL ?? "http://127.0.0.1:8000");
const seconds = Number(process.env.SECONDS_BETWEEN ?? 2);
const size = 1024;

// Math.hypot is ten times slower.
const distance = (x, y) => Math.sqrt(x * x + y * y);

/** The lightness of each point of a picture, from 0 to 1. */
const concepts = {
  hero_abc123(x, y) {
    const sun = distance(x - 0.68, y - 0.42);
    let light = 0.75 - 0.45 * y + 0.5 * Math.exp(-6 * sun) + (sun < 0.13 ? 0.35 : 0);
    for (const [level, height, waves, shade] of [[0.62, 0.07, 5, 0.3], [0.74, 0.09, 3, 0.2], [0.88, 0.06, 7, 0.1]]) {
      if (y > level + height * Math.sin(waves * x + 9 * level)) light = shade + 0.1 * (1 - y);
    }
    return light;
  },
  logo_def456(x, y) {
    const radius = distance(x - 0.5, y - 0.5);
    const angle = Math.atan2(y - 0.5, x - 0.5);
    const ring = Math.exp(-(((radius - 0.27 - 0.02 * Math.sin(3 * angle)) / 0.035) ** 2));
    return 0.08 + 0.8 * ring * (0.6 + 0.4 * Math.sin(angle + 1)) + 0.55 * Math.exp(-18 * radius);
  },
  photo_ghi789(x, y) {
    let light = 0.12 + 0.12 * y;
    for (let lamp = 0; lamp < 14; lamp += 1) {
      const away = distance(x - ((lamp * 0.381) % 1), y - 0.15 - ((lamp * 0.617) % 0.7));
      const radius = 0.04 + 0.05 * ((lamp * 0.73) % 1);
      light += 0.32 / (1 + Math.exp(220 * (away - radius)));
    }
    return Math.min(light, 1);
  },
};

/** A PNG of a drawing in a random colour, with a grain like film's: about 1.5 MB, as from an image model. */
function png(shade) {
  const hue = Math.random();
  const tint = [0, 1, 2].map((part) => 0.45 + 0.55 * (0.5 + 0.5 * Math.cos(2 * Math.PI * (hue + part / 3))));
  const grain = Float32Array.from({ length: (size / 4) ** 2 }, () => 0.11 * (Math.random() - 0.5));
  const rows = Buffer.alloc(size * (1 + 3 * size));
  let at = 0;
  for (let y = 0; y < size; y += 1) {
    rows[at++] = 1; // Each byte is the difference to the pixel on its left.
    const left = [0, 0, 0];
    for (let x = 0; x < size; x += 1) {
      const light = shade(x / size, y / size) + grain[(y >> 2) * (size / 4) + (x >> 2)];
      for (const part of [0, 1, 2]) {
        const colour = light * tint[part] + 0.35 * light ** 3 + 0.02 * (Math.random() - 0.5);
        const now = Math.round(255 * Math.min(Math.max(colour, 0), 1));
        rows[at++] = now - left[part];
        left[part] = now;
      }
    }
  }
  const header = Buffer.alloc(13);
  header.writeUInt32BE(size, 0);
  header.writeUInt32BE(size, 4);
  header.set([8, 2, 0, 0, 0], 8);
  const chunks = [["IHDR", header], ["IDAT", deflateSync(rows)], ["IEND", Buffer.alloc(0)]].map(([name, data]) => {
    const chunk = Buffer.concat([Buffer.alloc(4), Buffer.from(name), data, Buffer.alloc(4)]);
    chunk.writeUInt32BE(data.length, 0);
    chunk.writeUInt32BE(crc32(chunk.subarray(4, -4)), chunk.length - 4);
    return chunk;
  });
  return Buffer.concat([Buffer.from("\x89PNG\r\n\x1a\n", "latin1"), ...chunks]);
}

/** The token that may write, and where it is from. */
function token() {
  if (process.env.AFTERIMAGE_TOKEN) return { from: "AFTERIMAGE_TOKEN", token: process.env.AFTERIMAGE_TOKEN };
  const { XDG_RUNTIME_DIR: run, XDG_STATE_HOME: state, XDG_DATA_HOME: data } = process.env;
  // With Redis the first of these that is set; with the embedded store the last one.
  const folders = [run ?? state ?? join(homedir(), ".local/state"), data ?? join(homedir(), ".local/share")];
  const files = folders.map((folder) => join(folder, "afterimage", `write-token-${afterimage.port || 80}`));
  const from = files.find((file) => existsSync(file));
  if (!from) throw new Error(`AFTERIMAGE_TOKEN must be a token that may write: there is no ${files.join(" and no ")}`);
  return { from, token: readFileSync(from, "utf8").trim() };
}

const writer = token();
const wanted = process.argv.slice(2);
for (const [number, id] of (wanted.length ? wanted : Object.keys(concepts)).entries()) {
  if (!concepts[id]) throw new Error(`no image ${id}: there are ${Object.keys(concepts).join(", ")}`);
  if (number > 0) await pause(1000 * seconds);
  const body = png(concepts[id]);
  const headers = { Authorization: `Bearer ${writer.token}`, "Content-Type": "image/png" };
  const answer = await fetch(new URL(`/images/${id}?ttl=2h`, afterimage), { method: "PUT", headers, body });
  if (!answer.ok) throw new Error(`${id} isn't stored, with the token of ${writer.from}: ${await answer.text()}`);
  console.log(`${id} stored, ${(body.length / 1e6).toFixed(1)} MB, version ${answer.headers.get("etag")}`);
}
