"""Make a training dataset of scenes and their labels: cut into blocks, split by ground, checked for shifted labels.

    scenes ──cells of ground──▶ blocks ──read, burn──▶ image and label files ──split──▶ DATA/{train,val,test}[_labels]

The layout is that of `seg_core.training.dataset`. Memory depends on the block, not on the scenes or the labels.
"""

import colorsys
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.datasets.alignment import SIDE, Fit, find_offset, judge, measure_fit
from seg_core.datasets.blocks import Block, Made
from seg_core.datasets.ground import Cell, GroundGrid, make_grids
from seg_core.datasets.labels import Labels, LabelSettings, open_labels
from seg_core.datasets.samples import write_samples
from seg_core.datasets.splits import SPLITS, assign_splits
from seg_core.errors import SegError
from seg_core.grid import Window, bounding_window, translated
from seg_core.imagery.georef import window_transform
from seg_core.imagery.geotiff import write_masked
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene
from seg_core.storage.disk import staged_folder
from seg_core.storage.files import PARTIAL, exists
from seg_core.training.dataset import check_trainable

Colour = tuple[int, int, int]
Report = Callable[[str], None]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
GOLDEN = 0.618034  # of a turn of hue between the colours of classes: neighbours differ, and none comes twice


@dataclass(frozen=True)
class MakeSettings:
    """How a dataset is to be made."""

    labels: LabelSettings = field(default_factory=LabelSettings)
    block: int = 512  # px: about the side of a block
    val: float = 0.2  # shares of the blocks of ground
    test: float = 0.0
    seed: int = 0


class Planned(NamedTuple):
    """What a scene has of a cell of ground, before it is read."""

    scene: Scene
    grid: GroundGrid
    cell: Cell
    window: Window


def make_dataset(
    scenes: Sequence[Scene], labels: str, out: str, settings: MakeSettings, report: Report = lambda _: None
) -> Made:
    """Write a dataset for `seg train` to a folder, which appears whole or not at all.

    `labels` is a vector file, or a raster of one band. `report` is called with a text for each block that is read.
    Raises SegError for labels or scenes that don't fit together, an existing folder, or too few blocks.
    """
    for scene in scenes:
        check_trainable(scene)
    if (numbers := {len(scene.bands) for scene in scenes}) != {len(scenes[0].bands)}:
        listed = " and ".join(map(str, sorted(numbers)))
        raise SegError(f"scenes have {listed} bands: choose the same for all, such as --bands 1,2,3")
    if exists(out):
        raise SegError(f"--out {out}: is there already: remove it, or choose another folder")
    with staged_folder(out) as folder, open_labels(labels, scenes, settings.labels) as opened:
        planned, names = _plan(scenes, settings.block), _unique_stems(scenes)
        surfaces = _Surfaces(folder, len(planned))
        blocks, fits = list[Block](), dict[Cell, list[Fit]]()
        for number, plan in enumerate(planned, 1):
            report(f"{number:,} of {len(planned):,} blocks, {plan.scene.scene_id}")
            found = _write_block(plan, opened, names[plan.scene.uri], folder)
            if found is not None:
                block, fit = found
                blocks.append(block)
                fits.setdefault(plan.cell, []).append(surfaces.keep(fit))
        splits = _arrange(blocks, folder, settings)
        _write_classes(opened.names, folder)
        every = [fit for each in fits.values() for fit in each]
        made = Made(scenes, opened.names, blocks, splits, opened.tally, judge(fits), find_offset(every))
        surfaces.remove()
        report("drawing samples.png")
        write_samples(made, folder, settings.seed)
    return made


class _Surfaces:
    """Keeps what blocks contribute to their neighbours' offsets in a file, so that memory stays bounded."""

    def __init__(self, folder: str, number: int) -> None:
        self.path, self.used = f"{folder}/{PARTIAL}surfaces", 0
        self.kept = np.memmap(self.path, np.float32, "w+", shape=(number, SIDE, SIDE))

    def keep(self, fit: Fit) -> Fit:
        """Move the surface of a fit to the file."""
        self.kept[self.used] = fit.surface
        self.used += 1
        return fit._replace(surface=self.kept[self.used - 1])

    def remove(self) -> None:
        """Remove the file."""
        os.unlink(self.path)


