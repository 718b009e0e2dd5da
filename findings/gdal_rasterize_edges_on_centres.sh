#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3), rasterstats 0.21.0: a level edge that runs through pixel centres counts on both sides.
#
# Expected: of polygons that share an edge, each pixel belongs to one, wherever the edge runs. That is the usual rule of
# rasterizing, and what "pixels whose centre is within the polygon" suggests. Seen: two halves of an image that meet at a
# vertical or slanting edge through pixel centres share no pixel; two that meet at a level edge both get the row of
# pixels on it. So squares of 5 x 5 pixels, half a pixel off the grid, get 30 pixels each, 20 % more than their area, and
# counts by MergeAlg.add find an overlap of polygons that have none. A shift of half a pixel is what grids of "pixel is
# point" files have. geometry_mask and rasterstats count alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 rasterstats==0.21.0 shapely==2.2.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy
import rasterio
import shapely
from rasterio.enums import MergeAlg
from rasterio.features import geometry_mask, rasterize
from rasterio.transform import Affine
from rasterstats import zonal_stats

SIDE = 40
place = Affine(1, 0, 0, 0, -1, SIDE)  # pixel centres lie at .5
print("GDAL", rasterio.__gdal_version__)


def counts(polygons):
    burned = rasterize(
        [(polygon, 1) for polygon in polygons],
        out_shape=(SIDE, SIDE),
        transform=place,
        dtype="int32",
        merge_alg=MergeAlg.add,
    )
    return dict(zip(*(each.tolist() for each in numpy.unique(burned, return_counts=True))))


halves = {
    "level": [shapely.box(0, 0, SIDE, 20.5), shapely.box(0, 20.5, SIDE, SIDE)],
    "vertical": [shapely.box(0, 0, 20.5, SIDE), shapely.box(20.5, 0, SIDE, SIDE)],
    "slanting": [
        shapely.Polygon([(0, 0), (SIDE, 0), (SIDE, SIDE)]),
        shapely.Polygon([(0, 0), (SIDE, SIDE), (0, SIDE)]),
    ],
}
seen = {name: counts(polygons) for name, polygons in halves.items()}
for name, found in seen.items():
    print(f"{name} edge: pixels by the number of halves that hold them {found}")
assert seen == {"level": {1: 1560, 2: 40}, "vertical": {1: 1600}, "slanting": {1: 1600}}

starts = numpy.arange(0.5, 35, 5)
squares = [shapely.box(x, y, x + 5, y + 5) for x in starts for y in starts]
found = counts(squares)
print("49 squares of 25 pixels without overlap:", found)
assert found == {0: 340, 1: 1050, 2: 210}
one = [squares[0]]
by_mask = int((~geometry_mask(one, (SIDE, SIDE), place)).sum())
by_statistics = zonal_stats(one, numpy.ones((SIDE, SIDE)), affine=place, stats=["count"])[0]["count"]
print("pixels of one square: geometry_mask", by_mask, "rasterstats", by_statistics, "area", one[0].area)
assert by_mask == by_statistics == 30 and one[0].area == 25
PYTHON
