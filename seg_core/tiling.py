"""Tiles, windows, parts and halos: arithmetic on a scene's pixel grid, no input or output.

A scene is cut three times with the same function, each time into squares that are cut short at the right and
bottom edge. Because part is a multiple of window and window a multiple of tile, the squares nest:

    scene ──split(part)──▶ parts ──split(window)──▶ windows ──split(tile)──▶ tiles

What is read for a window is its chip: the window, grown by the halo on every side, and on to a multiple of the
model's stride at the bottom and right:

    ┌───────────────────────┐  row_off - halo
    │ halo                  │
    │    ┌────────────┐     │  row_off
    │    │   window   │     │
    │    │  (4 tiles) │     │
    │    └────────────┘     │  row_off + height
    │                  halo │
    └───────────────────────┘  row_off - halo + a multiple of the stride, at least MIN_CHIP

Because the window's and the halo's offsets are multiples of the stride, every chip's pooling grid falls on the
scene's, and the network computes the same values for a pixel whatever window it is in.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# px a side. A CPU's convolution routines add up in another order where the input is small; from about this size on they
# don't, so that a pixel's value is the same to the last bit in a window of any size.
MIN_CHIP = 512


class Window(NamedTuple):
    """A rectangle of pixels, in rasterio's terms but rows first."""

    row_off: int
    col_off: int
    height: int
    width: int

    def slices(self, frame: "Window") -> tuple[slice, slice]:
        """Rows and columns of this window in an array of the window `frame`, which contains it."""
        top, left = self.row_off - frame.row_off, self.col_off - frame.col_off
        return slice(top, top + self.height), slice(left, left + self.width)


def intersection(one: Window, other: Window) -> Window:
    """What two windows that overlap have in common."""
    top, left = max(one.row_off, other.row_off), max(one.col_off, other.col_off)
    bottom = min(one.row_off + one.height, other.row_off + other.height)
    right = min(one.col_off + one.width, other.col_off + other.width)
    return Window(top, left, bottom - top, right - left)


def align(window: Window, size: int, whole: Window) -> Window:
    """A window grown to the grid of `size` px squares that begins at 0, within the window `whole`."""
    top, left = window.row_off // size * size, window.col_off // size * size
    bottom = round_up(window.row_off + window.height, size)
    right = round_up(window.col_off + window.width, size)
    return intersection(Window(top, left, bottom - top, right - left), whole)


def split(window: Window, size: int) -> Iterator[Window]:
    """Cut a window into squares of `size` pixels, row by row, cut short at the right and bottom edge."""
    bottom, right = window.row_off + window.height, window.col_off + window.width
    for row_off in range(window.row_off, bottom, size):
        for col_off in range(window.col_off, right, size):
            yield Window(row_off, col_off, min(size, bottom - row_off), min(size, right - col_off))


def num_splits(window: Window, size: int) -> int:
    """How many windows `split` yields, without yielding them."""
    return -(-window.height // size) * -(-window.width // size)


def round_up(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `length`."""
    return -(-length // multiple) * multiple


def chip_window(window: Window, halo: int, stride: int) -> Window:
    """The chip of a window: what is read and inferred for it. It may reach beyond the scene."""
    return Window(
        window.row_off - halo,
        window.col_off - halo,
        round_up(max(window.height + 2 * halo, MIN_CHIP), stride),
        round_up(max(window.width + 2 * halo, MIN_CHIP), stride),
    )


def reflect(start: int, stop: int, size: int) -> NDArray[np.intp]:
    """Source index of each position in `start:stop` when `0:size` is continued by reflection for ever.

    Reflection is without repeating the edge, as `numpy.pad(mode="reflect")` does it: -1 maps to 1, `size` maps
    to `size - 2`. An axis of one pixel repeats that pixel.
    """
    if size == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (size - 1)
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position).astype(np.intp)
