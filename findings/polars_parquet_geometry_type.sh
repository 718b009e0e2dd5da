#!/usr/bin/env bash
# polars 2.1.0: a Parquet file with a column of the type GEOMETRY can't be opened, not even for its other columns.
#
# Expected: an unknown logical type is read as what it annotates, which is binary, as pandas does, and other columns are
# not concerned. Seen: for GeoParquet 2.0, as geopandas 1.2.0 writes it with pyarrow 26.0.1, polars raises ComputeError,
# "LogicalType union has no variant set", for one column of integers too. `use_pyarrow=True` reads the file, and so does
# polars by itself if geopandas writes its default version, in which geometries are plain binary.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0 geopandas==1.2.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import geopandas
import pandas
import polars
import shapely

frame = geopandas.GeoDataFrame({"number": [1]}, geometry=[shapely.Point(1, 2)], crs=4326)
frame.to_parquet("plain.parquet")
frame.to_parquet("typed.parquet", schema_version="2.0.0")
assert polars.read_parquet("plain.parquet", columns=["number"])["number"].to_list() == [1]
assert pandas.read_parquet("typed.parquet")["number"].tolist() == [1]
assert polars.read_parquet("typed.parquet", use_pyarrow=True)["number"].to_list() == [1]
for columns in (None, ["number"]):
    try:
        polars.read_parquet("typed.parquet", columns=columns)
    except polars.exceptions.ComputeError as error:
        print(f"columns={columns}: {type(error).__name__}: {error}")
        assert "LogicalType union has no variant set" in str(error)
    else:
        raise AssertionError(f"columns={columns}: polars has read a file with the type GEOMETRY")
PYTHON
