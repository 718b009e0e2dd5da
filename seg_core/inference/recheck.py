"""Segment a sample of a run's windows again, in this process, and compare with the rows that are stored."""

import posixpath
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from seg_core.errors import ReadError, SegError
from seg_core.grid import Window, overlap, split
from seg_core.imagery.scene import Scene, read_scene
from seg_core.inference.windows import infer_window, may_be_in_places
from seg_core.model.bundle import BUILT_IN, read_bundle
from seg_core.model.cpu_threads import at_least_two_threads
from seg_core.model.segmenter import Segmenter
from seg_core.run.plan import Part, Places, Settings
from seg_core.run.record import read_record
from seg_core.run.rows import Row, decode_mask, tile_rows
from seg_core.run.sizing import choose_window
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, read_part
from seg_core.storage.files import exists

MEMORY = 2**31  # bytes to segment a window in
TOLERANCE = 0.002  # share of a tile's pixels that may differ where the device has rounded otherwise


@dataclass
class Recheck:
    """The outcome of segmenting windows again."""

    num_same: int = 0  # windows whose stored tiles were reproduced
    differing: dict[str, list[str]] = field(default_factory=dict)  # lines, by the name of the part's file
    unread: list[str] = field(default_factory=list)  # reasons, one for each window that could not be rechecked


def recheck(
    run: str,
    number: int,
    device: str,
    model: str | None = None,
    places: Places = (),
    report: Callable[[str], None] = lambda _: None,
) -> Recheck:
    """Segment `number` windows, chosen at random, again. Scenes that have moved are at `places`.

    `report` is told how far it is.

    The model is at `model`, or where `run.json` says, or the one that comes with the package where nothing is there.
    Raises SegError where that is another.
    """
    plan, record = read_plan(run, places), read_record(run)
    named = record.model.uri
    copied = model is None and not exists(named) and read_bundle(BUILT_IN).hash == plan.model
    segmenter = Segmenter(BUILT_IN if copied else model or named, device, precision=plan.settings.precision)
    if segmenter.bundle.hash != plan.model:
        raise SegError(f"--model: is {segmenter.bundle.hash[:8]}, the run was made with {plan.model[:8]}")
    rounded = not segmenter.exact or record.exact is False
    window = choose_window(None, plan.settings, segmenter.bundle, MEMORY)
    parts, result = list(plan.parts()), Recheck()
    chosen = random.Random().sample(range(len(parts)), min(number, len(parts)))
    for done, part in enumerate(parts[i] for i in sorted(chosen)):
        report(f"{done} of {len(chosen)} windows")
        at = random.choice(list(split(part.window, window)))
        path = part_path(run, part.key)
        with at_least_two_threads():
            differing, reason = _recheck_window(part, at, read_part(path), plan.settings, segmenter, rounded)
        if differing:
            result.differing[posixpath.basename(path)] = differing
        elif reason is not None:
            result.unread.append(reason)
        else:
            result.num_same += 1
    return result


def _recheck_window(
    part: Part, window: Window, stored: list[Row], settings: Settings, segmenter: Segmenter, rounded: bool
) -> tuple[list[str], str | None]:
    """Lines for what differs, and the reason why not all of the window's tiles could be compared, if there is one."""
    again, unread = _segment_again(part, window, settings, segmenter)
    done = [Window.from_row(row) for row in stored if row["status"] == "done"]
    reason = next((str(error) for where, error in unread if any(overlap(tile, where) for tile in done)), None)
    differing = _differences(part, again, stored, rounded)
    # Of scenes that have moved the version is that of their old place, with which the file can't be compared.
    comparable = (part.sources or (part.scene,)) if differing and not part.planned else ()
    changed = next(filter(_has_changed, comparable), None)
    if changed is not None:  # which says nothing about what was stored before
        return [], f"{changed.uri}: has changed since it was segmented: the run's seg segment command does it again"
    return differing, reason


def _has_changed(scene: Scene) -> bool:
    try:
        return read_scene(scene.uri, scene.scene_id).version != scene.version
    except ReadError:
        return True


def _segment_again(
    part: Part, window: Window, settings: Settings, segmenter: Segmenter
) -> tuple[list[Row], list[tuple[Window, ReadError]]]:
    """The rows of a window, and what of it can't be read: found as a run finds it."""
    try:
        result = infer_window(part, window, settings, segmenter)
        return list(tile_rows(part.scene, window, settings.tile_size, result.figures)), []
    except ReadError as error:
        tiles = list(split(window, settings.tile_size))
        if len(tiles) == 1 or not may_be_in_places(error, settings):
            return [], [(window, error)]
    each = [_segment_again(part, tile, settings, segmenter) for tile in tiles]
    return [row for rows, _ in each for row in rows], [one for _, unread in each for one in unread]


def _differences(part: Part, again: list[Row], stored: list[Row], rounded: bool) -> list[str]:
    """Lines for the tiles whose stored row says something else. Failed ones say nothing."""
    there = {(row["row_off"], row["col_off"]): row for row in stored if row["status"] == "done"}
    problems = []
    for row in again:
        before = there.get((row["row_off"], row["col_off"]), row)
        room = TOLERANCE * row["height"] * row["width"] if rounded else 0
        off = abs(row["building_px"] - before["building_px"])
        if off > room or row["valid_px"] != before["valid_px"] or not (rounded or _same_mask(row, before)):
            problems.append(
                f"{part.scene.scene_id}: tile {row['row_off']}, {row['col_off']}: {before['building_px']} building of "
                f"{before['valid_px']} valid px stored, {row['building_px']} of {row['valid_px']} when segmented again"
            )
    return problems


def _same_mask(row: Row, other: Row) -> bool:
    """Whether the pixels are the same: the bytes are not where the PNG was written by another version."""
    try:
        one, two = (decode_mask(each["mask"], row["height"], row["width"]) for each in (row, other))
    except SegError:
        return False
    return np.array_equal(one, two)
