"""Pixels on disk: read a chip and what of it is valid, write a GeoTIFF. The only module that touches them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError
from seg_core.geometry import Transform, position
from seg_core.scenes import Scene, open_image
from seg_core.tiling import Window, align, intersection, reflect, split

Pixels = NDArray[np.uint8]
Valid = NDArray[np.bool_]

RESAMPLE_BLOCK = 512  # px


def read_chip(scene: Scene, window: Window, scale: tuple[float, float] | None = None) -> tuple[Pixels, Valid]:
    """Read a window, which may reach beyond the scene: there the scene is continued by reflection.

    Returns pixels `uint8 (bands, height, width)` and which of them hold data, `bool (height, width)`. `scale`
    names the two values that become 0 and 255. Raises ReadError where the file can't be read.
    """
    rows = reflect(window.row_off, window.row_off + window.height, scene.height)
    cols = reflect(window.col_off, window.col_off + window.width, scene.width)
    box = Window(int(rows.min()), int(cols.min()), int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1)
    with _open_grid(scene) as dataset:
        raw, valid = _read(dataset, box, scene)
    pixels = np.asarray(raw, np.uint8) if scale is None else _to_uint8(raw, scale)
    if box != window:
        row, col = np.ix_(rows - box.row_off, cols - box.col_off)
        pixels, valid = np.ascontiguousarray(pixels[:, row, col]), valid[row, col]
    return pixels, valid


@contextmanager
def _open_grid(scene: Scene) -> Iterator[DatasetReader]:
    """The file on the scene's grid: as it is, or warped to it where the scene is resampled."""
    with open_image(scene.uri) as dataset:
        end = position(tuple(dataset.transform)[:6], *dataset.shape)
        if not np.allclose(end, position(scene.transform, scene.height, scene.width), rtol=1e-9):
            raise ReadError(f"{scene.uri}: {dataset.width} x {dataset.height} px: not the size that was planned")
        try:
            if not scene.resampled:
                yield dataset
                return
            with WarpedVRT(
                dataset,
                crs=dataset.crs,
                transform=Affine(*scene.transform),
                height=scene.height,
                width=scene.width,
                resampling=Resampling.bilinear,
                add_alpha=MaskFlags.per_dataset in dataset.mask_flag_enums[0] and _alpha_band(dataset) is None,
            ) as warped:
                yield warped
        except RasterioError as error:
            raise ReadError(f"{scene.uri}: {error}") from error


def _alpha_band(dataset: DatasetReader) -> int | None:
    return next((i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha), None)


def _read(dataset: DatasetReader, box: Window, scene: Scene) -> tuple[NDArray[np.generic], Valid]:
    if not scene.resampled:
        return _read_at_once(dataset, box, scene)
    # GDAL rounds a resampled pixel a little differently for another window, so it is only ever asked for whole blocks
    # of a fixed grid: the answer must not depend on how the scene is cut.
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype)
    valid = np.empty((box.height, box.width), np.bool_)
    for block in split(align(box, RESAMPLE_BLOCK, scene.window), RESAMPLE_BLOCK):
        block_pixels, block_valid = _read_at_once(dataset, block, scene)
        common = intersection(block, box)
        target, source = common.slices(box), common.slices(block)
        pixels[:, *target], valid[target] = block_pixels[:, *source], block_valid[source]
    return pixels, valid


def _read_at_once(dataset: DatasetReader, box: Window, scene: Scene) -> tuple[NDArray[np.generic], Valid]:
    window = RasterioWindow(box.col_off, box.row_off, box.width, box.height)
    pixels = dataset.read(list(scene.bands), window=window)
    valid = np.ones(pixels.shape[1:], dtype=np.bool_)
    alpha = _alpha_band(dataset)
    if alpha is not None:  # read as a band: GDAL's masks leave alpha out where there is a nodata value too
        valid &= dataset.read(alpha, window=window) > 0
    elif MaskFlags.per_dataset in dataset.mask_flag_enums[0]:
        valid &= dataset.read_masks(scene.bands[0], window=window) > 0
    if scene.nodata is not None and not np.isnan(scene.nodata):
        # One band may hold the nodata value by chance, as a white roof holds 255: only all of them mean missing.
        valid &= (pixels != scene.nodata).any(axis=0)
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels).all(axis=0)
    return pixels, valid


def _to_uint8(pixels: NDArray[np.generic], scale: tuple[float, float]) -> Pixels:
    low, high = scale
    stretched = (pixels.astype(np.float32).clip(low, high) - low) * (255.0 / (high - low))
    return np.asarray(np.nan_to_num(stretched, nan=0.0).round(), np.uint8)


def read_image(uri: str) -> NDArray[np.generic]:
    """All bands of a whole file, `(bands, height, width)`, as they are. Raises ReadError."""
    with open_image(uri) as dataset:
        try:
            return np.asarray(dataset.read())
        except RasterioError as error:
            raise ReadError(f"{uri}: {error}") from error


def write_geotiff(
    path: str,
    pixels: NDArray[np.generic],
    *,
    crs: str | None = None,
    transform: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    nodata: float | None = None,
) -> None:
    """Write `(bands, height, width)` as a tiled, deflate-compressed GeoTIFF."""
    bands, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=bands,
        dtype=pixels.dtype.name,
        crs=crs,
        transform=Affine(*transform),
        nodata=nodata,
        tiled=True,
        blockxsize=256,
        blockysize=256,
        compress="deflate",
    ) as dataset:
        dataset.write(pixels)
