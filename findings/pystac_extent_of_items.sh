#!/usr/bin/env bash
# pystac 1.15.2: the extent of a collection, made of its items, is wrong where a bbox crosses the antimeridian or has
# heights.
#
# Expected: Extent.from_items covers all items, as STAC writes boxes: west is larger than east across the antimeridian,
# and a box of six numbers holds the heights at the third and the sixth place. Seen: the smallest west and the largest
# east are taken as they are, so that the ground beyond 180 degrees is left out; and of six numbers the first four are
# taken, so that the lowest height becomes the east, and the east becomes the north. Collection.update_extent_from_items
# does the same. Neither raises an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pystac==1.15.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from datetime import UTC, datetime

import pystac

DATE = datetime(2024, 1, 1, tzinfo=UTC)


def item(name, bbox):
    return pystac.Item(name, None, bbox, DATE, {})


fiji = item("fiji", [177.0, -19.0, -178.0, -16.0])  # 5 degrees wide
viti_levu = item("viti-levu", [177.0, -18.5, 178.5, -17.0])
hill = item("hill", [6.0, 46.0, 400.0, 8.0, 47.0, 900.0])  # west, south, lowest, east, north, highest

across = pystac.Extent.from_items([fiji, viti_levu]).spatial.bboxes
print("across the antimeridian:", across)
assert across == [[177.0, -19.0, 178.5, -16.0]]  # without 178.5 to -178

high = pystac.Extent.from_items([hill]).spatial.bboxes
print("with heights:", high)
assert high == [[6.0, 46.0, 400.0, 8.0]]

collection = pystac.Collection("places", "Places", pystac.Extent.from_items([viti_levu]))
collection.add_items([fiji, viti_levu])
collection.update_extent_from_items()
assert collection.extent.spatial.bboxes == across
PYTHON
