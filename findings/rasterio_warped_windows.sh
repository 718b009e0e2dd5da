#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): WarpedVRT.read() of the whole is not what its windows are.
#
# Expected: a WarpedVRT is a dataset, so a pixel has one value, whether it is read with the whole or in a window. The
# tolerance of 0.125 pixels, which is documented, says how far a place may be off, not that it depends on the question.
# Seen: a map of classes, warped from UTM to Web Mercator with the nearest pixel, is read as a whole, and by windows of
# 128, 256 or 512 pixels: all windows agree among themselves, but 0.7 % of all pixels have another class than in the
# whole. So tiles that are made by windows differ from a check against the whole image. With tolerance=0 all are equal,
# and the whole differs from that by 0.6 %, the windows by 1.1 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import rasterio
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

print("GDAL", rasterio.__gdal_version__)
side = 700
classes = numpy.random.default_rng(1).integers(0, 5, (side // 4, side // 4), dtype=numpy.uint8)
place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 6_600_000)}
with rasterio.open(
    "a.tif", "w", driver="GTiff", height=side, width=side, count=1, dtype="uint8", **place
) as file:
    file.write(numpy.kron(classes, numpy.ones((4, 4), numpy.uint8)), 1)


def read(step, **settings):
    with rasterio.open("a.tif") as file, WarpedVRT(file, crs="EPSG:3857", **settings) as view:
        out = numpy.full(view.shape, 99, numpy.uint8)
        for row in range(0, view.height, step):
            for column in range(0, view.width, step):
                part = out[row : row + step, column : column + step]
                part[:] = view.read(1, window=Window(column, row, part.shape[1], part.shape[0]))
        return out


WHOLE = 1000
whole, exact = read(WHOLE), read(WHOLE, tolerance=0)
assert (read(WHOLE) == whole).all()
seen = {}
for step in (128, 256, 512):
    windows = read(step)
    seen[step] = float((windows != whole).mean()), float((windows != exact).mean())
    print(f"windows of {step}: {seen[step][0]:.2%} of the pixels differ from the whole, {seen[step][1]:.2%} from exact")
    assert (read(step, tolerance=0) == exact).all()
print(f"the whole: {(whole != exact).mean():.2%} differ from exact")
assert len(set(seen.values())) == 1
assert 0.005 < seen[256][0] < 0.01
PYTHON
