"""Which JPEG library GDAL decodes with, found by what it makes of a small image.

Libraries round and interpolate in different ways. IJG's libjpeg 9, which wheels of rasterio 1.4 contain, and
libjpeg-turbo, which those of 1.5 contain, decode a fifth of the values of aerial images differently.
"""

import base64
import warnings
from functools import cache
from hashlib import sha256

import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

# 8 x 8 px of random colours, with colour at half the resolution, where libraries differ most.
IMAGE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
    "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKT/wAARCAAIAAgDASIAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EAB8QAAIBAgcAAAAAAAAAAAAAAAECABFh"
    "AxMhMTJBkf/EABUBAQEAAAAAAAAAAAAAAAAAAAEC/8QAGBEBAAMBAAAAAAAAAAAAAAAAAQACAxH/2gAMAwEAAhEDEQA/ABxkZ2Az"
    "GBrpTj1t4KWvERKcxCFwq8J//9k="
)
NAMES = {"a5fff699": "libjpeg 9", "6d39472e": "libjpeg-turbo"}  # by hash of the decoded pixels


def find_decoders() -> dict[str, str]:
    """Return what decodes imagery, by name with version: GDAL, and its JPEG library."""
    return {"GDAL": rasterio.__gdal_version__, "JPEG library": find_jpeg_library()}


@cache
def find_jpeg_library() -> str:
    """Return the name of the JPEG library, or a hash of its pixels if it is none of those known."""
    with warnings.catch_warnings(), MemoryFile(IMAGE) as file:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with file.open(driver="JPEG") as image:
            pixels = image.read()
    digest = sha256(pixels.tobytes()).hexdigest()[:8]
    return NAMES.get(digest, digest)
