#!/usr/bin/env bash
# pyarrow 26.0.1: an array or a scalar made of Python values imports pandas, wherever it is installed.
#
# Expected: pyarrow needs pandas for data frames, and a program without any does not load it. Seen: the first
# `pa.array(["a"])`, `pa.scalar("a")` or comparison with a Python value (`pc.equal(column, "a")`) imports all of pandas,
# to find out whether the value is one of its series. That takes a fifth of a second of a core, and some 50 MB.
# `pq.read_table` loads it too, through `pyarrow.dataset`. To read a file with `pq.ParquetFile` and to add up its columns
# loads nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
ask() {
    "$folder/venv/bin/python" - "$1" <<'PYTHON'
import resource
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

assert "pandas" not in sys.modules
before = resource.getrusage(resource.RUSAGE_SELF)
exec(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF)
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(f"{sys.argv[1]}: pandas {'is' if 'pandas' in sys.modules else 'is not'} loaded, {seconds:.2f} s of a core")
PYTHON
}
ask 'pq.write_table(pa.table({"a": ["x"], "n": [1]}), "t.parquet")'
ask 'pa.array(["a"])'
ask 'pa.scalar("a", pa.string())'
ask 'pc.equal(pq.ParquetFile("t.parquet").read()["a"], "x")'
ask 'pq.ParquetFile("t.parquet").read().to_pylist()'
ask 'pc.sum(pq.ParquetFile("t.parquet").read()["n"]).as_py()'
ask 'pc.sum(pq.ParquetFile("t.parquet").read()["n"]).as_py()' | grep -q "is not loaded"
ask 'pa.array(["a"])' | grep -q "is loaded"
