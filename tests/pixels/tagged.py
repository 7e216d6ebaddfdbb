"""Pictures that say their colours in each way: the sources for tests/pixels/colours.mjs.

    tagged.py FOLDER    writes the pictures

The profiles are made here, from the formulas of ICC.1:2022, so that no two programs share a mistake.
"""

import io
import math
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 96, 64


def colour(x, y):
    """Smooth, so that the codecs of JPEG and WebP differ little: red to the right, green down, blue across; greys at the foot."""
    if y >= HEIGHT - 8:
        return (x * 255 // (WIDTH - 1),) * 3
    return x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 9), abs(255 - (x + y) * 510 // (WIDTH + HEIGHT - 10))


RGB = Image.new("RGB", (WIDTH, HEIGHT))
RGB.putdata([colour(x, y) for y in range(HEIGHT) for x in range(WIDTH)])
GREY = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
ALPHA = Image.linear_gradient("L").rotate(90).resize((WIDTH, HEIGHT)).point(lambda it: 128 + it // 2)
CMYK = Image.merge("CMYK", (*RGB.split(), GREY.point(lambda it: it // 2)))
# By a profile, Chromium shows black ink too bright and yellow, unlike LittleCMS and the formula in `printed`.
CMY = Image.merge("CMYK", (*RGB.split(), Image.new("L", (WIDTH, HEIGHT))))


# PNG, third edition


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(im, *before, bits=8):
    """A PNG with chunks before its palette or pixels. With 16 bits each byte is repeated, with fewer the high bits are kept."""
    kind = {"L": 0, "RGB": 2, "P": 3, "LA": 4, "RGBA": 6}[im.mode]
    palette = chunk(b"PLTE", bytes(im.getpalette())) if im.mode == "P" else b""
    data, line = im.tobytes(), len(im.getbands()) * im.width
    rows = b""
    for at in range(0, len(data), line):
        row = data[at : at + line]
        if bits == 16:
            row = bytes(it for byte in row for it in (byte, byte))
        elif bits < 8:
            packed = "".join(f"{it >> (8 - bits):0{bits}b}" for it in row)
            row = int(packed, 2).to_bytes(len(packed) // 8, "big")
        rows += b"\0" + row
    head = struct.pack(">IIBBBBB", im.width, im.height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(before) + palette
        + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )


def cicp(primaries, transfer, matrix=0, full=1):
    return chunk(b"cICP", bytes((primaries, transfer, matrix, full)))


def gama(gamma):
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))


def chrm(white, red, green, blue):
    return chunk(b"cHRM", struct.pack(">8I", *(round(it * 100_000) for xy in (white, red, green, blue) for it in xy)))


def iccp(profile):
    return chunk(b"iCCP", b"test\0\0" + zlib.compress(profile))


D65 = (0.3127, 0.3290)
P3_CHROMATICITIES = (D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
SRGB_CHUNK = chunk(b"sRGB", b"\0")


# ICC.1:2022

WHITE = (0.9642, 1.0, 0.8249)
# Adapted to D50.
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(it * 65536)) for it in numbers)


def words(numbers):
    return b"".join(struct.pack(">H", max(0, min(65535, round(it * 65535)))) for it in numbers)


def xyz(values):
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(*table):
    """A curve: none for the identity, one number for a gamma, or a table (§10.6)."""
    body = struct.pack(">H", round(table[0] * 256)) if len(table) == 1 else words(table)
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + body + bytes(-len(body) % 4)


def para(kind, *parameters):
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + fixed(*parameters)


SRGB_CURVE = para(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space, tags, pcs=b"XYZ ", version=4, kind=b"mntr"):
    """A profile of tags: bytes by their signatures."""
    tags = {b"wtpt": xyz(WHITE), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", version << 24, kind, space, pcs)
    head += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed(*WHITE)
    return head + bytes(128 - len(head)) + table + body


def matrix(primaries, *curves, **options):
    """An RGB profile of three primaries and one or three curves."""
    curves = curves if len(curves) == 3 else curves * 3
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries)))
    return profile(b"RGB ", tags | dict(zip((b"rTRC", b"gTRC", b"bTRC"), curves)), **options)


def grey(shape, **options):
    return profile(b"GRAY", {b"kTRC": shape}, **options)


def lab(values):
    x, y, z = (it ** (1 / 3) if it > 216 / 24389 else (24389 / 27 * it + 16) / 116 for it in map(lambda a, b: a / b, values, WHITE))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def grid(channels, points):
    if channels == 0:
        return [()]
    return [(at / (points - 1), *rest) for at in range(points) for rest in grid(channels - 1, points)]


def mft2(channels, points, light):
    """A table of 16 bits to Lab as old profiles have it, L from 0 to 0xff00 (§10.10, §6.3.4.2)."""
    head = b"mft2\0\0\0\0" + bytes((channels, 3, points, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 2, 2)
    body = b""
    for node in grid(channels, points):
        l, a, b = lab(light(*node))
        body += words((l / 100 * 65280 / 65535, (a + 128) * 256 / 65535, (b + 128) * 256 / 65535))
    return head + words((0, 1) * channels) + body + words((0, 1) * 3)


def mab(points, light):
    """A table of 16 bits from RGB to XYZ with a matrix, and curves around both (§10.12). Chromium needs the matrix."""
    curves, bodies = curve() * 3, b"".join(words(it * 32768 / 65535 for it in light(*node)) for node in grid(3, points))
    clut = bytes((points,) * 3) + bytes(13) + bytes((2, 0, 0, 0)) + bodies
    clut += bytes(-len(clut) % 4)
    unit = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    parts, start = (curves, unit, curves, clut, curves), 32
    head = b"mAB \0\0\0\0" + bytes((3, 3, 0, 0))
    for at in range(5):
        head += struct.pack(">I", start + sum(map(len, parts[:at])))
    return head + b"".join(parts)


def lights(primaries, parts):
    return tuple(sum(part * primary[at] for part, primary in zip(parts, primaries)) for at in range(3))


def turned(r, g, b):
    """The light of an odd device: its red is our green, its green our blue."""
    return lights(SRGB, (b**1.8, r**2.2, g**2.0))


def printed(c, m, y, k):
    """The light of a print, whose inks are not quite clean."""
    parts = (1 - 0.9 * c) * (1 - 0.1 * m), (1 - 0.3 * c) * (1 - 0.85 * m) * (1 - 0.05 * y), (1 - 0.1 * c) * (1 - 0.3 * m) * (1 - 0.9 * y)
    return lights(SRGB, [(it * (1 - 0.95 * k)) ** 1.5 for it in parts])


PRINT = profile(b"CMYK", {b"A2B0": mft2(4, 5, printed)}, pcs=b"Lab ", version=2, kind=b"prtr")
PROFILES = {
    "srgb": matrix(SRGB, SRGB_CURVE),
    "p3": matrix(P3, SRGB_CURVE),
    "adobe": matrix(ADOBE, curve(563 / 256), version=2),
    "curves-that-differ": matrix(SRGB, curve(1.4), curve(), para(0, 2.6)),
    "curve-of-a-table": matrix(P3, curve(*((it / 63) ** 1.6 for it in range(64)))),
    "table-to-lab": profile(b"RGB ", {b"A2B0": mft2(3, 9, turned)}, pcs=b"Lab ", version=2),
    "table-to-xyz": profile(b"RGB ", {b"A2B0": mab(9, turned)}),
}
GREYS = {"linear": grey(curve()), "gamma-1.4": grey(curve(1.4), version=2), "table": grey(curve(0, 0.05, 0.3, 1))}


def main():
    folder = Path(sys.argv[1])

    def save(name, im, **options):
        im.save(folder / name, **options)

    def write(name, *parts, **options):
        (folder / name).write_bytes(png(*parts, **options))

    greys, few = Image.merge("LA", (GREY, ALPHA)), RGB.quantize(64)
    rgba = RGB.copy()
    rgba.putalpha(ALPHA)
    write("png-gama-1.0.png", RGB, gama(1.0))
    write("png-gama-grey.png", GREY, gama(1 / 1.4))
    write("png-gama-grey-alpha.png", greys, gama(1.0))
    write("png-gama-palette.png", few, gama(1 / 1.8))
    write("png-gama-16-bit.png", RGB, gama(1 / 1.8), bits=16)
    write("png-gama-4-bit-grey.png", GREY, gama(1.0), bits=4)
    write("png-gama-45455.png", RGB, gama(0.45455))
    write("png-gama-chrm.png", rgba, gama(0.45455), chrm(*P3_CHROMATICITIES))
    write("png-chrm-alone.png", RGB, chrm(*P3_CHROMATICITIES))
    write("png-srgb-over-gama.png", RGB, gama(1.0), SRGB_CHUNK)
    write("png-iccp-over-srgb.png", RGB, SRGB_CHUNK, iccp(PROFILES["p3"]))
    write("png-cicp-over-iccp.png", RGB, iccp(PROFILES["table-to-xyz"]), cicp(12, 13))
    write("png-cicp-2020-linear.png", RGB, cicp(9, 8))
    write("png-cicp-709.png", rgba, cicp(1, 1))
    write("png-cicp-grey.png", GREY, cicp(9, 4))
    for name, icc in PROFILES.items():
        write(f"{name}.png", RGB, iccp(icc))
    for name in "p3", "table-to-lab":
        save(f"{name}.jpg", RGB, quality=95, subsampling=0, icc_profile=PROFILES[name])
        save(f"{name}.webp", rgba, lossless=True, exact=True, icc_profile=PROFILES[name])
    for name, icc in GREYS.items():
        write(f"grey-{name}.png", GREY, iccp(icc))
        save(f"grey-{name}.jpg", GREY, quality=95, icc_profile=icc)
    save("cmyk-profile.jpg", CMY, quality=95, subsampling=0, icc_profile=PRINT)
    save("cmyk.jpg", CMYK, quality=95, subsampling=0)


if __name__ == "__main__":
    main()
