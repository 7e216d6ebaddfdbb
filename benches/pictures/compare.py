"""Bytes and SSIMULACRA2 of variants at quality 80, beside Pillow's and sharp's: compare.py URL|PROGRAM [FORMAT …]

URL is a running server that takes PUT without a token. PROGRAM is run as PROGRAM SOURCE FORMAT QUALITY PRODUCT.
The table is Markdown. A peer's column has its bytes at quality 80, and × is our size to the size that the peer needs for
our score, between two of its qualities: below 1.03 is the aim. Lossless products are compared by size alone.

Needs `pip install pillow numpy ssimulacra2`, `npm install sharp` in the folder it is started in, and photographs:
`pip download scikit-image --no-deps`, also in that folder.
"""

import argparse
import glob
import io
import json
import math
import pathlib
import subprocess
import tempfile
import urllib.request
import zipfile

from PIL import Image, ImageDraw, ImageFilter, ImageFont
from ssimulacra2 import compute_ssimulacra2

SIZE = 512
QUALITY = 80
PHOTOGRAPHS = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png"]


def photographs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name in PHOTOGRAPHS:
            picture = Image.open(io.BytesIO(archive.read(f"skimage/data/{name}"))).convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, top, left + side, top + side))
            # Pillow would store the profile, by which sharp converts the colours.
            square.info.pop("icc_profile", None)
            yield name.split(".")[0], square.resize((SIZE, SIZE), Image.LANCZOS)


def smooth(draw, mode="RGB", ground="white"):
    """Draws at four times the size, so that edges are smooth."""
    picture = Image.new(mode, (4 * SIZE, 4 * SIZE), ground)
    draw(ImageDraw.Draw(picture))
    return picture.resize((SIZE, SIZE), Image.LANCZOS)


def interface():
    picture = Image.new("RGB", (SIZE, SIZE), (248, 250, 252))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, SIZE, 44), fill=(37, 99, 235))
    draw.text((16, 12), "Dashboard", font=ImageFont.load_default(18), fill="white")
    for row, colour in enumerate([(22, 163, 74), (220, 38, 38), (234, 179, 8), (37, 99, 235)]):
        y = 60 + 108 * row
        draw.rounded_rectangle((16, y, 496, y + 96), 8, fill="white", outline=(203, 213, 225))
        draw.text((32, y + 12), f"Item number {row + 1}", font=ImageFont.load_default(15), fill=(15, 23, 42))
        line = "The quick brown fox jumps over the lazy dog"
        draw.text((32, y + 38), line, font=ImageFont.load_default(12), fill=(100, 116, 139))
        draw.rounded_rectangle((400, y + 30, 480, y + 62), 6, fill=colour)
        draw.text((418, y + 38), "Open", font=ImageFont.load_default(13), fill="white")
    return picture


def text():
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(picture)
    for row in range(30):
        line = f"{row}: lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do"
        draw.text((10, 8 + 16.7 * row), line, font=ImageFont.load_default(12), fill="black")
    return picture


def diagram(draw):
    places = [(1024 + 700 * math.cos(at * math.pi / 6), 1024 + 700 * math.sin(at * math.pi / 6)) for at in range(12)]
    for at, place in enumerate(places):
        for other in places[:at]:
            draw.line((*place, *other), fill=(120, 130, 140), width=5)
    for at, (x, y) in enumerate(places):
        colour = (90 + 10 * at, 140, 230 - 12 * at)
        draw.ellipse((x - 120, y - 120, x + 120, y + 120), fill=colour, outline="black", width=8)
        draw.text((x - 40, y - 50), str(at), font=ImageFont.load_default(90), fill="white")


def illustration(draw):
    for y in range(4 * SIZE):
        part = y / (4 * SIZE)
        draw.line((0, y, 4 * SIZE, y), fill=(int(60 + 120 * part), int(130 + 80 * part), int(220 - 40 * part)))
    for at in range(6):
        foot = 400 * at
        hill = [(foot - 300, 2048), (foot + 120, 1000 + 80 * (at % 3)), (foot + 600, 2048)]
        draw.polygon(hill, fill=(40 + 20 * at, 90 + 10 * at, 60 + 8 * at))
    draw.ellipse((1400, 200, 1760, 560), fill=(255, 230, 120))


def logo():
    def draw(draw):
        draw.ellipse((100, 100, 1900, 1900), fill=(14, 116, 144, 255))
        draw.pieslice((300, 300, 1700, 1700), 20, 200, fill=(250, 204, 21, 255))
        draw.text((500, 800), "Logo", font=ImageFont.load_default(400), fill="white")

    mark = smooth(draw, "RGBA", (0, 0, 0, 0))
    shadow = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    shadow.paste((0, 0, 0, 140), (8, 12, SIZE, SIZE), mark.getchannel("A").crop((0, 0, SIZE - 8, SIZE - 12)))
    shadow = shadow.filter(ImageFilter.GaussianBlur(8))
    shadow.alpha_composite(mark)
    return shadow


