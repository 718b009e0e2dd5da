#!/usr/bin/env bash
# rasterio 1.4.4: a merge computes in the type of the first raster, and what does not fit begins again at 0.
#
# Expected: values that a type can't hold are refused, or clipped as GDAL clips them. Seen: of rasters of uint8, the sum
# 200 + 100 is 44, and the count of 300 rasters that overlap is 44. Beside a first raster of uint8, the value 1000 of a
# raster of uint16 is 232. Nothing is said. With `dtype` it is 300, 300 and 1000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from contextlib import ExitStack

import numpy as np
import rasterio
from rasterio.merge import merge
from rasterio.transform import from_origin


def write(name, value, dtype, nodata=None):
    options = {"driver": "GTiff", "count": 1, "height": 1, "width": 1, "crs": "EPSG:32633", "nodata": nodata}
    with rasterio.open(name, "w", dtype=dtype, transform=from_origin(0, 1, 1, 1), **options) as raster:
        raster.write(np.full((1, 1, 1), value, dtype))
    return name


def merged(names, **options):
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("error", RuntimeWarning)
        pixels, _ = merge([stack.enter_context(rasterio.open(name)) for name in names], **options)
    return int(pixels[0, 0, 0])


one, two = write("one.tif", 200, "uint8"), write("two.tif", 100, "uint8")
gap, large = write("gap.tif", 0, "uint8", nodata=0), write("large.tif", 1000, "uint16")
found = {
    "sum": [merged([one, two], method="sum", **wide) for wide in ({}, {"dtype": "uint16"})],
    "count": [merged([one] * 300, method="count", **wide) for wide in ({}, {"dtype": "uint16"})],
    "uint16": [merged([gap, large], **wide) for wide in ({}, {"dtype": "uint16"})],
}
print(f"by default, and with dtype=uint16: {found}")
assert found == {"sum": [44, 300], "count": [44, 300], "uint16": [232, 1000]}
PYTHON
