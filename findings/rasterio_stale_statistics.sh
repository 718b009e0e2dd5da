#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): statistics of a GeoTIFF are those of its old pixels after it was written to in place.
#
# Expected: `statistics()` of a file that was opened for reading leaves nothing behind; at the least, what it kept is
# dropped when pixels are written by the same library. Seen: it writes `FILE.tif.aux.xml` beside the file. After all
# pixels of 7 were overwritten by 9 in mode `r+`, `statistics()` still says 7, and so does `tags(1)`, while `read` gives
# 9. A file that is moved into the place of another inherits its statistics in the same way. `stats()`, which is to
# replace `statistics()`, says the same. Only `clear_cache=True` looks at the pixels again. Mode `w` removes the file
# beside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

import numpy as np
import rasterio
from rasterio.transform import from_origin

shape = {"width": 64, "height": 64, "count": 1, "dtype": "uint8"}
place = {"crs": "EPSG:32633", "transform": from_origin(0, 64, 1, 1)}


def fill(path, mode, value, **options):
    with rasterio.open(path, mode, **options) as file:
        file.write(np.full((1, 64, 64), value, np.uint8))


def look(what, **options):
    with rasterio.open("scene.tif") as file:
        found = file.statistics(1, approx=False, **options).mean, float(file.read(1).mean())
        assert float(file.tags(1)["STATISTICS_MEAN"]) == found[0]
        if not options:
            assert file.stats(indexes=1)[0].mean == found[0]
    print(f"{what}: statistics say {found[0]}, the pixels are {found[1]}, files {sorted(os.listdir())}")
    return found


os.mkdir("work")
os.chdir("work")
fill("scene.tif", "w", 7, driver="GTiff", **shape, **place)
assert look("new") == (7, 7)
assert os.path.exists("scene.tif.aux.xml")
fill("scene.tif", "r+", 9)
assert look("written to in place") == (7, 9)
assert look("with clear_cache", clear_cache=True) == (9, 9)
fill("other.tif", "w", 200, driver="GTiff", **shape, **place)
os.replace("other.tif", "scene.tif")
assert look("another file in its place") == (9, 200)
fill("scene.tif", "w", 11, driver="GTiff", **shape, **place)
assert look("written anew") == (11, 11)
PYTHON
