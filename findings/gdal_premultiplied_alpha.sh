#!/usr/bin/env bash
# GDAL 3.10.3 (in rasterio 1.4.4) writes ALPHA=PREMULTIPLIED into a GeoTIFF, and does not say so when it reads it.
#
# Expected: an item of the alpha band's metadata. Seen: two files that differ in nothing but the tag ExtraSamples (1 is
# associated alpha, 2 is not) have the same metadata in every domain, and the same colour interpretation. So whoever
# needs to know has to read the tag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6 pillow==13.0.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import rasterio
from PIL import Image

EXTRA_SAMPLES = 338
said = {}
for alpha in ("premultiplied", "non-premultiplied"):
    shape = {"height": 64, "width": 64, "count": 4, "dtype": "uint8"}
    with rasterio.open(f"{alpha}.tif", "w", driver="GTiff", photometric="rgb", alpha=alpha, **shape) as file:
        file.write(np.full((4, 64, 64), 128, np.uint8))
    with rasterio.open(f"{alpha}.tif") as file:
        bands = [(file.tags(i, ns=domain) for domain in file.tag_namespaces(i)) for i in file.indexes]
        domains = {domain: file.tags(ns=domain) for domain in (None, *file.tag_namespaces()) if domain != "DERIVED_SUBDATASETS"}
        said[alpha] = (file.colorinterp, file.mask_flag_enums, domains, [list(each) for each in bands])
    with Image.open(f"{alpha}.tif") as picture:
        print("GDAL", rasterio.__gdal_version__, alpha, "ExtraSamples", picture.tag_v2[EXTRA_SAMPLES], said[alpha])
        assert picture.tag_v2[EXTRA_SAMPLES] == ((1,) if alpha == "premultiplied" else (2,))
assert said["premultiplied"] == said["non-premultiplied"]
PYTHON
