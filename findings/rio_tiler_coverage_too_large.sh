#!/usr/bin/env bash
# rio-tiler 9.4.12: the coverage of pixels by a polygon is never too small, so areas and counts by it are too large.
#
# Expected: `get_coverage_array` of ImageData, which estimates how much of each pixel a polygon covers from 10 x 10
# smaller ones, is now a little too large and now a little too small. Seen: a smaller one counts whole if the polygon
# touches it at all. A strip that covers 0.01 of its pixels is said to cover 0.1, one of 0.55 covers 0.6. Four strips
# side by side, of 94 pixels together, cover 96. A disc of 28.23 pixels covers 29.21. `statistics(coverage=...)` counts
# with these numbers. With `cover_scale=100` the disc covers 28.35, in a hundred times the memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rio-tiler==9.4.12 rasterio==1.4.4 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import rasterio
import shapely
from rasterio.transform import from_origin
from rio_tiler.io import Reader

CRS = "EPSG:32633"
LEFT, TOP, SIDE = 400_000, 5_800_000, 10  # one pixel is one square metre
options = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint8", "crs": CRS}
with rasterio.open("scene.tif", "w", transform=from_origin(LEFT, TOP, 1, 1), **options) as file:
    file.write(np.ones((1, SIDE, SIDE), np.uint8))


def strip(left, right):
    return shapely.box(LEFT + left, TOP - SIDE, LEFT + right, TOP)


with Reader("scene.tif") as reader:
    image = reader.part((LEFT, TOP - SIDE, LEFT + SIDE, TOP), bounds_crs=CRS, dst_crs=CRS)

    def cover(polygon, **scale):
        found = image.get_coverage_array(shapely.geometry.mapping(polygon), shape_crs=CRS, **scale)
        return found, round(float(found.sum()), 2)

    for width, said in ((0.01, 0.1), (0.45, 0.5), (0.5, 0.5), (0.55, 0.6)):
        found = round(float(cover(strip(0, width))[0][0, 0]), 3)
        print(f"a strip of {width} pixels covers {found}")
        assert found == said
    strips = [strip(2.35 * at, 2.35 * (at + 1)) for at in range(4)]
    areas = sum(each.area for each in strips), sum(cover(each)[1] for each in strips)
    print(f"four strips side by side: {areas[0]:.2f} pixels, said to be {areas[1]:.2f}")
    assert [round(each, 2) for each in areas] == [94, 96]
    disc = shapely.Point(LEFT + 5, TOP - 5).buffer(3)
    coverage, at_ten = cover(disc)
    counted = image.statistics(coverage=coverage)["b1"].count
    at_hundred = cover(disc, cover_scale=100)[1]
    print(f"a disc: {disc.area:.2f} pixels, said to be {at_ten}, counted as {counted:.2f}, by 100 x 100 {at_hundred}")
    assert (round(disc.area, 2), at_ten, round(counted, 2), at_hundred) == (28.23, 29.21, 29.21, 28.35)
PYTHON
