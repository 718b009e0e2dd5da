"""Pixels on disk: read a chip and what of it is valid, write a GeoTIFF. The only module that touches them."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import Interleaving, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.shutil import copy as copy_image
from rasterio.transform import Affine
from rasterio.warp import reproject
from rasterio.windows import Window as RasterioWindow

from seg_core.chips import NewPixels, Pixels, Valid, new_pixels
from seg_core.errors import ReadError, SegError, StoreUnavailableError
from seg_core.grid import (
    Window,
    align,
    expand_reflected_mask,
    expand_reflection,
    inside,
    intersection,
    reflect_window,
    split,
)
from seg_core.imagery.bands import alpha_band, has_mask, has_own_mask
from seg_core.imagery.georef import Transform, pixel_at, pixel_size, position
from seg_core.imagery.open import files_beside, open_image
from seg_core.imagery.scene import Scene
from seg_core.storage import retries
from seg_core.storage.files import PARTIAL, is_remote

T = TypeVar("T")

RESAMPLE_BLOCK = 512  # px
OPAQUE = 100  # as alpha while resampling: any type of pixel holds it
MAX_SOURCE = 2048  # px a side of what is read to resample a block: of very fine imagery blocks are smaller
BLOCK = 512  # px a side, of what is written in pieces
# GDAL's options for a GeoTIFF, by what a person calls the codec.
CODECS: dict[str, dict[str, str | int]] = {
    "none": {},
    "deflate": {"compress": "deflate"},
    "lzw": {"compress": "lzw"},
    "zstd": {"compress": "zstd"},
    "jpeg": {"compress": "jpeg", "jpeg_quality": 85, "interleave": "pixel"},
}


def read_chip(
    scene: Scene,
    window: Window,
    scale: tuple[float, float] | None = None,
    grid: Scene | None = None,
    new: NewPixels = new_pixels,
) -> tuple[Pixels, Valid]:
    """Read a window, which may reach beyond the scene: there the scene is continued by reflection.

    The window is on the scene's own grid, or on that of `grid`, an image that the scene is a piece of.

    Returns pixels `uint8 (bands, height, width)` and which of them hold data, `bool (height, width)`. `scale`
    names the two values that become 0 and 255. The pixels are put into `new` memory, into which GDAL decodes them where
    it can. Raises ReadError where the file can't be read; an object store that does not answer is asked again, after a
    growing pause.
    """
    return ask_again(lambda fresh: _read_chip(scene, grid or scene, window, scale, new, fresh))


def ask_again(read: Callable[[bool], T]) -> T:
    """What `read` returns; asked again, for what is fresh, where an object store does not answer. Raises ReadError."""
    for attempt, pause in enumerate((*retries.CHIP_PAUSES, None), 1):
        try:
            return read(attempt > 1)
        except StoreUnavailableError as error:
            error.attempts = attempt
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _read_chip(
    scene: Scene, grid: Scene, window: Window, scale: tuple[float, float] | None, new: NewPixels, fresh: bool
) -> tuple[Pixels, Valid]:
    box, rows, cols = reflect_window(window, grid.height, grid.width)
    with open_scene(scene, grid, fresh) as dataset:
        chip = new((len(scene.bands), len(rows), len(cols)))
        into = inside(chip, rows, cols)
        raw, valid = _read(dataset, box, scene, grid, into if scale is None and scene.dtype == "uint8" else None)
    pixels = np.asarray(raw, np.uint8) if scale is None else _to_uint8(raw, scale, into)
    return expand_reflection(pixels, rows, cols, chip), expand_reflected_mask(valid, rows, cols)


@contextmanager
def open_scene(scene: Scene, grid: Scene, fresh: bool) -> Iterator[DatasetReader]:
    """The file that a scene is read from; an overview of it where the grid is coarser. Raises ReadError."""
    with open_image(scene.uri, fresh, sidecars=scene.sidecars) as dataset:
        end = position(tuple(dataset.transform)[:6], *dataset.shape)
        if not np.allclose(end, position(scene.transform, scene.height, scene.width), rtol=1e-9):
            raise ReadError(f"{scene.uri}: {dataset.width} x {dataset.height} px: not the size that was planned")
        if has_mask(dataset, scene.alpha) != scene.masked:
            # To take every pixel for valid because a store was silent would be a wrong answer: it is asked again.
            kind = StoreUnavailableError if is_remote(scene.uri) else ReadError
            raise kind(f"{scene.uri}: its mask was {'' if scene.masked else 'not '}there when it was planned")
        if grid.is_resampled:
            with _near(dataset, scene, grid, fresh) as source:
                yield source
        else:
            yield dataset


@contextmanager
def _near(dataset: DatasetReader, scene: Scene, grid: Scene, fresh: bool) -> Iterator[DatasetReader]:
    """Of a file and its overviews the coarsest that is not coarser than the grid: what is finer is read for nothing.

    Only overviews within the file: those beside it are not looked for in S3. And not of a file with a mask: GDAL gives
    a mask that is added after the overviews further ones that say all is valid.
    """
    own, wanted = pixel_size(tuple(dataset.transform)[:6]), pixel_size(grid.transform)
    room = min(wanted[0] / own[0], wanted[1] / own[1]) * (1 + 1e-6)
    factors = dataset.overviews(scene.bands[0])
    fitting = [level for level, factor in enumerate(factors) if factor <= room]
    beside = files_beside(scene.uri, dataset, scene.sidecars, ".ovr")
    different = any(dataset.overviews(band) != factors for band in dataset.indexes)
    if not fitting or has_own_mask(dataset) or beside or different:
        yield dataset
        return
    level = max(fitting, key=lambda level: factors[level])
    with open_image(scene.uri, fresh, level, sidecars=scene.sidecars) as overview:
        # A nodata value that was set after the overviews were made is not theirs.
        same = (repr(overview.nodatavals), overview.colorinterp) == (repr(dataset.nodatavals), dataset.colorinterp)
        yield overview if same else dataset


def _read(
    dataset: DatasetReader, box: Window, scene: Scene, grid: Scene, into: Pixels | None
) -> tuple[NDArray[np.generic], Valid]:
    """The pixels of a box of the grid, in the memory that is given or else of their own, and which hold data."""
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype) if into is None else into
    if not grid.is_resampled:
        return pixels, _read_at_once(dataset, box, scene, pixels)
    # GDAL rounds a resampled pixel a little differently for another window, so it is only ever asked for whole blocks
    # of a fixed grid: the answer must not depend on how the scene is cut.
    valid = np.empty((box.height, box.width), np.bool_)
    size = _resample_block(dataset, grid)
    for block in split(align(box, size, grid.window), size):
        block_pixels, block_valid = _read_resampled(dataset, block, scene, grid)
        common = intersection(block, box)
        target, source = common.slices(box), common.slices(block)
        pixels[:, *target], valid[target] = block_pixels[:, *source], block_valid[source]
    return pixels, valid


def _resample_block(dataset: DatasetReader, grid: Scene) -> int:
    """The side in px of the blocks of a grid that are resampled at once: what they are made of is bounded."""
    own, wanted = pixel_size(tuple(dataset.transform)[:6]), pixel_size(grid.transform)
    factor, size = max(wanted[0] / own[0], wanted[1] / own[1]), RESAMPLE_BLOCK
    while size > 1 and size * factor > MAX_SOURCE:
        size //= 2
    return size


def _read_resampled(dataset: DatasetReader, block: Window, scene: Scene, grid: Scene) -> tuple[NDArray[Any], Valid]:
    """A block of a grid, made of the pixels of the file that hold data: bilinear, `(bands, height, width)`."""
    own: Transform = tuple(dataset.transform)[:6]
    box = _source_window(own, dataset.shape, block, grid)
    found = np.zeros((len(scene.bands), block.height, block.width), scene.dtype)
    if min(box.height, box.width) <= 0:
        return found, np.zeros(found.shape[1:], np.bool_)
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype)
    valid = _read_at_once(dataset, box, scene, pixels)
    if not valid.any():
        return found, np.zeros(found.shape[1:], np.bool_)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels[:, ~valid] = 0  # what is not finite would spread
    size, wanted = pixel_size(own), pixel_size(grid.transform)
    opaque = np.where(valid, OPAQUE, 0).astype(pixels.dtype)
    warped, _ = reproject(
        np.concatenate([pixels, opaque[np.newaxis]]),
        np.zeros((len(pixels) + 1, block.height, block.width), pixels.dtype),
        src_crs=scene.crs,
        dst_crs=scene.crs,
        src_transform=Affine(*_moved(own, box)),
        dst_transform=Affine(*_moved(grid.transform, block)),
        src_alpha=len(pixels) + 1,
        dst_alpha=len(pixels) + 1,
        resampling=Resampling.bilinear,
        SRC_ALPHA_MAX=OPAQUE,
        DST_ALPHA_MAX=OPAQUE,
        # Else GDAL takes them from what of the file a window covers, rounded.
        XSCALE=size[0] / wanted[0],
        YSCALE=size[1] / wanted[1],
    )
    return warped[:-1], warped[-1] > 0


def _source_window(own: Transform, shape: tuple[int, int], block: Window, grid: Scene) -> Window:
    """The pixels of a file that a block of a grid is made of."""
    corners = [(row, col) for row in (block.row_off, block.bottom) for col in (block.col_off, block.right)]
    rows, cols = zip(*(pixel_at(own, *position(grid.transform, *corner)) for corner in corners), strict=True)
    size, wanted = pixel_size(own), pixel_size(grid.transform)
    reach = 2 * math.ceil(max(1.0, wanted[0] / size[0], wanted[1] / size[1])) + 1  # of a bilinear kernel, and one
    top, left = math.floor(min(rows)) - reach, math.floor(min(cols)) - reach
    bottom, right = math.ceil(max(rows)) + reach, math.ceil(max(cols)) + reach
    return intersection(Window(top, left, bottom - top, right - left), Window(0, 0, *shape))


def _moved(transform: Transform, window: Window) -> Transform:
    """The transform of a window of an image."""
    a, b, _, d, e, _ = transform
    x, y = position(transform, window.row_off, window.col_off)
    return a, b, float(x), d, e, float(y)


def _read_at_once(dataset: DatasetReader, box: Window, scene: Scene, pixels: NDArray[Any]) -> Valid:
    """Put the pixels of a box of the file where they are wanted, and say which hold data; 0 where none does.

    A pixel holds data where each of these that the file has says so: its mask, its alpha band, its nodata value, the
    blocks that a sparse file holds, and, of floats, where it is a number.
    """
    stored, alpha = _stored(dataset, box, scene), alpha_band(dataset, scene.alpha)
    window = _as_rasterio(box)
    if stored is not None and not stored.any():  # much of a mosaic is often empty: it needn't be fetched and decoded
        pixels[...] = 0
        return stored
    if alpha is not None and dataset.interleaving == Interleaving.pixel and not has_own_mask(dataset):
        found = dataset.read([*scene.bands, alpha], window=window)  # at once: they are in the same blocks
        pixels[...] = found[:-1]
        valid: Valid = found[-1] > 0
    else:
        valid = _read_masks(dataset, box, scene)
        if not valid.any():
            pixels[...] = 0
            return valid
        dataset.read(list(scene.bands), window=window, out=pixels)
    if stored is not None:
        valid &= stored
    _drop_nodata(scene, pixels, valid)
    if scene.premultiplied and alpha is not None:
        _divide_by_alpha(pixels, dataset.read(alpha, window=window))
    if scene.inverted:
        white = np.iinfo(pixels.dtype).max if scene.bits is None else 2**scene.bits - 1
        np.subtract(white, pixels, out=pixels)
    return valid


def _divide_by_alpha(pixels: NDArray[Any], alpha: NDArray[Any]) -> None:
    """Undo the multiplication of colours by alpha, where it is between transparent and opaque."""
    opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1
    partly = (alpha > 0) & (alpha < opaque)
    colors = pixels[:, partly] * (opaque / alpha[partly].astype(np.float64))
    pixels[:, partly] = colors.round().clip(0, opaque) if opaque > 1 else colors


def _drop_nodata(scene: Scene, pixels: NDArray[Any], valid: Valid) -> None:
    """Take from the valid pixels those that hold the nodata value in all bands, and those that are no numbers.

    One band may hold the nodata value by chance, as a white roof holds 255: only all of them mean missing.
    """
    if scene.nodata_color is not None:
        values = [(band, scene.nodata_color[number - 1]) for band, number in zip(pixels, scene.bands, strict=True)]
        differs = [band != value for band, value in values if value is not None and not math.isnan(value)]
        if differs:
            valid &= np.any(differs, axis=0)
    elif scene.nodata is not None and not np.isnan(scene.nodata):
        valid &= (pixels != scene.nodata).any(axis=0)
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels).all(axis=0)


def read_valid(dataset: DatasetReader, box: Window, scene: Scene) -> Valid:
    """Which pixels of a box hold data by mask, alpha band and stored blocks, not by their values, `(height, width)`."""
    stored, valid = _stored(dataset, box, scene), _read_masks(dataset, box, scene)
    return valid if stored is None else valid & stored


def _read_masks(dataset: DatasetReader, box: Window, scene: Scene) -> Valid:
    """What the alpha band and the mask say, where there are any; a pixel holds data where both say so."""
    valid, window = np.ones((box.height, box.width), np.bool_), _as_rasterio(box)
    if (alpha := alpha_band(dataset, scene.alpha)) is not None:
        valid &= dataset.read(alpha, window=window) > 0  # as a band: GDAL's masks leave alpha out beside others
    if has_own_mask(dataset):
        valid &= dataset.read_masks(scene.bands[0], window=window) > 0
    return valid


def _stored(dataset: DatasetReader, box: Window, scene: Scene) -> Valid | None:
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


def _as_rasterio(window: Window) -> RasterioWindow:
    return RasterioWindow(window.col_off, window.row_off, window.width, window.height)


def _to_uint8(pixels: NDArray[np.generic], scale: tuple[float, float], into: Pixels | None) -> Pixels:
    low, high = scale
    found = np.empty(pixels.shape, np.uint8) if into is None else into
    for band, kept in zip(pixels, found, strict=True):  # one by one: they are large
        stretched = (band.astype(np.float32).clip(low, high) - low) * (255.0 / (high - low))
        kept[:] = np.nan_to_num(stretched, nan=0.0).round()
    return found


def read_whole(uri: str) -> NDArray[np.generic]:
    """All bands of a whole file, `(bands, height, width)`, as they are. Raises ReadError."""
    with open_image(uri) as dataset:
        return np.asarray(dataset.read())


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


def _create(
    path: str,
    shape: tuple[int, ...],
    dtype: str,
    crs: str | None,
    transform: Transform,
    block: int,
    **options: Any,
) -> DatasetWriter:
    """Open a new GeoTIFF of a shape `(bands, height, width)`, in square blocks, to be written."""
    bands, height, width = shape
    return rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=bands,
        dtype=dtype,
        crs=crs,
        transform=Affine(*transform),
        tiled=True,
        blockxsize=block,
        blockysize=block,
        **options,
    )


def write_cog(path: str, grid: Scene, tiles: Iterable[tuple[Window, NDArray[np.uint8]]], nodata: int) -> None:
    """Write one band on a scene's grid, from pieces of it, as a cloud-optimised GeoTIFF with overviews.

    What no piece holds is nodata. It appears whole or not at all; memory is bounded. Raises SegError where it can't be
    written.
    """
    options = {"compress": "deflate", "bigtiff": "if_safer"}
    with TemporaryDirectory(prefix=PARTIAL, dir=os.path.dirname(path)) as folder:
        draft, done = f"{folder}/draft.tif", f"{folder}/done.tif"
        try:
            shape = 1, grid.height, grid.width
            sparse = {"nodata": nodata, "sparse_ok": True, **options}
            with _create(draft, shape, "uint8", grid.crs, grid.transform, BLOCK, **sparse) as dataset:
                for window, pixels in tiles:
                    dataset.write(pixels, 1, window=_as_rasterio(window))
            copy_image(draft, done, driver="COG", blocksize=BLOCK, overview_resampling="nearest", **options)
        except (RasterioError, CPLE_BaseError) as error:
            raise SegError(f"{path}: can't be written: {error}") from error
        if not _is_whole(done, draft):  # of a full disk GDAL may say nothing, for it is noticed at the end
            raise SegError(f"{path}: can't be written: what was read back is not what it should be: is the disk full?")
        os.replace(done, path)


def _is_whole(path: str, draft: str) -> bool:
    """Whether an image holds the pixels of its draft, and overviews that can be read."""
    try:
        with open_image(path) as dataset, open_image(draft) as drafted:
            levels = range(len(dataset.overviews(1)))
            same = (
                np.array_equal(dataset.read(1, window=at), drafted.read(1, window=at))
                for _, at in dataset.block_windows(1)
            )
            if not all(same):
                return False
        for level in levels:
            with open_image(path, overview=level) as overview:
                for _, at in overview.block_windows(1):
                    overview.read(1, window=at)
    except ReadError:
        return False
    return True


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
            dataset.write(pixels[:, rows[:, None], cols], window=_as_rasterio(at))
