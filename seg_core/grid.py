"""Tiles, windows, parts and halos: arithmetic on a scene's pixel grid, without input or output.

`split` divides a scene three times into squares, which are cut short at the right and bottom edge. A part is a multiple
of the window and a window is a multiple of the tile, so the squares nest:

    scene ──split(part)──▶ parts ──split(window)──▶ windows ──split(tile)──▶ tiles

The model infers a window from its chip. The chip is the window with the halo on every side, extended at the bottom and
right to a multiple of the model's stride:

    ┌───────────────────────┐  row_off - halo
    │ halo                  │
    │    ┌────────────┐     │  row_off
    │    │   window   │     │
    │    │  (4 tiles) │     │
    │    └────────────┘     │  row_off + height
    │                  halo │
    └───────────────────────┘  row_off - halo + a multiple of the stride, at least min_chip

The offsets of windows and halos are multiples of the stride. The pooling grid of every chip therefore coincides with
the scene's, and the network computes the same value for a pixel in any window.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# Smallest side of a chip, in px. On a CPU, torch sums in another order where a convolution's input is small. Chips are
# at least this large, so that a pixel's value is the same to the last bit in any window; a network that needs larger
# ones says so. The built-in model needs 208: the rest is room for other processors and versions of torch.
MIN_CHIP = 512

T = TypeVar("T", bound=np.generic)


class Window(NamedTuple):
    """A rectangle of pixels. Its fields have rasterio's names, but rows come first."""

    row_off: int
    col_off: int
    height: int
    width: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Window":
        """Return the window whose fields are columns of a table's row."""
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
        """The row below the last row."""
        return self.row_off + self.height

    @property
    def right(self) -> int:
        """The column after the last column."""
        return self.col_off + self.width

    def slices(self, frame: "Window") -> tuple[slice, slice]:
        """Return the row and column slices of this window in an array that covers `frame`, a window around it."""
        top, left = self.row_off - frame.row_off, self.col_off - frame.col_off
        return slice(top, top + self.height), slice(left, left + self.width)


def intersects(one: Window, other: Window) -> bool:
    """Whether two windows have at least one pixel in common."""
    common = intersection(one, other)
    return common.height > 0 and common.width > 0


def intersection(one: Window, other: Window) -> Window:
    """Return the pixels that two windows share. If they share none, the height or width is 0 or negative."""
    top, left = max(one.row_off, other.row_off), max(one.col_off, other.col_off)
    return Window(top, left, min(one.bottom, other.bottom) - top, min(one.right, other.right) - left)


def bounding_window(windows: Iterable[Window]) -> Window:
    """Return the smallest window that contains all given windows. At least one must be given."""
    edges = ((window.row_off, window.col_off, window.bottom, window.right) for window in windows)
    tops, lefts, bottoms, rights = zip(*edges, strict=True)
    return Window(min(tops), min(lefts), max(bottoms) - min(tops), max(rights) - min(lefts))


def translated(window: Window, rows: int, cols: int) -> Window:
    """Return the window moved down by `rows` and right by `cols`."""
    return window._replace(row_off=window.row_off + rows, col_off=window.col_off + cols)


def buffered(window: Window, margin: int) -> Window:
    """Return the window extended by `margin` px on every side."""
    height, width = window.height + 2 * margin, window.width + 2 * margin
    return Window(window.row_off - margin, window.col_off - margin, height, width)


def align(window: Window, size: int, whole: Window) -> Window:
    """Extend a window to whole squares of `size` px, on a grid that starts at 0, and clip it to the window `whole`."""
    top, left = window.row_off // size * size, window.col_off // size * size
    bottom, right = round_up(window.bottom, size), round_up(window.right, size)
    return intersection(Window(top, left, bottom - top, right - left), whole)


def split(window: Window, size: int) -> Iterator[Window]:
    """Divide a window into squares of `size` px, row by row, which are cut short at the right and bottom edge."""
    for row_off in range(window.row_off, window.bottom, size):
        for col_off in range(window.col_off, window.right, size):
            yield Window(row_off, col_off, min(size, window.bottom - row_off), min(size, window.right - col_off))


