#!/usr/bin/env bash
# rasterstats 0.21.0, rasterio 1.4.4: pixels outside a raster without a nodata value count as zeros in zonal statistics.
#
# Expected: a polygon of which half lies outside the raster has the count and the mean of the pixels inside, whether or
# not the file declares a nodata value; at the least, with `nodata=255`, what is outside is filled with 255 and left
# out. Seen: of a file of sevens without a nodata value, 100 pixels are counted instead of 50, and the mean is 3.5, for
# uint8 and float32 alike, and with `nodata=255` too. The warning speaks of -999, which is nowhere filled in. The same
# file with a declared nodata value, and the same pixels as an array, give 50 and 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterstats==0.21.0 rasterio==1.4.4
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import rasterio
import shapely
from rasterio.transform import from_origin
from rasterstats import zonal_stats

half_outside = shapely.box(-5, 0, 5, 10)
transform = from_origin(0, 10, 1, 1)


def statistics(dtype, declared, source="file", **options):
    sevens = np.full((10, 10), 7, dtype)
    shape = {"width": 10, "height": 10, "count": 1, "dtype": dtype, "nodata": declared}
    with rasterio.open("sevens.tif", "w", driver="GTiff", crs="EPSG:32633", transform=transform, **shape) as file:
        file.write(sevens, 1)
    raster = "sevens.tif" if source == "file" else sevens
    if source == "array":
        options["affine"] = transform
    (found,) = zonal_stats([half_outside], raster, stats=["count", "mean"], **options)
    print(f"{source} of {dtype}, declared nodata {declared}, options {sorted(options)}: {found}")
    return found["count"], found["mean"]


for dtype in ("uint8", "float32"):
    assert statistics(dtype, None) == (100, 3.5)
    assert statistics(dtype, None, nodata=255) == (100, 3.5)
    assert statistics(dtype, 255) == (50, 7)
    assert statistics(dtype, None, source="array", nodata=255) == (50, 7)
PYTHON
