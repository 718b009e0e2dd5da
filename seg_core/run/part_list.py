"""Some parts of a plan, kept as a few integers each, because a region may have millions of parts."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from seg_core.run.plan import Part, Plan

PLACE = ("image", "row_off", "col_off")  # what is kept of a part; the image is a number in `Plan.images`


@dataclass(frozen=True, eq=False)
class PartList(Sequence[Part]):
    """Parts of a plan, each of which is made when it is asked for."""

    plan: Plan
    places: NDArray[np.int32]  # (parts, 3): see PLACE

    @classmethod
    def of(cls, plan: Plan, parts: Iterable[Part]) -> "PartList":
        """Keep parts of a plan, which are not held in memory together."""
        numbers = {image.scene_id: number for number, image in enumerate(plan.images)}
        places = array("i")
        for part in parts:
            places.extend((numbers[part.scene.scene_id], *part.window.origin))
        return cls(plan, np.frombuffer(places, np.int32).reshape(-1, len(PLACE)))

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Part: ...

    @overload
    def __getitem__(self, at: slice) -> "PartList": ...

    def __getitem__(self, at: int | slice) -> "Part | PartList":
        """Return a part, or some parts."""
        if isinstance(at, slice):
            return PartList(self.plan, self.places[at])
        return self.plan.part_at(*self.places[at].tolist())
