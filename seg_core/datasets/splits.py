"""Assign cells of ground to the splits of a dataset."""

from collections.abc import Mapping

import numpy as np

from seg_core.datasets.ground import Cell
from seg_core.errors import SegError

SPLITS = ("train", "val", "test")


def assign_splits(cells: Mapping[Cell, bool], val: float, test: float, seed: int) -> dict[Cell, str]:
    """Assign each cell to train, val or test, in random order by seed.

    `cells` says for each cell whether it holds anything but background: these are divided first, and the rest in the
    same shares, so that no split is without the class by chance. A split with a share gets at least one cell. Raises
    SegError if there are too few cells.
    """
    needed = 1 + (val > 0) + (test > 0)
    if not (val >= 0 and test >= 0 and val + test < 1):  # also if one is no number
        raise SegError(f"--val {val:g} --test {test:g}: shares are at least 0 and less than 1 together")
    if len(cells) < needed:
        raise SegError(
            f"{len(cells)} block{'s' if len(cells) != 1 else ''} of labelled ground for {needed} splits: "
            "add scenes, make blocks smaller (--block PX), or leave out splits (--val 0, --test 0)"
        )
    rng, found = np.random.default_rng(seed), dict[Cell, str]()
    ordered = sorted(cells)
    shuffled = [ordered[at] for at in rng.permutation(len(ordered))]
    shuffled.sort(key=lambda cell: not cells[cell])  # stable: those with the class first
    shares = {name: share for name, share in (("val", val), ("test", test)) if share}
    firsts = dict(zip(shuffled, ("train", *shares), strict=False))  # one for each split, with the class if possible
    pool = shuffled[len(firsts) :]
    numbers = {name: max(1, round(share * len(cells))) - 1 for name, share in shares.items()}  # of further cells
    if sum(numbers.values()) > len(pool):
        numbers = dict.fromkeys(shares, 0)
    for name, number in numbers.items():
        chosen = [pool[at * len(pool) // number] for at in range(number)]  # evenly from both kinds
        found |= dict.fromkeys(chosen, name)
        pool = [cell for cell in pool if cell not in found]
    found |= firsts
    return {cell: found.get(cell, "train") for cell in ordered}
