#!/usr/bin/env bash
# tifffile 2026.3.3, rasterio 1.4.4: where nodata is the lowest float32, tifffile says that it is 0.
#
# Expected: page.nodata is the number of the tag GDAL_NODATA, as its documentation says. The lowest number of float32
# (-3.4028234663852886e+38) is the usual one for elevation and other measures in many programs, and it is exact in
# float32. Seen: page.nodata is 0, with a message in the log that the number doesn't fit into float32. So zeros that were
# measured are taken for gaps, and gaps for measures. It is also what tifffile puts into tiles that a sparse file leaves
# out: they are read as 0 without any sign, where GDAL reads nodata. With -9999 both agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tifffile==2026.3.3 rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy
import rasterio
import tifffile
from rasterio.windows import Window

LOWEST = float(numpy.finfo(numpy.float32).min)
layout = {"tiled": True, "blockxsize": 128, "blockysize": 128, "sparse_ok": True}
tile = numpy.full((128, 128), 5, numpy.float32)
tile[:64] = 0  # measured: at the level of the sea
seen = {}
for nodata in (LOWEST, -9999.0):
    with rasterio.open(
        "a.tif", "w", driver="GTiff", height=256, width=256, count=1, dtype="float32", nodata=nodata, **layout
    ) as file:
        file.write(tile, 1, window=Window(0, 0, 128, 128))  # the other three tiles are left out
    with rasterio.open("a.tif") as file:
        by_gdal = file.read(1)
        valid = float((file.dataset_mask() > 0).mean())
    with tifffile.TiffFile("a.tif") as file:
        said = file.pages[0].nodata
        pixels = file.asarray()
    seen[nodata] = said, float((pixels != said).mean()), valid, bool((pixels == by_gdal).all())
    print(f"nodata {nodata}: tifffile says {said}; valid by tifffile {seen[nodata][1]:.1%}, by GDAL {valid:.1%};")
    print("  values by tifffile", numpy.unique(pixels).tolist(), "by GDAL", numpy.unique(by_gdal).tolist())
assert seen == {LOWEST: (0, 0.125, 0.25, False), -9999.0: (-9999.0, 0.25, 0.25, True)}
PYTHON
