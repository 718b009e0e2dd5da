"""Windows of a part: their chips, what the model makes of them, their tiles' rows, and how well neighbours fit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import AllocatePixels, JpegStreams, allocate_pixels
from seg_core.errors import ReadError
from seg_core.grid import Window, bounding_window, chip_window, intersection, round_up, split
from seg_core.imagery.jpeg_streams import read_streams
from seg_core.imagery.raster import read_image
from seg_core.run.plan import Part, ReadBlock, Settings

if TYPE_CHECKING:
    from seg_core.model.device_chips import DeviceChip
    from seg_core.model.segmenter import Pending, Segmenter
    from seg_core.model.window_results import WindowResult

BORDER_STRIP = 32  # px on this side of a border that are looked at

Chip = tuple[NDArray[np.uint8], NDArray[np.bool_]]
ReadPixels = Callable[[Part, Window, Settings, AllocatePixels], Chip]  # see read_pixels


def read_pixels(part: Part, chip: Window, settings: Settings, new: AllocatePixels = allocate_pixels) -> Chip:
    """The pixels of a chip, in `new` memory, and which hold data. Raises ReadError."""
    return read_image(part.scene, part.sources, chip, settings.scale, new)


def stage_windows(
    block: ReadBlock,
    settings: Settings,
    segmenter: "Segmenter",
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
    pixels_of: ReadPixels = read_pixels,
) -> "list[DeviceChip]":
    """The chips of windows that are read at once, where the device has them at hand.

    It decodes them, where that is wanted and can be. All others are read by `pixels_of`. Raises ReadError where one of
    them can't be read. The work is done within a `turn`, but for that of a GPU, which takes chips of many threads at
    once.
    """
    bundle, normalization = segmenter.bundle, block.part.normalization(settings)
    chips = [chip_window(window, settings.halo, bundle.stride, bundle.min_chip) for window in block.windows]
    whole = bounding_window(chips)

    def read() -> "DeviceChip":
        pixels, valid = pixels_of(block.part, whole, settings, segmenter.allocate_pixels)
        return segmenter.stage(pixels, valid, normalization)

    with ExitStack() as within:
        within.enter_context(turn())
        streams = _read_streams(block.part, whole, settings, segmenter)
        if streams is None:
            staged = read()
        else:
            if segmenter.on_gpu:
                within.close()
            try:
                staged = segmenter.stage_streams(streams, normalization)
            except ReadError:
                # What the device's JPEG engine does not know, or is damaged, is left to GDAL, which says which. But
                # only of a window alone: who decodes the others must not depend on what is read with them.
                if len(block.windows) > 1:
                    raise
                if segmenter.on_gpu:
                    within.enter_context(turn())
                staged = read()
    return [staged.cut(chip.slices(whole)) for chip in chips]


def _read_streams(part: Part, chip: Window, settings: Settings, segmenter: "Segmenter") -> JpegStreams | None:
    """What the device is to decode; None where GDAL is to. Raises ReadError where it can't be read."""
    if settings.decode != "device" or part.sources or settings.scale is not None:
        return None
    return read_streams(part.scene, chip, segmenter.decodes_rgb)


def may_be_partial(error: ReadError, settings: Settings) -> bool:
    """Whether smaller windows of one that can't be read may well be readable, and have the rows that it would have."""
    return error.is_partial and not settings.context_exceeds_halo


def start_windows(
    chips: "Sequence[DeviceChip]", window: Window, settings: Settings, segmenter: "Segmenter", may_compile: bool = True
) -> "Pending":
    """Begin to segment the chips of windows that have the size of `window`. Raises RuntimeError or MemoryError.

    The network may be compiled for batches of that size and number, unless they are rare.
    """
    from seg_core.model.window_results import WindowSpec

    wanted = settings.tile_size, settings.threshold, settings.keep_probability
    return segmenter.start(chips, WindowSpec(settings.halo, window.height, window.width, *wanted), may_compile)


def infer_window(part: Part, window: Window, settings: Settings, segmenter: "Segmenter") -> "WindowResult":
    """What the model says of a single window's own pixels. Raises ReadError where they can't be read."""
    chips = stage_windows(ReadBlock(part, (window,)), settings, segmenter)
    return start_windows(chips, window, settings, segmenter, may_compile=False).result()[0]


def compare_across_border(
    part: Part, window: Window, result: "WindowResult", settings: Settings, segmenter: "Segmenter"
) -> tuple[int, int]:
    """Valid pixels beside the window's right or lower border, and on how many of them its neighbour would differ.

    The neighbour is a window laid across the border, where most pixels beside it are valid: what it says on this side
    of it is compared with the window's result. Both are 0 where the image ends at both borders. Raises ReadError.
    """
    reach = round_up(BORDER_STRIP, segmenter.bundle.stride)
    laid = list(_across(window, part.scene.window, reach, max(settings.tile_size, 2 * reach)))
    if not laid:
        return 0, 0
    at = max(laid, key=lambda across: int(result.valid[intersection(across, window).slices(window)].sum()))
    beside = infer_window(part, at, settings, segmenter)
    common = intersection(at, window)
    here, there = common.slices(window), common.slices(at)
    differs = result.building(settings.tile_size)[here] != beside.building(settings.tile_size)[there]
    return int(beside.valid[there].sum()), int(differs.sum())


def _across(window: Window, image: Window, reach: int, length: int) -> Iterator[Window]:
    """Windows laid across the right and the lower border, where the image goes on: `length` px along it."""
    if window.right < image.right:
        for strip in split(Window(window.row_off, window.right - reach, window.height, 2 * reach), length):
            yield intersection(strip, image)
    if window.bottom < image.bottom:
        for strip in split(Window(window.bottom - reach, window.col_off, 2 * reach, window.width), length):
            yield intersection(strip, image)
