#!/usr/bin/env bash
# duckdb 2.0.1, geopandas 1.2.0: a copy of a GeoParquet file by COPY says less than the file, and one thing that is
# wrong: an unknown CRS becomes longitude and latitude.
#
# Expected: COPY (SELECT * FROM 'a.parquet') TO 'b.parquet' keeps what GeoParquet 1.1 says of the column, or refuses to.
# Seen: the copy is of version 1.0.0 and has the same rows, but
# - `crs: null`, which means that the CRS is unknown, is left out, which means OGC:CRS84: coordinates in pixels or in a
#   local system become degrees for each reader;
# - `covering` is left out although its column bbox is copied, so that geopandas refuses to filter by a box;
# - `edges: spherical`, `epoch` and `orientation` are left out, so that great circles become straight lines.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1 geopandas==1.2.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import duckdb
import geopandas
import pyarrow.parquet
import shapely


def described(path):
    return json.loads(pyarrow.parquet.read_metadata(path).metadata[b"geo"])


def copied(path):
    duckdb.sql(f"COPY (SELECT * FROM '{path}') TO 'copy-of-{path}'")
    copy = described(f"copy-of-{path}")
    assert copy["version"] == "1.0.0"
    return copy["columns"]["geometry"]


pixels = geopandas.GeoDataFrame(geometry=[shapely.box(100, 200, 300, 400)], crs=None)
pixels.to_parquet("pixels.parquet", schema_version="1.1.0")
assert described("pixels.parquet")["columns"]["geometry"]["crs"] is None
assert geopandas.read_parquet("pixels.parquet").crs is None
assert "crs" not in copied("pixels.parquet")
print("unknown CRS, read from the copy:", geopandas.read_parquet("copy-of-pixels.parquet").crs)
assert geopandas.read_parquet("copy-of-pixels.parquet").crs == "OGC:CRS84"

covered = geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1), shapely.box(5, 0, 6, 1)], crs=4326)
covered.to_parquet("covered.parquet", schema_version="1.1.0", write_covering_bbox=True)
assert len(geopandas.read_parquet("covered.parquet", bbox=(0, 0, 2, 2))) == 1
assert "covering" not in copied("covered.parquet")
assert "bbox" in pyarrow.parquet.read_schema("copy-of-covered.parquet").names
try:
    geopandas.read_parquet("copy-of-covered.parquet", bbox=(0, 0, 2, 2))
    raise SystemExit("the copy can be filtered")
except ValueError as error:
    print("filter of the copy:", error)

table = pyarrow.parquet.read_table("covered.parquet")
geo = json.loads(table.schema.metadata[b"geo"])
more = {"edges": "spherical", "epoch": 2020.5, "orientation": "counterclockwise"}
geo["columns"]["geometry"] |= more
metadata = {**table.schema.metadata, b"geo": json.dumps(geo)}
pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), "sphere.parquet")
left = copied("sphere.parquet")
print("said of the copied column:", sorted(left))
assert not more.keys() & left.keys()
PYTHON
