"""Connected components of a mask that comes in blocks.

    ┌─────────┬─────────┐
    │   ███   │         │  1 lies within a block, and its size is final.
    │   █1█ ██│███      │  2 and 3 touch where two blocks meet, so they are one component.
    │       █2│3██      │  A component at an edge whose other side has not come yet is open.
    └─────────┴─────────┘

What is kept are the labels along open edges, and the sizes of components. Memory does not grow with the area of the
mask, if those components that are closed are removed from `sizes`.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.grid import Window

Edge = tuple[str, int, int]  # direction, and the row and column where it begins
Labels = NDArray[np.int64]


class Components:
    """The components of one mask. Pixels that share a side are connected (4-connectivity)."""

    def __init__(self, whole: Window) -> None:
        """Start without a block of the mask, which is as large as the window `whole`."""
        self.whole = whole
        self.sizes: dict[int, int] = {}  # px, by label
        self._edges: dict[Edge, Labels] = {}  # labels along each open edge
        self._parents: dict[int, int] = {}  # labels that have become part of another one
        self._last = 0

    def label(self, window: Window, mask: NDArray[np.bool_]) -> Labels:
        """Label the components of a block whose mask is `bool (height, width)`.

        All blocks lie on one grid, in any order. Returns `int64 (height, width)`, 0 outside the mask. `find` gives the
        final label of a component.
        """
        number, numbered = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        labels = np.where(numbered > 0, numbered + np.int64(self._last), 0)
        sizes = np.bincount(numbered.ravel(), minlength=number)[1:].tolist()
        self.sizes.update(enumerate(sizes, self._last + 1))
        self._last += number - 1
        for edge, line in _inner_edges(window, self.whole, labels):
            other = self._edges.pop(edge, None)
            if other is None:
                self._edges[edge] = line
            else:
                self._join(line, other)
        return labels

    def find(self, label: int) -> int:
        """Return the label of the component that a label belongs to."""
        while label in self._parents:
            label = self._parents[label]
        return label

    def find_open(self) -> set[int]:
        """Return the labels of the components that may still grow. Afterwards, labels that were joined are unknown."""
        found: set[int] = set()
        for edge, line in self._edges.items():
            labels, positions = np.unique(line, return_inverse=True)
            final = [self.find(label) for label in labels.tolist()]
            self._edges[edge] = np.array(final, np.int64)[positions]
            found.update(final)
        self._parents.clear()
        return found - {0}

    def _join(self, line: Labels, other: Labels) -> None:
        touching = (line > 0) & (other > 0)
        for pair in set(zip(line[touching].tolist(), other[touching].tolist(), strict=True)):
            kept, joined = map(self.find, pair)
            if kept != joined:
                self._parents[joined] = kept
                self.sizes[kept] += self.sizes.pop(joined)


def _inner_edges(window: Window, whole: Window, labels: Labels) -> Iterator[tuple[Edge, Labels]]:
    """Yield a block's edges within the mask, and the labels along them. The blocks on both sides name it alike."""
    top, left = window.origin
    if top > whole.row_off:
        yield ("across", top, left), labels[0].copy()
    if window.bottom < whole.bottom:
        yield ("across", window.bottom, left), labels[-1].copy()
    if left > whole.col_off:
        yield ("down", top, left), labels[:, 0].copy()
    if window.right < whole.right:
        yield ("down", top, window.right), labels[:, -1].copy()
