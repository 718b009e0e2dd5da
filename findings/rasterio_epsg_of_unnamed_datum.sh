#!/usr/bin/env bash
# rasterio 1.4.4 (PROJ 9.7.1): CRS.to_epsg() gives a code for a CRS whose datum has no name, and the code's datum lies
# elsewhere.
#
# Expected: None, since the code stands for another CRS. Seen: 24719 (La Canoa / UTM zone 19N, of Venezuela) for UTM zone
# 19 on the International 1924 ellipsoid, because the default confidence of 70 % is met by ellipsoid and projection
# alone. What is placed by the code lies more than 100 m from what is placed by the CRS itself; the two compare as
# different, which is the way to tell.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 pyproj==3.7.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import pyproj
import rasterio
from rasterio.crs import CRS

crs = CRS.from_user_input("+proj=utm +zone=19 +ellps=intl +units=m +type=crs")
code = crs.to_epsg()
place = 500_000, 1_000_000
here, there = (
    pyproj.Transformer.from_crs(each, "EPSG:4326", always_xy=True).transform(*place)
    for each in (crs.to_wkt(), f"EPSG:{code}")
)
apart = pyproj.Geod(ellps="WGS84").inv(*here, *there)[2]
print("rasterio", rasterio.__version__, "PROJ", rasterio.__proj_version__, "code", code, f"apart by {apart:.0f} m")
assert code == 24719
assert crs != CRS.from_epsg(code)
assert crs.to_epsg(confidence_threshold=100) is None
assert apart > 20
PYTHON
