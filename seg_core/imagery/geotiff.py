"""Write images as GeoTIFF."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.shutil import copy as copy_image
from rasterio.transform import Affine
from rasterio.windows import Window as RasterioWindow

from seg_core.chips import Pixels, Valid
from seg_core.errors import ReadError, SegError
from seg_core.grid import Window, split
from seg_core.imagery.data_files import gdal_environment
from seg_core.imagery.georef import Transform
from seg_core.imagery.open import as_rasterio, open_image
from seg_core.imagery.scene import Scene
from seg_core.storage.files import PARTIAL

BLOCK = 512  # px a side, of what is written in pieces
# GDAL's options for a GeoTIFF, by what a person calls the codec.
CODECS: dict[str, dict[str, str | int]] = {
    "none": {},
    "deflate": {"compress": "deflate"},
    "lzw": {"compress": "lzw"},
    "zstd": {"compress": "zstd"},
    "jpeg": {"compress": "jpeg", "jpeg_quality": 85, "interleave": "pixel"},
}


def write_geotiff(
    path: str,
    pixels: NDArray[np.generic],
    *,
    crs: str | None = None,
    transform: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    nodata: float | None = None,
) -> None:
    """Write `(bands, height, width)` as a tiled, deflate-compressed GeoTIFF."""
    with _create(path, pixels.shape, pixels.dtype.name, crs, transform, 256, nodata=nodata, compress="deflate") as file:
        file.write(pixels)


def write_masked(path: str, pixels: Pixels, valid: Valid, *, crs: str | None, transform: Transform) -> None:
    """Write `uint8 (bands, height, width)` as a tiled, deflate-compressed GeoTIFF.

    An internal mask says which pixels hold data, `bool (height, width)`; without it, all do. No band is labelled alpha.
    Raises SegError where it can't be written.
    """
    options = {"compress": "deflate", "predictor": 2, "photometric": "rgb" if len(pixels) == 3 else "minisblack"}
    try:
        with (
            gdal_environment({"GDAL_TIFF_INTERNAL_MASK": "YES"}),
            _create(path, pixels.shape, "uint8", crs, transform, 256, **options) as file,
        ):
            file.write(pixels)
            if not valid.all():
                file.write_mask(valid)
    except (RasterioError, CPLE_BaseError) as error:
        raise SegError(f"{path}: can't be written: {error}") from error


@contextmanager
def _create(
    path: str,
    shape: tuple[int, ...],
    dtype: str,
    crs: str | None,
    transform: Transform,
    block: int,
    **options: Any,
) -> Iterator[DatasetWriter]:
    """Open a new GeoTIFF of a shape `(bands, height, width)`, in square blocks, to be written and read back."""
    bands, height, width = shape
    options |= {"tiled": True, "blockxsize": block, "blockysize": block}
    options |= {"height": height, "width": width, "count": bands, "dtype": dtype}
    with (
        gdal_environment(),
        rasterio.open(path, "w+", driver="GTiff", crs=crs, transform=Affine(*transform), **options) as dataset,
    ):
        yield dataset


class PixelGrid(NamedTuple):
    """The pixel grid of a raster that belongs to no scene. `crs` and `transform` are those of `Scene`."""

    height: int
    width: int
    crs: str | None
    transform: Transform


@dataclass(frozen=True, kw_only=True)
class Bands:
    """What the bands of a raster hold, all of the same kind."""

    nodata: float | None  # None: each value is one of data, and an internal mask says which pixels are nodata
    dtype: str = "uint8"
    names: tuple[str, ...] = ()  # the bands' descriptions; without, there is one band that has none
    scale: float = 1.0  # a pixel's value times this is what it stands for
    colours: Mapping[int, tuple[int, int, int]] | None = None  # red, green and blue by value, as viewers show them
    overviews: str = "nearest"  # how pixels are merged


def write_cog(
    path: str,
    grid: Scene | PixelGrid,
    tiles: Iterable[tuple[Window, NDArray[Any]]],
    bands: Bands,
    keep_first: bool = False,
) -> None:
    """Write a raster on a grid, from pieces of it, as a cloud-optimised GeoTIFF with overviews.

    A piece is a window and its pixels, `(height, width)`, or `(bands, height, width)` if there are several bands. If
    `bands` have no nodata value, it is a masked array. What no piece holds is nodata. Pieces may overlap: the last one
    counts, or with `keep_first`, the first that holds data. The file appears whole or not at all; memory is bounded.
    Raises SegError where it can't be written.
    """
    options = {"compress": "deflate", "bigtiff": "if_safer"}
    with TemporaryDirectory(prefix=PARTIAL, dir=os.path.dirname(path)) as folder:
        draft, done = f"{folder}/draft.tif", f"{folder}/done.tif"
        try:
            shape = len(bands.names) or 1, grid.height, grid.width
            sparse = {"nodata": bands.nodata, "sparse_ok": True, **options}
            with (
                gdal_environment({"GDAL_TIFF_INTERNAL_MASK": "YES"}),
                _create(draft, shape, bands.dtype, grid.crs, grid.transform, BLOCK, **sparse) as dataset,
            ):
                if bands.nodata is None:  # without a mask, all pixels would count as valid, also those not written yet
                    dataset.write_mask(np.zeros((1, 1), np.bool_), window=RasterioWindow(0, 0, 1, 1))
                for window, pixels in tiles:
                    _write_piece(dataset, window, pixels, keep_first)
                _describe_bands(dataset, bands)
            with gdal_environment():
                copy_image(draft, done, driver="COG", blocksize=BLOCK, overview_resampling=bands.overviews, **options)
        except (RasterioError, CPLE_BaseError) as error:
            raise SegError(f"{path}: can't be written: {error}") from error
        if not _is_whole(done, draft):  # of a full disk GDAL may say nothing, for it is noticed at the end
            raise SegError(f"{path}: can't be written: what was read back is not what it should be: is the disk full?")
        os.replace(done, path)


def _write_piece(dataset: DatasetWriter, window: Window, pixels: NDArray[Any], keep_first: bool) -> None:
    """Write a piece of a raster; its mask too if the raster has no nodata value."""
    at = as_rasterio(window)
    pixels = pixels.reshape(-1, window.height, window.width)
    values, missing = np.ma.getdata(pixels), np.ma.getmaskarray(pixels)
    if keep_first:
        there = dataset.read(window=at, masked=True)
        is_empty = np.ma.getmaskarray(there)
        values, missing = np.where(is_empty, values, there.data), missing & is_empty
    dataset.write(values, window=at)
    if dataset.nodata is None:
        dataset.write_mask(~missing[0], window=at)


def _describe_bands(dataset: DatasetWriter, bands: Bands) -> None:
    for number, name in enumerate(bands.names, 1):
        dataset.set_band_description(number, name)
    if bands.scale != 1.0:
        dataset.scales = [bands.scale] * dataset.count
    if bands.colours is not None:
        dataset.write_colormap(1, dict(bands.colours))


def _is_whole(path: str, draft: str) -> bool:
    """Whether an image holds the pixels of its draft, and overviews that can be read."""
    try:
        with open_image(path) as dataset, open_image(draft) as drafted:
            levels = range(len(dataset.overviews(1)))
            if not all(_is_same(dataset, drafted, at) for _, at in dataset.block_windows(1)):
                return False
        for level in levels:
            with open_image(path, overview=level) as overview:
                for _, at in overview.block_windows(1):
                    overview.read(window=at)
    except ReadError:
        return False
    return True


def _is_same(one: DatasetReader, other: DatasetReader, at: RasterioWindow) -> bool:
    """Whether two images have the same values and valid pixels in a window."""
    if not np.array_equal(one.read_masks(1, window=at), other.read_masks(1, window=at)):
        return False
    return np.array_equal(one.read(window=at), other.read(window=at), equal_nan=True)


def write_repeated(path: str, pixels: Pixels, side: int, codec: str, *, crs: str, gsd_m: float) -> None:
    """Write a square GeoTIFF of `side` px in blocks of 512, that repeats `(bands, height, width)` over and over.

    The codec is one of CODECS; three bands of JPEG are stored as YCbCr of quality 85, as orthophotos mostly are.
    """
    bands, height, width = pixels.shape
    options = dict(CODECS[codec], photometric="ycbcr" if (codec, bands) == ("jpeg", 3) else "minisblack")
    transform = gsd_m, 0.0, 400_000.0, 0.0, -gsd_m, 5_800_000.0
    with _create(path, (bands, side, side), "uint8", crs, transform, BLOCK, bigtiff="if_safer", **options) as dataset:
        for at in split(Window(0, 0, side, side), 2048):
            rows = np.arange(at.row_off, at.row_off + at.height) % height
            cols = np.arange(at.col_off, at.col_off + at.width) % width
            dataset.write(pixels[:, rows[:, None], cols], window=as_rasterio(at))
