"""Takes SciPy's photograph of a raccoon, 1024×768 pixels of RGB, out of a wheel: photograph.py WHEEL PIXELS"""

import bz2
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel, open(sys.argv[2], "wb") as pixels:
    pixels.write(bz2.decompress(wheel.read("scipy/misc/face.dat")))
