"""Tiles, windows, parts and halos: arithmetic on a scene's pixel grid, no input or output.

A scene is cut three times with the same function, each time into squares that are cut short at the right and
bottom edge. Because part is a multiple of window and window a multiple of tile, the squares nest:

    scene ──split(part)──▶ parts ──split(window)──▶ windows ──split(tile)──▶ tiles

What is inferred for a window is its chip: the window, grown by the halo on every side, and on to a multiple of the
model's stride at the bottom and right:

    ┌───────────────────────┐  row_off - halo
    │ halo                  │
    │    ┌────────────┐     │  row_off
    │    │   window   │     │
    │    │  (4 tiles) │     │
    │    └────────────┘     │  row_off + height
    │                  halo │
    └───────────────────────┘  row_off - halo + a multiple of the stride, at least min_chip

Because the window's and the halo's offsets are multiples of the stride, every chip's pooling grid falls on the
scene's, and the network computes the same values for a pixel whatever window it is in.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# px a side. On a CPU, torch adds up in another order where a convolution's input is small; the chips of a network that
# needs no more are at least as large as this, so that a pixel's value is the same to the last bit in any window. The
# built-in model needs 208: the rest is room for other processors and versions of torch.
MIN_CHIP = 512

T = TypeVar("T", bound=np.generic)


class Window(NamedTuple):
    """A rectangle of pixels, in rasterio's terms but rows first."""

    row_off: int
    col_off: int
    height: int
    width: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Window":
        """The window whose fields a row of a table has among its columns."""
        return cls(*(int(row[name]) for name in cls._fields))

    @property
    def origin(self) -> tuple[int, int]:
        """Row and column of the first pixel."""
        return self.row_off, self.col_off

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.height, self.width

    @property
    def num_pixels(self) -> int:
        """How many pixels it has."""
        return self.height * self.width

    @property
    def bottom(self) -> int:
        """The row below the last one."""
        return self.row_off + self.height

    @property
    def right(self) -> int:
        """The column after the last one."""
        return self.col_off + self.width

    def slices(self, frame: "Window") -> tuple[slice, slice]:
        """Rows and columns of this window in an array of the window `frame`, which contains it."""
        top, left = self.row_off - frame.row_off, self.col_off - frame.col_off
        return slice(top, top + self.height), slice(left, left + self.width)


def overlap(one: Window, other: Window) -> bool:
    """Whether two windows have a pixel in common."""
    common = intersection(one, other)
    return common.height > 0 and common.width > 0


def intersection(one: Window, other: Window) -> Window:
    """What two windows have in common; a height or width of 0 or less where that is nothing."""
    top, left = max(one.row_off, other.row_off), max(one.col_off, other.col_off)
    return Window(top, left, min(one.bottom, other.bottom) - top, min(one.right, other.right) - left)


def bounding_window(windows: Iterable[Window]) -> Window:
    """The smallest window that holds all of one or more."""
    tops, lefts, bottoms, rights = zip(*((at.row_off, at.col_off, at.bottom, at.right) for at in windows), strict=True)
    return Window(min(tops), min(lefts), max(bottoms) - min(tops), max(rights) - min(lefts))


def translated(window: Window, rows: int, cols: int) -> Window:
    """The window so many rows further down and columns further right."""
    return window._replace(row_off=window.row_off + rows, col_off=window.col_off + cols)


def buffered(window: Window, reach: int) -> Window:
    """The window with `reach` px more on every side."""
    return Window(window.row_off - reach, window.col_off - reach, window.height + 2 * reach, window.width + 2 * reach)


def align(window: Window, size: int, whole: Window) -> Window:
    """A window grown to the grid of `size` px squares that begins at 0, within the window `whole`."""
    top, left = window.row_off // size * size, window.col_off // size * size
    bottom, right = round_up(window.bottom, size), round_up(window.right, size)
    return intersection(Window(top, left, bottom - top, right - left), whole)


def split(window: Window, size: int) -> Iterator[Window]:
    """Cut a window into squares of `size` pixels, row by row, cut short at the right and bottom edge."""
    for row_off in range(window.row_off, window.bottom, size):
        for col_off in range(window.col_off, window.right, size):
            yield Window(row_off, col_off, min(size, window.bottom - row_off), min(size, window.right - col_off))


