"""Extents of images and files in words, for messages about what does not meet."""

from collections.abc import Sequence

import numpy as np
from pyproj import CRS, Transformer

from seg_core.imagery.area_projection import Bounds, transformed_bounds
from seg_core.imagery.scene import Scene

LONLAT = CRS.from_user_input("OGC:CRS84")


def describe_extent(images: Sequence[Scene]) -> str:
    """Return the extent of images in longitude and latitude."""
    boxes = [box for image in images for box in transformed_bounds(image, image.window, LONLAT)]
    left, bottom, right, top = zip(*boxes, strict=True) if boxes else [(np.nan,)] * 4
    return describe_bounds((min(left), min(bottom), max(right), max(top)), LONLAT)


def describe_bounds(bounds: Bounds, crs: CRS) -> str:
    """Return an extent in longitude and latitude; in its own CRS if it is nowhere on Earth."""
    try:
        west, south, east, north = Transformer.from_crs(crs, LONLAT, always_xy=True).transform_bounds(*bounds)
    except ValueError:
        west = south = east = north = np.nan
    if not (np.isfinite([west, south, east, north]).all() and abs(south) <= 90 and abs(north) <= 90):
        left, bottom, right, top = bounds
        return f"x {left:.6g} to {right:.6g}, y {bottom:.6g} to {top:.6g} of {crs.name}, which is nowhere on Earth"
    return f"longitude {west:.5f} to {east:.5f}, latitude {south:.5f} to {north:.5f}"
