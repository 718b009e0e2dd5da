#!/usr/bin/env bash
# exactextract 0.3.0, geopandas 1.2.0: a frame without a CRS, and one empty polygon among others, end the whole call.
#
# Expected: a GeoDataFrame without a CRS is measured on a raster without one, as its polygons are when they are given as
# GeoJSON; and an empty polygon, which is valid, sums to 0, as one beside the raster does. Seen: the frame ends in
# AttributeError ('NoneType' object has no attribute 'to_wkt'), before anything is measured; one empty polygon ends in
# RuntimeError (Error getting geometry extent), and the sums of the other polygons are lost with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q exactextract==0.3.0 geopandas==1.2.0 shapely==2.2.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import geopandas
import numpy
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource

raster = NumPyRasterSource(numpy.ones((4, 4), numpy.float32), 0, 0, 4, 4, name="value")
inside, beside, empty = shapely.box(0.5, 0.5, 2.5, 1.5), shapely.box(10, 10, 12, 12), shapely.Polygon()


def features(*polygons):
    return [{"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(each)} for each in polygons]


def ask(areas):
    try:
        return [found["properties"]["sum"] for found in exact_extract(raster, areas, ["sum"])]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


answers = {
    "polygons as GeoJSON": ask(features(inside, beside)),
    "a frame with a CRS": ask(geopandas.GeoDataFrame(geometry=[inside, beside], crs="EPSG:32633")),
    "a frame without": ask(geopandas.GeoDataFrame(geometry=[inside, beside])),
    "with an empty polygon": ask(features(inside, beside, empty)),
}
for name, answer in answers.items():
    print(f"{name}: {answer}")
assert empty.is_valid
assert answers == {
    "polygons as GeoJSON": [2.0, 0.0],
    "a frame with a CRS": [2.0, 0.0],
    "a frame without": "AttributeError: 'NoneType' object has no attribute 'to_wkt'",
    "with an empty polygon": "RuntimeError: Error getting geometry extent.",
}
PYTHON