def num_splits(window: Window, size: int) -> int:
    """How many windows `split` yields, without yielding them."""
    return -(-window.height // size) * -(-window.width // size)


def round_up(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `length`."""
    return -(-length // multiple) * multiple


def chip_window(window: Window, halo: int, stride: int, min_chip: int = MIN_CHIP) -> Window:
    """The chip of a window: what is inferred for it. It may reach beyond the scene."""
    return Window(
        window.row_off - halo,
        window.col_off - halo,
        round_up(max(window.height + 2 * halo, min_chip), stride),
        round_up(max(window.width + 2 * halo, min_chip), stride),
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


def reflect_window(window: Window, height: int, width: int) -> tuple[Window, NDArray[np.intp], NDArray[np.intp]]:
    """The part of an image that a window shows which may reach beyond it, where the image is continued by reflection.

    Returns a window within the image, and for the rows and columns of `window` those of that window to take.
    """
    rows = reflect(window.row_off, window.bottom, height)
    cols = reflect(window.col_off, window.right, width)
    top, left = int(rows.min()), int(cols.min())
    box = Window(top, left, int(rows.max()) - top + 1, int(cols.max()) - left + 1)
    return box, rows - top, cols - left


def expand_reflection(
    image: NDArray[T], rows: NDArray[np.intp], cols: NDArray[np.intp], found: NDArray[T] | None = None
) -> NDArray[T]:
    """Those rows and columns of `(..., height, width)`, put into `found` where that is given.

    Else it is the image itself where they are all that it has. What is not reflected is copied at once: to take it
    pixel by pixel would cost as much as to decode it. Where the image is `inside` what is found, it is not copied.
    """
    if found is None:
        if np.array_equal(rows, np.arange(image.shape[-2])) and np.array_equal(cols, np.arange(image.shape[-1])):
            return image
        found = np.empty((*image.shape[:-2], len(rows), len(cols)), image.dtype)
    (down, from_rows), (across, from_cols) = map(_stretch, (rows, cols))
    beyond, beside = (
        [around for around in (slice(0, stretch.start), slice(stretch.stop, len(wanted))) if around.start < around.stop]
        for stretch, wanted in ((down, rows), (across, cols))
    )
    for lines, taken in (
        (down, image[..., from_rows, :]),
        *((lines, _take(image, rows[lines], -2)) for lines in beyond),
    ):
        found[..., lines, across] = taken[..., from_cols]
        for columns in beside:
            found[..., lines, columns] = _take(taken, cols[columns], -1)
    return found


def _take(image: NDArray[T], places: NDArray[np.intp], axis: int) -> NDArray[T]:
    """Those places of an axis. Of what is not in one piece in memory numpy would copy all, so it is narrowed first."""
    low = places.min()
    narrow = image[..., low : places.max() + 1, :] if axis == -2 else image[..., low : places.max() + 1]
    taken: NDArray[T] = narrow.take(places - low, axis)
    return taken


def inside(found: NDArray[T], rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[T] | None:
    """Where in `(..., height, width)` the image lies of which those rows and columns are taken, as `fold` gives them.

    None where not all of it is there in one piece.
    """
    (down, from_rows), (across, from_cols) = map(_stretch, (rows, cols))
    if (from_rows, from_cols) != (slice(0, rows.max() + 1), slice(0, cols.max() + 1)):
        return None
    return found[..., down, across]


def expand_reflected_mask(mask: NDArray[np.bool_], rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Expand a mask likewise. Most are true throughout, and so is what is reflected of them."""
    shape = len(rows), len(cols)
    return np.ones(shape, np.bool_) if mask.shape != shape and mask.all() else expand_reflection(mask, rows, cols)


def _stretch(wanted: NDArray[np.intp]) -> tuple[slice, slice]:
    """The longest stretch of places that follow each other: where it is among them, and what it is."""
    ends = [0, *np.flatnonzero(np.diff(wanted) != 1) + 1, len(wanted)]
    first, last = max(pairwise(ends), key=lambda stretch: stretch[1] - stretch[0])
    return slice(first, last), slice(int(wanted[first]), int(wanted[last - 1]) + 1)
