"""Parts that are segmented in this process, as an actor does it."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from runs import read_part

from aerial_seg.resources import ActorResources, ExecutionOptions
from aerial_seg.segment import choose_watched
from aerial_seg.segmenting.actor import PartSegmenter
from aerial_seg.segmenting.receipts import Receipt
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import Part, Plan, Settings, make_plan
from seg_core.run.resume import open_run
from seg_core.run.tables import part_path

SETTINGS = Settings(tile_size=64, part=256, halo=24, threshold=0.5)
WINDOW = 128
RESOURCES = ActorResources(min_actors=1, max_actors=1, num_cpus=1, num_gpus=0, threads=2, readers=2, memory=2**31)
EXECUTION = ExecutionOptions(device="cpu")
Made = tuple[Plan, str, str]
Rows = list[dict[str, Any]]


def open_plan(path: str, model: str, run: str) -> Made:
    """Plan a scene, and open its run."""
    plan, _ = make_plan(read_region([path])[0], read_bundle(model), SETTINGS)
    open_run(run, plan, model)
    return plan, model, run


def work(
    made: Made,
    session: str = "s",
    execution: ExecutionOptions = EXECUTION,
    parts: Sequence[Part] | None = None,
    resources: ActorResources = RESOURCES,
) -> Rows:
    """Segment all parts in this process; the rows of the run."""
    plan, model, run = made
    actor = PartSegmenter(model, run, SETTINGS, WINDOW, resources, execution, session)
    list(actor.segment_parts(parts or list(plan.parts())))
    return rows_of(made)


def rows_of(made: Made) -> Rows:
    """The rows of a run in the order of its plan."""
    plan, _, run = made
    return [row for part in plan.parts() for row in read_part(part_path(run, part.key))]


def segment_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Have `seg segment` start no actor, which takes Ray seconds, but segment as one does it in this process."""

    def pipe(todo: Sequence[Part], model: str, out: str, *options: Any) -> Iterator[Receipt]:
        settings, window, _, execution, *store = options
        session, watched = secrets.token_hex(), choose_watched(todo)
        actor = PartSegmenter(model, out, settings, window, RESOURCES, execution, session, watched, *store)
        return actor.segment_parts(todo)

    patch.setattr("aerial_seg.segment.run_pipe", pipe)
    patch.setattr("aerial_seg.segment.ray_session", lambda *_, **__: nullcontext())
    patch.setattr("aerial_seg.segment.size_actors", lambda *_: RESOURCES)
