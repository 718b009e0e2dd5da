"""Read the pixels of a chip, and what of them is valid."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Interleaving, Resampling
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.warp import reproject

from seg_core.chips import AllocatePixels, Pixels, Valid, allocate_pixels
from seg_core.errors import ReadError, StoreUnavailableError
from seg_core.grid import (
    Window,
    align,
    expand_reflected_mask,
    expand_reflection,
    intersection,
    reflect_window,
    split,
    unreflected_view,
)
from seg_core.imagery.bands import alpha_band, has_mask, has_own_mask
from seg_core.imagery.georef import Transform, pixel_at, pixel_size, position
from seg_core.imagery.open import as_rasterio, files_beside, open_image
from seg_core.imagery.scene import Scene
from seg_core.imagery.valid import drop_nodata, find_stored, read_masks
from seg_core.storage import retries
from seg_core.storage.files import is_remote

T = TypeVar("T")

RESAMPLE_BLOCK = 512  # px
OPAQUE = 100  # as alpha while resampling: any type of pixel holds it
MAX_SOURCE = 2048  # px a side of what is read to resample a block: of very fine imagery blocks are smaller


def read_chip(
    scene: Scene,
    window: Window,
    scale: tuple[float, float] | None = None,
    grid: Scene | None = None,
    new: AllocatePixels = allocate_pixels,
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
    scene: Scene, grid: Scene, window: Window, scale: tuple[float, float] | None, new: AllocatePixels, fresh: bool
) -> tuple[Pixels, Valid]:
    box, rows, cols = reflect_window(window, grid.height, grid.width)
    with open_scene(scene, grid, fresh) as dataset:
        chip = new((len(scene.bands), len(rows), len(cols)))
        into = unreflected_view(chip, rows, cols)
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
    stored, alpha = find_stored(dataset, box, scene), alpha_band(dataset, scene.alpha)
    window = as_rasterio(box)
    if stored is not None and not stored.any():  # much of a mosaic is often empty: it needn't be fetched and decoded
        pixels[...] = 0
        return stored
    if alpha is not None and dataset.interleaving == Interleaving.pixel and not has_own_mask(dataset):
        found = dataset.read([*scene.bands, alpha], window=window)  # at once: they are in the same blocks
        pixels[...] = found[:-1]
        valid: Valid = found[-1] > 0
    else:
        valid = read_masks(dataset, box, scene)
        if not valid.any():
            pixels[...] = 0
            return valid
        dataset.read(list(scene.bands), window=window, out=pixels)
    if stored is not None:
        valid &= stored
    drop_nodata(scene, pixels, valid)
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
