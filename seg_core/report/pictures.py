"""Small pictures for a page, as text that a browser shows without any request."""

import base64

import cv2
import numpy as np

from seg_core.chips import Pixels, Valid
from seg_core.imagery.decimated import average_valid
from seg_core.plots.pictures import Rgb, as_rgb

QUALITY = 70  # of WebP, from 0 to 100


def to_rgb(pixels: Pixels) -> Rgb:
    """Return the first three bands of `(bands, height, width)`, or the first one in grey, as `(height, width, 3)`."""
    return np.ascontiguousarray(as_rgb(np.moveaxis(pixels, 0, -1)))


def shrink(rgb: Rgb, valid: Valid, shape: tuple[int, int]) -> tuple[Rgb, Valid]:
    """Average an image and its valid pixels `(height, width)` to a smaller shape. One that is no smaller stays."""
    if shape[0] >= valid.shape[0] and shape[1] >= valid.shape[1]:
        return rgb, valid
    pixels, smaller = average_valid(np.moveaxis(rgb, -1, 0), valid, shape)
    return to_rgb(pixels), smaller


def encode_image(rgb: Rgb, valid: Valid) -> bytes:
    """Encode an image `uint8 (height, width, 3)` as WebP, transparent where it is not valid."""
    bgra = np.dstack([rgb[..., ::-1], np.where(valid, np.uint8(255), np.uint8(0))])
    pixels = bgra if not valid.all() else np.ascontiguousarray(bgra[..., :3])
    written, content = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    assert written
    return content.tobytes()


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture of a kind, `webp` or `png`, as a URI that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
