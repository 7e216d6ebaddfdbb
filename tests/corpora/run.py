#!/usr/bin/env python3
"""Writes the pictures that other projects are tested with, and compares what is served of them with Pillow and Chromium.

    target/python/bin/python tests/corpora/run.py [--before PROGRAM] [--only TEXT] [--pixels MOST] [FOLDER...]

A FOLDER has a folder for each project; by default they are target/corpus and target/corpora, which tests/run.sh and
tests/corpora/fetch.sh fetch. The program is AFTERIMAGE_TEST_PROGRAM, or target/debug/afterimage. With --before the same is done with
another build, whose figures stand beside the others. With --only files are taken whose name has TEXT, and with --pixels those that
have at most MOST pixels, since a build without optimisation takes minutes for large ones.

Each file is written to a Redis of its own, and asked for in six ways:

    as it is         the same bytes, with the type that its signature tells
    in PNG           at full size: each pixel is compared with Pillow's (of JPEG XL, with that of djxl), and where Pillow can't read
                     it or differs, with Chromium's
    format=auto      never more bytes than the file has
    /info, /thumbnail, format=webp&w=128

The exit code is 1 if any of these fails, if a picture is nearer than 40 dB to neither, or if one is refused that Pillow reads; unless
known.toml names the file with a reason. All figures are in target/corpora.json: a line for each file as soon as it is known, and
one for each comparison with Chromium.
"""

import argparse
import base64
import collections
import fnmatch
import http.client
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis
from PIL import Image, ImageCms, ImageOps, ImageSequence

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/pixels"))
from reference import distance  # noqa: E402

# No eye sees a smaller difference.
NEAR = 40.0
# Longest time that Pillow has for a file, which may be made to take for ever.
PATIENCE = 60
# Wider pictures are asked for, and compared, at this width: a width makes a variant even of a PNG.
WIDEST = 3840
CHROME = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
# In the answer for a picture that is longer than WebP can be.
ROOM = b"pixels a side"
ENDINGS = set("apng avif avifs bmp gif heic heif hif ico jfif jpeg jpg jxl png svg tif tiff webp".split())
# The signatures of each type, told independently of the program.
SIGNATURES = [
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"RIFF....WEBPVP8", "image/webp"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n", "image/jxl"),
    (rb"....ftyp(avif|avis|mif1....(mif1)?avif)", "image/avif"),
    (rb"....ftyp(....)*?(he[iv][cmsx]|mif1|msf1)", "image/heic"),
    (rb"II[*+]\x00|MM\x00[*+]", "image/tiff"),
    (rb"BM", "image/bmp"),
    (rb"\x00\x00\x01\x00", "image/vnd.microsoft.icon"),
]


def type_of(path, data):
    for signature, media_type in SIGNATURES:
        if re.match(signature, data, re.DOTALL):
            return media_type
    return "image/svg+xml" if path.suffix.lower() == ".svg" else None


