"""Read a whole scene with fewer pixels, to look at: from its overviews if it has any."""

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.io import DatasetReader

from seg_core.chips import Pixels, Valid
from seg_core.grid import Window, split
from seg_core.imagery.bands import alpha_band, has_own_mask
from seg_core.imagery.raster import open_scene, read_chip, retry, to_uint8
from seg_core.imagery.scene import Scene
from seg_core.imagery.valid import drop_nodata

BLOCK = 2048  # px; side of what is read at once of a file without overviews

Scale = tuple[float, float] | None


def read_decimated(scene: Scene, factor: float, scale: Scale = None) -> tuple[Pixels, Valid]:
    """Read a whole scene, with about `factor` x `factor` of its pixels averaged to one.

    `scale` is that of `seg_core.imagery.raster.read_chip`. Returns pixels, `uint8 (bands, height, width)`, and which of
    them hold data, `bool (height, width)`. They are good to look at, but not exact: masks of overviews may be coarse.
    Memory does not grow with the scene. Raises ReadError if the file can't be read, or is not as it was when the run
    was planned.
    """

    def read(fresh: bool) -> tuple[Pixels, Valid]:
        with open_scene(scene, replace(scene, gsd_m=scene.source_gsd_m), fresh) as dataset:
            own = _on_own_grid(scene, dataset)
            step = max(1, round(factor * own.width / scene.width))
            if step > 1 and dataset.overviews(scene.bands[0]):
                return _read_overview(dataset, own, step, scale)
        return _average_blocks(own, step, scale)

    return retry(read)


def _on_own_grid(scene: Scene, dataset: DatasetReader) -> Scene:
    """Return the scene on the pixel grid of its file."""
    height, width = dataset.shape
    transform = tuple(dataset.transform)[:6]
    return replace(scene, height=height, width=width, transform=transform, gsd_m=scene.source_gsd_m)


def _read_overview(dataset: DatasetReader, scene: Scene, step: int, scale: Scale) -> tuple[Pixels, Valid]:
    """Read a whole file from its overviews, of which GDAL chooses one."""
    shape = _shrunk(scene.window, step)
    pixels = dataset.read(list(scene.bands), out_shape=(len(scene.bands), *shape), resampling=Resampling.average)
    valid = np.ones(shape, np.bool_)
    if (alpha := alpha_band(dataset, scene.alpha)) is not None:
        valid &= dataset.read(alpha, out_shape=shape) > 0
    if has_own_mask(dataset):
        valid &= dataset.read_masks(scene.bands[0], out_shape=shape) > 0
    average = {"out_shape": shape, "resampling": Resampling.average}
    drop_nodata(dataset, scene, pixels, valid, lambda band: dataset.read(band, **average))
    if scene.inverted:
        pixels = (np.iinfo(pixels.dtype).max if scene.bits is None else 2**scene.bits - 1) - pixels
    return np.asarray(pixels, np.uint8) if scale is None else to_uint8(pixels, scale, None), valid


def _average_blocks(scene: Scene, step: int, scale: Scale) -> tuple[Pixels, Valid]:
    """Read a whole file block by block, and average the valid pixels of each."""
    height, width = _shrunk(scene.window, step)
    found, valid = np.zeros((len(scene.bands), height, width), np.uint8), np.zeros((height, width), np.bool_)
    for block in split(scene.window, max(1, BLOCK // step) * step):
        pixels, there = read_chip(scene, block, scale)
        shape = _shrunk(block, step)
        at = Window(block.row_off // step, block.col_off // step, *shape).slices(Window(0, 0, height, width))
        found[:, *at], valid[at] = average_valid(pixels, there, shape)
    return found, valid


def average_valid(pixels: Pixels, valid: Valid, shape: tuple[int, int]) -> tuple[Pixels, Valid]:
    """Average the valid pixels of an image `(bands, height, width)` to a smaller shape `(height, width)`.

    Half of the pixels make an average valid.
    """
    share = _average(valid.astype(np.float32), shape)
    found = np.empty((len(pixels), *shape), np.uint8)
    for band, average in zip(pixels, found, strict=True):  # one at a time, to save memory
        total = _average(np.where(valid, band, np.float32(0)), shape)
        average[:] = np.divide(total, share, out=np.zeros(shape, np.float32), where=share > 0).round().clip(0, 255)
    return found, share >= 0.5


def _average(values: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    height, width = shape
    return np.asarray(cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA))


def _shrunk(window: Window, step: int) -> tuple[int, int]:
    return -(-window.height // step), -(-window.width // step)
