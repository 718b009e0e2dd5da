#!/usr/bin/env bash
# xvec 0.5.2: zones that overlap lose pixels to each other, or not, depending on which other package is installed.
#
# Expected: the sum over a zone does not depend on other zones. Seen: `zonal_stats` takes the method "rasterize" unless
# exactextract is installed. It burns all zones into one raster, so that a pixel counts for the last of its zones alone.
# Of two squares of 3 x 3 px with 4 px in common, the first has 5 px left. By "iterate", both have 9. Nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xvec==0.5.2 rioxarray==0.19.0 rasterio==1.4.4 geopandas==1.2.0 joblib
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import geopandas
import numpy as np
import rioxarray  # noqa: F401
import shapely
import xarray
import xvec  # noqa: F401

centres = np.arange(4) + 0.5
ones = xarray.DataArray(np.ones((4, 4)), dims=("y", "x"), coords={"y": centres[::-1], "x": centres})
zones = geopandas.GeoSeries([shapely.box(0, 0, 3, 3), shapely.box(1, 1, 4, 4)])


def sums(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return ones.xvec.zonal_stats(zones, x_coords="x", y_coords="y", stats="sum", **options).to_numpy().tolist()


found = {"by default": sums()} | {method: sums(method=method) for method in ("rasterize", "iterate")}
print(found)
assert found == {"by default": [5.0, 9.0], "rasterize": [5.0, 9.0], "iterate": [9.0, 9.0]}
PYTHON
