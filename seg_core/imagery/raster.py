"""Read the pixels of a chip, and which of them hold data."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
    intersects,
    reflect_window,
    split,
    translated,
    unreflected_view,
)
from seg_core.imagery.bands import alpha_band, has_mask, has_own_mask
from seg_core.imagery.georef import Transform, pixel_at, pixel_size, position, window_transform
from seg_core.imagery.mosaic import place_on_grid
from seg_core.imagery.open import as_rasterio, files_beside, open_image
from seg_core.imagery.scene import Scene
from seg_core.imagery.valid import drop_nodata, find_stored, read_masks
from seg_core.storage import retries
from seg_core.storage.files import is_remote

T = TypeVar("T")

RESAMPLE_BLOCK = 512  # px
OPAQUE = 100  # value of alpha while resampling, which any pixel type can hold
MAX_SOURCE = 2048  # px; largest side of what is read to resample a block: for very fine imagery, blocks are smaller


def read_image(
    image: Scene,
    pieces: Sequence[Scene],
    window: Window,
    scale: tuple[float, float] | None = None,
    new: AllocatePixels = allocate_pixels,
) -> tuple[Pixels, Valid]:
    """Read a window of a scene, or of a mosaic if it has pieces.

    `pieces` are all scenes that the window touches, in order of precedence. Returns pixels `uint8 (bands, height,
    width)` and which of them hold data, `bool (height, width)`. Raises ReadError if one of the files can't be read. The
    other arguments are those of `read_chip`.
    """
    if not pieces:
        return read_chip(image, window, scale, new=new)
    box, rows, cols = reflect_window(window, image.height, image.width)
    pixels = np.zeros((len(image.bands), box.height, box.width), np.uint8)
    valid = np.zeros((box.height, box.width), np.bool_)
    for piece in pieces:
        frame = place_on_grid(piece, image)
        common = intersection(frame, box)
        target = common.slices(box)
        if not intersects(frame, box) or valid[target].all():
            continue
        if image.is_resampled:
            piece_pixels, piece_valid = read_chip(piece, common, scale, grid=image)
        else:
            own = translated(common, -frame.row_off, -frame.col_off)
            piece_pixels, piece_valid = read_chip(piece, own, scale)
        new_valid = piece_valid & ~valid[target]
        pixels[:, *target][:, new_valid] = piece_pixels[:, new_valid]
        valid[target] |= new_valid
    chip = new((len(image.bands), len(rows), len(cols)))
    return expand_reflection(pixels, rows, cols, chip), expand_reflected_mask(valid, rows, cols)


def read_chip(
    scene: Scene,
    window: Window,
    scale: tuple[float, float] | None = None,
    grid: Scene | None = None,
    new: AllocatePixels = allocate_pixels,
) -> tuple[Pixels, Valid]:
    """Read a window. Beyond the scene's edge, it is filled by reflection.

    The window is on the scene's own pixel grid, or on that of `grid`, an image that the scene is a piece of. `scale`
    gives the two pixel values that become 0 and 255. `new` allocates the memory for the pixels, into which GDAL decodes
    directly if it can.

    Returns pixels, `uint8 (bands, height, width)`, and which of them hold data, `bool (height, width)`. If an object
    store does not answer, reading is repeated after growing pauses. Raises ReadError if the file can't be read.
    """
    return retry(lambda fresh: _read_chip(scene, grid or scene, window, scale, new, fresh))


def retry(read: Callable[[bool], T]) -> T:
    """Return `read(fresh)`. Repeat it with `fresh` true while an object store does not answer. Raises ReadError."""
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
    pixels = np.asarray(raw, np.uint8) if scale is None else to_uint8(raw, scale, into)
    return expand_reflection(pixels, rows, cols, chip), expand_reflected_mask(valid, rows, cols)


@contextmanager
def open_scene(scene: Scene, grid: Scene, fresh: bool) -> Iterator[DatasetReader]:
    """Open the file of a scene, or one of its overviews if the grid is coarser.

    Raises ReadError if the file can't be read, or is not as it was when the run was planned.
    """
    with open_image(scene.uri, fresh, sidecars=scene.sidecars) as dataset:
        end = position(tuple(dataset.transform)[:6], *dataset.shape)
        if not np.allclose(end, position(scene.transform, scene.height, scene.width), rtol=1e-9):
            size = f"{dataset.width} x {dataset.height} px"
            raise ReadError(f"{scene.uri}: {size}: its size or position was different when it was planned")
        if has_mask(dataset, scene.alpha) != scene.masked:
            # A store that did not answer may hide the mask. Without it, all pixels would wrongly count as valid.
            kind = StoreUnavailableError if is_remote(scene.uri) else ReadError
            raise kind(f"{scene.uri}: its mask was {'' if scene.masked else 'not '}there when it was planned")
        if grid.is_resampled:
            with _choose_overview(dataset, scene, grid, fresh) as source:
                yield source
        else:
            yield dataset


@contextmanager
def _choose_overview(dataset: DatasetReader, scene: Scene, grid: Scene, fresh: bool) -> Iterator[DatasetReader]:
    """Open the coarsest of a file and its overviews that is not coarser than the grid, so as not to read too much.

    Only overviews inside the file are used, because those beside it are not looked for in S3. None are used if the file
    has a mask: GDAL gives a mask that is added after the overviews its own overviews, in which all pixels are valid.
    """
    own, wanted = pixel_size(tuple(dataset.transform)[:6]), pixel_size(grid.transform)
    largest = min(wanted[0] / own[0], wanted[1] / own[1]) * (1 + 1e-6)
    factors = dataset.overviews(scene.bands[0])
    fitting = [level for level, factor in enumerate(factors) if factor <= largest]
    beside = files_beside(scene.uri, dataset, scene.sidecars, ".ovr")
    different = any(dataset.overviews(band) != factors for band in dataset.indexes)
    if not fitting or has_own_mask(dataset) or beside or different:
        yield dataset
        return
    level = max(fitting, key=lambda level: factors[level])
    with open_image(scene.uri, fresh, level, sidecars=scene.sidecars) as overview:
        # Overviews do not have a nodata value that was set after they were made.
        same = (repr(overview.nodatavals), overview.colorinterp) == (repr(dataset.nodatavals), dataset.colorinterp)
        yield overview if same else dataset


def _read(
    dataset: DatasetReader, box: Window, scene: Scene, grid: Scene, into: Pixels | None
) -> tuple[NDArray[np.generic], Valid]:
    """Read a box of the grid, into `into` or new memory. Returns the pixels and which of them hold data."""
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype) if into is None else into
    if not grid.is_resampled:
        return pixels, _read_native(dataset, box, scene, pixels)
    # GDAL rounds resampled pixels a little differently for other windows. It therefore gets only whole blocks of a
    # fixed grid, so that the pixels do not depend on how the scene is divided.
    valid = np.empty((box.height, box.width), np.bool_)
    size = _resample_block(dataset, grid)
    for block in split(align(box, size, grid.window), size):
        block_pixels, block_valid = _read_resampled(dataset, block, scene, grid)
        common = intersection(block, box)
        target, source = common.slices(box), common.slices(block)
        pixels[:, *target], valid[target] = block_pixels[:, *source], block_valid[source]
    return pixels, valid


def _resample_block(dataset: DatasetReader, grid: Scene) -> int:
    """Return the side in px of the blocks of a grid that are resampled at once, so that their sources are bounded."""
    own, wanted = pixel_size(tuple(dataset.transform)[:6]), pixel_size(grid.transform)
    factor, size = max(wanted[0] / own[0], wanted[1] / own[1]), RESAMPLE_BLOCK
    while size > 1 and size * factor > MAX_SOURCE:
        size //= 2
    return size


def _read_resampled(dataset: DatasetReader, block: Window, scene: Scene, grid: Scene) -> tuple[NDArray[Any], Valid]:
    """Resample a block of a grid bilinearly from the file's valid pixels. Returns pixels, and which hold data."""
    own: Transform = tuple(dataset.transform)[:6]
    box = _source_window(own, dataset.shape, block, grid)
    found = np.zeros((len(scene.bands), block.height, block.width), scene.dtype)
    if min(box.height, box.width) <= 0:
        return found, np.zeros(found.shape[1:], np.bool_)
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype)
    valid = _read_native(dataset, box, scene, pixels)
    if not valid.any():
        return found, np.zeros(found.shape[1:], np.bool_)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels[:, ~valid] = 0  # NaN and infinity would spread
    size, wanted = pixel_size(own), pixel_size(grid.transform)
    opaque = np.where(valid, OPAQUE, 0).astype(pixels.dtype)
    warped, _ = reproject(
        np.concatenate([pixels, opaque[np.newaxis]]),
        np.zeros((len(pixels) + 1, block.height, block.width), pixels.dtype),
        src_crs=scene.crs,
        dst_crs=scene.crs,
        src_transform=Affine(*window_transform(own, box)),
        dst_transform=Affine(*window_transform(grid.transform, block)),
        src_alpha=len(pixels) + 1,
        dst_alpha=len(pixels) + 1,
        resampling=Resampling.bilinear,
        SRC_ALPHA_MAX=OPAQUE,
        DST_ALPHA_MAX=OPAQUE,
        # Otherwise GDAL derives them from the rounded size of the source window.
        XSCALE=size[0] / wanted[0],
        YSCALE=size[1] / wanted[1],
    )
    return warped[:-1], warped[-1] > 0


