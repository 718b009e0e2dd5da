"""Segment a sample of a run's windows again, in this process, and compare the results with the stored rows."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from seg_core.errors import ReadError, SegError
from seg_core.grid import Window, intersects, split
from seg_core.imagery.headers import read_scene
from seg_core.imagery.scene import Scene
from seg_core.inference.windows import infer_window, may_be_partial
from seg_core.model.bundle import BUILT_IN, find_bundle, read_bundle
from seg_core.model.cpu_threads import at_least_two_threads
from seg_core.model.segmenter import Segmenter
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import find_parts
from seg_core.run.places import Places
from seg_core.run.plan import Part, Settings
from seg_core.run.record import read_record
from seg_core.run.rows import Row, decode_mask, decode_valid, tile_rows
from seg_core.run.sizing import choose_window
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_name
from seg_core.storage.files import exists

WINDOW_MEMORY = 2**31  # bytes that segmenting a window may take
ROUNDING_TOLERANCE = 0.002  # fraction of a tile's pixels that may differ if a device has rounded differently


@dataclass
class Recheck:
    """The result of segmenting windows again."""

    num_same: int = 0  # windows whose stored tiles were reproduced
    differing: dict[str, list[str]] = field(default_factory=dict)  # lines by name of the part's file
    unread: list[str] = field(default_factory=list)  # reasons, one for each window that could not be rechecked


def recheck(
    run: str,
    number: int,
    device: str,
    model: str | None = None,
    places: Places = (),
    report: Callable[[str], None] = lambda _: None,
) -> Recheck:
    """Segment again one random window of each of `number` random parts, and compare the rows.

    `model` is the path of the bundle: by default the one in `run.json`, or the built-in one if that path doesn't exist.
    `places` are the old and new paths of scenes that have moved. `report` is called with a text for each window. Raises
    SegError if the bundle is not the one that the run was made with.
    """
    plan, record = read_plan(run, places), read_record(run)
    recorded = find_bundle(record.model.uri)
    use_built_in = model is None and not exists(recorded) and read_bundle(BUILT_IN).hash == plan.model
    segmenter = Segmenter(BUILT_IN if use_built_in else model or recorded, device, precision=plan.settings.precision)
    if segmenter.bundle.hash != plan.model:
        raise SegError(
            f"--model: is {segmenter.bundle.hash[:8]}, but the run was made with {plan.model[:8]}: name that model"
        )
    rounded = not segmenter.exact or record.exact is False
    side = choose_window(None, plan.settings, segmenter.bundle, WINDOW_MEMORY)
    parts, there, result = list(plan.parts()), find_parts(run), Recheck()
    chosen = random.Random().sample(range(len(parts)), min(number, len(parts)))
    for done, part in enumerate(parts[i] for i in sorted(chosen)):
        report(f"{done} of {len(chosen)} windows")
        window = random.choice(list(split(part.window, side)))
        if part.key not in there:
            raise SegError(f"{run}: part {part.key} is gone: seg verify says more")
        with at_least_two_threads():
            differing, reason = _recheck_window(
                part, window, read_rows(there[part.key]), plan.settings, segmenter, rounded
            )
        if differing:
            result.differing[part_name(part.key)] = differing
        elif reason is not None:
            result.unread.append(reason)
        else:
            result.num_same += 1
    return result


def _recheck_window(
    part: Part, window: Window, stored: list[Row], settings: Settings, segmenter: Segmenter, rounded: bool
) -> tuple[list[str], str | None]:
    """Return one line per difference, and the reason if not all tiles of the window could be compared, or else None."""
    rows, unread = _segment_again(part, window, settings, segmenter)
    done = [Window.from_row(row) for row in stored if row["status"] == "done"]
    reason = next((str(error) for place, error in unread if any(intersects(tile, place) for tile in done)), None)
    differing = _differences(part, rows, stored, rounded)
    # The version of a scene that has moved is that of its old file, so the new file can't be compared with it.
    comparable = (part.sources or (part.scene,)) if differing and not part.planned else ()
    changed = next(filter(_has_changed, comparable), None)
    if changed is not None:  # then a difference is no sign of a wrong row
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
    """Return the rows of a window, and the places that can't be read with their errors, as a run would find them."""
    try:
        result = infer_window(part, window, settings, segmenter)
        return list(tile_rows(part.scene, window, settings.tile_size, result.figures)), []
    except ReadError as error:
        tiles = list(split(window, settings.tile_size))
        if len(tiles) == 1 or not may_be_partial(error, settings):
            return [], [(window, error)]
    results = [_segment_again(part, tile, settings, segmenter) for tile in tiles]
    return [row for rows, _ in results for row in rows], [each for _, unread in results for each in unread]


def _differences(part: Part, rows: list[Row], stored_rows: list[Row], rounded: bool) -> list[str]:
    """Return one line for each tile whose stored row differs. Failed tiles are not compared."""
    done = {(row["row_off"], row["col_off"]): row for row in stored_rows if row["status"] == "done"}
    problems = []
    for row in rows:
        stored = done.get((row["row_off"], row["col_off"]), row)
        tolerance = ROUNDING_TOLERANCE * row["height"] * row["width"] if rounded else 0
        difference = abs(row["building_px"] - stored["building_px"])
        if difference > tolerance or not _same_pixels(row, stored, rounded):
            problems.append(
                f"{part.scene.scene_id}: tile {row['row_off']}, {row['col_off']}: {stored['building_px']} building of "
                f"{stored['valid_px']} valid px stored, {row['building_px']} of {row['valid_px']} when segmented again"
            )
    return problems


def _same_pixels(row: Row, stored: Row, rounded: bool) -> bool:
    """Whether the same pixels are valid and, unless a device has rounded differently, building.

    The bytes of the PNGs may differ between versions of the encoder. A run of an older version may not say which pixels
    are valid.
    """
    try:
        mask, stored_mask = (decode_mask(each["mask"], row["height"], row["width"]) for each in (row, stored))
        valid, stored_valid = decode_valid(row), decode_valid(stored)
    except SegError:
        return False
    if row["valid_px"] != stored["valid_px"]:
        return False
    if valid is not None and stored_valid is not None and not np.array_equal(valid, stored_valid):
        return False
    return rounded or np.array_equal(mask, stored_mask)
