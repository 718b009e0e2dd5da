#!/usr/bin/env bash
# GDAL 3.10.3 (in rasterio 1.4.4): the open option GEOREF_SOURCES wins over the setting GDAL_GEOREF_SOURCES, but not where
# GTIFF_POINT_GEO_IGNORE is set, to whatever value.
#
# Expected: the two settings have nothing to do with each other: one says which of several places of a georeference counts
# first, the other how a file that says "pixel is point" is read. Seen: of a GeoTIFF that says "pixel is area", opened
# with GEOREF_SOURCES=INTERNAL while the environment says GDAL_GEOREF_SOURCES=NONE, CRS and transform are read; with
# GTIFF_POINT_GEO_IGNORE=NO beside it, which is its default, they are gone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
GDAL_GEOREF_SOURCES=NONE venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import rasterio
from rasterio.transform import Affine

place = {"crs": "EPSG:32633", "transform": Affine(1, 0, 400_000, 0, -1, 5_800_000)}
with rasterio.open("a.tif", "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", **place) as file:
    file.write(np.zeros((1, 8, 8), np.uint8))


def is_placed(**settings):
    with rasterio.Env(**settings), rasterio.open("a.tif", GEOREF_SOURCES="INTERNAL") as file:
        return file.crs is not None and not file.transform.is_identity


found = {name or "nothing": is_placed(**settings) for name, settings in {
    "": {},
    "GTIFF_POINT_GEO_IGNORE=NO": {"GTIFF_POINT_GEO_IGNORE": "NO"},
    "GTIFF_POINT_GEO_IGNORE=YES": {"GTIFF_POINT_GEO_IGNORE": "YES"},
}.items()}
print("GDAL", rasterio.__gdal_version__, "georeference read, with", found)
assert list(found.values()) == [True, False, False]
PYTHON
