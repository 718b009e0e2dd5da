#!/usr/bin/env bash
# geopandas 1.2.0: a GeoParquet file in GeoArrow encoding returns other geometries than were written.
#
# Expected: what is read equals what was written, as with the encoding WKB, or mixed geometries are refused. Seen: beside
# one multipolygon, each polygon comes back as a multipolygon, though the file's metadata still lists "Polygon". Beside
# one point with a height, each point comes back with a height of NaN. Nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q geopandas==1.2.0 pyarrow==25.0.0 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import warnings

import geopandas
import pyarrow.parquet
import shapely

box = shapely.box(0, 0, 1, 1)
shapes = geopandas.GeoDataFrame(geometry=[box, shapely.MultiPolygon([box])], crs=4326)
points = geopandas.GeoDataFrame(geometry=[shapely.Point(1, 2, 3), shapely.Point(1, 2)], crs=4326)
for encoding, types, heights in (
    ("WKB", ["Polygon", "MultiPolygon"], [True, False]),
    ("geoarrow", ["MultiPolygon", "MultiPolygon"], [True, True]),
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes.to_parquet("shapes.parquet", geometry_encoding=encoding)
        points.to_parquet("points.parquet", geometry_encoding=encoding)
        found = geopandas.read_parquet("shapes.parquet").geom_type.tolist()
        has_z = geopandas.read_parquet("points.parquet").has_z.tolist()
    column = json.loads(pyarrow.parquet.read_schema("shapes.parquet").metadata[b"geo"])["columns"]["geometry"]
    print(f"{encoding}: types {found}, listed {column['geometry_types']}, with a height {has_z}")
    assert (found, has_z) == (types, heights)
    assert column["geometry_types"] == ["MultiPolygon", "Polygon"]
PYTHON
