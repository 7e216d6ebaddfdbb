// Variants under load, beside a server of sharp's: node load.mjs PROGRAM [ROUNDS]
//
// PROGRAM is a build of Afterimage. 64 clients ask for each of five variants of 120 images once, in an order by chance. The servers
// take turns, each new, with nothing in memory. The table is Markdown: images a second, processor time per image, and the most
// resident memory, of the server's process. The figures are medians of the rounds (3).
//
// Needs Linux, and `npm install sharp` in the folder it is started in.

import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import http from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const sharp = createRequire(path.join(process.cwd(), "package.json"))("sharp");

const IMAGES = 120;
const CLIENTS = 64;
const VARIANTS = [
  { w: 64, format: "webp" },
  { w: 256, format: "webp" },
  { w: 512, format: "webp" },
  { w: 512, format: "jpg" },
  { w: 750, format: "webp" },
];
// Quality and effort of Afterimage's.
const OPTIONS = { webp: { quality: 80, effort: 4 }, jpg: { quality: 80 } };

/** A PNG of 1024×1024 with gradients, shapes and noise, 2.14 MB: harder than a picture of a model, which has 1.3. */
async function picture(number) {
  const [hue, x, y] = [number * 47, (number * 131) % 900, (number * 211) % 900];
  const drawn = `<svg width="1024" height="1024"><defs><linearGradient id="g" x2="1" y2="1"><stop stop-color="hsl(${hue},70%,40%)"/><stop offset="1" stop-color="hsl(${hue + 90},60%,75%)"/></linearGradient></defs>
    <rect width="1024" height="1024" fill="url(#g)"/><circle cx="${x}" cy="${y}" r="230" fill="hsl(${hue + 180},60%,50%)"/><rect x="${y}" y="${x}" width="300" height="120" fill="hsl(${hue + 30},80%,30%)"/></svg>`;
  const noise = await sharp({ create: { width: 1024, height: 1024, channels: 3, background: "black", noise: { type: "gaussian", mean: 128, sigma: 5 } } }).png().toBuffer();
  return sharp(Buffer.from(drawn)).removeAlpha().composite([{ input: noise, blend: "soft-light" }]).png().toBuffer();
}

/** The peer: variants of the files in a folder. */
function serve(folder) {
  const server = http.createServer(async (request, response) => {
    const { pathname, searchParams } = new URL(request.url, "http://localhost");
    const format = searchParams.get("format");
    const source = await readFile(path.join(folder, path.basename(pathname)));
    const made = await sharp(source).resize({ width: Number(searchParams.get("w")) }).toFormat(format, OPTIONS[format]).toBuffer();
    response.setHeader("content-type", `image/${format}`).end(made);
  });
  server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
}

/** Starts a program and waits for the address in what it prints. */
async function started(program, args) {
  const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"] });
  let printed = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (some) => (printed += some));
  for (let wait = 0; wait < 200; wait += 1) {
    const base = printed.match(/http:\/\/127\.0\.0\.1:\d+/)?.[0];
    if (base) return { base, child };
    if (child.exitCode != null) break;
    await sleep(50);
  }
  throw new Error(`${program} didn't start:\n${printed}`);
}

/** Processor time in seconds and most resident memory in MiB of a process (proc(5)). */
async function figures(pid) {
  const [stat, status] = await Promise.all(["stat", "status"].map((it) => readFile(`/proc/${pid}/${it}`, "utf8")));
  const [user, system] = stat.slice(stat.lastIndexOf(")") + 2).split(" ").slice(11, 13);
  return { cpu: (Number(user) + Number(system)) / 100, resident: Number(status.match(/VmHWM:\s+(\d+)/)[1]) / 1024 };
}

async function measured({ base, child }, addresses) {
  const agent = new http.Agent({ keepAlive: true, maxSockets: CLIENTS });
  const get = (address) =>
    new Promise((done, failed) => {
      http.get(base + address, { agent }, (response) => {
        let bytes = 0;
        response.on("data", (some) => (bytes += some.length));
        response.on("end", () => (response.statusCode === 200 ? done(bytes) : failed(new Error(`${response.statusCode} for ${address}`))));
      }).on("error", failed);
    });
  const before = await figures(child.pid);
  const begin = performance.now();
  let next = 0;
  let bytes = 0;
  const client = async () => {
    while (next < addresses.length) {
      const taken = await get(addresses[next++]);
      bytes += taken;
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, client));
  const seconds = (performance.now() - begin) / 1000;
  const after = await figures(child.pid);
  agent.destroy();
  const count = addresses.length;
  return { rate: count / seconds, cpu: ((after.cpu - before.cpu) * 1000) / count, resident: after.resident, bytes: bytes / count };
}

async function stopped({ child }) {
  child.kill("SIGTERM");
  if (child.exitCode == null && child.signalCode == null) await new Promise((done) => child.once("exit", done));
}

async function compare(program, rounds) {
  const folder = await mkdtemp(path.join(tmpdir(), "load-"));
  try {
    const pictures = await Promise.all(Array.from({ length: IMAGES }, (_, number) => picture(number)));
    await Promise.all(pictures.map((it, number) => writeFile(path.join(folder, `i${number}`), it)));
    const results = { Afterimage: [], sharp: [] };
    for (let round = 0; round < rounds; round += 1) {
      const addresses = pictures.flatMap((_, number) => VARIANTS.map(({ w, format }) => `/images/i${number}?${new URLSearchParams({ w, format })}`));
      addresses.sort(() => Math.random() - 0.5);
      const servers = {
        Afterimage: async () => {
          const flags = { "http-listen": "127.0.0.1:0", "embedded-dir": path.join(folder, `store${round}`), "log-access": "false", "writes-tokens": '["only-for-this-bench"]' };
          const server = await started(program, Object.entries(flags).map(([name, value]) => `--${name}=${value}`));
          for (const [number, body] of pictures.entries()) {
            const headers = { authorization: "Bearer only-for-this-bench", "content-type": "image/png" };
            const { status } = await fetch(`${server.base}/images/i${number}`, { method: "PUT", headers, body });
            if (status !== 201) throw new Error(`PUT: ${status}`);
          }
          return server;
        },
        sharp: () => started(process.execPath, [import.meta.filename, "serve", folder]),
      };
      for (const [name, start] of Object.entries(servers)) {
        const server = await start();
        try {
          results[name].push(await measured(server, addresses));
        } finally {
          await stopped(server);
        }
      }
    }
    const median = (name, figure) => results[name].map((it) => it[figure]).sort((a, b) => a - b)[rounds >> 1];
    const source = pictures.reduce((all, it) => all + it.length, 0) / IMAGES / 1e6;
    console.log(`${IMAGES} PNGs of ${source.toFixed(2)} MB × ${VARIANTS.length} variants, ${CLIENTS} clients, ${rounds} rounds; sharp ${sharp.versions.sharp}, libvips ${sharp.versions.vips}\n`);
    console.log("| server | images a second | CPU per image, ms | bytes per image | resident, MiB |\n|---|---:|---:|---:|---:|");
    for (const name of Object.keys(results)) {
      console.log(`| ${name} | ${median(name, "rate").toFixed(1)} | ${median(name, "cpu").toFixed(1)} | ${median(name, "bytes").toFixed(0)} | ${median(name, "resident").toFixed(0)} |`);
    }
  } finally {
    await rm(folder, { recursive: true });
  }
}

const [first, second] = process.argv.slice(2);
if (first === "serve") serve(second);
else if (first) await compare(path.resolve(first), Number(second ?? 3));
else throw new Error("expected PROGRAM [ROUNDS]");
