#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): features.shapes joins regions of floating-point numbers that differ, if they are close.
#
# Expected: one polygon for each connected region of equal pixels, as the documentation of rasterio and of
# GDALFPolygonize says. All whole numbers below 2**24 are exact in float32, so ids of buildings or of segments should be
# safe in it. Seen: neighbours whose values are at most ten steps of float32 apart become one polygon. One step is 1
# above 8,388,608, so ids 10,000,000 and 10,000,009 become one polygon, and 10,000,012 is kept apart. It also goes on
# from neighbour to neighbour: eight ids become one polygon, which has the last id alone. float64, which is taken too,
# gives the same. No warning is given. The same pixels as int32 give eight polygons. Probabilities join in the same way:
# 0.5 and the next number above it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import rasterio
from rasterio.features import shapes

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)


def values(pixels, dtype):
    return [value for _, value in shapes(numpy.array([pixels], dtype))]


seen = {apart: values([10_000_000, 10_000_000 + apart], "float32") for apart in (1, 9, 12)}
for apart, found in seen.items():
    print(f"two ids that differ by {apart}, as float32: polygons {found}")
assert seen == {1: [10_000_001], 9: [10_000_009], 12: [10_000_000, 10_000_012]}

ids = [10_000_000 + 4 * number for number in range(8)]
assert numpy.array(ids, "float32").tolist() == ids  # each id is exact
chain = {dtype: values(ids, dtype) for dtype in ("float32", "float64", "int32")}
for dtype, found in chain.items():
    print(f"eight ids as {dtype}: polygons {found}")
assert chain == {"float32": [ids[-1]], "float64": [ids[-1]], "int32": ids}

half = numpy.float32(0.5)
close = values([half, numpy.nextafter(half, numpy.float32(1))], "float32")
print("0.5 and the next float32: polygons", close)
assert len(close) == 1
PYTHON
