#!/usr/bin/env bash
# rasterio 1.4.4: read_masks(boundless=True) is 0 and 255 for one file, and False and True for another.
#
# Expected: a mask of 0 and 255 as uint8, as the documentation of masks says of every file. Seen: for a file that has a
# nodata value or an internal mask, it is. For a file in which all pixels are valid, it is an array of bool, as soon as
# boundless=True is passed, even for a window inside the file. So `mask == 255`, the share of valid pixels by
# `mask.mean() / 255`, and a mask that is written to a file as alpha, are right for some files, and 0 % or nearly so for
# others, although these hold more valid pixels. dataset_mask(boundless=True) gives 0 and 255 for all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy
import rasterio
from rasterio.windows import Window

shape = {"driver": "GTiff", "height": 8, "width": 8, "count": 1, "dtype": "uint8"}
with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
    for name, nodata in (("all valid", None), ("nodata", 0), ("mask", None)):
        with rasterio.open(f"{name}.tif", "w", nodata=nodata, **shape) as file:
            file.write(numpy.full((8, 8), 7, numpy.uint8), 1)
            if name == "mask":
                file.write_mask(True)
seen = {}
for name in ("all valid", "nodata", "mask"):
    with rasterio.open(f"{name}.tif") as file:
        plain = file.read_masks(1)
        assert plain.dtype == numpy.uint8 and (plain == 255).all()
        for place, window in (("inside", Window(0, 0, 4, 4)), ("across the edge", Window(-2, 0, 4, 4))):
            mask = file.read_masks(1, window=window, boundless=True)
            whole = file.dataset_mask(window=window, boundless=True)
            assert whole.dtype == numpy.uint8 and whole.max() == 255
            seen[name, place] = str(mask.dtype), float((mask == 255).mean()), float((whole == 255).mean())
            print(f"{name}, {place}: {mask.dtype}, 255 in {seen[name, place][1]:.0%}, by dataset_mask in"
                  f" {seen[name, place][2]:.0%}")
for (name, place), found in seen.items():
    share = 1.0 if place == "inside" else 0.5
    assert found == (("bool", 0.0, share) if name == "all valid" else ("uint8", share, share))
PYTHON
