"""Which pixels of an image hold data: by its mask, its alpha band, its nodata value, and the blocks that it holds."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Interleaving
from rasterio.io import DatasetReader

from seg_core.chips import Valid
from seg_core.grid import Window
from seg_core.imagery.bands import alpha_band, has_own_mask
from seg_core.imagery.open import as_rasterio
from seg_core.imagery.scene import Scene


def drop_nodata(
    dataset: DatasetReader, scene: Scene, pixels: NDArray[Any], valid: Valid, read_band: Callable[[int], NDArray[Any]]
) -> None:
    """Take from the valid pixels those that hold the nodata value in all bands, and those that are no numbers.

    One band may hold the nodata value by chance, as a white roof holds 255: only all of them mean missing. `pixels` are
    the bands of the scene. `read_band` returns another colour band of the file, `(height, width)`. It is called only if
    pixels hold the nodata value in all bands of the scene: black water may still be seen in infrared.
    """
    values = scene.nodata_color or (scene.nodata,) * dataset.count
    nodata = {i: value for i, value in enumerate(values, 1) if value is not None and not math.isnan(value)}
    chosen = [band == nodata[i] for i, band in zip(scene.bands, pixels, strict=True) if i in nodata]
    if chosen:
        missing = valid & np.all(chosen, axis=0)
        for i in set(nodata) - {*scene.bands, alpha_band(dataset, scene.alpha)}:
            if not missing.any():
                break
            missing &= read_band(i) == nodata[i]
        valid &= ~missing
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels).all(axis=0)


def read_valid(dataset: DatasetReader, box: Window, scene: Scene) -> Valid:
    """Which pixels of a box hold data by mask, alpha band and stored blocks, not by their values, `(height, width)`."""
    stored, valid = find_stored(dataset, box, scene), read_masks(dataset, box, scene)
    return valid if stored is None else valid & stored


def read_masks(dataset: DatasetReader, box: Window, scene: Scene) -> Valid:
    """What the alpha band and the mask say, where there are any; a pixel holds data where both say so."""
    valid, window = np.ones((box.height, box.width), np.bool_), as_rasterio(box)
    if (alpha := alpha_band(dataset, scene.alpha)) is not None:
        valid &= dataset.read(alpha, window=window) > 0  # as a band: GDAL's masks leave alpha out beside others
    if has_own_mask(dataset):
        valid &= dataset.read_masks(scene.bands[0], window=window) > 0
    return valid


def find_stored(dataset: DatasetReader, box: Window, scene: Scene) -> Valid | None:
    """Which pixels of a box are in blocks that a sparse GeoTIFF holds; None where all are.

    GDAL says where a block is in the file (https://gdal.org/drivers/raster/gtiff.html#metadata), and reads nothing.
    """
    if dataset.driver != "GTiff" or (scene.blank_is_data and scene.nodata is None):
        return None
    height, width = dataset.block_shapes[0]
    if height == 1:  # a large strip, perhaps: GDAL shows its rows as blocks, and of the first alone says where it is
        return None
    bands = scene.bands[:1] if dataset.interleaving == Interleaving.pixel else scene.bands
    rows = range(box.row_off // height, -(-box.bottom // height))
    cols = range(box.col_off // width, -(-box.right // width))
    held = np.array(
        [
            [
                any(dataset.get_tag_item(f"BLOCK_OFFSET_{col}_{row}", "TIFF", bidx=band) for band in bands)
                for col in cols
            ]
            for row in rows
        ]
    )
    if held.all():
        return None
    at_row, at_col = np.arange(box.row_off, box.bottom) // height, np.arange(box.col_off, box.right) // width
    return held[np.ix_(at_row - rows.start, at_col - cols.start)]
