"""Windows that are read in Ray tasks have the rows of those that an actor reads by itself."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import ray
from conftest import MakeBundle, MakeScene
from parts import EXECUTION, RESOURCES, SETTINGS, WINDOW, Made, open_plan, work

from aerial_seg.resources import ExecutionOptions, size_actors
from aerial_seg.segmenting import reading, reading_tasks
from aerial_seg.segmenting.actor import PartSegmenter
from aerial_seg.segmenting.reading_tasks import MAX_ATTEMPTS, TaskReader, read_in_task
from seg_core.errors import SegError
from seg_core.imagery.jpeg_library import find_decoders
from seg_core.inference import windows
from seg_core.run.plan import Settings

pytestmark = pytest.mark.usefixtures("ray_cluster")
IN_TASKS = replace(RESOURCES, reading_tasks=2)


@pytest.fixture
def made(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> Made:
    """A plan of a scene of two parts of four windows each, with a corner without data, and its run, which is open."""
    pixels = np.random.default_rng(0).integers(1, 250, (3, 256, 500)).astype(np.uint8)
    pixels[:, :70, :90] = 0
    return open_plan(make_scene("region/a.tif", pixels=pixels, nodata=0), make_bundle(), str(tmp_path / "run"))


@pytest.fixture
def no_reading_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading pixels in this process is an error."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("pixels are read in this process")

    monkeypatch.setattr(windows, "read_image", refuse)
    monkeypatch.setattr("seg_core.imagery.raster.read_image", refuse)


def test_rows_are_those_of_an_actor_that_reads_by_itself(made: Made, request: pytest.FixtureRequest) -> None:
    whole = work(made)
    assert {row["status"] for row in whole} == {"done"}
    assert any(0 < row["valid_px"] < row["height"] * row["width"] for row in whole)
    request.getfixturevalue("no_reading_here")
    assert work(made, "tasks", resources=IN_TASKS) == whole


def test_a_chip_says_what_decoded_it(made: Made, no_reading_here: None) -> None:  # noqa: ARG001
    reader, part = TaskReader(), next(made[0].parts())
    pixels, valid = reader(part, part.window, made[0].settings)
    assert reader.decoders == find_decoders()
    assert pixels.flags.writeable
    assert valid.flags.writeable
    assert not valid[0, 0]


def test_the_number_of_tasks_stays_as_it_was_asked_for(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reading, "WINDOWS_TO_COUNT_READERS", 1)
    monkeypatch.setattr(reading, "enough_readers", lambda *_: asked.append(1) or 64)
    for resources in (RESOURCES, IN_TASKS):
        actor = PartSegmenter(made[1], made[2], SETTINGS, WINDOW, resources, EXECUTION, "s")
        (*_, last) = actor.segment_parts(list(made[0].parts()))
        assert asked
        assert (last.readers == 2) == (resources is IN_TASKS)


def test_what_cannot_be_read_fails_as_it_does_without_tasks(made: Made) -> None:
    scene = Path(made[0].scenes[0].uri)
    content = scene.read_bytes()
    scene.write_bytes(content[: len(content) // 2])
    broken = work(made)
    assert {row["status"] for row in broken} == {"done", "failed"}
    assert work(made, "tasks", resources=IN_TASKS) == broken


def test_a_window_that_ends_the_processes_that_read_it_is_given_up(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, log = work(made), tmp_path / "ended"

    def deadly(part: Any, chip: Any, settings: Settings) -> Any:
        if chip.col_off <= 128 < chip.right and chip.bottom > 200:
            with log.open("a") as file:
                file.write(f"{chip.shape}\n")
            os._exit(1)
        return ray.get(read_in_task.remote(part, chip, settings))

    task = ray.remote(num_cpus=1, max_retries=1)(deadly)
    monkeypatch.setattr(reading_tasks, "read_in_task", task)
    rows = work(made, "tasks", resources=IN_TASKS)
    failed = [row for row in rows if row["status"] == "failed"]
    assert {(row["error_class"], row["attempts"]) for row in failed} == {("Crash", MAX_ATTEMPTS)}
    assert {row["error"] for row in failed} == {f"{made[0].scenes[0].uri}: reading this window crashed the process"}
    assert [now if now["status"] == "done" else then for then, now in zip(whole, rows, strict=True)] == whole
    assert 0 < len(failed) < len(rows)
    assert len(log.read_text().splitlines()) == 2 * 2  # each of two windows twice


def test_readers_need_a_cpu_beside_the_processes_that_segment() -> None:
    execution = ExecutionOptions(device="cpu", actors=(1, 1), readers=1)
    assert size_actors(execution).reading_tasks == 1
    with pytest.raises(SegError, match=r"^--readers 1: the processes that segment take every CPU: leave it out$"):
        size_actors(replace(execution, actors=(2, 2)))
