"""Pixels on disk: read a chip and what of it is valid, write a GeoTIFF. The only module that touches them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError
from seg_core.geometry import Transform
from seg_core.scenes import Scene, open_image
from seg_core.tiling import Window, reflect

Pixels = NDArray[np.uint8]
Valid = NDArray[np.bool_]


def read_chip(scene: Scene, window: Window, scale: tuple[float, float] | None = None) -> tuple[Pixels, Valid]:
    """Read a window, which may reach beyond the scene: there the scene is continued by reflection.

    Returns pixels `uint8 (bands, height, width)` and which of them hold data, `bool (height, width)`. `scale`
    names the two values that become 0 and 255. Raises ReadError where the file can't be read.
    """
    rows = reflect(window.row_off, window.row_off + window.height, scene.height)
    cols = reflect(window.col_off, window.col_off + window.width, scene.width)
    box = Window(int(rows.min()), int(cols.min()), int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1)
    with _open_grid(scene) as dataset:
        raw, valid = _read(dataset, box, scene.bands, scene.nodata)
    pixels = np.asarray(raw, np.uint8) if scale is None else _to_uint8(raw, scale)
    if box != window:
        row, col = np.ix_(rows - box.row_off, cols - box.col_off)
        pixels, valid = np.ascontiguousarray(pixels[:, row, col]), valid[row, col]
    return pixels, valid


@contextmanager
def _open_grid(scene: Scene) -> Iterator[DatasetReader]:
    """The file on the scene's grid: as it is, or warped to it where the scene is resampled."""
    with open_image(scene.uri) as dataset:
        try:
            if scene.resampled:
                # GDAL's approximate transformer depends on the window read, and the answer must not: next to no
                # tolerance makes it exact (none at all fails to open).
                with WarpedVRT(
                    dataset,
                    crs=dataset.crs,
                    transform=Affine(*scene.transform),
                    height=scene.height,
                    width=scene.width,
                    resampling=Resampling.bilinear,
                    add_alpha=MaskFlags.per_dataset in dataset.mask_flag_enums[0],
                    tolerance=1e-6,
                ) as warped:
                    yield warped
            elif dataset.shape != (scene.height, scene.width):
                raise ReadError(
                    f"{scene.uri}: {dataset.width} x {dataset.height} px, planned {scene.width} x {scene.height}"
                )
            else:
                yield dataset
        except RasterioError as error:
            raise ReadError(f"{scene.uri}: {error}") from error


def _read(
    dataset: DatasetReader, box: Window, bands: tuple[int, ...], nodata: float | None
) -> tuple[NDArray[np.generic], Valid]:
    window = RasterioWindow(box.col_off, box.row_off, box.width, box.height)
    pixels = dataset.read(list(bands), window=window)
    flags = dataset.mask_flag_enums[bands[0] - 1]
    if MaskFlags.per_dataset in flags:  # an alpha band or an internal mask
        valid = dataset.read_masks(bands[0], window=window) > 0
    elif nodata is not None and not np.isnan(nodata):
        # One band may hold the nodata value by chance, as a white roof holds 255: only all of them mean missing.
        valid = (pixels != nodata).any(axis=0)
    else:
        valid = np.ones(pixels.shape[1:], dtype=np.bool_)
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels).all(axis=0)
    return pixels, valid


def _to_uint8(pixels: NDArray[np.generic], scale: tuple[float, float]) -> Pixels:
    low, high = scale
    stretched = (pixels.astype(np.float32) - low) * (255.0 / (high - low))
    return np.asarray(np.nan_to_num(stretched, nan=0.0).clip(0, 255).round(), np.uint8)


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
