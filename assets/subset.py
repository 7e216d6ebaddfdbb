"""Makes placeholder.otf, the font of drawn placeholders, out of Inter Semi Bold.

    apt-get download fonts-inter && dpkg-deb -x fonts-inter_*.deb inter     (Debian 12: 4.0~beta7+ds-1)
    pip install fonttools==4.68.0 uharfbuzz==0.57.0
    python assets/subset.py inter/usr/share/fonts/opentype/inter/Inter-SemiBold.otf assets/placeholder.otf

It keeps the characters of European languages and some symbols. ab_glyph places one glyph after another
and reads only the old `kern` table, so the layout tables go, and the kerning of ASCII is written
into such a table first. The same input gives the same bytes.
"""

import itertools
import sys

import uharfbuzz as hb
from fontTools import subset
from fontTools.ttLib import newTable
from fontTools.ttLib.tables._k_e_r_n import KernTable_format_0

CHARACTERS = [
    *range(0x20, 0x7F),  # ASCII
    *range(0xA0, 0x180),  # Latin-1, Latin Extended-A
    *range(0x218, 0x21C),  # Romanian
    0x1E9E,  # ẞ
    *range(0x370, 0x400),  # Greek
    *range(0x400, 0x500),  # Cyrillic
    *range(0x2010, 0x2060),  # general punctuation
    *range(0x20A0, 0x20C0),  # currencies
    *map(ord, "№™Ω←↑→↓↔↗↘∂∆∏∑−∕∙√∞∫≈≠≤≥◊■□▲△▶▷▼▽◀◁●○★☆♥✓✗"),
]
KERNED = [*map(chr, range(0x21, 0x7F)), "×"]


def kerning(path):
    """Kerning that HarfBuzz applies between two characters, by the names of their glyphs."""
    font = hb.Font(hb.Face(hb.Blob.from_file_path(path)))

    def advance(text, kern):
        buffer = hb.Buffer()
        buffer.add_str(text)
        buffer.guess_segment_properties()
        hb.shape(font, buffer, {"kern": kern, "calt": False, "liga": False, "ccmp": False})
        return sum(position.x_advance for position in buffer.glyph_positions)

    for pair in itertools.product(KERNED, repeat=2):
        text = "".join(pair)
        # Less than a hundredth of an em is invisible.
        value = advance(text, True) - advance(text, False)
        if abs(value) >= font.face.upem / 100:
            yield pair, value


def main(source, target):
    options = subset.Options(hinting=False, notdef_outline=True, layout_features=[])
    options.drop_tables += ["GPOS", "GSUB", "GDEF"]
    # The copyright, the version, the trademark and the licence stay in the file.
    options.name_IDs = [0, 1, 2, 5, 7, 13, 14]
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(font)

    names = font.getBestCmap()
    table = KernTable_format_0()
    table.coverage = 1
    table.tupleIndex = None
    table.apple = False
    table.kernTable = {
        (names[ord(left)], names[ord(right)]): value for (left, right), value in kerning(source)
    }
    font["kern"] = newTable("kern")
    font["kern"].version = 0
    font["kern"].kernTables = [table]
    subset.save_font(font, target, options)
    print(f"{len(names)} characters, {len(table.kernTable)} pairs")


main(*sys.argv[1:])
