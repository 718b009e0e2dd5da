"""Burn polygons onto the pixel grid of a scene, one window at a time."""

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MergeAlg
from rasterio.features import rasterize

from seg_core.grid import Window
from seg_core.imagery.data_files import gdal_environment
from seg_core.imagery.scene import Scene
from seg_core.imagery.vectors import PolygonIndex


def burn(
    index: PolygonIndex, scene: Scene, window: Window, values: NDArray[np.uint8], all_touched: bool = False
) -> NDArray[np.uint8]:
    """Burn polygons onto a window of a scene: `uint8 (height, width)`, 0 where there is none.

    `values` holds what to burn for each number of the index, `uint8 (numbers,)`. Where polygons overlap, the highest
    value wins, whatever their order in the file. A pixel belongs to a polygon that covers its centre, with
    `all_touched` to each polygon that it touches. Memory depends on the window.
    """
    polygons, numbers = index.near(scene, window)
    burnt = values[numbers]
    order = np.argsort(burnt, kind="stable")
    shapes = [(polygons[at], int(burnt[at])) for at in order]
    if not shapes:
        return np.zeros(window.shape, np.uint8)
    with gdal_environment():
        found = rasterize(
            shapes, out_shape=window.shape, all_touched=all_touched, dtype="uint8", merge_alg=MergeAlg.replace
        )
    return np.asarray(found, np.uint8)
