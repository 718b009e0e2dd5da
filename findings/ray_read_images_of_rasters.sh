#!/usr/bin/env bash
# Ray 2.60.0 with Pillow 13.0.0: `ray.data.read_images` reads other pixels than a GeoTIFF holds, and says nothing.
#
# Expected: pixels as they are stored, as those of one band of 16 bits or of floats are, or an error. Seen: three bands
# of 16 bits come as 8 bits with the upper byte alone, so that imagery of 11 bits (0 to 2047) has 8 grey levels. Red,
# green, blue and infrared come without infrared. Of two bands the second is lost. If the same bands are not labelled
# as colours (photometric MINISBLACK), reading ends in an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'ray[data]==2.60.0' pillow==13.0.0 rasterio==1.4.4
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import numpy as np
import rasterio
import ray
from rasterio.transform import from_origin

SIDE = 64
PLACE = {"crs": "EPSG:32633", "transform": from_origin(0, SIDE, 1, 1)}
rng = np.random.default_rng(0)
deep = rng.integers(0, 2048, (3, SIDE, SIDE)).astype(np.uint16)
flat = rng.integers(0, 256, (4, SIDE, SIDE)).astype(np.uint8)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def read(pixels, **options):
    shape = {"height": SIDE, "width": SIDE, "count": len(pixels), "dtype": pixels.dtype.name}
    with rasterio.open("scene.tif", "w", driver="GTiff", **shape, **PLACE, **options) as file:
        file.write(pixels)
    return ray.data.read_images("scene.tif").take_all()[0]["image"]


def stored(pixels):
    return np.moveaxis(pixels, 0, -1)


assert np.array_equal(read(deep[:1]), deep[0])
assert np.array_equal(read(deep[:1].astype(np.float32)), deep[0])
assert np.array_equal(read(flat[:3], photometric="rgb"), stored(flat[:3]))
print("as stored: one band of 16 bits, one of floats, three of 8 bits")

found = read(deep, photometric="rgb")
print(f"three bands of 16 bits, {deep.min()} to {deep.max()}: {found.dtype}, {found.min()} to {found.max()}")
assert np.array_equal(found, stored(deep) >> 8)
assert (found.dtype, found.max()) == (np.uint8, 7)

found = read(flat, photometric="rgb", alpha="unspecified")
print(f"red, green, blue and infrared: {found.shape}")
assert np.array_equal(found, stored(flat[:3]))

found = read(flat[:2])
print(f"two bands: {found.shape}")
assert np.array_equal(found, flat[0])

try:
    read(deep, photometric="minisblack")
except Exception as error:
    assert "PIL couldn't load image file" in str(error)
    print("without colours: an error")
else:
    raise AssertionError("bands that are not labelled as colours were read")
PYTHON
