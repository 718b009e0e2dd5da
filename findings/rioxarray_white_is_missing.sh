#!/usr/bin/env bash
# rioxarray 0.19.0: reprojecting 8-bit imagery without a nodata value makes its white pixels missing.
#
# Expected: `rio.reproject` fills what lies outside with 0, as `gdalwarp` and rasterio do, and declares no nodata value
# that the file did not have. Seen: it fills with 255 and declares 255 as nodata, so that 16 white roof pixels become
# NaN with `masked=True`. `rio.clip` and `merge_arrays` fill the same imagery with 0 and declare nothing, so that what
# they leave out counts as black ground.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rioxarray==0.19.0 rasterio==1.4.4 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import rasterio
import rioxarray
import shapely
from rasterio.transform import from_origin
from rasterio.warp import reproject
from rioxarray.merge import merge_arrays

pixels = np.full((1, 64, 64), 100, np.uint8)
pixels[0, 30:34, 30:34] = 255  # a white roof
place = {"crs": "EPSG:32633", "transform": from_origin(400_000, 5_800_000, 1, 1)}
options = {"driver": "GTiff", "width": 64, "height": 64, "count": 1, "dtype": "uint8"}
with rasterio.open("scene.tif", "w", **options, **place) as file:
    file.write(pixels)
scene = rioxarray.open_rasterio("scene.tif")
assert scene.rio.nodata is None

turned = scene.rio.reproject("EPSG:32634")
inside = scene.rio.reproject("EPSG:32633", transform=place["transform"], shape=(64, 64))
inside.rio.to_raster("again.tif")
missing = int(np.isnan(rioxarray.open_rasterio("again.tif", masked=True)).sum())
print(f"reproject: values {np.unique(turned).tolist()}, nodata {turned.rio.nodata}, roof pixels missing {missing}")
assert (np.unique(turned).tolist(), turned.rio.nodata, missing) == ([100, 255], 255, 16)

plain = np.zeros((1, *turned.shape[1:]), np.uint8)
target = {"dst_crs": "EPSG:32634", "dst_transform": turned.rio.transform()}
reproject(pixels, plain, src_crs=place["crs"], src_transform=place["transform"], **target)
print(f"rasterio: values {np.unique(plain).tolist()}")
assert np.unique(plain).tolist() == [0, 100, 255]

clipped = scene.rio.clip([shapely.Point(400_010, 5_799_990).buffer(4)])
print(f"clip: values {np.unique(clipped).tolist()}, nodata {clipped.rio.nodata}")
assert (np.unique(clipped).tolist(), clipped.rio.nodata) == ([0, 100], None)
joined = merge_arrays([scene, scene.assign_coords(x=scene.x + 100)])
print(f"merge_arrays: values {np.unique(joined).tolist()}, nodata {joined.rio.nodata}")
assert (np.unique(joined).tolist(), joined.rio.nodata) == ([0, 100, 255], None)
PYTHON
