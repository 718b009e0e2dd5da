"""What a dataset holds, as figures and lines of advice."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from seg_core.chips import MISSING
from seg_core.datasets.blocks import Made
from seg_core.datasets.labels import describe_dropped
from seg_core.datasets.splits import SPLITS


def figures(made: Made) -> dict[str, Any]:
    """Return the figures of a dataset: blocks, pixels and shares, what was read of the labels, and their offsets."""
    total = sum(block.pixels for block in made.blocks)
    labelled = sum(sum(block.counts.values()) - block.counts[MISSING] for block in made.blocks)
    found: dict[str, Any] = {"scenes": len(made.scenes), "blocks": len(made.blocks)}
    splits = [made.splits[block.cell] for block in made.blocks]
    found |= {f"{split}_blocks": splits.count(split) for split in SPLITS}
    found |= {"pixels": total, "missing_share": round(1 - labelled / total, 6)}
    for index, name in enumerate(made.names[1:], 1):
        found[f"{name}_share"] = round(sum(block.counts[index] for block in made.blocks) / labelled, 6)
    if made.tally is not None:
        dropped = {kind: number for kind, number in sorted(made.tally.dropped.items()) if number}
        found |= {"footprints": made.tally.read, "repaired": made.tally.repaired, "dropped": sum(dropped.values())}
    return found | _alignment(made)


def _alignment(made: Made) -> dict[str, Any]:
    """The share of blocks whose labels look shifted among those that can be judged, and their median offset."""
    shifted, judged = made.shifted, made.num_judged
    found: dict[str, Any] = {
        "judged_blocks": judged,
        "shifted_share": round(len(shifted) / judged, 4) if judged else None,
    }
    lengths = [(offset.px, block.scene.gsd_m) for block, offset in shifted]
    metres = [px * gsd_m for px, gsd_m in lengths if gsd_m is not None]
    found["shifted_px"] = round(float(np.median([px for px, _ in lengths])), 1) if lengths else None
    found["shifted_m"] = round(float(np.median(metres)), 2) if metres else None
    return found


def describe(made: Made) -> Iterator[str]:
    """Yield a line for each thing that whoever made the dataset should know."""
    if made.tally is not None and made.tally.repaired:
        yield f"{made.tally.repaired:,} invalid footprints were repaired"
    if made.tally is not None and (dropped := describe_dropped(made.tally)):
        yield f"dropped, because they are no area: {dropped}"
    marked = {block.scene.uri for block in made.blocks if block.has_class}
    if made.tally is not None and len(marked) < len(made.scenes):
        without = len(made.scenes) - len(marked)
        yield (
            f"{without:,} of {len(made.scenes):,} scenes hold no footprint, and count as background: "
            "if nobody has mapped them, leave them out, or draw what is mapped (--aoi FILE)"
        )
    yield from _describe_shifts(made)


def _describe_shifts(made: Made) -> Iterator[str]:
    shifted = made.shifted
    if shifted:
        rows, cols = (float(np.median([offset[axis] for _, offset in shifted])) for axis in (0, 1))
        found = _alignment(made)
        size = f"{found['shifted_px']:g} px" + (f", {found['shifted_m']:g} m" if found["shifted_m"] else "")
        yield (
            f"labels look shifted in {len(shifted):,} of {made.num_judged:,} blocks ({found['shifted_share']:.0%}), by "
            f"{size} in the median; they would fit better {_direction(rows, cols)}: look at samples.png before training"
        )
    if made.overall is not None and made.overall.is_shifted and 2 * len(shifted) <= made.num_judged:
        where = _direction(made.overall.rows, made.overall.cols)
        yield f"all labels together would fit better {where}: look at samples.png before training"


def _direction(rows: float, cols: float) -> str:
    down, right = "down" if rows > 0 else "up", "right" if cols > 0 else "left"
    return f"{abs(rows):g} px further {down} and {abs(cols):g} px further {right}"
