"""Begin a run or resume it: is it of this plan, and which of its parts are to be done."""

import json
import posixpath
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.scene import Scene
from seg_core.run.attempts import attempts_folder
from seg_core.run.compact import remove_parts
from seg_core.run.fence import LEASE, PLAIN, Store
from seg_core.run.ledger import ledger_folder, read_live_ledger
from seg_core.run.part_list import PartList
from seg_core.run.part_reading import read_states
from seg_core.run.parts import find_parts, index_parts
from seg_core.run.plan import Plan, image_key
from seg_core.run.record import PlanFigures, RunRecord, new_record, read_record, write_record
from seg_core.run.tables import read_scenes, scenes_path, write_scenes
from seg_core.storage.files import PARTIAL, check_writable, make_folder, stat, walk


def find_run(out: str, plan: Plan) -> RunRecord | None:
    """The record of the run at `out`, None where nothing is yet. Raises SegError where `out` holds something else.

    That is: a folder that is no run, or a run of other scenes, settings or another model.
    """
    if stat(f"{out}/run.json") is not None:
        record = read_record(out)
        _refuse_differences(out, record, plan)
        return record
    if stat(out) is not None or any(not posixpath.basename(path).startswith((PARTIAL, LEASE)) for path in walk(out)):
        raise SegError(f"{out}: exists and is not a run: choose another folder")
    check_writable(out)
    return None


CHOSEN = ("decode", "precision")  # settings that may be `auto` until a run begins


def with_choices_of_run(out: str, plan: Plan) -> Plan:
    """The plan with the settings that are `auto` as they were chosen when the run at `out` began, where there is one.

    An older run may have recorded `auto`: it stays so.
    """
    open_settings = [name for name in CHOSEN if getattr(plan.settings, name) == "auto"]
    if not open_settings or stat(f"{out}/run.json") is None:
        return plan
    chosen = read_record(out).settings
    return replace(plan, settings=replace(plan.settings, **{name: getattr(chosen, name) for name in open_settings}))


def open_run(out: str, plan: Plan, model_uri: str, store: Store = PLAIN) -> RunRecord:
    """The record of the run at `out`, made there if there is none. Raises SegError as `find_run` does."""
    record = find_run(out, plan)
    if record is None:
        make_folder(out)
        record = new_record(plan, model_uri)
        write_record(out, record, store)
    for folder in (f"{out}/tiles", ledger_folder(out), attempts_folder(out)):
        make_folder(folder)
    if stat(scenes_path(out)) is None:
        make_folder(f"{out}/scenes")
        write_scenes(out, plan.scenes, store, plan.settings.decode)
    elif record.plan.fingerprint != plan.fingerprint:
        _replace_changed_scenes(out, plan, store)
        record.plan = PlanFigures.of(plan)
        record.seams = None  # perhaps of borders that are no more
        write_record(out, record, store)
    return record


def _replace_changed_scenes(out: str, plan: Plan, store: Store) -> None:
    """Replace the scenes table where scenes have changed since, and remove what is no part of them any more."""
    images = plan.images if plan.settings.mosaic else changed_scenes(out, plan)
    changed = tuple(f"{image_key(image)}-" for image in images)
    planned = {part.key for part in plan.parts()}
    index = index_parts(out)
    remove_parts(index, [key for key in index.find() if key not in planned and key.startswith(changed)], store)
    write_scenes(out, plan.scenes, store, plan.settings.decode)


def changed_scenes(out: str, plan: Plan) -> list[Scene]:
    """The scenes whose files have changed since the run at `out` was planned."""
    if stat(scenes_path(out)) is None:  # the run's maker was killed before it wrote them
        return []
    before = {scene.scene_id: scene for scene in read_scenes(out)}
    return [s for s in plan.scenes if s.scene_id not in before or not is_same_scene(s, before[s.scene_id])]


def is_same_scene(one: Scene, other: Scene) -> bool:
    """Whether all that is recorded of two scenes is the same."""
    # Compared as text, because a NaN, which a nodata value may be, differs from itself.
    return repr(one.to_plain()) == repr(other.to_plain())


def parts_to_do(run: str, plan: Plan) -> PartList:
    """The planned parts that are not published, damaged, hold failed tiles, or are of an older state of a file.

    Raises SegError where one can't be read, or a newer version wrote it.
    """
    known = {entry.key: sys.intern(entry.version) for _, entries in read_live_ledger(run) for entry in entries}
    todo = PartList.of(plan, (part for part in plan.parts() if known.get(part.key) != part.version))
    there = find_parts(run) if todo else {}  # verify names what is there beside the parts
    if not there:
        return todo
    states = read_states({part.key: there[part.key] for part in todo if part.key in there and part.key not in known})
    return PartList.of(plan, (part for part in todo if states.get(part.key) != (True, part.version)))


def _refuse_differences(out: str, record: RunRecord, plan: Plan) -> None:
    there, here = (json.loads(json.dumps(asdict(settings))) for settings in (record.settings, plan.settings))
    differing = [f"{name} {there[name]} there, {here[name]} now" for name in here if there[name] != here[name]]
    if record.model.hash != plan.model:
        differing.append(f"model {record.model.hash[:8]} there, {plan.model[:8]} now")
    if not differing and record.plan.fingerprint != plan.fingerprint:
        differing += _scene_differences(known_scenes(out), plan.scenes)
    if differing:
        raise SegError(f"{out}: is a run with other settings ({'; '.join(differing)}): choose another folder")


def known_scenes(out: str) -> list[Scene]:
    """The scenes of the run at `out`. Raises CorruptFileError, and SegError, as `read_scenes` does."""
    try:
        return read_scenes(out)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{scenes_path(out)}: damaged, and can't be rewritten: the scenes named are not those of the run, or have "
            "changed since: restore it from a copy, or choose another folder"
        ) from error


def _scene_differences(there: Sequence[Scene], here: Sequence[Scene]) -> list[str]:
    """What makes it another region: scenes that come or go. A scene that has changed is one that is done again."""
    before, after = ({scene.scene_id: scene.uri for scene in scenes} for scenes in (there, here))
    odd = next((i for i in {**after, **before} if before.get(i) != after.get(i)), None)
    if odd is None:
        return [] if list(before) == list(after) else ["the order of its scenes"]
    if odd not in after:
        return [f"scene {odd} is there, not here"]
    if odd not in before:
        return [f"scene {odd} is new"]
    way_out = f"if it has moved, add {_suggest(before[odd], after[odd])}"
    return [f"scene {odd} is {before[odd]} there, {after[odd]} now: {way_out}"]


def _suggest(old: str, new: str) -> str:
    """The option that takes one URI to the other: without the end that they have in common."""
    while posixpath.basename(old) == posixpath.basename(new) != "":
        old, new = posixpath.dirname(old), posixpath.dirname(new)
    return f"--relocate {shlex.quote(f'{old}={new}')}"