def _plan(scenes: Sequence[Scene], block: int) -> list[Planned]:
    grids = make_grids(scenes, block)
    return [
        Planned(scene, grid, cell, window)
        for scene, grid in zip(scenes, grids, strict=True)
        for cell, window in grid.windows(scene)
    ]


def _unique_stems(scenes: Sequence[Scene]) -> dict[str, str]:
    """A name for each scene by its URI, that can begin the name of a file."""
    stems = [os.path.splitext(scene.scene_id)[0].replace("/", "_") for scene in scenes]
    counts, used = Counter(stems), Counter[str]()
    names = {}
    for scene, stem in zip(scenes, stems, strict=True):
        used[stem] += 1
        names[scene.uri] = f"{stem}-{used[stem]}" if counts[stem] > 1 else stem
    return names


def _write_block(plan: Planned, labels: Labels, stem: str, folder: str) -> tuple[Block, Fit] | None:
    """Read a block and write its image and label; None if no pixel of it is valid and labelled."""
    scene, (window, inside) = plan.scene, _trim(plan)
    if window is None:
        return None
    pixels, valid = read_chip(scene, window)
    valid = valid & inside
    if not valid.any():
        return None
    label = np.where(valid, labels.read(scene, window), MISSING).astype(np.uint8)
    known = label != MISSING
    if not known.any():
        return None
    name = _unused_name(folder, f"{stem}_{window.row_off:06}_{window.col_off:06}")
    place = window_transform(scene.transform, window)
    image = np.where(valid, pixels, 0).astype(np.uint8)
    write_masked(f"{folder}/{name}.tif", image, valid, crs=scene.crs, transform=place)
    colours = np.array(choose_colours(len(labels.names)), np.uint8)
    shown = np.moveaxis(colours[np.where(known, label, 0)], -1, 0)
    write_masked(f"{folder}/{name}.label.tif", np.ascontiguousarray(shown), known, crs=scene.crs, transform=place)
    values, numbers = np.unique(label[valid], return_counts=True)
    counts = Counter(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    block = Block(name, scene, plan.cell, label.size, int(valid.sum()), counts)
    return block, measure_fit(image, valid, label)


def _unused_name(folder: str, name: str) -> str:
    """Return a name that no image in a folder has. Where cells lie askew in a scene, two may begin at one pixel."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(name for name in names if not exists(f"{folder}/{name}.tif"))


def _trim(plan: Planned) -> tuple[Window | None, NDArray[np.bool_]]:
    """The window of the pixels of a block that lie in its cell, and which of them do; no window if none does."""
    inside = plan.grid.inside(plan.scene, plan.cell, plan.window)
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return None, inside
    top, left = int(rows[0]), int(cols[0])
    window = bounding_window([Window(top, left, int(rows[-1]) - top + 1, int(cols[-1]) - left + 1)])
    return translated(window, *plan.window.origin), inside[window.slices(Window(0, 0, *inside.shape))]


def choose_colours(number: int) -> list[Colour]:
    """Return a colour for each class: black for the background, white for a single other class, else bright ones."""
    if number == 2:
        return [BLACK, WHITE]
    hues = (index * GOLDEN % 1.0 for index in range(number - 1))
    return [BLACK, *(_bright(hue, index) for index, hue in enumerate(hues))]


def _bright(hue: float, index: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, 1.0 - 0.25 * (index % 3), 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _write_classes(names: Sequence[str], folder: str) -> None:
    colours = choose_colours(len(names))
    table = pd.DataFrame(colours, columns=["r", "g", "b"])
    table.insert(0, "name", list(names))
    table.to_csv(f"{folder}/label_class_dict.csv", index=False)


def _arrange(blocks: Sequence[Block], folder: str, settings: MakeSettings) -> dict[Cell, str]:
    """Move the files of blocks to the folders of their splits. Raises SegError if there are too few blocks."""
    cells = {block.cell: False for block in blocks}
    for block in blocks:
        cells[block.cell] |= block.has_class
    splits = assign_splits(cells, settings.val, settings.test, settings.seed)
    for split in (name for name in SPLITS if name in splits.values()):
        os.mkdir(f"{folder}/{split}")
        os.mkdir(f"{folder}/{split}_labels")
    for block in blocks:
        split = splits[block.cell]
        Path(f"{folder}/{block.name}.tif").rename(f"{folder}/{split}/{block.name}.tif")
        Path(f"{folder}/{block.name}.label.tif").rename(f"{folder}/{split}_labels/{block.name}.tif")
    return splits
