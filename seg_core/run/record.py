"""A run: the output folder of one bulk job, and what of its plan is left to do."""

import json
import posixpath
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.scene import Scene
from seg_core.run.attempts import attempts_folder
from seg_core.run.fence import LEASE, PLAIN, Store
from seg_core.run.lease import acquire_lease
from seg_core.run.plan import Part, Places, Plan, Settings, image_key, relocate
from seg_core.run.tables import part_path, published_parts, read_scenes, read_states, scenes_path, write_scenes
from seg_core.storage.files import PARTIAL, check_writable, exists, is_remote, make_folder, read_bytes, stat, walk
from seg_core.version import code_version

FORMAT = "aerial-seg run"
VERSION = 2


def find_run(out: str, plan: Plan) -> dict[str, Any] | None:
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


def with_decoder_of_run(out: str, plan: Plan) -> Plan:
    """The plan with `decode auto` decided as it was when the run at `out` began, where there is one."""
    if plan.settings.decode != "auto" or stat(f"{out}/run.json") is None:
        return plan
    return plan.with_decoder(on_gpu=read_record(out)["settings"].get("decode") == "device")


def open_run(out: str, plan: Plan, model_uri: str, store: Store = PLAIN) -> dict[str, Any]:
    """The record of the run at `out`, made there if there is none. Raises SegError as `find_run` does."""
    record = find_run(out, plan)
    if record is None:
        make_folder(out)
        record = _new_record(plan, model_uri)
        write_record(out, record, store)
    for folder in (f"{out}/tiles", attempts_folder(out)):
        make_folder(folder)
    if stat(scenes_path(out)) is None:
        make_folder(f"{out}/scenes")
        write_scenes(out, plan.scenes, store)
    elif record["plan"]["fingerprint"] != plan.fingerprint:
        _take_over(out, plan, store)
        record["plan"] = {"fingerprint": plan.fingerprint, **plan.counts}
        record.pop("seams", None)  # perhaps of borders that are no more
        write_record(out, record, store)
    return record


def _take_over(out: str, plan: Plan, store: Store) -> None:
    """Replace the scenes table where scenes have changed since, and remove what is no part of them any more."""
    images = plan.images if plan.settings.mosaic else changed_scenes(out, plan)
    changed = tuple(f"part-{image_key(image)}-" for image in images)
    planned = {part_path(out, part.key) for part in plan.parts()}
    for path in published_parts(out):
        if path not in planned and posixpath.basename(path).startswith(changed):
            store.remove(path)
    write_scenes(out, plan.scenes, store)


def changed_scenes(out: str, plan: Plan) -> list[Scene]:
    """The scenes whose files have changed since the run at `out` was planned."""
    if stat(scenes_path(out)) is None:  # the run's maker was killed before it wrote them
        return []
    before = {scene.scene_id: _as_text(scene) for scene in read_scenes(out)}
    return [scene for scene in plan.scenes if before.get(scene.scene_id) != _as_text(scene)]


def match_run(out: str, plan: Plan, given: Places = ()) -> tuple[Plan, list[str]]:
    """The plan under the names by which the run at `out` knows its scenes, if there is a run; and messages.

    Scenes that have moved are at the `given` places, or at those that `run.json` records; the places in use are
    recorded there. A scene is unchanged where its size and header agree, and its etag if both places are in S3. Its
    modification time may differ, since copying seldom keeps it. A damaged or missing scenes table is rewritten if the
    plan is the one that the run was made with.

    Raises SegError as `find_run` does.
    """
    if stat(f"{out}/run.json") is None:
        if given:
            raise SegError(f"--relocate: there is no run at {out} yet: leave out this option")
        return plan, []
    record = read_record(out)
    places, accepted = read_places(record, given), record.get("relocated_versions") or {}
    moved = _relocate(plan, _known_scenes(out), places, accepted) if places else RelocatedPlan(plan, [], accepted)
    plan, notes = moved.plan, moved.notes
    begun = with_decoder_of_run(out, plan)
    find_run(out, begun)
    if read_places(record) != plan.places or moved.accepted != accepted:
        with acquire_lease(out) as lease:
            relocated: dict[str, str] = {}
            for old, new in plan.places:
                relocated.setdefault(old, new)  # of two places the first applies
            changes = {"relocated": relocated, "relocated_versions": moved.accepted}
            write_record(out, {**read_record(out), **changes}, lease)
    if record["plan"]["fingerprint"] == begun.fingerprint and not _has_scenes(out, begun):
        with acquire_lease(out) as lease:
            make_folder(posixpath.dirname(scenes_path(out)))
            write_scenes(out, begun.scenes, lease)
        notes.append(f"{scenes_path(out)}: was damaged or missing: rewritten from the plan")
    return plan, notes


