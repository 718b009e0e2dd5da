#!/usr/bin/env bash
# pyogrio 0.13.0 (GDAL 3.12.4), geopandas 1.2.0, h3 4.5.0: use_arrow=True, which is meant to be faster, changes ids.
#
# Expected: to_file(use_arrow=True) writes the same values as without, since the documentation has it as a faster way to
# hand data to GDAL; or it refuses a type that the format doesn't have, as it does elsewhere. Seen: a column of uint64, the type in
# which H3 and S2 give their cells, becomes one of floating-point numbers. Every H3 cell is rounded to 53 bits and so
# names no cell any more. No warning is given. Without use_arrow the column is int64 and each cell is right. That holds
# for GeoPackage, FlatGeobuf and GeoJSON alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyogrio==0.13.0 geopandas==1.2.0 pyarrow==26.0.1 h3==4.5.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
import geopandas
import h3.api.numpy_int as h3
import numpy
import pyogrio
import shapely

print("GDAL", pyogrio.__gdal_version__)
cells = numpy.sort(h3.grid_disk(h3.latlng_to_cell(52.5, 13.4, 10), 3))
assert cells.dtype == numpy.uint64
points = [shapely.Point(*reversed(h3.cell_to_latlng(cell))) for cell in cells]
frame = geopandas.GeoDataFrame({"cell": cells}, geometry=points, crs="OGC:CRS84")
seen = {}
for ending in ("gpkg", "fgb", "geojson"):
    for by_arrow in (False, True):
        frame.to_file(f"a.{ending}", engine="pyogrio", use_arrow=by_arrow)
        column = geopandas.read_file(f"a.{ending}", engine="pyogrio")["cell"]
        back = numpy.sort(column.to_numpy()).astype(numpy.uint64)
        right = int((back == cells).sum()), sum(h3.is_valid_cell(cell) for cell in back)
        seen[ending, by_arrow] = str(column.dtype), *right
        print(f"{ending}, use_arrow={by_arrow}: {column.dtype}, {right[0]} of 37 unchanged, {right[1]} valid cells")
for (_, by_arrow), found in seen.items():
    assert found == (("float64", 0, 0) if by_arrow else ("int64", 37, 37))
PYTHON
