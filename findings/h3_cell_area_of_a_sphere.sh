#!/usr/bin/env bash
# h3 4.5.0, pyproj 3.7.2: the area of an H3 cell is that on a sphere, so it depends on latitude how wrong it is.
#
# Expected: h3.cell_area, in square metres to 15 digits, is the area of the cell on the ground within some 0.01 %, as
# latitudes and longitudes of WGS 84 go in. Seen: it is 0.45 % more than the geodesic area on the ellipsoid at the
# equator, the same at 35 degrees, and 0.85 % less at 80 degrees, for large cells and small ones alike. A share of a
# cell is right only if both of its areas are measured in one way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h3==4.5.0 pyproj==3.7.2
"$folder/venv/bin/python" - <<'PYTHON'
import h3
import pyproj

geod = pyproj.Geod(ellps="WGS84")
seen = {}
for latitude in (0.5, 35, 60, 80):
    for resolution in (6, 10):
        cell = h3.latlng_to_cell(latitude, 10, resolution)
        latitudes, longitudes = zip(*h3.cell_to_boundary(cell))
        area = abs(geod.polygon_area_perimeter(longitudes, latitudes)[0])
        seen[latitude, resolution] = 100 * (h3.cell_area(cell, "m^2") / area - 1)
        print(f"latitude {latitude}, resolution {resolution}: {area:14,.1f} m2, h3 {seen[latitude, resolution]:+.3f} %")

for (latitude, _), percent in seen.items():
    expected = {0.5: 0.45, 35: 0.0, 60: -0.56, 80: -0.85}[latitude]
    assert abs(percent - expected) < 0.03, (latitude, percent)
PYTHON
