#!/usr/bin/env bash
# geopandas 1.2.0 with pyogrio 0.13.0: rows that are appended to a file get as many columns by position, not by name.
#
# Expected: `to_file(..., mode="a")` matches columns by name, as `pandas.concat` does, or ends in an error if they differ.
# Seen, for GeoPackage, FlatGeobuf, GeoJSON and Shapefile: if the new rows have as many columns as the file, the first is
# written to the first, and so on, whatever they are called. Rows with the same two columns in another order have their
# values exchanged. A height of 6 m becomes an area of 6 m2, and a text an area of 0 m2. With fewer columns names count,
# and what is absent is null; a column too many ends in an error. With `use_arrow=True` names always count.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q geopandas==1.2.0 pyogrio==0.13.0 shapely==2.2.0 pandas==3.1.1 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

import geopandas
import numpy
import shapely
from pyogrio.errors import DataLayerError, FieldError


def building(at, **columns):
    shape = shapely.box(at, 0, at + 1, 1)
    return geopandas.GeoDataFrame({name: [value] for name, value in columns.items()}, geometry=[shape], crs=4326)


def append(path, first, later, **options):
    """The values of the later building, by column of the file."""
    if os.path.exists(path):
        os.remove(path)
    first.to_file(path)
    later.to_file(path, mode="a", **options)
    found = geopandas.read_file(path)
    row = found[found.bounds["minx"] == 2].drop(columns="geometry")
    return {name: values[0] for name, values in row.to_dict("list").items()}


both, one = building(0, area_m2=80.5, height_m=6.0), building(0, area_m2=80.5)
for suffix in ("gpkg", "fgb", "geojson", "shp"):
    path, swapped = f"buildings.{suffix}", building(2, height_m=4.0, area_m2=60.25)
    by_position, by_name = append(path, both, swapped), append(path, both, swapped, use_arrow=True)
    height, use = append(path, one, building(2, height_m=4.0)), append(path, one, building(2, use="barn"))
    print(f"{suffix}: 60.25 m2 and 4 m high is {by_position}, through Arrow {by_name}; 4 m high is {height}, a barn {use}")
    assert by_position == {"area_m2": 4.0, "height_m": 60.25}
    assert by_name == {"area_m2": 60.25, "height_m": 4.0}
    assert height == {"area_m2": 4.0}
    assert use == {"area_m2": 0.0}
    fewer = append(path, both, building(2, height_m=4.0))
    assert numpy.isnan(fewer["area_m2"])
    assert fewer["height_m"] == 4.0
    for first, options, error in ((both, {}, FieldError), (one, {"use_arrow": True}, DataLayerError)):
        try:
            append(path, first, building(2, use="barn"), **options)
        except error as raised:
            assert "field" in str(raised)
        else:
            raise AssertionError(f"{suffix}: a column that the file lacks was appended by name")
PYTHON
