#!/usr/bin/env bash
# rasterio 1.4.4: reproject(..., dst_nodata=0) into an array leaves the nodata value of the source in it.
#
# Expected: what the source does not cover becomes `dst_nodata`, as its documentation says, whatever number that is. Seen:
# a source with nodata 255 and dst_nodata=0 gives 255, the value that it gives if dst_nodata isn't passed at all; with
# dst_nodata=9 it gives 9. So 255 counts as valid where zeros are missing pixels, and the mean of the image goes from 5
# to 67.5. src_nodata=255 beside it changes nothing. A masked array as the source, and WarpedVRT(nodata=0), give 0.
# rasterio's sources have been corrected since (pull request 3506), but 1.4.4 is the last version for Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import rasterio
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject

pixels = numpy.full((8, 8), 5, numpy.uint8)
pixels[:2] = 255
place = {"crs": "EPSG:32633", "transform": Affine(1, 0, 400_000, 0, -1, 5_800_000)}
with rasterio.open(
    "a.tif", "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", nodata=255, **place
) as file:
    file.write(pixels, 1)


def values(source, **settings):
    out = numpy.full((8, 8), 77, numpy.uint8)
    reproject(source, out, dst_crs=place["crs"], dst_transform=place["transform"], **settings)
    return numpy.unique(out).tolist(), float(out[out != settings.get("dst_nodata", 255)].mean())


with rasterio.open("a.tif") as file:
    band = rasterio.band(file, 1)
    masked = {"src_crs": place["crs"], "src_transform": place["transform"]}
    seen = {
        "band, default": values(band),
        "band, dst_nodata=9": values(band, dst_nodata=9),
        "band, dst_nodata=0": values(band, dst_nodata=0),
        "band, src_nodata=255, dst_nodata=0": values(band, src_nodata=255, dst_nodata=0),
        "masked array, dst_nodata=0": values(file.read(1, masked=True), dst_nodata=0, **masked),
    }
    with WarpedVRT(file, nodata=0) as view:
        warped = numpy.unique(view.read(1)).tolist()
for name, (found, mean) in seen.items():
    print(f"{name}: values {found}, mean of the valid ones {mean}")
print("WarpedVRT, nodata=0: values", warped)
assert seen == {
    "band, default": ([5, 255], 5),
    "band, dst_nodata=9": ([5, 9], 5),
    "band, dst_nodata=0": ([5, 255], 67.5),
    "band, src_nodata=255, dst_nodata=0": ([5, 255], 67.5),
    "masked array, dst_nodata=0": ([0, 5], 5),
}
assert warped == [0, 5]
PYTHON
