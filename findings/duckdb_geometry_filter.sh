#!/usr/bin/env bash
# duckdb 2.0.1, geopandas 1.2.0: a filter of boxes on a GEOMETRY column reads every row group, although each has its box.
#
# Expected: WHERE geometry && box skips the row groups whose box in the footer excludes them, as comparisons of numbers
# do. GeoParquet 2.0 has such boxes as statistics of Parquet's type GEOMETRY, and DuckDB reads them (parquet_metadata).
# Seen: `&&` and st_intersects_extent read ten row groups of ten, in a file of geopandas as in one of DuckDB's own. The
# same box, compared with the numbers of a covering column of GeoParquet 1.1, reads one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1 geopandas==1.2.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import re

import duckdb
import geopandas
import numpy
import shapely

number = numpy.arange(20_480)
west = number / 1000
squares = geopandas.GeoDataFrame({"number": number}, geometry=shapely.box(west, 0, west + 0.0005, 0.001), crs=4326)
squares.to_parquet("covering.parquet", schema_version="1.1.0", write_covering_bbox=True, row_group_size=2048)
squares.to_parquet("native.parquet", schema_version="2.0.0", row_group_size=2048)
duckdb.sql("COPY (SELECT number, geometry FROM 'covering.parquet') TO 'own.parquet' (ROW_GROUP_SIZE 2048)")

boxes = duckdb.sql(
    "SELECT geo_bbox.xmin, geo_bbox.xmax FROM parquet_metadata('native.parquet') WHERE path_in_schema = 'geometry'"
).fetchall()
assert len(boxes) == 10 and boxes[0][0] == 0 and boxes[9][0] == 18.432

POLYGON = "'POLYGON ((19.5 0, 19.5 1, 19.6 1, 19.6 0, 19.5 0))'::GEOMETRY"
queries = [
    ("covering.parquet", "bbox.xmin <= 19.6 AND bbox.xmax >= 19.5", "1 / 10"),
    ("native.parquet", f"geometry && {POLYGON}", "10 / 10"),
    ("native.parquet", f"st_intersects_extent(geometry, {POLYGON})", "10 / 10"),
    ("own.parquet", f"geometry && {POLYGON}", "10 / 10"),
]
for path, condition, expected in queries:
    sql = f"SELECT count(*), min(number), max(number) FROM '{path}' WHERE {condition}"
    assert duckdb.sql(sql).fetchall() == [(101, 19500, 19600)]
    plan = duckdb.sql(f"EXPLAIN ANALYZE {sql}").fetchall()[0][1]
    words = " ".join(plan.replace("│", " ").split())
    (scanned,) = re.findall(r"Row Groups Scanned: (\S+ / \S+)", words)
    print(f"{path}, {condition[:24]}...: row groups {scanned}")
    assert scanned == expected
PYTHON