class Server:
    """A build of the program on a Redis of its own, both on free ports."""

    def __init__(self, program):
        self.folder = tempfile.TemporaryDirectory()
        path = f"{self.folder.name}/redis.sock"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        redis_server = ["redis-server", "--port", str(port), "--unixsocket", path, "--save", "", "--dir", self.folder.name]
        self.redis_server = subprocess.Popen(redis_server, **silent)
        self.redis = redis.Redis(unix_socket_path=path)
        for _ in range(600):
            try:
                self.redis.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        environment = {name: text for name, text in os.environ.items() if not name.startswith("AFTERIMAGE_")}
        # A busy machine isn't a fault.
        flags = ["--http-listen", "127.0.0.1:0", "--redis-url", f"redis://127.0.0.1:{port}", "--pictures-timeout", "120s"]
        self.program = subprocess.Popen([program, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        first = self.program.stdout.readline().decode()
        threading.Thread(target=self.program.stdout.read, daemon=True).start()
        found = re.search(r"://([\d.]+):(\d+)/", first)
        if not found:
            sys.exit(f"{program} doesn't start: {first}")
        self.address = found[1], int(found[2])

    def get(self, path, accept="*/*"):
        connection = http.client.HTTPConnection(*self.address, timeout=180)
        connection.request("GET", path, headers={"accept": accept})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, answer.getheader("content-type", ""), body

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in (self.program, self.redis_server):
            process.terminate()
            process.wait()
        self.folder.cleanup()


def by_djxl(data):
    """A JPEG XL as PNG, with its profile, or its first frame."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in.jxl").write_bytes(data)
        made = subprocess.run(["djxl", "in.jxl", "out.png"], cwd=folder, capture_output=True, text=True)
        pictures = sorted(Path(folder).glob("*.png"))
        if made.returncode or not pictures:
            raise OSError(made.stderr.strip().splitlines()[-1:])
        return pictures[0].read_bytes()


def expected(data, intent=ImageCms.Intent.PERCEPTUAL):
    """The picture as Pillow reads it: its first frame, upright, in sRGB."""
    is_jxl = type_of(Path(), data) == "image/jxl"
    if is_jxl:
        data = by_djxl(data)
    with Image.open(io.BytesIO(data)) as opened:
        im = next(iter(ImageSequence.Iterator(opened))) if opened.format != "ICO" else opened
        im.load()
        profile = im.info.get("icc_profile")
        names = {"exif", "xmp", "XML:com.adobe.xmp"}
        metadata = not is_jxl and (bool(opened.getexif()) or bool(opened.info.keys() & names))
        # What djxl makes is upright, and has the EXIF all the same.
        im = im.copy() if is_jxl else ImageOps.exif_transpose(im)
    if im.mode.startswith("I;16"):
        high = slice(0, None, 2) if im.mode.endswith("B") else slice(1, None, 2)
        im = Image.frombytes("L", im.size, im.tobytes()[high])
    alpha = im.convert("RGBA").getchannel("A") if im.has_transparency_data else None
    if im.mode in ("LA", "La"):
        im = im.convert("L")
    elif im.mode not in ("L", "CMYK"):
        im = im.convert("RGB")
    if profile:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == {"L": "GRAY"}.get(im.mode, im.mode):
            srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
            im = ImageCms.profileToProfile(im, source, srgb, renderingIntent=intent, outputMode="RGB")
    im = im.convert("RGB")
    if alpha:
        im.putalpha(alpha)
    if im.width > WIDEST:
        im = im.resize((WIDEST, max(1, round(im.height * WIDEST / im.width))), Image.Resampling.LANCZOS)
    im.info["metadata"] = metadata
    return im


def measure(data, product):
    """Returns whether Pillow reads the file, and the PSNR of the product."""
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    Image.MAX_IMAGE_PIXELS = None
    try:
        wanted = expected(data)
    except Exception as error:
        return {"pillow": f"{type(error).__name__}: {error}"[:200]}
    read = {"pillow": "reads", "metadata": wanted.info["metadata"]}
    if product is None:
        return read
    shown = Image.open(io.BytesIO(product))
    shown.load()
    if shown.size != wanted.size:
        return {**read, "psnr": 0.0, "sizes": f"{shown.size}, Pillow has {wanted.size}"}
    # A profile of inks has a table for each intent, and none is the right one.
    by_other_intent = expected(data, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    return {**read, "psnr": max(distance(shown, it)[1] for it in (wanted, by_other_intent))}


def measure_apart(data, product):
    """The same in a process of its own: a file may end it, or take it for ever."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: there.send(measure(data, product)))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(PATIENCE) else {"pillow": "takes too long"}
    except EOFError:
        return {"pillow": "crashes"}
    finally:
        process.kill()
        process.join()
        here.close()


def is_small(path, most):
    """True if a picture has no more pixels, as far as Pillow can tell."""
    try:
        with Image.open(path) as im:
            return im.width * im.height <= most
    except Exception:
        return path.stat().st_size <= most


def examine(server, number, name, path, products, report):
    try:
        result = examine_file(server, number, path, products)
    except Exception as error:
        result = {"type": None, "outcome": "failed", "faults": [repr(error)]}
    report.write(json.dumps({"file": name, **result}) + "\n")
    return name, result


def examine_file(server, number, path, products):
    data = path.read_bytes()
    media_type = type_of(path, data)
    result = {"type": media_type, "faults": []}
    url = f"/images/corpus_{number}"
    server.redis.set(f"image:corpus_{number}", json.dumps({"base64_data": base64.b64encode(data).decode()}))

    def ask(end, accept="*/*"):
        status, told, body = server.get(url + end, accept)
        if status >= 500:
            result["faults"].append(f"{end or 'the file'}: {status} {body[:300].decode(errors='replace')}")
        return status, told, body

    status, told, body = server.get(url)
    if status == 502:
        # No image. Is it one?
        result |= {"outcome": "no image", **measure_apart(data, None)}
    else:
        if (status, body) != (200, data) or told != media_type:
            result["faults"].append(f"the file: {status} {told}, {len(body)} bytes")
        status, told, product = ask(f"?format=png&w={WIDEST}" if media_type == "image/png" else "?format=png")
        webp_status, webp_type, webp = ask("?format=webp&w=128")
        if status == 200 and media_type != "image/png" and png_width(product) > WIDEST:
            status, told, product = ask(f"?format=png&w={WIDEST}")
        made_both = status == 200 and (webp_status, webp_type) == (200, "image/webp")
        # A PNG that can't be decoded is passed on as PNG.
        made = made_both or status == 200 and (media_type != "image/png" or ROOM in webp)
        result["outcome"] = "made" if made else "refused"
        if not made:
            result["detail"] = json.loads(product if status != 200 else webp)["detail"]
        elif not made_both and ROOM not in webp:
            result["faults"].append(f"format=webp&w=128: {webp_status} {webp_type} {webp[:200]}")
        result |= measure_apart(data, product if made else None)
        if made and result.get("psnr", 0) < NEAR:
            (products / f"{number}.png").write_bytes(product)
        status, told, body = ask("?format=auto", CHROME)
        # Metadata that can't be removed from a file are left out of another one, and Chromium doesn't name JPEG XL.
        is_inseparable = result.get("metadata") and media_type in ("image/avif", "image/tiff")
        is_another = told != media_type and (is_inseparable or media_type == "image/jxl")
        if status != 200 or len(body) > len(data) and not is_another:
            result["faults"].append(f"format=auto: {status} {told}, {len(body)} bytes of {len(data)}")
        # The thumbnail first, which makes most of what /info tells.
        for end in ("/thumbnail", "/info"):
            status, told, _ = ask(end)
            if status != 200:
                result["faults"].append(f"{end}: {status}")
    server.redis.delete(f"image:corpus_{number}")
    return result


def png_width(data):
    return int.from_bytes(data[16:20])


def compare_with_chromium(files, results, products, report):
    pairs = []
    for number, (name, path) in enumerate(files):
        if (products / f"{number}.png").exists():
            original = f"{number}.original.{results[name]['type'].split('/')[1].split('+')[0]}"
            shutil.copy(path, products / original)
            pairs.append({"original": original, "product": f"{number}.png", "name": name})
    if not pairs:
        return
    (products / "list.json").write_text(json.dumps(pairs))
    script = ["node", ROOT / "tests/pixels/colours.mjs", ROOT / "target/browser", shutil.which("chromium"), products]
    compared = subprocess.run(script, stdout=subprocess.PIPE, check=True)
    for pair, shown in zip(pairs, json.loads(compared.stdout), strict=True):
        figure = results[pair["name"]]["chromium"] = shown.get("failure") or shown["psnr"]
        report.write(json.dumps({"file": pair["name"], "chromium": figure}) + "\n")


def examine_all(program, files, report):
    report.write(json.dumps({"program": str(program)}) + "\n")
    with Server(program) as server, tempfile.TemporaryDirectory() as products:
        products, results = Path(products), {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tasks = [pool.submit(examine, server, number, *file, products, report) for number, file in enumerate(files)]
            for count, task in enumerate(tasks, 1):
                name, results[name] = task.result()
                if count % 100 == 0:
                    print(f"{count} of {len(files)}", file=sys.stderr)
        compare_with_chromium(files, results, products, report)
    return results


def near(result):
    figures = result.get("psnr"), result.get("chromium")
    return max((it for it in figures if isinstance(it, float | int)), default=0.0)


def complaint(result):
    """Returns what is wrong with a file, as a line for people; None if nothing is."""
    pillow = f"{result['psnr']:.1f} dB" if "psnr" in result else result.get("pillow", "")
    if result["faults"]:
        return "; ".join(result["faults"])
    if result["outcome"] != "made":
        return f"{result['outcome']}: {result.get('detail', '')}" if result.get("pillow") == "reads" else None
    if near(result) >= NEAR or ("psnr" not in result and not isinstance(result.get("chromium"), float | int)):
        return None
    chromium = result.get("chromium")
    chromium = f"{chromium:.1f} dB" if isinstance(chromium, float | int) else chromium
    return f"Pillow {pillow} {result.get('sizes', '')}, Chromium {chromium}"


COLUMNS = ["files", "no image", "refused", "… Pillow reads", "variant made", "≥ 40 dB", "below", "… named", "nobody reads it"]


def row(names, results, named):
    them = [(name, results[name]) for name in names]
    made = [(name, it) for name, it in them if it["outcome"] == "made"]
    below = [(name, it) for name, it in made if near(it) < NEAR and complaint({**it, "faults": []})]
    count = collections.Counter(it["outcome"] for _, it in them)
    refused_but_read = sum(it["outcome"] == "refused" and it.get("pillow") == "reads" for _, it in them)
    good = sum(near(it) >= NEAR for _, it in made)
    return [len(them), count["no image"], count["refused"], refused_but_read, len(made), good, len(below),
            sum(name in named for name, _ in below), len(made) - good - len(below)]


def table(title, key, results, named, before):
    groups = collections.defaultdict(list)
    for name, result in results.items():
        groups[key(name, result)].append(name)
    print(f"\n| {title} | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for group, names in [*sorted(groups.items()), ("all", list(results))]:
        now = row(names, results, named)
        if before:
            then = row(names, before, named)
            now = [f"{one} → {other}" if one != other else one for one, other in zip(then, now)]
        print(f"| {group} | " + " | ".join(map(str, now)) + " |")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--before")
    parser.add_argument("--only", default="")
    parser.add_argument("--pixels", type=int, default=1 << 60)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "target/corpus", ROOT / "target/corpora"])
    given = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    files = [
        (str(path.relative_to(folder)), path)
        for folder in given.folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix[1:].lower() in ENDINGS and given.only in str(path.relative_to(folder))
        and is_small(path, given.pixels)
    ]
    if not files:
        sys.exit("no pictures: run tests/corpora/fetch.sh target/corpora")
    program = os.environ.get("AFTERIMAGE_TEST_PROGRAM", ROOT / "target/debug/afterimage")
    # By lines, so that it can be read while files are examined.
    report = open(ROOT / "target/corpora.json", "w", buffering=1)
    before = examine_all(given.before, files, report) if given.before else None
    results = examine_all(program, files, report)

    known = tomllib.loads((Path(__file__).parent / "known.toml").read_text())["known"]
    reasons = {
        name: it["reason"] for name in results for it in known for glob in it["files"] if fnmatch.fnmatch(name, glob)
    }
    wrong = {name: line for name in results if (line := complaint(results[name]))}
    table("corpus", lambda name, _: name.split("/")[0], results, reasons, before)
    table("type", lambda _, it: it["type"] or "none", results, reasons, before)
    for title, is_named in (("Named in known.toml", True), ("Wrong", False)):
        lines = [f"{name}: {line}" for name, line in sorted(wrong.items()) if (name in reasons) == is_named]
        print(f"\n{title}: {len(lines)}\n" + "\n".join(lines))
    unread = [name for name, it in results.items() if it["outcome"] == "made" and not near(it) and name not in wrong]
    print("\nMade, and read by neither: " + ", ".join(unread))
    unnecessary = [name for name in reasons if name not in wrong]
    if unnecessary:
        print("\nNamed in known.toml, but right: " + ", ".join(unnecessary))
    sys.exit(1 if wrong.keys() - reasons.keys() else 0)


if __name__ == "__main__":
    main()
