"""What is read for a window and what a model makes of it: plain arrays, so that neither loads the other's libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # `(bands, height, width)`
Valid = NDArray[np.bool_]  # `(height, width)`
MISSING = 255  # label of a pixel that holds no data: never trained on, never scored
NewPixels = Callable[[tuple[int, ...]], Pixels]


def new_pixels(shape: tuple[int, ...]) -> Pixels:
    """Memory for the pixels of a chip."""
    return np.empty(shape, np.uint8)


class JpegStreams(NamedTuple):
    """A chip before it is decoded: the JPEG blocks that it touches, and how they are joined and cut."""

    blocks: list[NDArray[np.uint8]]  # each a JPEG image
    places: list[tuple[int, int]]  # row and column of each block's corner on the canvas
    block: tuple[int, int]  # height and width of each
    canvas: tuple[int, int]  # that the blocks make together
    components: int  # of each block: 1 or 3
    bands: tuple[int, ...]  # of them, counted from 0
    rows: NDArray[np.intp]  # of the canvas that make the chip: those beyond the scene are reflected
    cols: NDArray[np.intp]
    valid: Valid  # `bool (height, width)` of the chip


@dataclass(frozen=True)
class WindowFigures:
    """What the rows of a window's tiles are made of. It travels to the processes that write, so it holds no more."""

    # `(window height, tile columns, bytes)`: which pixels are valid and building, one line of a tile after the other;
    # the first pixel is the highest bit of the first byte, as in np.packbits.
    building_bits: NDArray[np.uint8]
    num_building: NDArray[np.int64]  # pixels of each tile, `(tile rows, tile columns)`
    probability_sums: NDArray[np.float64]  # over the valid pixels of each tile, likewise
    num_valid: NDArray[np.int64]  # pixels of each tile, likewise
    levels: NDArray[np.uint8] | None = None  # probabilities in 255ths, `(height, width)`; None: they are not kept
