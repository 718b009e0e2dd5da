#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): where a GeoTIFF has an internal mask and an alpha band, the alpha band is ignored.
#
# Expected: a pixel is valid where both say so, or at least a flag that says that there is alpha. Seen: dataset_mask() and
# read_masks() are the internal mask alone, and mask_flag_enums lacks `alpha`, as if the file had no alpha band.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags

pixels = np.full((4, 64, 64), 99, np.uint8)
pixels[3, :, :32] = 0  # transparent
mask = np.ones((64, 64), bool)
mask[:16] = False
with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
    with rasterio.open("a.tif", "w", driver="GTiff", height=64, width=64, count=4, dtype="uint8") as file:
        file.write(pixels)
        file.write_mask(mask)
with rasterio.open("a.tif") as file:
    found, flags = file.dataset_mask() > 0, file.mask_flag_enums[0]
    print("GDAL", rasterio.__gdal_version__, flags, "valid:", found.sum(), "of both:", (mask & (pixels[3] > 0)).sum())
    assert file.colorinterp[3] == ColorInterp.alpha
    assert flags == [MaskFlags.per_dataset]
    assert np.array_equal(found, mask)
PYTHON
