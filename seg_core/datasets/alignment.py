"""Find labels that lie beside what they mark: the offset at which their edges fit the edges of the image best.

The edges of image and labels are correlated at all offsets up to REACH px. An edge counts by its direction too, the
same for bright roofs on dark ground and the other way round: gradients are complex numbers whose angle is doubled
(J. Bigun and G. Granlund, *Optimal Orientation Detection of Linear Symmetry*, ICCV 1987).

A few houses fit by chance at some offset. So a block is judged together with its neighbours, as many as it takes to
have MIN_OBJECTS objects, and an offset counts only if it fits better than no offset by more than chance would.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING, Pixels
from seg_core.datasets.ground import Cell
from seg_core.grey_levels import LUMA

REACH = 40  # px: largest offset that is looked for
SIDE = 2 * REACH + 1
MIN_OBJECTS = 25  # that are judged together
FEWEST_OBJECTS = 8  # with fewer, nothing is said
MAX_NEIGHBOURS = 3  # cells on each side that are judged together at most
SHIFTED = 2.0  # px: a smaller offset is nothing to warn of
# Labels of other places fit at the best of all offsets better than at none by 0.55 / sqrt(number of objects), in 9 of
# 10 blocks; of Massachusetts, Joplin and Nairobi alike.
CHANCE = 0.8
LOCAL = 16.0  # px: an edge is as strong as it is among those so near
STRONGEST = 4.0  # times the mean strength, beyond which an edge counts no more
SMOOTH = 1.5  # px: offsets are blurred by so much, for roofs lean and people draw them loosely


class Fit(NamedTuple):
    """How well the edges of a block's labels fit those of its image, at each offset."""

    surface: NDArray[np.float32]  # sums over edges, `(SIDE, SIDE)`, by rows and columns that labels would have to move
    weight: float  # sum over the edges of labels
    num_objects: int


class Offset(NamedTuple):
    """The offset at which labels fit best: how far they would have to move."""

    rows: float  # px, down
    cols: float  # px, to the right
    gain: float  # by which it fits better than no offset; 1 is the strength of a mean edge
    is_shifted: bool

    @property
    def px(self) -> float:
        """Its length in px."""
        return float(np.hypot(self.rows, self.cols))


def measure_fit(pixels: Pixels, valid: NDArray[np.bool_], label: NDArray[np.uint8]) -> Fit:
    """Correlate the edges of a block's image `uint8 (bands, height, width)` and label `uint8 (height, width)`."""
    grey = np.tensordot(LUMA, pixels[:3], 1) if len(pixels) >= 3 else pixels[0]
    marked = (label != 0) & (label != MISSING)
    image_edges, strength = _edges(np.asarray(grey, np.float32), valid)
    near = cv2.GaussianBlur(strength, (0, 0), LOCAL)
    image_edges *= np.minimum(strength / (near + 1e-3), STRONGEST)
    label_edges, boundary = _edges(marked.astype(np.float32), label != MISSING)
    label_edges *= boundary
    surface = _correlate(image_edges, label_edges)
    num_objects = cv2.connectedComponents(marked.astype(np.uint8))[0] - 1
    return Fit(surface, float(boundary.sum()), num_objects)


def _edges(grey: NDArray[np.float32], known: NDArray[np.bool_]) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Direction of the gradient with its angle doubled, of length 1, and its length; none where a neighbour is unknown.

    Both are `(height, width)`.
    """
    blurred = cv2.GaussianBlur(grey, (0, 0), 1.0)
    down, across = cv2.Sobel(blurred, cv2.CV_32F, 0, 1), cv2.Sobel(blurred, cv2.CV_32F, 1, 0)
    framed = np.pad(known.astype(np.uint8), 2)  # the gradient across the frame of a block is none
    inside = cv2.erode(framed, np.ones((5, 5), np.uint8))[2:-2, 2:-2]
    length = np.asarray(np.hypot(down, across) * inside, np.float32)
    unit = (across + 1j * down) / np.maximum(np.hypot(down, across), 1e-6)
    return np.asarray(unit**2 * inside, np.complex64), length


def _correlate(image: NDArray[np.complex64], label: NDArray[np.complex64]) -> NDArray[np.float32]:
    """Sum of the products of an image and a label that is moved by each offset: `(SIDE, SIDE)`."""
    shape = [cv2.getOptimalDFTSize(max(length + REACH, SIDE)) for length in image.shape]
    product = np.fft.fft2(image, shape) * np.conj(np.fft.fft2(label, shape))
    surface = np.roll(np.fft.ifft2(product).real, (REACH, REACH), (0, 1))
    return np.asarray(surface[:SIDE, :SIDE], np.float32)


def find_offset(fits: Iterable[Fit]) -> Offset | None:
    """Return the offset at which the labels of blocks fit best; None if there are too few objects to tell."""
    surface, weight, num_objects = np.zeros((SIDE, SIDE), np.float64), 0.0, 0
    for fit in fits:
        surface += fit.surface
        weight += fit.weight
        num_objects += fit.num_objects
    if num_objects < FEWEST_OBJECTS or not weight:
        return None
    strength = cv2.GaussianBlur(surface / weight, (0, 0), SMOOTH)
    row, col = np.unravel_index(strength.argmax(), strength.shape)
    gain = float(strength[row, col] - strength[REACH - 1 : REACH + 2, REACH - 1 : REACH + 2].max())
    rows, cols = float(row - REACH), float(col - REACH)
    significant = gain > CHANCE / num_objects**0.5
    return Offset(rows, cols, gain, bool(significant and np.hypot(rows, cols) >= SHIFTED))


def judge(fits: Mapping[Cell, Sequence[Fit]]) -> dict[Cell, Offset]:
    """Return the offset of each cell's labels, judged together with its neighbours as far as it takes."""
    offsets = {cell: find_offset(_neighbours(fits, cell)) for cell in fits}
    return {cell: offset for cell, offset in offsets.items() if offset is not None}


def _neighbours(fits: Mapping[Cell, Sequence[Fit]], cell: Cell) -> list[Fit]:
    """The fits of a cell and its neighbours, as far as it takes to have MIN_OBJECTS."""
    found: list[Fit] = []
    for reach in range(MAX_NEIGHBOURS + 1):
        steps = range(-reach, reach + 1)
        near = (Cell(cell.ground, cell.row + down, cell.col + across) for down in steps for across in steps)
        found = [fit for each in near for fit in fits.get(each, ())]
        if sum(fit.num_objects for fit in found) >= MIN_OBJECTS:
            break
    return found
