"""The blocks of a dataset, and what the dataset holds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from seg_core.chips import MISSING
from seg_core.datasets.alignment import Offset
from seg_core.datasets.ground import Cell
from seg_core.imagery.scene import Scene
from seg_core.imagery.vectors import Tally


@dataclass(frozen=True)
class Block:
    """A block that was written: an image with its label."""

    name: str  # of its files, without folder
    scene: Scene
    cell: Cell
    pixels: int
    valid: int
    counts: Counter[int]  # valid pixels by class, MISSING included

    @property
    def has_class(self) -> bool:
        """Whether it holds anything but background."""
        return any(self.counts[index] for index in self.counts if index not in {0, MISSING})


@dataclass(frozen=True)
class Made:
    """What a dataset holds."""

    scenes: Sequence[Scene]
    names: tuple[str, ...]  # of the classes
    blocks: Sequence[Block]
    splits: dict[Cell, str]
    tally: Tally | None
    offsets: dict[Cell, Offset]
    overall: Offset | None  # of all blocks together

    @property
    def shifted(self) -> list[tuple[Block, Offset]]:
        """Blocks whose labels look shifted."""
        judged = [(block, self.offsets[block.cell]) for block in self.blocks if block.cell in self.offsets]
        return [(block, offset) for block, offset in judged if offset.is_shifted]

    @property
    def num_judged(self) -> int:
        """Blocks with enough objects to say whether their labels are shifted."""
        return sum(block.cell in self.offsets for block in self.blocks)
