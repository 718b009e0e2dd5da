#!/usr/bin/env bash
# xvec 0.5.2: a point far off a raster gets the value of the nearest pixel at its edge.
#
# Expected: NaN or an error, as a point outside has no pixel (rasterio's `sample` gives the nodata value there). Seen:
# `extract_points` gives a value at any distance, since its `tolerance` is None by default. A point at 1,000 km from a
# raster of 4 px has one. With `tolerance=0.5`, it is a KeyError, which names no point.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xvec==0.5.2 geopandas==1.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import shapely
import xarray
import xvec  # noqa: F401

centres = np.arange(2) + 0.5
raster = xarray.DataArray(np.array([[1.0, 2.0], [3.0, 4.0]]), dims=("y", "x"), coords={"y": centres[::-1], "x": centres})
points = [shapely.Point(0.5, 0.5), shapely.Point(1e6, 0.5)]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = raster.xvec.extract_points(points, x_coords="x", y_coords="y").to_numpy().tolist()
print(f"values at {[point.wkt for point in points]}: {found}")
assert found == [3.0, 4.0]
try:
    raster.xvec.extract_points(points, x_coords="x", y_coords="y", tolerance=0.5)
except KeyError as error:
    print(f"with a tolerance: KeyError: {error}")
else:
    raise AssertionError("a point outside has a value in spite of the tolerance")
PYTHON
