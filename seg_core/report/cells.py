"""The cells of the map: a tile each, or blocks of tiles, or groups of whole scenes, so that a page stays small."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seg_core.grid import Window, intersection
from seg_core.imagery.scene import Scene
from seg_core.report.frame import Frame
from seg_core.run.plan import Part, Plan

MAX_CELLS = 4000
BITS = 21  # of the number of a row or column of cells: a scene may have 2 million of them

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Which tiles are drawn together. A cell is a block of `side` x `side` tiles of one image, or a group of images."""

    images: tuple[Scene, ...]
    tile_size: int  # px
    side: int  # tiles; 1: each tile is a cell
    groups: Numbers | None  # the group of each image, where a cell is a group of images
    keys: Numbers  # of the cells, ascending: see `_keys`
    planned: Numbers  # tiles of each cell

    @property
    def num_cells(self) -> int:
        """How many cells the map has."""
        return len(self.keys)

    def find(self, images: Numbers, tile_rows: Numbers, tile_cols: Numbers) -> Numbers:
        """Return the number of the cell of each tile, given the numbers of its image, its row and its column.

        It is -1 for a tile that is not planned.
        """
        keys = _keys(images, tile_rows, tile_cols, self.side, self.groups)
        at = np.searchsorted(self.keys, keys).clip(max=max(0, self.num_cells - 1))
        return np.where(self.keys[at] == keys, at, -1) if self.num_cells else np.full(len(keys), -1)

    def outlines(self, frame: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return x and y of the corners of each cell, `(cells, 4)`. That of a group is the box around its images."""
        if self.groups is None:
            corners = [_corners(frame, self.images[number], window) for number, window in self.windows()]
        else:
            boxes = np.array([_corners(frame, image, image.window) for image in self.images])
            corners = [_box_around(boxes[self.groups == group]) for group in range(self.num_cells)]
        x, y = np.array(corners, np.float64).reshape(-1, 2, 4).swapaxes(0, 1)
        return x, y

    def windows(self) -> list[tuple[int, Window]]:
        """Return the image of each cell by its number, and the cell's window. Groups of images have none."""
        assert self.groups is None
        size, mask = self.side * self.tile_size, (1 << BITS) - 1
        found = []
        for key in self.keys.tolist():
            image, row, col = key >> 2 * BITS, key >> BITS & mask, key & mask
            window = Window(row * size, col * size, size, size)
            found.append((image, intersection(window, self.images[image].window)))
        return found


def make_cells(plan: Plan, frame: Frame, most: int = MAX_CELLS) -> Cells:
    """Choose the finest cells of which there are not too many."""
    images, parts = plan.images, list(plan.parts())
    groups, side = None, 1
    if len(images) > most:
        groups = _group_by_ground(frame, most)
    elif parts:
        side = max(1, int(np.sqrt(plan.counts["tiles"] / most)))
    while True:
        keys, planned = _plan_cells(plan, parts, side, groups)
        if len(keys) <= most or groups is not None:
            return Cells(images, plan.settings.tile_size, side, groups, keys, planned)
        side += max(1, side // 4)


def _plan_cells(plan: Plan, parts: list[Part], side: int, groups: Numbers | None) -> tuple[Numbers, Numbers]:
    """Return the keys of all cells that hold a planned tile, ascending, and how many they hold."""
    numbers = {image.scene_id: number for number, image in enumerate(plan.images)}
    found: list[tuple[Numbers, Numbers]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for part in parts:
        rows, cols = _tiles_of(part.window, plan.settings.tile_size)
        image = np.full(rows.shape, numbers[part.scene.scene_id])
        found.append(np.unique(_keys(image, rows, cols, side, groups), return_counts=True))
    keys, at = np.unique(np.concatenate([each for each, _ in found]), return_inverse=True)
    counts = np.bincount(at, np.concatenate([each for _, each in found]), len(keys))
    return keys, counts.astype(np.int64)


def _tiles_of(window: Window, size: int) -> tuple[Numbers, Numbers]:
    """Return the row and column of each tile of a window that consists of whole tiles."""
    rows = np.arange(window.row_off // size, -(-window.bottom // size))
    cols = np.arange(window.col_off // size, -(-window.right // size))
    return np.repeat(rows, len(cols)), np.tile(cols, len(rows))


def _keys(images: Numbers, rows: Numbers, cols: Numbers, side: int, groups: Numbers | None) -> Numbers:
    """Return numbers that tell cells apart, and sort them by image, row and column."""
    if groups is not None:
        return groups[images] << 2 * BITS
    return (images.astype(np.int64) << 2 * BITS) | (rows.astype(np.int64) // side << BITS) | (cols // side)


def _group_by_ground(frame: Frame, most: int) -> Numbers:
    """Group images whose centres lie in the same cell of a square grid with about as many cells as there may be."""
    centres = np.array([_centre(frame, image) for image in frame.images])
    low, extent = centres.min(axis=0), np.maximum(np.ptp(centres, axis=0), 1e-9)
    step = max(np.sqrt(extent.prod() / most), extent.max() / most)
    while True:
        at = ((centres - low) // step).astype(np.int64)
        _, groups = np.unique(at, axis=0, return_inverse=True)
        if groups.max() < most:
            return np.asarray(groups.ravel(), np.int64)
        step *= 1.25


def _centre(frame: Frame, image: Scene) -> tuple[float, float]:
    x, y = frame.locate(image, np.array([image.height / 2]), np.array([image.width / 2]))
    return float(x[0]), float(y[0])


def _corners(frame: Frame, image: Scene, window: Window) -> NDArray[np.float64]:
    """Return x and y of the corners of a window, `(2, 4)`."""
    rows = np.array([window.row_off, window.row_off, window.bottom, window.bottom], np.float64)
    cols = np.array([window.col_off, window.right, window.right, window.col_off], np.float64)
    return np.array(frame.locate(image, rows, cols))


def _box_around(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the corners of the box around outlines `(number, 2, 4)`, as `(2, 4)`."""
    (left, bottom), (right, top) = boxes.min(axis=(0, 2)), boxes.max(axis=(0, 2))
    return np.array([[left, right, right, left], [top, top, bottom, bottom]])
