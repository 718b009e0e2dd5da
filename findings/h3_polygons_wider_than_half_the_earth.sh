#!/usr/bin/env bash
# h3 4.5.0: a polygon wider than 180 degrees is filled on its other side, across the antimeridian, without a word.
#
# Expected: `geo_to_cells` of a rectangle from -100 to 100 degrees gives what its two halves give together, or an error.
# Seen: an edge longer than 180 degrees is taken to go the other way around the Earth. The rectangle gets 241 cells, none
# of which is in its halves, that get 301. One from -170 to 170 gets 31 cells, of the 20 degrees that it leaves out. With
# vertices 90 degrees apart along the edges it is right. An area of interest such as a hemisphere lies elsewhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h3==4.5.0 shapely==2.2.0
"$folder/venv/bin/python" - <<'PYTHON'
import h3
import shapely

RESOLUTION = 1


def cells(*polygons):
    return {cell for polygon in polygons for cell in h3.geo_to_cells(polygon, RESOLUTION)}


for west, east, number in ((-80, 80, 246), (-100, 100, 241)):
    box = shapely.box(west, -40, east, 40)
    whole, halves = cells(box), cells(shapely.box(west, -40, 0, 40), shapely.box(0, -40, east, 40))
    dense = cells(shapely.segmentize(box, 90))
    print(f"{west} to {east}: {len(whole)} cells; its halves {len(halves)}, {len(whole & halves)} of them in both")
    assert len(whole) == number
    assert dense == halves
    assert whole == halves if east < 90 else not whole & halves

longitudes = [h3.cell_to_latlng(cell)[1] for cell in cells(shapely.box(-170, -40, 170, 40))]
print(f"-170 to 170: {len(longitudes)} cells, {min(map(abs, longitudes)):.0f} degrees from the prime meridian or more")
assert len(longitudes) == 31
assert min(map(abs, longitudes)) >= 170
PYTHON
