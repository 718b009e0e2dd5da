"""Pixels on disk: read a chip and what of it is valid, write a GeoTIFF. The only module that touches them."""

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
from rasterio.enums import ColorInterp, Interleaving, MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.shutil import copy as copy_image
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError, SegError, UnansweredError
from seg_core.geometry import Transform, pixel_size, position
from seg_core.scenes import Scene, files_beside, has_mask, open_image
from seg_core.storage import PARTIAL, is_remote
from seg_core.tiling import Window, align, fold, inside, intersection, split, unfold, unfold_mask

Pixels = NDArray[np.uint8]
Valid = NDArray[np.bool_]
NewPixels = Callable[[tuple[int, ...]], Pixels]
T = TypeVar("T")

RESAMPLE_BLOCK = 512  # px
BLOCK = 512  # px a side, of what is written in pieces
# GDAL's options for a GeoTIFF, by what a person calls the codec.
CODECS: dict[str, dict[str, str | int]] = {
    "none": {},
    "deflate": {"compress": "deflate"},
    "lzw": {"compress": "lzw"},
    "zstd": {"compress": "zstd"},
    "jpeg": {"compress": "jpeg", "jpeg_quality": 85, "interleave": "pixel"},
}
# s between attempts; in each, GDAL itself waits for half a minute.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)


def new_pixels(shape: tuple[int, ...]) -> Pixels:
    """Memory for the pixels of a chip."""
    return np.empty(shape, np.uint8)


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
    for attempt, pause in enumerate((*PAUSES, None), 1):
        try:
            return read(attempt > 1)
        except UnansweredError as error:
            error.attempts = attempt
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _read_chip(
    scene: Scene, grid: Scene, window: Window, scale: tuple[float, float] | None, new: NewPixels, fresh: bool
) -> tuple[Pixels, Valid]:
    box, rows, cols = fold(window, grid.height, grid.width)
    with open_grid(scene, grid, fresh) as dataset:
        chip = new((len(scene.bands), len(rows), len(cols)))
        into = inside(chip, rows, cols)
        raw, valid = _read(dataset, box, scene, grid, into if scale is None and scene.dtype == "uint8" else None)
    pixels = np.asarray(raw, np.uint8) if scale is None else _to_uint8(raw, scale, into)
    return unfold(pixels, rows, cols, chip), unfold_mask(valid, rows, cols)


@contextmanager
def open_grid(scene: Scene, grid: Scene, fresh: bool) -> Iterator[DatasetReader]:
    """The file on a grid: as it is, or warped to it where that is not the file's own. Raises ReadError."""
    with open_image(scene.uri, fresh) as dataset:
        end = position(tuple(dataset.transform)[:6], *dataset.shape)
        if not np.allclose(end, position(scene.transform, scene.height, scene.width), rtol=1e-9):
            raise ReadError(f"{scene.uri}: {dataset.width} x {dataset.height} px: not the size that was planned")
        if has_mask(dataset) != scene.masked:
            # To take every pixel for valid because a store was silent would be a wrong answer: it is asked again.
            kind = UnansweredError if is_remote(scene.uri) else ReadError
            raise kind(f"{scene.uri}: its mask was {'' if scene.masked else 'not '}there when it was planned")
        if not grid.resampled:
            yield dataset
            return
        bounded = scene.masked or (grid is not scene and dataset.nodata is None)
        with _near(dataset, scene, grid, fresh) as source:
            own, wanted = pixel_size(tuple(source.transform)[:6]), pixel_size(grid.transform)
            with WarpedVRT(
                source,
                crs=source.crs,
                transform=Affine(*grid.transform),
                height=grid.height,
                width=grid.width,
                resampling=Resampling.bilinear,
                add_alpha=bounded and _alpha_band(source) is None,
                # Else GDAL takes them from what of the file a window covers, rounded.
                XSCALE=own[0] / wanted[0],
                YSCALE=own[1] / wanted[1],
            ) as warped:
                yield warped


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
    masked = scene.masked and _alpha_band(dataset) is None
    beside = files_beside(scene.uri, dataset, ".ovr")
    if not fitting or masked or beside or any(dataset.overviews(band) != factors for band in dataset.indexes):
        yield dataset
        return
    with open_image(scene.uri, fresh, max(fitting, key=lambda level: factors[level])) as overview:
        # A nodata value that was set after the overviews were made is not theirs.
        same = (repr(overview.nodata), overview.colorinterp) == (repr(dataset.nodata), dataset.colorinterp)
        yield overview if same else dataset