def _source_window(own: Transform, shape: tuple[int, int], block: Window, grid: Scene) -> Window:
    """Return the window of a file from which a block of a grid is resampled."""
    corners = [(row, col) for row in (block.row_off, block.bottom) for col in (block.col_off, block.right)]
    rows, cols = zip(*(pixel_at(own, *position(grid.transform, *corner)) for corner in corners), strict=True)
    size, wanted = pixel_size(own), pixel_size(grid.transform)
    reach = (
        2 * math.ceil(max(1.0, wanted[0] / size[0], wanted[1] / size[1])) + 1
    )  # radius of the bilinear kernel, and one more
    top, left = math.floor(min(rows)) - reach, math.floor(min(cols)) - reach
    bottom, right = math.ceil(max(rows)) + reach, math.ceil(max(cols)) + reach
    return intersection(Window(top, left, bottom - top, right - left), Window(0, 0, *shape))


def _read_native(dataset: DatasetReader, box: Window, scene: Scene, pixels: NDArray[Any]) -> Valid:
    """Read a box of the file into `pixels`, and return which pixels hold data, `bool (height, width)`.

    A pixel holds data if all of these that the file has agree: the mask, the alpha band, the nodata value, the blocks
    that a sparse file stores, and for floats, that it is a number. If no pixel holds data, `pixels` are 0.
    """
    stored, alpha = find_stored(dataset, box, scene), alpha_band(dataset, scene.alpha)
    window = as_rasterio(box)
    if stored is not None and not stored.any():  # large parts of a mosaic are often empty, and need not be fetched
        pixels[...] = 0
        return stored
    if alpha is not None and dataset.interleaving == Interleaving.pixel and not has_own_mask(dataset):
        found = dataset.read([*scene.bands, alpha], window=window)  # together: they are in the same blocks
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
    drop_nodata(dataset, scene, pixels, valid, lambda band: dataset.read(band, window=window))
    if scene.premultiplied and alpha is not None:
        _divide_by_alpha(pixels, dataset.read(alpha, window=window))
    if scene.inverted:
        white = np.iinfo(pixels.dtype).max if scene.bits is None else 2**scene.bits - 1
        np.subtract(white, pixels, out=pixels)
    return valid


def _divide_by_alpha(pixels: NDArray[Any], alpha: NDArray[Any]) -> None:
    """Undo the multiplication of colours by alpha in half-transparent pixels, in place."""
    opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1
    partly = (alpha > 0) & (alpha < opaque)
    colors = pixels[:, partly] * (opaque / alpha[partly].astype(np.float64))
    pixels[:, partly] = colors.round().clip(0, opaque) if opaque > 1 else colors


def to_uint8(pixels: NDArray[np.generic], scale: tuple[float, float], into: Pixels | None) -> Pixels:
    """Map the values of `scale` to 0 and 255, clip beyond them, and turn NaN into 0."""
    low, high = scale
    found = np.empty(pixels.shape, np.uint8) if into is None else into
    for band, kept in zip(pixels, found, strict=True):  # one band at a time, to save memory
        stretched = (band.astype(np.float32).clip(low, high) - low) * (255.0 / (high - low))
        kept[:] = np.nan_to_num(stretched, nan=0.0).round()
    return found


def read_whole(uri: str) -> NDArray[np.generic]:
    """Read all bands of a whole file, `(bands, height, width)` in its own type. Raises ReadError."""
    with open_image(uri) as dataset:
        return np.asarray(dataset.read())
