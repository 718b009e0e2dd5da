"""A picture of some blocks of a dataset, to be looked at before an hour is spent on training."""

import numpy as np

from seg_core.datasets.blocks import Block, Made
from seg_core.plots.pictures import Panel, as_rgb, assemble_panels, paint_outlines
from seg_core.storage.files import publish
from seg_core.training.dataset import Classes, Pair, read_classes, read_pair

NUM_SAMPLES = 6


def write_samples(made: Made, data: str, seed: int) -> None:
    """Write `samples.png` into a dataset: some of its blocks, with the outlines of their labels."""
    classes = read_classes(data)
    panels = [_panel(made, block, data, classes) for block in _choose(made, seed)]
    publish(f"{data}/samples.png", assemble_panels(panels, columns=3))


def _choose(made: Made, seed: int) -> list[Block]:
    """Blocks to show, at random: of those with a class if there are any."""
    blocks = [block for block in made.blocks if block.has_class] or list(made.blocks)
    chosen = np.random.default_rng(seed).permutation(len(blocks))[:NUM_SAMPLES]
    return [blocks[at] for at in sorted(chosen)]


def _panel(made: Made, block: Block, data: str, classes: Classes) -> Panel:
    split, offset = made.splits[block.cell], made.offsets.get(block.cell)
    pair = Pair(f"{data}/{split}/{block.name}.tif", f"{data}/{split}_labels/{block.name}.tif")
    (image, label), _, _ = read_pair(pair, classes)
    doubt = f", looks shifted by {offset.px:.0f} px" if offset is not None and offset.is_shifted else ""
    return Panel(f"{split}: {block.name}{doubt}", paint_outlines(as_rgb(image), label))
