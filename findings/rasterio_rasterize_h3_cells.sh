#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3), h3 4.5.0: rasterize burns other numbers than those given, in int64 and uint64.
#
# Expected: rasterize burns the integers that it is given, or refuses them, since it checks that the values fit into the
# type. int64 isn't in the documentation's list of types, but it is what an array of integers gets if no dtype is passed.
# Seen: values pass through floating-point numbers of 53 bits on their way, so that above 2**53 each may change:
# 9007199254740993 is burned as 9007199254740992. An H3 cell has 60 bits: of the cells of a district burned as their own
# ids, none comes back, and neighbours share one number, so that their areas are added up. There is neither an error nor
# a warning. Burn row numbers instead, and look the ids up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 h3==4.5.0 shapely==2.2.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import h3.api.numpy_int as h3
import numpy
import shapely
from rasterio.features import rasterize
from rasterio.transform import from_bounds

seen = {}
for dtype in (None, "int64", "uint64"):
    burned = rasterize([(shapely.box(0, 0, 4, 4), 2**53 + 1)], out_shape=(4, 4), dtype=dtype)
    seen[dtype] = str(burned.dtype), numpy.unique(burned).tolist()
    print(f"dtype {dtype}: given {2**53 + 1}, burned {seen[dtype][1]} as {seen[dtype][0]}")
assert seen == {dtype: (dtype or "int64", [2**53]) for dtype in (None, "int64", "uint64")}

cells = [int(cell) for cell in h3.grid_disk(h3.latlng_to_cell(52.5, 13.4, 13), 3)]
polygons = [shapely.Polygon([(x, y) for y, x in h3.cell_to_boundary(cell)]) for cell in cells]
place = from_bounds(*shapely.total_bounds(polygons), 400, 400)
by_cell = rasterize(zip(polygons, cells), out_shape=(400, 400), transform=place, dtype="int64")
by_row = rasterize(zip(polygons, range(1, 38)), out_shape=(400, 400), transform=place, dtype="int64")
found = set(numpy.unique(by_cell).tolist()) - {0}
rows = set(numpy.unique(by_row).tolist()) - {0}
print(f"{len(cells)} cells given, {len(found)} numbers burned, {len(found & set(cells))} of them cells; by row {len(rows)}")
assert len(rows) == len(cells) == 37
assert len(found) < 37 and not found & set(cells)
PYTHON
