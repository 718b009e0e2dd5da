#!/usr/bin/env bash
# pyogrio 0.13.0 (GDAL 3.12.4): with RFC7946=YES, a polygon that ends 1e-9 degrees beyond -180 gains a line at +180.
#
# Expected: RFC 7946 (section 3.1.9) asks that polygons that cross the antimeridian be cut there, so it becomes a
# polygon, or two. Seen: it is cut, then rounded to seven digits, and written as a GeometryCollection of the polygon and
# a LineString of no area on the other side of the Earth. Type and bounds change, as for each tile or building of an
# image whose edge is meant to lie at the antimeridian. A polygon that ends at -180 exactly stays a polygon.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyogrio==0.13.0 geopandas==1.2.0 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import geopandas
import pyogrio
import shapely

print("GDAL", pyogrio.__gdal_version__)
seen = {}
for west in (-180.0, -180.0 - 1e-9, -180.1):
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(west, 0.0, -179.9, 0.1)], crs="OGC:CRS84")
    frame.to_file("a.geojson", engine="pyogrio", RFC7946="YES")
    geometry = json.load(open("a.geojson"))["features"][0]["geometry"]
    seen[west] = [geometry["type"], *(each["type"] for each in geometry.get("geometries", []))]
    print(west, json.dumps(geometry))
assert list(seen.values()) == [["Polygon"], ["GeometryCollection", "Polygon", "LineString"], ["MultiPolygon"]], seen
PYTHON
