#!/usr/bin/env bash
# shapely 2.2.0 (GEOS 3.14.1): a simplified polygon may leave a corner farther behind than the tolerance.
#
# Expected: simplification as by Douglas & Peucker (1973) drops a vertex only if it is within the tolerance of the line
# that replaces it. Seen: an L of six corners becomes a triangle at a tolerance of 1, and a corner of it lies 1.109 away.
# That depends on where its ring starts: from four of the six corners, and as a closed line, nothing lies farther away
# than 0.632. GEOS also drops the start of a ring, at the end, and measures from a line that is simplified already.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q shapely==2.2.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import shapely

corners = [(2, 2), (2, 3), (1, 3), (1, 4), (4, 4), (4, 2)]


def farthest(simple: shapely.Geometry) -> float:
    return max(shapely.distance(shapely.points(corners), simple))


print("GEOS", shapely.geos_version_string)
found = {}
for start in range(len(corners)):
    ring = corners[start:] + corners[:start]
    simple = shapely.simplify(shapely.Polygon(ring), 1.0)
    found[corners[start]] = (len(simple.exterior.coords) - 1, round(float(farthest(simple.exterior)), 3))
    print("start", corners[start], "->", *found[corners[start]], simple.wkt)
line = shapely.simplify(shapely.LineString([*corners, corners[0]]), 1.0)
print("line", round(farthest(line), 3), line.wkt)
assert found[2, 3] == found[1, 3] == (3, 1.109), found
assert sorted(distance for _, distance in found.values())[:4] == [0.447, 0.447, 0.447, 0.632], found
assert farthest(line) <= 1, line
PYTHON
