"""The plan of a run, from the run's own files."""

from seg_core.errors import CorruptFileError
from seg_core.run.parts import find_parts
from seg_core.run.places import Places
from seg_core.run.plan import Plan
from seg_core.run.record import PlanFigures, read_record
from seg_core.run.tables import read_scenes


def read_plan(run: str, given: Places = ()) -> Plan:
    """The plan that a run was made with, from its own files. Scenes that have moved are at the given places, if any.

    Raises SegError where there is no run, CorruptFileError where its files don't belong together.
    """
    record = read_record(run)
    plan = Plan(
        scenes=tuple(read_scenes(run)),
        settings=record.settings,
        model=record.model.hash,
        class_name=record.class_name or "",
        places=record.places(given),
    )
    if record.plan != PlanFigures.of(plan):
        raise CorruptFileError(
            f"{run}: damaged: run.json or scenes/scenes.parquet was changed after the run was planned: "
            f"the seg segment command of the run rewrites the scenes, or says what differs"
        )
    return plan


def num_missing(run: str, plan: Plan) -> int:
    """How many of a run's planned parts are not published yet: what is asked of it says nothing of their tiles."""
    there = find_parts(run)
    return sum(part.key not in there for part in plan.parts())
