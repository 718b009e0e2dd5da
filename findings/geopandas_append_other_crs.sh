#!/usr/bin/env bash
# geopandas 1.2.0, pyogrio 0.13.0 (GDAL 3.12.4): appending to a file in another CRS writes the numbers as they are.
#
# Expected: `to_file(mode="a")` of a frame in EPSG:4326 to a file in EPSG:32633 transforms it, warns or raises, as
# `pandas.concat` of these two frames does, and as it raises for a column that the file lacks. Seen: no error and no
# warning, with and without Arrow, in GeoPackage, FlatGeobuf, Shapefile and GeoJSON. The file then holds degrees among
# metres, under the CRS of its first rows: the second building, the same as the first, lies 500 km away from it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q geopandas==1.2.0 pyogrio==0.13.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import geopandas as gpd
import pandas as pd
import shapely

metres = gpd.GeoDataFrame({"n": [1]}, geometry=[shapely.box(500_000, 0, 500_010, 10)], crs="EPSG:32633")
degrees = metres.to_crs("EPSG:4326")
try:
    pd.concat([metres, degrees])
except ValueError as error:
    print("pandas.concat:", error)
else:
    raise AssertionError("concat takes both")

for name in ("b.gpkg", "b.fgb", "b.shp", "b.geojson"):
    for use_arrow in (False, True):
        metres.to_file(name)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            degrees.to_file(name, mode="a", use_arrow=use_arrow)
        found = gpd.read_file(name)
        east = found.geometry.bounds["minx"].tolist()
        print(f"{name}, use_arrow={use_arrow}: EPSG:{found.crs.to_epsg()}, west edges {east}, {len(seen)} warnings")
        assert found.crs == metres.crs
        assert sorted(round(each, 3) for each in east) == [15.0, 500_000.0]
        assert not seen

    try:
        metres.assign(further=1.5).to_file(name, mode="a")
    except Exception as error:
        print(f"{name}, a further column: {type(error).__name__}: {error}")
        assert type(error).__name__ == "FieldError"
    else:
        raise AssertionError("a further column is taken")
PYTHON
