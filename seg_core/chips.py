"""Plain arrays that imagery and models exchange, so that neither loads the other's libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PIXEL_DTYPE = "uint8"  # of imagery as models take it; of other types the values are scaled to it
Pixels = NDArray[np.uint8]  # `(bands, height, width)`
Valid = NDArray[np.bool_]  # `(height, width)`
MISSING = 255  # label of a pixel that holds no data: never trained on, never scored
UNLABELLED = 254  # label of a pixel that holds data and has no class: the network sees it, but it is never scored
AllocatePixels = Callable[[tuple[int, ...]], Pixels]


def allocate_pixels(shape: tuple[int, ...]) -> Pixels:
    """Allocate memory for the pixels of a chip: `uint8` of the given shape."""
    return np.empty(shape, np.uint8)


class JpegStreams(NamedTuple):
    """A chip before decoding: the JPEG blocks that it touches, and how to join them and crop the result."""

    blocks: list[NDArray[np.uint8]]  # one JPEG image each
    block_offsets: list[tuple[int, int]]  # row and column of each block's first corner on the canvas
    block_shape: tuple[int, int]  # height and width of a block
    canvas_shape: tuple[int, int]  # height and width of the blocks together
    components: int  # colour components of a block: 1 or 3
    bands: tuple[int, ...]  # the components that make the chip's bands, counted from 0
    rows: NDArray[np.intp]  # the canvas's rows that make the chip, reflected beyond the scene
    cols: NDArray[np.intp]  # the canvas's columns that make the chip
    valid: Valid  # which pixels of the chip hold data, `bool (height, width)`


@dataclass(frozen=True)
class WindowFigures:
    """Figures of a window, from which the rows of its tiles are made. Processes that write rows receive it."""

    # Which pixels are valid and building, `(window height, tile columns, bytes)`, one line of a tile after the other.
    # The first pixel is the highest bit of the first byte, as in np.packbits.
    building_bits: NDArray[np.uint8]
    num_building: NDArray[np.int64]  # pixels of each tile, `(tile rows, tile columns)`
    probability_sums: NDArray[np.float64]  # over the valid pixels of each tile, `(tile rows, tile columns)`
    num_valid: NDArray[np.int64]  # pixels of each tile, `(tile rows, tile columns)`
    levels: NDArray[np.uint8] | None = None  # probabilities in 255ths, `(height, width)`; None if they are not kept
    valid_bits: NDArray[np.uint8] | None = None  # which pixels are valid, as building_bits; None: all or none of them


def pack_validity(valid: Valid, tile_size: int) -> NDArray[np.uint8] | None:
    """Pack which pixels of a window are valid, `bool (height, width)`, as `WindowFigures.valid_bits` holds them."""
    if valid.all() or not valid.any():
        return None
    height, width = valid.shape
    num_columns = -(-width // tile_size)
    lines = np.zeros((height, num_columns * tile_size), np.bool_)
    lines[:, :width] = valid
    return np.packbits(lines.reshape(height, num_columns, tile_size), axis=-1)
