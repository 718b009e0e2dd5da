#!/usr/bin/env bash
# Ray 2.60.0: a dataset without rows, although it has a schema, is written as no file and no folder.
#
# Expected: write_parquet leaves a file with the schema and no row, as pyarrow.parquet does, so that the next step reads
# zero rows of the right columns. Seen: after a filter that keeps nothing, such as tiles without a building, the folder
# isn't there, without an error, and read_parquet of it raises FileNotFoundError. With mode="overwrite" the old files
# are deleted and an empty folder is left, of which read_parquet says that no files were found. A table of zero rows
# gives the same, although its schema is known before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import os

import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import ray

ray.init("local", include_dashboard=False, num_cpus=1, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
table = pyarrow.table({"tile": pyarrow.array([1, 2, 3]), "area": pyarrow.array([0.0, 0.0, 0.0])})
data = ray.data.from_arrow(table)
none = data.filter(lambda row: row["area"] > 0)
assert none.count() == 0


def look(path):
    files = sorted(os.listdir(path)) if os.path.exists(path) else None
    try:
        read = ray.data.read_parquet(os.path.abspath(path)).count()
    except Exception as error:
        read = type(error).__name__
    print(f"{path}: files {files}, read by Ray: {read}", flush=True)
    return files, read


pyarrow.parquet.write_table(table.slice(0, 0), "by-pyarrow.parquet")
assert pyarrow.dataset.dataset("by-pyarrow.parquet").schema.names == ["tile", "area"]
none.write_parquet(os.path.abspath("filtered"))
ray.data.from_arrow(table.slice(0, 0)).write_parquet(os.path.abspath("no-rows"))
data.write_parquet(os.path.abspath("overwritten"))
assert look("overwritten")[1] == 3
none.write_parquet(os.path.abspath("overwritten"), mode="overwrite")
seen = {path: look(path) for path in ("filtered", "no-rows", "overwritten")}
by_pyarrow = pyarrow.dataset.dataset("by-pyarrow.parquet").count_rows()
print("by-pyarrow.parquet:", by_pyarrow, "rows")
ray.shutdown()
assert seen == {
    "filtered": (None, "FileNotFoundError"),
    "no-rows": (None, "FileNotFoundError"),
    "overwritten": ([], "ValueError"),
}
assert by_pyarrow == 0
PYTHON
