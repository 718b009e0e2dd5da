#!/usr/bin/env bash
# pyarrow 26.0.1, geopandas 1.2.0: GeoParquet metadata that are added while a file is written are not found again.
#
# A writer knows only at the end which geometry types a file holds, so it adds "geo" by
# ParquetWriter.add_key_value_metadata. Expected: a folder of such files is read by geopandas as one of them is, because
# "geo" is in each footer. Seen: one file is read, and the folder is refused ("Missing geo metadata"). For a folder,
# geopandas asks the schema that pyarrow gives. pyarrow takes the metadata of the schema that it has stored itself, and
# drops what else the footer holds. With store_schema=False, the folder is read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1 geopandas==1.2.0 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import os

import geopandas
import pyarrow
import pyarrow.parquet
import shapely

geo = {"version": "1.1.0", "primary_column": "geometry"}
geo["columns"] = {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"]}}
table = pyarrow.table({"geometry": [shapely.to_wkb(shapely.box(0, 0, 1, 1))]})


def ask(path):
    try:
        frame = geopandas.read_parquet(path)
    except ValueError as error:
        return str(error).splitlines()[0]
    return f"{len(frame)} row in {frame.crs.name}"


seen = {}
for stored in (True, False):
    folder = f"stored-{stored}"
    os.mkdir(folder)
    path = f"{folder}/tiles.parquet"
    with pyarrow.parquet.ParquetWriter(path, table.schema, store_schema=stored) as file:
        file.write_table(table)
        file.add_key_value_metadata({"geo": json.dumps(geo)})
    in_footer = b"geo" in pyarrow.parquet.read_metadata(path).metadata
    in_schema = b"geo" in (pyarrow.parquet.read_schema(path).metadata or {})
    seen[stored] = in_footer, in_schema, ask(path), ask(folder)
    print(f"store_schema={stored}:", *seen[stored], sep="; ")
assert seen == {
    True: (True, False, "1 row in WGS 84 (CRS84)", "Missing geo metadata in Parquet/Feather file."),
    False: (True, True, "1 row in WGS 84 (CRS84)", "1 row in WGS 84 (CRS84)"),
}
PYTHON