def _has_scenes(out: str, plan: Plan) -> bool:
    """Whether the scenes table of the run is that of the plan."""
    try:
        there = read_scenes(out)
    except CorruptFileError:
        return False
    return list(map(_as_text, there)) == list(map(_as_text, plan.scenes))


class RelocatedPlan(NamedTuple):
    """A plan whose scenes have moved, as the run knows them."""

    plan: Plan
    notes: list[str]  # about scenes that are assumed to be unchanged
    accepted: dict[str, str]  # by scene_id, the version at the new place of those that were found unchanged there


def _relocate(plan: Plan, known: list[Scene], places: Places, accepted: dict[str, str]) -> RelocatedPlan:
    """The plan with its scenes as the run knows them. The versions are those that were `accepted` before."""
    at = {relocate(scene.uri, places): scene for scene in known}
    if plan.settings.mosaic:  # of which the first is no file
        at[plan.scenes[0].uri] = known[0]
    scenes = [_as_known(at.get(scene.uri, scene), scene, accepted) for scene in plan.scenes]
    moved = [(here, there) for here, there in zip(plan.scenes, scenes, strict=True) if here.uri != there.uri]
    unchanged = {there.scene_id: here.version for here, there in moved if there in known}
    doubtful = [
        there.scene_id
        for here, there in moved
        if there in known and here.version not in {there.version, accepted.get(there.scene_id)}
    ]
    if not plan.settings.mosaic:  # else their order is a setting
        order = {scene.scene_id: number for number, scene in enumerate(known)}
        scenes.sort(key=lambda scene: order.get(scene.scene_id, len(order)))
    more = f" and {len(doubtful) - 1:,} more" if len(doubtful) > 1 else ""
    why = "same size and header as before the move, another modification time: treated as unchanged"
    notes = [f"{doubtful[0]}{more}: {why} (seg verify --deep compares a sample)"] if doubtful else []
    plan = replace(plan, scenes=tuple(scenes), places=places if moved else ())
    return RelocatedPlan(plan, notes, {**accepted, **unchanged} if moved else {})


def _as_known(known: Scene, here: Scene, accepted: Mapping[str, str]) -> Scene:
    """A scene as the run knows it: by its old name, and, where it is the same file, of the old version.

    A version that is neither the old one nor the `accepted` one of the new place is that of a changed file.
    """
    renamed = replace(here, scene_id=known.scene_id, uri=known.uri)
    if not (is_remote(known.uri) and is_remote(here.uri)):
        expected = accepted.get(known.scene_id, here.version)
        if here.version in {expected, known.version}:
            renamed = replace(renamed, version=known.version)
    return known if _as_text(renamed) == _as_text(known) else renamed


def read_places(record: Mapping[str, Any], given: Places = ()) -> Places:
    """Where the scenes of a run are now: at the given places, or else where its record says."""
    noted = ((old, relocate(str(new), given)) for old, new in (record.get("relocated") or {}).items())
    return (*given, *noted)


def _new_record(plan: Plan, model_uri: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "code_version": code_version(),
        "model": {"hash": plan.model, "uri": model_uri},
        "settings": asdict(plan.settings),
        "plan": {"fingerprint": plan.fingerprint, **plan.counts},
        "created": now(),
        "finished": None,
    }


