#!/usr/bin/env bash
# ray 2.60.0: GeoParquet that Ray Data reads and writes is GeoParquet no longer, and a GeoDataFrame can't be written.
#
# Expected: `read_parquet(...).write_parquet(...)` of a file without a change keeps the file's metadata, as pyarrow does
# with `write_table(read_table(...))`. Seen: the key "geo", with the column's CRS, is gone, and geopandas refuses the
# copy. A GeoDataFrame passes through Ray Data whole, with its CRS, and its column has the type None in the schema. But
# `write_parquet` of it ends in an ArrowTypeError about a numpy.dtype, which names neither geometry nor a way out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'ray[data]==2.60.0' geopandas==1.2.0 pyarrow==25.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2> errors.txt || { tail -5 errors.txt; exit 1; }
import glob
import logging

import geopandas
import pyarrow.parquet
import ray
import shapely

ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
frame = geopandas.GeoDataFrame({"number": [1]}, geometry=[shapely.box(0, 0, 1, 1)], crs=32633)
frame.to_parquet("one.parquet")
pyarrow.parquet.write_table(pyarrow.parquet.read_table("one.parquet"), "copy.parquet")
assert geopandas.read_parquet("copy.parquet").crs == frame.crs
ray.data.read_parquet("one.parquet").write_parquet("copies")
(path,) = glob.glob("copies/*.parquet")
try:
    geopandas.read_parquet(path)
except ValueError as error:
    first = str(error).splitlines()[0]
    print(f"the copy: {first}")
    assert first == "Missing geo metadata in Parquet/Feather file."
else:
    raise AssertionError("the copy still has the key geo")

dataset = ray.data.from_pandas(frame)
print(f"a GeoDataFrame has the types {dataset.schema().types}")
assert dataset.to_pandas().crs == frame.crs
try:
    dataset.write_parquet("frames")
except Exception as error:
    last = str(error).strip().splitlines()[-1]
    print(f"writing it: {last}")
    assert "ArrowTypeError" in last
    assert "Did not pass numpy.dtype object" in last
else:
    raise AssertionError("a GeoDataFrame was written")
PYTHON
