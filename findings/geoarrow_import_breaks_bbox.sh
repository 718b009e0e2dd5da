#!/usr/bin/env bash
# geopandas 1.2.0 with geoarrow-pyarrow 0.3.0: after `import geoarrow.pyarrow`, GeoParquet can't be read by a box.
#
# Expected: an import changes no result of another library. Seen: points in GeoArrow encoding are filtered by the fields
# x and y of their column. Once geoarrow.pyarrow is imported, pyarrow gives this column an extension type, whose fields
# a filter can't name: `read_parquet(bbox=...)` of the same file ends in ArrowInvalid. Without a box it still works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q geopandas==1.2.0 geoarrow-pyarrow==0.3.0 pyarrow==25.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import geopandas
import pyarrow
import shapely

frame = geopandas.GeoDataFrame({"number": [1, 2]}, geometry=[shapely.Point(1, 2), shapely.Point(50, 50)], crs=4326)
frame.to_parquet("points.parquet", geometry_encoding="geoarrow")
box = (40, 40, 60, 60)
print("before:", before := geopandas.read_parquet("points.parquet", bbox=box)["number"].tolist())
assert before == [2]

import geoarrow.pyarrow  # noqa: E402, F401

assert geopandas.read_parquet("points.parquet")["number"].tolist() == [1, 2]
try:
    geopandas.read_parquet("points.parquet", bbox=box)
except pyarrow.ArrowInvalid as error:
    print(f"after the import: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert "No match for FieldRef" in str(error)
else:
    raise AssertionError("the same file is read by the box after the import as well")
PYTHON