def num_splits(window: Window, size: int) -> int:
    """Return how many windows `split` yields."""
    return -(-window.height // size) * -(-window.width // size)


def round_up(length: int, multiple: int) -> int:
    """Round `length` up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple


def chip_window(window: Window, halo: int, stride: int, min_chip: int = MIN_CHIP) -> Window:
    """Return the chip from which the model infers a window. It may extend beyond the scene."""
    return Window(
        window.row_off - halo,
        window.col_off - halo,
        round_up(max(window.height + 2 * halo, min_chip), stride),
        round_up(max(window.width + 2 * halo, min_chip), stride),
    )


def reflect(start: int, stop: int, size: int) -> NDArray[np.intp]:
    """Return the source index of each position in `start:stop` if `0:size` continues endlessly by reflection.

    The edge itself is not repeated, as in `numpy.pad(mode="reflect")`: -1 maps to 1, and `size` maps to `size - 2`. An
    axis of one pixel repeats that pixel. The result is `intp (stop - start,)`.
    """
    if size == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (size - 1)
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position).astype(np.intp)


def reflect_window(window: Window, height: int, width: int) -> tuple[Window, NDArray[np.intp], NDArray[np.intp]]:
    """Find the pixels that fill a window if the image continues by reflection beyond its edges.

    Returns a window within the image, and the row and column in it of each row and column of `window`.
    """
    rows = reflect(window.row_off, window.bottom, height)
    cols = reflect(window.col_off, window.right, width)
    top, left = int(rows.min()), int(cols.min())
    source = Window(top, left, int(rows.max()) - top + 1, int(cols.max()) - left + 1)
    return source, rows - top, cols - left


def expand_reflection(
    image: NDArray[T], rows: NDArray[np.intp], cols: NDArray[np.intp], out: NDArray[T] | None = None
) -> NDArray[T]:
    """Take rows and columns of an image `(..., height, width)`, as `reflect_window` returns them.

    The result is written to `out`, `(..., len(rows), len(cols))`, if it is given. Without `out`, the image itself is
    returned if `rows` and `cols` are all of it, in order. Pixels that are not reflected are copied in one step: taking
    them one by one would cost as much as decoding them. An image that already is `unreflected_view(out)` is not copied.
    """
    if out is None:
        if np.array_equal(rows, np.arange(image.shape[-2])) and np.array_equal(cols, np.arange(image.shape[-1])):
            return image
        out = np.empty((*image.shape[:-2], len(rows), len(cols)), image.dtype)
    (down, from_rows), (across, from_cols) = map(_longest_run, (rows, cols))
    reflected_rows, reflected_cols = (
        [part for part in (slice(0, run.start), slice(run.stop, len(indices))) if part.start < part.stop]
        for run, indices in ((down, rows), (across, cols))
    )
    for lines, taken in (
        (down, image[..., from_rows, :]),
        *((lines, _take(image, rows[lines], -2)) for lines in reflected_rows),
    ):
        out[..., lines, across] = taken[..., from_cols]
        for columns in reflected_cols:
            out[..., lines, columns] = _take(taken, cols[columns], -1)
    return out


def _take(image: NDArray[T], indices: NDArray[np.intp], axis: int) -> NDArray[T]:
    """Take indices of an axis. The array is narrowed first, because numpy copies a non-contiguous one as a whole."""
    low = indices.min()
    narrow = image[..., low : indices.max() + 1, :] if axis == -2 else image[..., low : indices.max() + 1]
    taken: NDArray[T] = narrow.take(indices - low, axis)
    return taken


def unreflected_view(chip: NDArray[T], rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[T] | None:
    """Return the view of a chip `(..., height, width)` that holds the image's own pixels, without the reflected ones.

    `rows` and `cols` are those of `reflect_window`. Returns None if the chip does not hold that whole image in one
    piece.
    """
    (down, from_rows), (across, from_cols) = map(_longest_run, (rows, cols))
    if (from_rows, from_cols) != (slice(0, rows.max() + 1), slice(0, cols.max() + 1)):
        return None
    return chip[..., down, across]


def expand_reflected_mask(mask: NDArray[np.bool_], rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Take rows and columns of a mask `(height, width)`, as `reflect_window` returns them.

    Most masks are true throughout. Then the result is made without taking pixels.
    """
    shape = len(rows), len(cols)
    return np.ones(shape, np.bool_) if mask.shape != shape and mask.all() else expand_reflection(mask, rows, cols)


def _longest_run(indices: NDArray[np.intp]) -> tuple[slice, slice]:
    """Find the longest run of consecutive indices: the positions that it has, and the indices that it covers."""
    ends = [0, *np.flatnonzero(np.diff(indices) != 1) + 1, len(indices)]
    first, last = max(pairwise(ends), key=lambda run: run[1] - run[0])
    return slice(first, last), slice(int(indices[first]), int(indices[last - 1]) + 1)
