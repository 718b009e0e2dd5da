"""Join the pieces of buildings that several parts of an image hold.

Parts come row by row. A building is whole once the row of parts below it has come. So memory depends on a row of parts,
not on the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import geopandas
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from seg_core.footprints.pieces import UNKNOWN, Pieces
from seg_core.grid import Window

Side = NDArray[np.int32]
REDUCTIONS = {
    "building_px": np.add,
    "building_m2": np.add,
    "level_sum": np.add,
    "first": np.minimum,
    "touches_gap": np.logical_or,
    "pixel_height": np.minimum,
    "pixel_width": np.minimum,
}


class Block(NamedTuple):
    """A part, and its sides, whose pieces are numbered in the frame of all pieces that are being joined."""

    window: Window
    sides: dict[str, Side]


@dataclass(frozen=True)
class OpenRow:
    """A row of parts, and the pieces that their lower sides may hold, in one frame or none."""

    blocks: Sequence[Block] = ()
    buildings: Sequence[geopandas.GeoDataFrame] = ()


def join_row(above: OpenRow, row: Sequence[Pieces]) -> tuple[list[geopandas.GeoDataFrame], OpenRow]:
    """Join the pieces of a row of parts of an image with those of the row above it.

    `row` is in the order of columns. Returns the buildings that are whole now, in one frame or none, and the row for
    the next call. A last call without parts makes all of them whole.
    """
    frames = [*above.buildings, *(part.buildings for part in row)]
    if not frames:
        return [], above
    starts = np.cumsum([0, *map(len, frames)])[len(above.buildings) :]
    blocks = [Block(part.window, _numbered(part.sides, start)) for part, start in zip(row, starts, strict=False)]
    contacts = _find_contacts(above.blocks, blocks)
    pieces = pd.concat(frames, ignore_index=True)
    pieces.loc[np.concatenate([[], *contacts.beside_gap]).astype(int), "touches_gap"] = True
    building = contacts.components(len(pieces))
    joined = _dissolve(pieces, building)
    goes_on = np.zeros(len(joined), np.bool_)
    for block in blocks:
        bottom = block.sides["bottom"]
        goes_on[building[bottom[bottom >= 0]]] = True
    numbers = np.cumsum(goes_on) - 1
    below = [Block(window, {"bottom": _renumbered(sides["bottom"], numbers[building])}) for window, sides in blocks]
    return [joined[~goes_on]], OpenRow(below, [joined[goes_on]])


def _numbered(sides: dict[str, Side], start: int) -> dict[str, Side]:
    return {name: np.where(side >= 0, side + np.int32(start), side) for name, side in sides.items()}


def _renumbered(side: Side, numbers: NDArray[np.intp]) -> Side:
    found = side.copy()
    found[side >= 0] = numbers[side[side >= 0]]
    return found


class _Contacts:
    """Which pieces are one building, and which touch ground of which nothing is known."""

    def __init__(self) -> None:
        self.pairs: list[Side] = []  # (2, pairs)
        self.beside_gap: list[Side] = []

    def compare(self, one: Side | None, other: Side | None) -> None:
        """Take in two sides whose pixels are neighbours. None is that of a part that does not exist."""
        for side, opposite in ((one, other), (other, one)):
            if side is not None:
                unknown = np.ones(len(side), np.bool_) if opposite is None else opposite == UNKNOWN
                self.beside_gap.append(side[(side >= 0) & unknown])
        if one is not None and other is not None:
            both = (one >= 0) & (other >= 0)
            self.pairs.append(np.unique(np.stack([one[both], other[both]]), axis=1))

    def components(self, number: int) -> NDArray[np.int32]:
        """Return the number of the building of each piece."""
        first, second = np.concatenate([np.empty((2, 0), np.int32), *self.pairs], axis=1)
        graph = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(number, number))
        components: NDArray[np.int32] = connected_components(graph, directed=False)[1]
        return components


def _find_contacts(above: Sequence[Block], row: Sequence[Block]) -> _Contacts:
    """Compare all sides within a row of parts, and with the row above."""
    contacts = _Contacts()
    upper = {(block.window.bottom, block.window.col_off): block.sides["bottom"] for block in above}
    for block in row:
        contacts.compare(upper.pop(block.window.origin, None), block.sides["top"])
    for side in upper.values():
        contacts.compare(side, None)
    for one, other in pairwise([None, *row, None]):
        right, left = one and one.sides["right"], other and other.sides["left"]
        if one is not None and other is not None and one.window.right == other.window.col_off:
            contacts.compare(right, left)
        else:
            contacts.compare(right, None)
            contacts.compare(None, left)
    return contacts


def _dissolve(pieces: geopandas.GeoDataFrame, building: NDArray[np.int32]) -> geopandas.GeoDataFrame:
    """Return a row for each building, in the order of their numbers."""
    order = np.argsort(building, kind="stable")
    starts = np.flatnonzero(np.diff(building[order], prepend=-1))
    polygons = pieces.geometry.to_numpy()
    groups = np.split(order, starts[1:]) if len(pieces) else []
    geometry = [polygons[group[0]] if len(group) == 1 else shapely.union_all(polygons[group]) for group in groups]
    figures = {name: how.reduceat(pieces[name].to_numpy()[order], starts) for name, how in REDUCTIONS.items()}
    return geopandas.GeoDataFrame(figures, geometry=geometry)
