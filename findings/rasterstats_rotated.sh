#!/usr/bin/env bash
# rasterstats 0.21.0, rioxarray 0.19.0, exactextract 0.3.0, rasterio 1.4.4: a rotated raster is measured elsewhere.
#
# Expected: zonal_stats takes an affine transform, so it uses all six of its numbers, or refuses a rotated raster, as
# exactextract does. Seen: it leaves the rotation out without a word. A polygon on 20 pixels of a raster that is turned by
# 10 degrees, with a mean of 137, gets a mean of 127.5 from 12 pixels; turned by 30 degrees, it gets None. rasterio.mask
# finds the right ones. So does rioxarray's clip, but its rio.bounds() gives a box without the rotation, which even has
# the raster on the wrong side of its origin. Images from drones and scanned maps are often turned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterstats==0.21.0 rioxarray==0.19.0 exactextract==0.3.0 rasterio==1.4.4 \
    shapely==2.2.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy
import rasterio
import rasterio.mask
import rioxarray
import shapely
from exactextract import exact_extract
from rasterio.transform import Affine
from rasterstats import zonal_stats

SIDE = 20
pixels = numpy.arange(SIDE * SIDE, dtype=numpy.float32).reshape(SIDE, SIDE)
seen = {}
for degrees in (0, 10, 30):
    place = Affine.translation(500_000, 5_000_000) * Affine.rotation(degrees) * Affine.scale(1, -1)
    polygon = shapely.Polygon([place * corner for corner in ((5, 5), (10, 5), (10, 9), (5, 9))])
    with rasterio.open(
        "a.tif", "w", driver="GTiff", height=SIDE, width=SIDE, count=1, dtype="float32", crs="EPSG:32633", transform=place
    ) as file:
        file.write(pixels, 1)
    with rasterio.open("a.tif") as file:
        masked, _ = rasterio.mask.mask(file, [polygon], crop=True, filled=False)
        bounds = tuple(round(each, 1) for each in file.bounds)
    with rioxarray.open_rasterio("a.tif", masked=True) as array:
        by_clip = float(array.rio.clip([polygon]).mean())
        box = tuple(round(float(each), 1) for each in array.rio.bounds())
    try:
        feature = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(polygon)}
        by_extract = exact_extract("a.tif", [feature], ["mean"])[0]["properties"]["mean"]
    except ValueError as error:
        by_extract = str(error)
    by_statistics = zonal_stats([polygon], "a.tif", stats=["mean", "count"])[0]
    means = float(masked.mean()), by_clip, by_extract, by_statistics["mean"], by_statistics["count"]
    seen[degrees] = means, box == bounds
    print(f"{degrees} degrees: mean by rasterio.mask {means[0]}, by rioxarray {means[1]}, by exactextract {means[2]},")
    print(f"  by rasterstats {means[3]} of {means[4]} pixels; bounds by rasterio {bounds}, by rioxarray {box}")
refused = "Rotated rasters are not supported."
assert seen[0] == ((137, 137, 137, 137, 20), True)
assert seen[30] == ((137, 137, refused, None, 0), False)
assert seen[10][0][:3] == (137, 137, refused) and seen[10][0][3:] == (127.5, 12) and not seen[10][1]
PYTHON
