"""Pillow's side of tests/it/pixels.rs: source pictures and expected products.

    reference.py sources FOLDER    writes a picture of each kind that is decoded
    reference.py measure FOLDER    reads a list of cases as JSON, and prints the distance of each product

The verdict is independent of the decoders and encoders under test: Pillow (libjpeg-turbo, libwebp, libtiff, LittleCMS)
makes the sources, reads the products, and computes the expected ones by itself.
"""

import io
import json
import math
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageOps, ImageSequence, ImageStat
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Odd, so that blocks, subsampled colours and rows end in the middle of a unit.
SIZE = (193, 127)
MARK = "what stays when the light is gone"


def picture(size=SIZE):
    """Gradients, curves, edges and fine lines, without a symmetry that would hide a wrong orientation."""
    w, h = size
    red = Image.linear_gradient("L").rotate(90).resize(size)
    green = Image.radial_gradient("L").resize(size)
    blue = Image.effect_mandelbrot(size, (-2.2, -1.3, 0.8, 1.1), 40)
    im = Image.merge("RGB", (red, green, blue))
    draw = ImageDraw.Draw(im)
    draw.ellipse((w * 0.1, h * 0.15, w * 0.4, h * 0.8), fill=(250, 120, 20))
    draw.polygon([(w * 0.55, h * 0.1), (w * 0.95, h * 0.3), (w * 0.6, h * 0.7)], fill=(20, 90, 200))
    for x in range(0, w // 3, 7):
        draw.line((w - 1, x, w - 1 - x, h - 1), fill=(255, 255, 255))
    draw.rectangle((0, 0, w // 6, h // 9), fill=(0, 0, 0))
    return im


def veiled(size=SIZE):
    im = picture(size)
    im.putalpha(ImageOps.invert(Image.radial_gradient("L").resize(size)))
    return im


def red_hidden():
    """Blue on the left; on the right red that is entirely transparent."""
    im = Image.new("RGBA", SIZE, (255, 0, 0, 0))
    im.paste((0, 0, 255, 255), (0, 0, SIZE[0] // 2, SIZE[1]))
    return im


def png(path, size, depth, colour, rows, interlaced=False, before=b""):
    """A PNG of a kind that Pillow doesn't write. `rows(y)` has a row's pixels as bytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    unit = channels * depth // 8
    w, h = size
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = bytearray()
    for left, top, across, down in passes:
        for y in range(top, h, down):
            row = rows(y)
            data.append(0)
            for x in range(left, w, across):
                data += row[x * unit : (x + 1) * unit]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, int(interlaced))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
        + chunk(b"IDAT", zlib.compress(bytes(data))) + chunk(b"IEND", b"")
    )


def wide(im):
    """Repeats each byte, which gives the same value in sixteen bits."""
    data = im.tobytes()
    return lambda y: bytes(b for byte in data[y * len(data) // im.height : (y + 1) * len(data) // im.height] for b in (byte, byte))


def profile(primaries, gamma):
    """An RGB profile of three primaries and a curve (ICC.1:2001 §6.3.2)."""

    def fixed(number):
        return struct.pack(">i", round(number * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"test\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(79)
    description += bytes(-len(description) % 4)
    tags = [(b"desc", description), (b"cprt", b"text\0\0\0\0CC0\0"), (b"wtpt", xyz((0.9642, 1.0, 0.8249)))]
    tags += [(tag, xyz(values)) for tag, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)]
    tags += [(tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")]
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags:
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4s4s4s4s4s12s4s4sI4s4s8sI12s4s", start + len(body), b"none", b"\x02\x40\0\0", b"mntr", b"RGB ",
                       b"XYZ ", bytes(12), b"acsp", b"\0\0\0\0", 0, b"\0\0\0\0", b"\0\0\0\0", bytes(8), 0,
                       fixed(0.9642) + fixed(1.0) + fixed(0.8249), b"\0\0\0\0")
    return head + bytes(128 - len(head)) + table + body


# sRGB's own primaries, adapted to D50, and those of Display P3 and Adobe RGB (1998).
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
PROFILES = {
    "swapped": profile([SRGB[1], SRGB[0], SRGB[2]], 2.2),
    "p3": profile(P3, 2.2),
    "adobe": profile(ADOBE, 563 / 256),
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = MARK
    tags.get_ifd(0x8825)[1] = "N"
    tags.get_ifd(0x8825)[2] = (51.0, 28.0, 40.0)
    return tags


def sources(folder):
    rgb, rgba, grey = picture(), veiled(), picture().convert("L")
    few = rgb.quantize(200)
    clear = rgba.getchannel("A").point(lambda it: 255 if it > 90 else 0)
    holed = few.copy()
    # A value with a place in the palette: without one, browsers and Pillow differ.
    holed.putpalette(few.getpalette()[:600] + [9, 9, 9] * 56)
    holed.paste(255, mask=ImageOps.invert(clear))

    def save(name, im, **options):
        im.save(folder / name, **options)

    save("rgb.png", rgb)
    save("rgba.png", rgba)
    save("grey.png", grey)
    save("grey-alpha.png", Image.merge("LA", (grey, rgba.getchannel("A"))))
    save("palette.png", few)
    save("palette-4-bit.png", rgb.quantize(11), bits=4)
    save("palette-transparent.png", holed, transparency=bytes([255] * 100 + [128] * 155 + [0]))
    save("key.png", rgb, transparency=(0, 0, 0))
    save("grey-key.png", grey, transparency=0)
    save("1-bit.png", rgb.convert("1"))
    png(folder / "16-bit-grey.png", SIZE, 16, 0, wide(grey))
    png(folder / "16-bit-rgb.png", SIZE, 16, 2, wide(rgb))
    png(folder / "16-bit-rgba.png", SIZE, 16, 6, wide(rgba))
    data = rgba.tobytes()
    png(folder / "interlaced.png", SIZE, 8, 6, lambda y: data[y * SIZE[0] * 4 : (y + 1) * SIZE[0] * 4], interlaced=True)

    save("baseline.jpg", rgb, quality=92, subsampling=0)
    save("4-2-2.jpg", rgb, quality=92, subsampling=1)
    save("4-2-0.jpg", rgb, quality=92, subsampling=2)
    save("progressive.jpg", rgb, quality=92, subsampling=0, progressive=True)
    save("progressive-4-2-0.jpg", rgb, quality=92, subsampling=2, progressive=True)
    save("restarts.jpg", rgb, quality=92, subsampling=0, restart_marker_rows=1)
    save("grey.jpg", grey, quality=92)
    save("cmyk.jpg", rgb.convert("CMYK"), quality=92)

    save("plain.gif", few, interlace=0)
    save("interlaced.gif", few, interlace=1)
    save("transparent.gif", holed, transparency=255, interlace=0)
    save("transparent-interlaced.gif", holed, transparency=255, interlace=1)

    save("lossy.webp", rgb, quality=90)
    save("lossless.webp", rgb, lossless=True)
    save("lossy-alpha.webp", rgba, quality=90, alpha_quality=100)
    save("lossless-alpha.webp", rgba, lossless=True, exact=True)

    save("24-bit.bmp", rgb)
    save("palette.bmp", few)
    save("grey.bmp", grey)
    save("1-bit.bmp", rgb.convert("1"))

    save("rgb.tif", rgb)
    save("rgba.tif", rgba)
    save("grey.tif", grey)
    save("16-bit-grey.tif", Image.frombytes("I;16", SIZE, bytes(b for byte in grey.tobytes() for b in (byte, byte))))
    save("1-bit.tif", rgb.convert("1"))
    save("lzw.tif", rgb, compression="tiff_lzw")
    save("deflate.tif", rgb, compression="tiff_adobe_deflate")
    save("packbits.tif", rgb, compression="packbits")
    save("jpeg.tif", rgb, compression="jpeg", quality=92)
    save("cmyk.tif", rgb.convert("CMYK"))

    save("png.ico", veiled((64, 64)), sizes=[(64, 64)])
    save("bmp.ico", veiled((64, 64)), sizes=[(64, 64)], bitmap_format="bmp")
    save("many.ico", veiled((128, 128)), sizes=[(16, 16), (48, 48), (128, 128)], bitmap_format="bmp")
    opaque_icon(folder / "rgb-png.ico")

    for turn in range(1, 9):
        tags = exif(turn)
        save(f"turn-{turn}.jpg", rgb, quality=92, subsampling=0, exif=tags)
        save(f"turn-{turn}.png", rgb, exif=tags)
        save(f"turn-{turn}.webp", rgb, lossless=True, exif=tags.tobytes())
        # Pillow removes one mark.
        save(f"turn-{turn}-marked.webp", rgb, lossless=True, exif=b"Exif\0\0" + tags.tobytes())
        tiff = ImageFileDirectory_v2()
        tiff[0x0112] = turn
        save(f"turn-{turn}.tif", rgb, tiffinfo=tiff)

    for name, icc in PROFILES.items():
        save(f"{name}.png", rgb, icc_profile=icc)
        save(f"{name}-alpha.png", rgba, icc_profile=icc)
        save(f"{name}.jpg", rgb, quality=92, subsampling=0, icc_profile=icc)
        save(f"{name}.webp", rgb, lossless=True, icc_profile=icc)
        save(f"{name}.tif", rgb, icc_profile=icc)

    save("hidden.png", red_hidden())
    save("hidden.webp", red_hidden(), lossless=True, exact=True)
    save("hidden.tif", red_hidden())

    text = PngInfo()
    text.add_text("Comment", MARK)
    text.add_itxt("XML:com.adobe.xmp", f"<x:xmpmeta>{MARK}</x:xmpmeta>")
    xmp = f"<x:xmpmeta>{MARK}</x:xmpmeta>".encode()
    save("told.png", rgba, pnginfo=text, exif=exif(6), icc_profile=PROFILES["p3"], dpi=(300, 300))
    save("told.jpg", rgb, exif=exif(6), icc_profile=PROFILES["p3"], xmp=xmp, comment=MARK, dpi=(300, 300))
    save("told.webp", rgba, exif=exif(6).tobytes(), icc_profile=PROFILES["p3"], xmp=xmp)
    save("told.tif", rgb, exif=exif(6), icc_profile=PROFILES["p3"])
    save("told.gif", few, comment=MARK)

    frames = [rgba, ImageOps.mirror(rgba), ImageOps.flip(rgba)]
    flat = [few, ImageOps.mirror(few), ImageOps.flip(few)]
    save("moving.png", frames[0], save_all=True, append_images=frames[1:], duration=100)
    save("moving.gif", flat[0], save_all=True, append_images=flat[1:], duration=100, loop=0)
    save("moving.webp", frames[0], save_all=True, append_images=frames[1:], duration=100, lossless=True, exact=True)
    # The default image, which programs without animation show, is no frame.
    save("covered.png", frames[2], save_all=True, append_images=frames[:2], duration=100, default_image=True)


def opaque_icon(path):
    """An icon as favicon generators write it and Pillow doesn't: with a PNG without alpha inside."""
    data = picture((64, 64))
    inner = path.with_suffix(".inner.png")
    data.save(inner)
    body = inner.read_bytes()
    inner.unlink()
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 24, len(body), 22) + body)


def expected(path, case):
    with Image.open(path) as opened:
        im = next(iter(ImageSequence.Iterator(opened)))
        im.load()
        icc = im.info.get("icc_profile")
        im = ImageOps.exif_transpose(im)
    if im.mode.startswith("I;16"):
        high = slice(0, None, 2) if im.mode.endswith("B") else slice(1, None, 2)
        im = Image.frombytes("L", im.size, im.tobytes()[high])
    im = im.convert("RGBA" if "A" in im.getbands() or "transparency" in im.info else "RGB")
    if icc:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        source = ImageCms.getOpenProfile(io.BytesIO(icc))
        if source.profile.xcolor_space.strip() == "RGB":
            im = ImageCms.profileToProfile(im, source, srgb, outputMode=im.mode)
    fit, size = case.get("fit"), (case.get("width"), case.get("height"))
    if fit == "contain":
        im = ImageOps.contain(im, size, Image.Resampling.LANCZOS)
    elif fit == "cover":
        im = ImageOps.fit(im, size, Image.Resampling.LANCZOS)
    elif fit == "fill":
        im = im.resize(size, Image.Resampling.LANCZOS)
    if case.get("flat"):
        ground = Image.new("RGBA", im.size, "white")
        im = Image.alpha_composite(ground, im.convert("RGBA")).convert("RGB")
    return im


def distance(one, other):
    """The largest difference of a channel, and the PSNR. With alpha: the worst of the alpha and of the picture on black
    and on white, since the colour of transparent pixels doesn't matter."""
    if "A" in one.getbands() or "A" in other.getbands():
        one, other = one.convert("RGBA"), other.convert("RGBA")
        pairs = [(one.getchannel("A"), other.getchannel("A"))]
        for ground in ("black", "white"):
            below = Image.new("RGBA", one.size, ground)
            pairs.append(tuple(Image.alpha_composite(below, it).convert("RGB") for it in (one, other)))
    else:
        pairs = [(one.convert("RGB"), other.convert("RGB"))]
    worst, least = 0, math.inf
    for pair in pairs:
        difference = ImageChops.difference(*pair)
        extrema = difference.getextrema()
        worst = max(worst, *(high for _, high in (extrema if isinstance(extrema[0], tuple) else [extrema])))
        stat = ImageStat.Stat(difference)
        error = sum(stat.sum2) / sum(stat.count)
        least = min(least, 10 * math.log10(255 * 255 / error) if error else math.inf)
    return worst, min(least, 99.0)


def measure(folder, case):
    with Image.open(folder / case["product"]) as product:
        product.load()
        beside = sorted(set(product.info) & {"exif", "xmp", "icc_profile", "comment", "Comment", "XML:com.adobe.xmp", "dpi"})
        beside += ["exif"] if len(product.getexif()) else []
        beside += ["frames"] if getattr(product, "n_frames", 1) > 1 else []
        wanted = expected(folder / case["source"], case)
        sizes = {"size": product.size, "expected": wanted.size, "beside": beside, "format": product.format}
        if product.size != wanted.size:
            return {**sizes, "difference": 255, "psnr": 0.0}
        difference, psnr = distance(product, wanted)
        return {**sizes, "difference": difference, "psnr": psnr, "peer": peer(wanted, product.format, case["quality"])}


def peer(wanted, form, quality):
    """PSNR of libwebp or libjpeg-turbo at the same quality."""
    if form not in ("WEBP", "JPEG"):
        return None
    bytes = io.BytesIO()
    if form == "WEBP":
        wanted.save(bytes, form, quality=quality, method=4)
    else:
        wanted.save(bytes, form, quality=quality, subsampling="4:2:0", optimize=True)
    with Image.open(bytes) as made:
        return distance(made, wanted)[1]


def main():
    step, folder = sys.argv[1], Path(sys.argv[2])
    # Hostile files are never read here.
    Image.MAX_IMAGE_PIXELS = None
    if step == "sources":
        sources(folder)
    else:
        json.dump([measure(folder, case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
