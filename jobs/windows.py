"""One window of a part: its chip, what the model makes of it, its tiles' rows, and how well it fits its neighbour."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from seg_core.coverage import Row, tile_rows
from seg_core.mosaic import read_image
from seg_core.plan import Part, Settings
from seg_core.tiling import Window, chip_window, intersection, round_up, split

if TYPE_CHECKING:
    from seg_core.segmenter import Segmenter  # torch comes with it, and the driver doesn't pay for that

SEAM = 32  # px on this side of a border that are looked at

Chip = tuple[NDArray[np.uint8], NDArray[np.bool_]]
Answer = tuple[NDArray[np.float32], NDArray[np.bool_]]  # probability and validity, `(height, width)` of the window


def read_window(part: Part, window: Window, settings: Settings, stride: int) -> Chip:
    """The chip of a window: its pixels with their halo, and which hold data. Raises ReadError."""
    return read_image(part.scene, part.sources, chip_window(window, settings.halo, stride), settings.scale)


def infer_window(chip: Chip, window: Window, settings: Settings, segmenter: "Segmenter") -> Answer:
    """Probability of building, and validity, of a window's own pixels."""
    pixels, valid = chip
    probability = segmenter(pixels, valid, settings.halo, window.height, window.width)
    return probability, valid[settings.halo :, settings.halo :][: window.height, : window.width]


def window_rows(part: Part, window: Window, answer: Answer, settings: Settings) -> Iterator[Row]:
    """The rows of a window's tiles."""
    return tile_rows(
        part.scene,
        window,
        settings.tile_size,
        *answer,
        threshold=settings.threshold,
        keep_probability=settings.keep_probability,
    )


def seam(part: Part, window: Window, answer: Answer, settings: Settings, segmenter: "Segmenter") -> tuple[int, int]:
    """Valid pixels beside the window's right or lower border, and on how many of them its neighbour would differ.

    The neighbour is a window laid across the border, where most pixels beside it are valid: what it says on this side
    of it is compared with the answer. Both are 0 where the image ends at both borders. Raises ReadError.
    """
    reach = round_up(SEAM, segmenter.bundle.stride)
    laid = list(_across(window, part.scene.window, reach, max(settings.tile_size, 2 * reach)))
    if not laid:
        return 0, 0
    at = max(laid, key=lambda across: int(answer[1][intersection(across, window).slices(window)].sum()))
    chip = read_window(part, at, settings, segmenter.bundle.stride)
    probability, valid = infer_window(chip, at, settings, segmenter)
    common = intersection(at, window)
    here, there = common.slices(window), common.slices(at)
    differs = (answer[0][here] >= settings.threshold) != (probability[there] >= settings.threshold)
    return int(valid[there].sum()), int((differs & valid[there]).sum())


def _across(window: Window, image: Window, reach: int, length: int) -> Iterator[Window]:
    """Windows laid across the right and the lower border, where the image goes on: `length` px along it."""
    if window.right < image.right:
        for strip in split(Window(window.row_off, window.right - reach, window.height, 2 * reach), length):
            yield intersection(strip, image)
    if window.bottom < image.bottom:
        for strip in split(Window(window.bottom - reach, window.col_off, 2 * reach, window.width), length):
            yield intersection(strip, image)
