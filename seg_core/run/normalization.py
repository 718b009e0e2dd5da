"""The normalization of a run: from a seeded sample of its imagery when it begins, afterwards from its own files.

region ─ frames ─▶ blocks drawn with a fixed seed ─ child process ─▶ histograms of valid pixels ─▶ mean and deviation

The sample depends on the scenes and their grids only, not on windows, parts, workers or readers. It is bounded: a
region of any size costs NUM_BLOCKS blocks, and `scene` BLOCKS_PER_SCENE blocks for each scene.
"""

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from seg_core.errors import CorruptFileError, ReadError
from seg_core.grey_levels import NUM_LEVELS, Levels, Normalization, count_levels
from seg_core.grid import Window, num_splits
from seg_core.imagery.mosaic import place_on_grid
from seg_core.imagery.raster import read_image
from seg_core.imagery.scene import Scene
from seg_core.model.bundle import Bundle
from seg_core.run.imagery_fit import MIN_PIXELS, choose_normalization, compare, decide_mode
from seg_core.run.isolated import for_each_isolated
from seg_core.run.places import Places, relocate
from seg_core.run.plan import Plan
from seg_core.run.record import read_record
from seg_core.run.tables import read_scenes

NUM_BLOCKS = 48  # of a region
BLOCKS_PER_SCENE = 4
BLOCK = 512  # px a side
MIN_BLOCK = 64  # px: of imagery that is much finer than its grid, blocks are smaller, because more of it is read
SEED = 0
NUM_READERS = 8  # threads: blocks are read at once that often, each with its memory


class Frame(NamedTuple):
    """A window of an image from which blocks are drawn, and the scenes to read it from."""

    image: Scene  # on whose grid the window is
    pieces: tuple[Scene, ...]  # of a mosaic, the scene that the window is of; else none
    window: Window

    @property
    def block(self) -> int:
        """Side in px of its blocks."""
        source = self.pieces[0] if self.pieces else self.image
        if not (self.image.is_resampled and self.image.gsd_m and source.source_gsd_m):
            return BLOCK
        return max(MIN_BLOCK, min(BLOCK, int(BLOCK * 2 * source.source_gsd_m / self.image.gsd_m)))


class Block(NamedTuple):
    """A window to read, with the values of the file that become 0 and 255."""

    frame: Frame
    window: Window
    scale: tuple[float, float] | None


def normalize_plan(plan: Plan, bundle: Bundle, report: Callable[[str], None] = lambda _: None) -> Plan:
    """Return the plan with its normalization found from a sample of its imagery, and with `Plan.fit`.

    Blocks that can't be read are left out. A region that is too small to be judged is not sampled, unless a mode is
    asked for that needs it. `report` is called with a text for each block.
    """
    mode, scale = plan.settings.normalize, plan.settings.scale
    if not plan.scenes:
        return plan
    if mode == "scene":
        return _normalize_scenes(plan, bundle, report)
    if mode in {"auto", "model"} and plan.counts["pixels"] < MIN_PIXELS:
        return replace(plan, settings=plan.settings.normalized("model", None))
    levels = sum_levels(draw_blocks(frames_of(plan, plan.images), NUM_BLOCKS, scale), bundle.bands, report)[0]
    found = choose_normalization(mode, levels, bundle)
    settings = plan.settings.normalized(decide_mode(mode, found), found)
    return replace(plan, settings=settings, fit=compare(levels, bundle))


def _normalize_scenes(plan: Plan, bundle: Bundle, report: Callable[[str], None]) -> Plan:
    blocks, starts = [], [0]
    for image in plan.images:
        blocks += draw_blocks(frames_of(plan, [image]), BLOCKS_PER_SCENE, plan.settings.scale)
        starts.append(len(blocks))
    levels = sum_levels(blocks, bundle.bands, report, starts[1:-1])
    found = [choose_normalization("scene", each, bundle) for each in levels]
    images = [image.normalized(each) for image, each in zip(plan.images, found, strict=True)]
    scenes = (*images, *plan.scenes[len(images) :])
    return replace(plan, scenes=scenes, fit=compare(np.sum(levels, axis=0), bundle))