def sources(wheel):
    yield from photographs(wheel)
    yield "illustration", smooth(illustration)
    yield "diagram", smooth(diagram)
    yield "text", text()
    yield "flat interface", interface()
    yield "alpha", logo()


class Server:
    def __init__(self, url):
        self.url = url.rstrip("/")

    def encode(self, source, format, quality):
        image = f"{self.url}/images/compare:{source.stem}"
        put = urllib.request.Request(image, source.read_bytes(), {"Content-Type": "image/png"}, method="PUT")
        urllib.request.urlopen(put).close()
        # A width asks for a variant in the format of the original too. It isn't enlarged.
        with urllib.request.urlopen(f"{image}?w=3840&format={format}&q={quality}") as answer:
            return answer.read()


class Program:
    def __init__(self, path):
        self.path = path

    def encode(self, source, format, quality):
        with tempfile.NamedTemporaryFile() as product:
            subprocess.run([self.path, source, format, str(quality), product.name], check=True, stdout=subprocess.DEVNULL)
            return pathlib.Path(product.name).read_bytes()


class Sharp:
    def __init__(self):
        script = pathlib.Path(__file__).with_suffix(".mjs")
        self.node = subprocess.Popen(["node", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = json.loads(self.node.stdout.readline())

    def encode(self, source, format, quality):
        with tempfile.NamedTemporaryFile() as product:
            job = {"source": str(source), "format": format, "quality": quality, "file": product.name}
            print(json.dumps(job), file=self.node.stdin, flush=True)
            if not self.node.stdout.readline():
                raise SystemExit("sharp has ended")
            return pathlib.Path(product.name).read_bytes()


class Pillow:
    def encode(self, source, format, quality):
        picture = Image.open(source)
        if format == "jpeg":
            picture = flat(picture, "white")
        options = {
            "jpeg": {"quality": quality, "optimize": True, "subsampling": "4:4:4" if quality > 90 else "4:2:0"},
            "webp": {"quality": quality, "method": 4},
            "png": {"optimize": True},
            "avif": {"quality": quality},
        }
        product = io.BytesIO()
        picture.save(product, format, **options[format])
        return product.getvalue()


def flat(picture, ground):
    picture = picture.convert("RGBA")
    below = Image.new("RGBA", picture.size, ground)
    below.alpha_composite(picture)
    return below.convert("RGB")


def score(source, product):
    # JPEG has transparent pixels on white.
    ground = "white"
    with tempfile.TemporaryDirectory() as folder:
        one, other = f"{folder}/one.png", f"{folder}/other.png"
        flat(Image.open(source), ground).save(one, compress_level=1)
        flat(Image.open(io.BytesIO(product)), ground).save(other, compress_level=1)
        return compute_ssimulacra2(one, other)


def size_at(peer, source, format, wanted):
    """The peer's bytes at a score: between two qualities in the logarithm of the size."""
    known = {}

    def at(quality):
        if quality not in known:
            product = peer.encode(source, format, quality)
            known[quality] = (score(source, product), math.log(len(product)))
        return known[quality]

    low, high = 30, 99
    while high - low > 2:
        middle = QUALITY if not known else (low + high) // 2
        if at(middle)[0] < wanted:
            low = middle
        else:
            high = middle
    (below, size), (above, larger) = at(low), at(high)
    if not below < wanted < above:
        return None
    return math.exp(size + (larger - size) * (wanted - below) / (above - below))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours")
    parser.add_argument("formats", nargs="*", default=["webp", "jpeg", "png", "avif"])
    arguments = parser.parse_args()
    ours = Server(arguments.ours) if arguments.ours.startswith("http") else Program(arguments.ours)
    peers = {"Pillow": Pillow(), "sharp": Sharp()}
    wheels = glob.glob("scikit_image-*.whl")
    if not wheels:
        raise SystemExit("there is no wheel here: pip download scikit-image --no-deps")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, picture in sources(wheels[0]):
            files[name] = pathlib.Path(folder) / f"{name.replace(' ', '-')}.png"
            picture.save(files[name])
        for format in arguments.formats:
            print(f"\n| {format} | ours | score | Pillow | score | × | sharp | score | × |")
            print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
            for name, source in files.items():
                product = ours.encode(source, format, QUALITY)
                our_score = score(source, product)
                row = [name, f"{len(product):,}", f"{our_score:.1f}"]
                for peer in peers.values():
                    theirs = peer.encode(source, format, QUALITY)
                    their_score = score(source, theirs)
                    if format == "png":
                        same = len(theirs)
                    elif len(product) <= len(theirs) and our_score >= their_score:
                        # Better in both: no search is needed to tell.
                        same = len(theirs)
                    else:
                        same = size_at(peer, source, format, our_score)
                    row += [f"{len(theirs):,}", f"{their_score:.1f}", f"{len(product) / same:.3f}" if same else "–"]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