def _alpha_band(dataset: DatasetReader) -> int | None:
    return next((i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha), None)


def _read(
    dataset: DatasetReader, box: Window, scene: Scene, grid: Scene, into: Pixels | None
) -> tuple[NDArray[np.generic], Valid]:
    """The pixels of a box of the grid, in the memory that is given or else of their own, and which hold data."""
    pixels = np.empty((len(scene.bands), box.height, box.width), scene.dtype) if into is None else into
    if not grid.resampled:
        return pixels, _read_at_once(dataset, box, scene, pixels)
    # GDAL rounds a resampled pixel a little differently for another window, so it is only ever asked for whole blocks
    # of a fixed grid: the answer must not depend on how the scene is cut.
    valid = np.empty((box.height, box.width), np.bool_)
    for block in split(align(box, RESAMPLE_BLOCK, grid.window), RESAMPLE_BLOCK):
        block_pixels = np.empty((len(scene.bands), block.height, block.width), scene.dtype)
        block_valid = _read_at_once(dataset, block, scene, block_pixels)
        common = intersection(block, box)
        target, source = common.slices(box), common.slices(block)
        pixels[:, *target], valid[target] = block_pixels[:, *source], block_valid[source]
    return pixels, valid


def _read_at_once(dataset: DatasetReader, box: Window, scene: Scene, pixels: NDArray[np.generic]) -> Valid:
    """Put the pixels of a box where they are wanted, and say which hold data; 0 where none does."""
    if _is_left_out(dataset, box, scene):
        pixels[...] = 0
        return np.zeros(box[2:], np.bool_)
    alpha, window = _alpha_band(dataset), _as_rasterio(box)
    if alpha is not None and dataset.interleaving == Interleaving.pixel:
        found = dataset.read([*scene.bands, alpha], window=window)  # at once: they are in the same blocks
        pixels[...] = found[:-1]
        valid: Valid = found[-1] > 0
    else:
        valid = read_mask(dataset, box, scene)
        if not valid.any():  # much of a mosaic is often empty: its colours needn't be fetched and decoded
            pixels[...] = 0
            return valid
        dataset.read(list(scene.bands), window=window, out=pixels)
    if scene.nodata is not None and not np.isnan(scene.nodata):
        # One band may hold the nodata value by chance, as a white roof holds 255: only all of them mean missing.
        valid &= (pixels != scene.nodata).any(axis=0)
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= np.isfinite(pixels).all(axis=0)
    return valid


def _is_left_out(dataset: DatasetReader, box: Window, scene: Scene) -> bool:
    """Whether a sparse GeoTIFF holds no block of the box at all, so that all of it is nodata.

    GDAL says where a block is in the file (https://gdal.org/drivers/raster/gtiff.html#metadata), and reads nothing.
    """
    if scene.nodata is None or dataset.driver != "GTiff":
        return False
    height, width = dataset.block_shapes[0]
    if height == 1:  # a large strip, perhaps: GDAL shows its rows as blocks, and of the first alone says where it is
        return False
    bands = scene.bands[:1] if dataset.interleaving == Interleaving.pixel else scene.bands
    rows = range(box.row_off // height, -(-box.bottom // height))
    cols = range(box.col_off // width, -(-box.right // width))
    return not any(
        dataset.get_tag_item(f"BLOCK_OFFSET_{col}_{row}", "TIFF", bidx=band)
        for row in rows
        for col in cols
        for band in bands
    )


def read_mask(dataset: DatasetReader, box: Window, scene: Scene) -> Valid:
    """What the alpha band or the mask says, where there is one."""
    alpha = _alpha_band(dataset)
    if alpha is not None:  # read as a band: GDAL's masks leave alpha out where there is a nodata value too
        return np.asarray(dataset.read(alpha, window=_as_rasterio(box)) > 0)
    if MaskFlags.per_dataset in dataset.mask_flag_enums[0]:
        return np.asarray(dataset.read_masks(scene.bands[0], window=_as_rasterio(box)) > 0)
    return np.ones((box.height, box.width), np.bool_)


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
