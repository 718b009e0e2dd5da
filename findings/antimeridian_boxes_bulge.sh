#!/usr/bin/env bash
# antimeridian 0.4.9: a box that is cut at the 180th meridian reaches further north and south than before.
#
# Expected: a box from 170 to 190 degrees east and 60 degrees south to 60 north becomes two boxes with the same
# latitudes, as in GeoJSON, whose edges are straight in longitude and latitude. Seen: edges are taken for great circles
# by default, but only where they are cut. The corners at 180 degrees are at 60.4 degrees, and the area in degrees is
# larger. With `great_circle=False` it is two boxes of the same latitudes. A box wider than 180 degrees is taken for the
# other side of the Earth by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q antimeridian==0.4.9 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import antimeridian
import shapely

box = shapely.box(170, -60, 190, 60)


def latitudes(polygon):
    return [round(polygon.bounds[at], 1) for at in (1, 3)]


by_default = antimeridian.fix_polygon(box, fix_winding=True)
flat = antimeridian.fix_polygon(box, fix_winding=True, great_circle=False)
print(f"latitudes: {latitudes(box)}, cut {latitudes(by_default)}, cut with great_circle=False {latitudes(flat)}")
print(f"areas: {box.area}, {by_default.area:.1f}, {flat.area}")
assert latitudes(by_default) == [-60.4, 60.4]
assert by_default.area > box.area
assert latitudes(flat) == [-60, 60]
assert flat.area == box.area
wide = shapely.box(-120, -10, 120, 10)
other = antimeridian.fix_polygon(wide, fix_winding=True, great_circle=False)
print(f"a box of 240 degrees has an area of {wide.area}, and of {other.area} when it is fixed")
assert not other.contains(shapely.Point(0, 0))
assert other.area == 120 * 20
PYTHON
