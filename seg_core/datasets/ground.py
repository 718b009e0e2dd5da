"""Cells of ground, which scenes are cut along, so that the same ground is always in the same split.

        cell (0, 0) │ cell (0, 1)        The cells are a grid in the CRS of one scene, which begins at its corner.
      ┌─────────────┼──────┐             A pixel belongs to the cell in which its centre lies, whatever scene it is in:
      │ scene A     │      │             scenes may overlap, and differ in resolution and CRS.
      │      ┌──────┼──────┼──┐
    ──┼──────┼──────┼──────┼──┼──
      └──────┼──────┼──────┘  │
             │      │ scene B │
             └──────┴─────────┘

Arithmetic without input or output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from seg_core.errors import SegError
from seg_core.grid import Window, intersection, split
from seg_core.imagery.georef import pixel_at, pixel_size, position
from seg_core.imagery.labels import transformer
from seg_core.imagery.scene import Scene

LARGEST = 1.5  # a window of a cell is divided if its sides are more than so many times those of a block
EDGE = 9  # points along the side of a cell, by which its window in a scene is found
CLOSE = 1e-6  # px; a centre this close to the edge of a cell counts as past it, despite rounding


class Cell(NamedTuple):
    """A cell of ground: a number of the ground that it is on, and its row and column there."""

    ground: int
    row: int
    col: int


@dataclass(frozen=True)
class GroundGrid:
    """A grid of cells in a CRS; without one in the pixels of one scene."""

    number: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]  # from rows and columns of cells to the CRS
    block: int  # px: side of a block

    def windows(self, scene: Scene) -> Iterator[tuple[Cell, Window]]:
        """Yield the cells that a scene may touch, and a window of the scene around what it has of each.

        A cell of many pixels is divided: it comes with several windows, which share no pixels. Raises SegError for a
        scene that the CRS of the grid does not cover.
        """
        rows, cols = self._positions(scene, *_outline(0, scene.height, 0, scene.width))
        if not np.isfinite([rows, cols]).all():
            raise SegError(f"{scene.uri}: lies beyond the CRS of the other scenes: make a dataset of its own")
        for row in range(int(np.floor(rows.min())), int(np.floor(rows.max())) + 1):
            for col in range(int(np.floor(cols.min())), int(np.floor(cols.max())) + 1):
                window = intersection(self._window(scene, row, col), scene.window)
                if window.height > 0 and window.width > 0:
                    yield from ((Cell(self.number, row, col), part) for part in divide(window, self.block))

    def inside(self, scene: Scene, cell: Cell, window: Window) -> NDArray[np.bool_]:
        """Whether each pixel of a window has its centre in a cell: `bool (height, width)`."""
        rows, cols = np.mgrid[window.row_off : window.bottom, window.col_off : window.right] + 0.5 + CLOSE
        cell_rows, cell_cols = self._positions(scene, rows, cols)
        with np.errstate(invalid="ignore"):
            return np.asarray((np.floor(cell_rows) == cell.row) & (np.floor(cell_cols) == cell.col))

    def _positions(
        self, scene: Scene, rows: NDArray[np.float64], cols: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows and columns of cells of positions in a scene, as fractions."""
        if self.crs is None:
            return rows / self.transform[4], cols / self.transform[0]
        x, y = position(scene.transform, rows, cols)
        if (convert := self._transformer(scene)) is not None:
            x, y = convert.transform(x, y)
        found_rows, found_cols = pixel_at(self.transform, x, y)
        return np.asarray(found_rows), np.asarray(found_cols)

    def _transformer(self, scene: Scene) -> Transformer | None:
        assert scene.crs is not None
        assert self.crs is not None
        return None if scene.crs == self.crs else transformer(scene.crs, self.crs)

    def _window(self, scene: Scene, row: int, col: int) -> Window:
        """The window of a scene around a cell, with a margin of a pixel."""
        rows, cols = _outline(row, row + 1, col, col + 1)
        if self.crs is None:
            rows, cols = rows * self.transform[4], cols * self.transform[0]
        else:
            x, y = position(self.transform, rows, cols)
            if (convert := self._transformer(scene)) is not None:
                x, y = convert.transform(x, y, direction="INVERSE")
            rows, cols = map(np.asarray, pixel_at(scene.transform, x, y))
        top, left = int(np.floor(rows.min())) - 1, int(np.floor(cols.min())) - 1
        return Window(top, left, int(np.ceil(rows.max())) + 1 - top, int(np.ceil(cols.max())) + 1 - left)


def _outline(top: float, bottom: float, left: float, right: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns of points all over a rectangle, its edges included."""
    rows, cols = np.meshgrid(np.linspace(top, bottom, EDGE), np.linspace(left, right, EDGE), indexing="ij")
    return rows, cols


def divide(window: Window, block: int) -> Iterator[Window]:
    """Divide a window into equal parts of about `block` px a side if it is much larger than that."""
    longest = max(window.shape)
    if longest <= LARGEST * block:
        yield window
    else:
        yield from split(window, -(-longest // round(longest / block)))


def make_grids(scenes: Sequence[Scene], block: int) -> list[GroundGrid]:
    """Return the grid of each scene: one for all scenes with a CRS, and one of its own for each scene without.

    A cell measures about `block` px of the coarsest scene, so that whole cells fill that scene.
    """
    placed = [scene for scene in scenes if scene.crs is not None]
    common = _place_grid(max(placed, key=lambda scene: scene.gsd_m or 0.0), block) if placed else None
    own = (_own_grid(number, scene, block) for number, scene in enumerate(scenes, 1))
    return [grid if scene.crs is None or common is None else common for scene, grid in zip(scenes, own, strict=True)]


def _place_grid(scene: Scene, block: int) -> GroundGrid:
    _, _, x, _, _, y = scene.transform
    width, height = pixel_size(scene.transform)
    across, down = width * _even(scene.width, block), height * _even(scene.height, block)
    return GroundGrid(0, scene.crs, (across, 0.0, x, 0.0, -down, y), block)


def _own_grid(number: int, scene: Scene, block: int) -> GroundGrid:
    across, down = _even(scene.width, block), _even(scene.height, block)
    return GroundGrid(number, None, (across, 0.0, 0.0, 0.0, down, 0.0), block)


def _even(length: int, block: int) -> float:
    """The side nearest to `block` px by which a length divides without a rest."""
    return length / max(1, round(length / block))