def normalize_as_run(out: str, plan: Plan, bundle: Bundle, given: Places = ()) -> Plan:
    """Return the plan with the normalization of the run at `out`, which it resumes.

    `auto` becomes what it was when the run began. A scene keeps its statistics if its file has changed since. `given`
    are the old and new paths of scenes that have moved. Raises SegError if there is no run.
    """
    record = read_record(out)
    there = record.settings
    wanted = there.normalize if plan.settings.normalize == "auto" else plan.settings.normalize
    plan = replace(plan, settings=plan.settings.normalized(wanted, there.normalization))
    if not wanted == there.normalize == "scene":
        return plan
    try:
        stored = read_scenes(out)
    except CorruptFileError:  # the sample is drawn again: it is the same
        return _normalize_scenes(plan, bundle, lambda _: None)
    known = {relocate(scene.uri, record.places(given)): scene.normalization for scene in stored}
    if plan.settings.mosaic and stored:  # the first is no file
        known[plan.scenes[0].uri] = stored[0].normalization
    return replace(plan, scenes=tuple(scene.normalized(known.get(scene.uri)) for scene in plan.scenes))


def frames_of(plan: Plan, images: Sequence[Scene]) -> list[Frame]:
    """Return what blocks of images of a plan are drawn from: the images, or the pieces of a mosaic."""
    if not plan.settings.mosaic:
        return [Frame(image, (), image.window) for image in images]
    (whole,) = images
    return [Frame(whole, (piece,), place_on_grid(piece, whole)) for piece in plan.scenes[1:]]


def draw_blocks(frames: Sequence[Frame], number: int, scale: tuple[float, float] | None = None) -> list[Block]:
    """Draw blocks of frames with a fixed seed, all of them if there are no more than `number`, in their order."""
    ends = list(accumulate(num_splits(frame.window, frame.block) for frame in frames))
    total = ends[-1] if ends else 0
    chosen = sorted(random.Random(SEED).sample(range(total), min(number, total)))
    blocks = []
    for index in chosen:
        at = bisect(ends, index)
        frame = frames[at]
        place = index - (ends[at - 1] if at else 0)
        blocks.append(Block(frame, block_at(frame.window, frame.block, place), scale))
    return blocks


def block_at(window: Window, side: int, index: int) -> Window:
    """Return the window with this index among those of `seg_core.grid.split`, without making the others."""
    row, col = divmod(index, math.ceil(window.width / side))
    row_off, col_off = window.row_off + row * side, window.col_off + col * side
    return Window(row_off, col_off, min(side, window.bottom - row_off), min(side, window.right - col_off))


def sum_levels(
    blocks: Sequence[Block], bands: int, report: Callable[[str], None] = lambda _: None, cuts: Sequence[int] = ()
) -> list[Levels]:
    """Read blocks, and count their valid pixels by grey level. Returns `int64 (bands, 256)` for each group of blocks.

    Groups begin at the indices `cuts`; without them there is one. Blocks are read in a child process, because a damaged
    file may end its reader. Those that can't be read count nothing.
    """
    sums = [np.zeros((bands, NUM_LEVELS), np.int64) for _ in range(len(cuts) + 1)]
    for number, levels in enumerate(for_each_isolated(read_levels, _no_levels, blocks, NUM_READERS)):
        report(f"{number + 1} of {len(blocks)} blocks")
        if levels is not None:
            sums[bisect(cuts, number)] += levels
    return sums


def read_levels(block: Block) -> Levels | None:
    """Return the counts of a block's valid pixels, `int64 (bands, 256)`; None if it can't be read."""
    try:
        return count_levels(*read_image(block.frame.image, block.frame.pieces, block.window, block.scale))
    except ReadError:
        return None


def _no_levels(_: Block) -> Levels | None:
    return None


def normalizations_of(
    scenes: Sequence[Scene], bundle: Bundle, mode: str, scale: tuple[float, float] | None = None
) -> list[Normalization | None]:
    """Return the normalization that each scene has in a run over them all, read in this process; None: the model's."""
    if mode == "scene":
        return [_normalization_of([scene], BLOCKS_PER_SCENE, bundle, mode, scale) for scene in scenes]
    return [_normalization_of(scenes, NUM_BLOCKS, bundle, mode, scale)] * len(scenes)


def _normalization_of(
    scenes: Sequence[Scene], number: int, bundle: Bundle, mode: str, scale: tuple[float, float] | None
) -> Normalization | None:
    if mode == "model":
        return None
    blocks = draw_blocks([Frame(scene, (), scene.window) for scene in scenes], number, scale)
    found = [levels for levels in map(read_levels, blocks) if levels is not None]
    return choose_normalization(mode, np.sum(found, axis=0), bundle) if found else None
