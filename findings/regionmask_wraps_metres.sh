#!/usr/bin/env bash
# regionmask 0.13.0: a mask on a grid in metres is empty, because x is wrapped as if it were a longitude.
#
# Expected: regions and a grid in one projected CRS give a mask, as they do with shapely or rasterio. Seen: by default x
# is taken modulo 360, so that none of 625 grid points is in a square of 10 x 10 m around 100 of them. A warning says
# that no grid point belongs to any region, and nothing about longitudes. With `wrap_lon=False` it is the 100 points.
# `mask_3D_frac_approx` refuses such a grid even then, because its y is no latitude.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q regionmask==0.13.0 rasterio==1.4.4 shapely==2.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import regionmask
import shapely

square = regionmask.Regions([shapely.box(400_000, 5_800_000, 400_010, 5_800_010)])
x, y = np.arange(399_995.5, 400_020), np.arange(5_799_995.5, 5_800_020)


def count(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = square.mask(x, y, **options)
    lines = [str(each.message) for each in caught if "gridpoint" in str(each.message)]
    return int(np.isfinite(mask.to_numpy()).sum()), lines


found, lines = count()
print(f"by default: {found} of {len(x) * len(y)} points, with the warning {lines}")
assert found == 0
assert len(lines) == 1
assert "No gridpoint belongs to any region" in lines[0]
assert "longitude" not in lines[0]
found, lines = count(wrap_lon=False)
print(f"with wrap_lon=False: {found} points, warnings {lines}")
assert (found, lines) == (100, [])
try:
    square.mask_3D_frac_approx(x, y, wrap_lon=False)
except ValueError as error:
    print(f"mask_3D_frac_approx: {type(error).__name__}: {error}")
else:
    raise AssertionError("mask_3D_frac_approx has taken metres")
PYTHON
