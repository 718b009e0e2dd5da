"""Resume a run whose scenes have moved: a plan of where they are now is given the names by which the run knows them."""

import posixpath
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.scene import Scene
from seg_core.run.lease import acquire_lease
from seg_core.run.places import Places, relocate, sidecars_at
from seg_core.run.plan import Plan
from seg_core.run.record import RunRecord, read_record, write_record
from seg_core.run.resume import find_run, is_same_scene, known_scenes, with_choices_of_run
from seg_core.run.tables import read_scenes, scenes_path, write_scenes
from seg_core.storage.files import is_remote, make_folder, stat


class RelocatedPlan(NamedTuple):
    """A plan whose scenes have moved, as the run knows them."""

    plan: Plan
    notes: list[str]  # about scenes that are assumed to be unchanged
    accepted: dict[str, str]  # by scene_id, the version at the new place of those that were found unchanged there


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
    places, accepted = record.places(given), record.relocated_versions or {}
    moved = _relocate(plan, known_scenes(out), record, given) if places else RelocatedPlan(plan, [], accepted)
    begun = with_choices_of_run(out, moved.plan)
    find_run(out, begun)
    if record.places() != moved.plan.places or moved.accepted != accepted:
        _record_places(out, moved)
    return moved.plan, [*moved.notes, *_restore_scenes(out, record, begun)]


def _record_places(out: str, moved: RelocatedPlan) -> None:
    """Note in the record of a run where its scenes are now."""
    with acquire_lease(out) as lease:
        record = read_record(out)
        record.relocated = {}
        for old, new in moved.plan.places:
            record.relocated.setdefault(old, new)  # of two places the first applies
        record.relocated_versions = moved.accepted
        write_record(out, record, lease)


def _restore_scenes(out: str, record: RunRecord, plan: Plan) -> list[str]:
    """Rewrite a scenes table that is damaged or missing, if the plan is that of the run. Returns messages."""
    if record.plan.fingerprint != plan.fingerprint or _has_scenes(out, plan):
        return []
    with acquire_lease(out) as lease:
        make_folder(posixpath.dirname(scenes_path(out)))
        write_scenes(out, plan.scenes, lease)
    return [f"{scenes_path(out)}: was damaged or missing: rewritten from the plan"]


def _has_scenes(out: str, plan: Plan) -> bool:
    """Whether the scenes table of the run is that of the plan."""
    try:
        there = read_scenes(out)
    except CorruptFileError:
        return False
    return len(there) == len(plan.scenes) and all(map(is_same_scene, there, plan.scenes))


def _relocate(plan: Plan, known: list[Scene], record: RunRecord, given: Places) -> RelocatedPlan:
    """The plan with its scenes as the run knows them.

    A version that was accepted before counts where the scene has not moved again.
    """
    places = record.places(given)
    at = {relocate(scene.uri, places): scene for scene in known}
    before = record.relocated_versions or {}
    accepted = {
        scene.scene_id: before[scene.scene_id]
        for uri, scene in at.items()
        if scene.scene_id in before and uri == relocate(scene.uri, record.places())
    }
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
    plan = replace(plan, scenes=tuple(scenes), places=places if moved else ())
    return RelocatedPlan(plan, _describe_doubtful(doubtful), {**accepted, **unchanged} if moved else {})


def _describe_doubtful(scene_ids: list[str]) -> list[str]:
    if not scene_ids:
        return []
    more = f" and {len(scene_ids) - 1:,} more" if len(scene_ids) > 1 else ""
    why = "same size and header as before the move, another modification time: treated as unchanged"
    return [f"{scene_ids[0]}{more}: {why} (seg verify --deep compares a sample)"]


def _as_known(known: Scene, here: Scene, accepted: Mapping[str, str]) -> Scene:
    """A scene as the run knows it: by its old name, and, where it is the same file, of the old version.

    A version that is neither the old one nor the `accepted` one of the new place is that of a changed file.
    """
    # Those of a file on disk are not listed.
    sidecars = sidecars_at(known.uri, here.sidecars) if is_remote(here.uri) else known.sidecars
    renamed = replace(here, scene_id=known.scene_id, uri=known.uri, sidecars=sidecars)
    if not (is_remote(known.uri) and is_remote(here.uri)):
        expected = accepted.get(known.scene_id, here.version)
        if here.version in {expected, known.version}:
            renamed = replace(renamed, version=known.version)
    return known if is_same_scene(renamed, known) else renamed