def now() -> str:
    """The present time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_record(out: str, record: dict[str, Any], store: Store = PLAIN) -> None:
    """Publish `run.json`."""
    store.publish(f"{out}/run.json", json.dumps(record, indent=2).encode())


def read_record(run: str) -> dict[str, Any]:
    """Read `run.json`. Raises SegError for a folder that is no run, CorruptFileError where the record can't be one."""
    content = read_bytes(f"{run}/run.json")
    if content is None:
        raise SegError(f"{run}: not a run: it holds no run.json" if exists(run) else f"{run}: no such run")
    try:
        record = json.loads(content)
    except ValueError as error:
        raise CorruptFileError(f"{run}: damaged: run.json is no JSON ({error}): {RESTORE_ADVICE}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise SegError(f"{run}: not a run: run.json does not say format {FORMAT!r}")
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise SegError(f"{run}: run.json is of version {version}, this aerial-seg reads {VERSION}: update aerial-seg")
    if version != VERSION:
        raise SegError(
            f"{run}: of version {version}, this aerial-seg reads {VERSION}: use the aerial-seg that "
            "made it, or segment into another folder"
        )
    for name, kind in FIELDS.items():
        value = _look_up(record, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and name != "exact"):  # True is an int to Python
            raise CorruptFileError(f"{run}: damaged: {name} in run.json is {json.dumps(value)[:60]}: {RESTORE_ADVICE}")
    if unknown := set(record["settings"]) - {field.name for field in fields(Settings)}:
        raise SegError(
            f"{run}: was made by a newer version: its setting {min(unknown)} is not known here: update aerial-seg"
        )
    if not isinstance(_look_up(record, "counts.failed"), int):
        record["finished"] = None  # so that they are counted again
    return record


RESTORE_ADVICE = "restore run.json from a copy, or segment into another folder"
# What commands rely on; those that may be None may also be absent.
FIELDS: dict[str, Any] = {
    "settings": dict,
    "settings.halo": int,
    "settings.threshold": int | float,
    "model.hash": str,
    "model.uri": str,
    "plan.fingerprint": str,
    **dict.fromkeys(("plan.scenes", "plan.parts", "plan.tiles", "plan.pixels"), int),
    "finished": str | None,
    "counts": dict | None,
    "seams": dict | None,
    "seams.pixels": int | None,
    "seams.differing": int | None,
    "seconds": int | float | None,
    "exact": bool | None,
    "relocated": dict | None,
}


def _look_up(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, whose name may be of several words; None where there is none."""
    value: Any = record
    for word in name.split("."):
        value = value.get(word) if isinstance(value, dict) else None
    return value


def read_plan(run: str, given: Places = ()) -> Plan:
    """The plan that a run was made with, from its own files. Scenes that have moved are at the given places, if any.

    Raises SegError where there is no run, CorruptFileError where its files don't belong together.
    """
    record = read_record(run)
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["settings"].items()}
    plan = Plan(
        scenes=tuple(read_scenes(run)),
        settings=Settings(**stored),
        model=record["model"]["hash"],
        places=read_places(record, given),
    )
    if plan.fingerprint != record["plan"]["fingerprint"] or any(
        record["plan"].get(name, value) != value for name, value in plan.counts.items()
    ):
        raise CorruptFileError(
            f"{run}: damaged: run.json or scenes/scenes.parquet was changed after the run was planned: "
            f"the seg segment command of the run rewrites the scenes, or says what differs"
        )
    return plan


def num_missing(run: str, plan: Plan) -> int:
    """How many of a run's planned parts are not published yet: what is asked of it says nothing of their tiles."""
    there = set(published_parts(run))
    return sum(part_path(run, part.key) not in there for part in plan.parts())


def _refuse_differences(out: str, record: dict[str, Any], plan: Plan) -> None:
    here = json.loads(json.dumps(asdict(plan.settings)))
    # A setting that is newer than the run had its default then.
    there = {field.name: field.default for field in fields(Settings)} | record["settings"]
    differing = [f"{name} {there[name]} there, {here[name]} now" for name in here if there[name] != here[name]]
    if record["model"]["hash"] != plan.model:
        differing.append(f"model {record['model']['hash'][:8]} there, {plan.model[:8]} now")
    if not differing and record["plan"]["fingerprint"] != plan.fingerprint:
        differing += _scene_differences(_known_scenes(out), plan.scenes)
    if differing:
        raise SegError(f"{out}: is a run with other settings ({'; '.join(differing)}): choose another folder")


def _known_scenes(out: str) -> list[Scene]:
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


def _as_text(scene: Scene) -> str:
    # Not as it is, because a NaN, which a nodata value may be, differs from itself.
    return repr(scene.to_plain())


def parts_to_do(run: str, plan: Plan) -> list[Part]:
    """The planned parts that are not published, damaged, hold failed tiles, or are of an older state of a file."""
    planned = {part_path(run, part.key) for part in plan.parts()}
    there = sorted(planned.intersection(published_parts(run)))  # what else lies there is for verify to name
    read = read_states(there)
    return [part for part in plan.parts() if read.get(part_path(run, part.key)) != (True, part.version)]
