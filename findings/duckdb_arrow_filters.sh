#!/usr/bin/env bash
# duckdb 2.0.1, pyarrow 26.0.1: a query of a pyarrow dataset reads every row group, whatever its WHERE says.
#
# Expected: as DuckDB's documentation of Arrow datasets says, filters go down into the scan, so that row groups whose
# statistics exclude them are skipped, as pyarrow itself skips them with the same filter. Seen: the scan of the dataset
# returns all 100,000 rows, for a column of its own and for a field of a struct (the bbox of GeoParquet) alike, and the
# filter comes after it. DuckDB's own reader skips nine row groups of ten on the same file, for both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import re

import duckdb
import pyarrow
import pyarrow.dataset
import pyarrow.parquet

rows = 100_000
x = pyarrow.array([float(number) for number in range(rows)])
bbox = pyarrow.StructArray.from_arrays([x, x], ["xmin", "xmax"])
pyarrow.parquet.write_table(pyarrow.table({"x": x, "bbox": bbox}), "tiles.parquet", row_group_size=rows // 10)

dataset = pyarrow.dataset.dataset("tiles.parquet")
(fragment,) = dataset.get_fragments()
kept = [
    len(fragment.subset(field >= 90_000).row_groups)
    for field in (pyarrow.dataset.field("x"), pyarrow.dataset.field("bbox", "xmin"))
]
print("pyarrow reads row groups:", kept)
assert kept == [1, 1]

connection = duckdb.connect()
connection.register("arrow", dataset)
seen = {}
for source in ("arrow", "read_parquet('tiles.parquet')"):
    for column in ("x", "bbox.xmin"):
        sql = f"EXPLAIN ANALYZE SELECT sum(x) FROM {source} WHERE {column} >= 90000"
        plan = connection.sql(sql).fetchall()[0][1]
        words = " ".join(plan.replace("│", " ").split())
        scan = re.findall(r"Function: (?:PYTHON_ARROW_SCAN|READ_PARQUET) .*", words)[0]
        seen[source, column] = re.findall(r"([\d,]+) rows", scan)[0], re.findall(r"Row Groups Scanned: (\S+ / \S+)", scan)
        print(source, column, *seen[source, column])
assert seen == {
    ("arrow", "x"): ("100,000", []),
    ("arrow", "bbox.xmin"): ("100,000", []),
    ("read_parquet('tiles.parquet')", "x"): ("10,000", ["1 / 10"]),
    ("read_parquet('tiles.parquet')", "bbox.xmin"): ("10,000", ["1 / 10"]),
}
PYTHON
