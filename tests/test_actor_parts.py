"""The parts of an actor, each alone: batches, the publishing of parts, the guard against windows that end a process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from aerial_seg.resources import ExecutionOptions
from aerial_seg.segmenting.batches import BatchSegmenter
from aerial_seg.segmenting.guard import CrashGuard
from aerial_seg.segmenting.publishing import Publisher, UnfinishedPart
from aerial_seg.segmenting.reading import LoadedWindow, UnreadableWindow
from aerial_seg.segmenting.stopwatch import Stopwatch
from aerial_seg.segmenting.writers import WindowRows
from seg_core.grid import Window, split
from seg_core.run.attempts import Attempt, claim_interrupted, mark_started
from seg_core.run.check import Expected
from seg_core.run.fence import PLAIN
from seg_core.run.plan import Part, Settings, WindowTask
from seg_core.run.rows import Failure, Row
from seg_core.run.sizing import chip_memory, gpu_share

SETTINGS = Settings(tile_size=64, part=128, halo=24, threshold=0.5)
EXPECTED = Expected(SETTINGS.tile_size, SETTINGS.part, "model", SETTINGS.keep_probability)
NO_SCENE: Any = Mock(uri="a.tif", crs=None, scene_id="a.tif")
SIDE = 128


def part_of(key: str, num_windows: int) -> Part:
    return Part(key, NO_SCENE, Window(0, 0, SIDE, SIDE * num_windows))


@pytest.fixture
def writers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def guard_of(tmp_path: Path) -> CrashGuard:
    return CrashGuard(str(tmp_path), "session", SETTINGS.tile_size, PLAIN)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_part_is_finished_with_its_last_window_in_whatever_order_they_come(
    tmp_path: Path, writers: ThreadPoolExecutor, on_gpu: bool
) -> None:
    publisher = Publisher("run", EXPECTED, writers, on_gpu, guard_of(tmp_path), Stopwatch(), PLAIN)
    parts = {"a": part_of("a", 3), "b": part_of("b", 2)}
    order, taken = ["a0", "b0", "a1", "b1", "a2"], []

    def windows() -> Iterator[WindowRows]:
        for name in order:
            taken.append(name)
            yield WindowRows(parts[name[0]], partial(iter, [{"name": name}]))

    found = []
    for part, makers in publisher.finished_parts(windows(), SIDE):
        found.append((part.key, [row["name"] for make in makers for row in make()], len(taken)))
    assert found == [("b", ["b0", "b1"], 4), ("a", ["a0", "a1", "a2"], 5)]


def test_of_a_large_part_at_most_so_many_windows_wait_without_rows(writers: ThreadPoolExecutor) -> None:
    clock, made = Stopwatch(), []

    def make(number: int) -> list[Row]:
        made.append(number)
        return [{"number": number}]

    part = UnfinishedPart(10, 3, writers, clock)
    finished = [part.add(partial(make, number)) for number in range(10)]
    assert finished == [False] * 9 + [True]
    assert (len(part.waiting), len(part.making)) == (3, 7)
    assert [row["number"] for window in part.windows() for row in window()] == list(range(10))
    assert sorted(made) == list(range(10))
    assert clock.take().writing > 0


def loaded(window: Window) -> LoadedWindow:
    return LoadedWindow(WindowTask(part_of("a", 1), window), Mock(decoded=True))


def batches_of(batch: int) -> BatchSegmenter:
    return BatchSegmenter(SETTINGS, Mock(), Mock(), Mock(), SIDE, ExecutionOptions(batch=batch))


def test_batches_are_of_windows_of_one_size_and_those_that_cant_be_read_come_in_between() -> None:
    large, small = Window(0, 0, 128, 128), Window(0, 128, 128, 64)
    unreadable = UnreadableWindow(WindowTask(part_of("a", 1), large), Failure("ReadError", "no"))
    windows = [loaded(large), loaded(large), loaded(large), loaded(small), unreadable, loaded(small), loaded(small)]
    found = list(batches_of(2).batches(windows))
    assert found == [windows[:2], windows[2:3], windows[3:4], unreadable, windows[5:]]


def test_a_batch_that_is_halved_halves_those_that_follow() -> None:
    segmenter = batches_of(4)
    windows = [loaded(Window(0, 0, 128, 128)) for _ in range(8)]
    batches = segmenter.batches(windows)
    first = next(batches)
    segmenter.batch = 2
    assert [len(batch) for batch in (first, *batches)] == [4, 2, 2]


def test_the_guard_leaves_out_a_window_that_ended_two_processes_and_names_the_others_first(tmp_path: Path) -> None:
    part, guard, seen = part_of("a", 2), guard_of(tmp_path), []
    (tmp_path / "attempts").mkdir()
    mark_started(str(tmp_path), "a", "session")
    first, second = split(part.window, SIDE)
    attempt = Attempt("session", None, {f"{first.row_off} {first.col_off}": 2})

    def segment(_: Part, window: Window) -> list[Row]:
        known = claim_interrupted(str(tmp_path), ["a"], "session")["a"]  # as if this process had died here
        seen.append((window, known.deaths))
        return [{"status": "done"}]

    found = list(guard.segment_each([part], SIDE, {"a": attempt}, segment))
    rows = [[row["status"] for row in window.make()] for window in found]
    assert rows == [["failed"] * 4, ["done"]]
    assert [window for window, _ in seen] == [second]
    assert seen[0][1][f"{second.row_off} {second.col_off}"] == 1
    assert set(guard.given_up) == {"a"}
    guard.end_task()
    assert claim_interrupted(str(tmp_path), ["a"], "session") == {}
    assert guard.given_up == {}


@pytest.mark.parametrize(
    ("host", "gpu", "gpus", "expected"),
    [
        (1000, None, 0.0, 1000),  # on a CPU
        (1000, 4000, 1.0, 1000),
        (1000, 800, 1.0, 400),  # the half of a GPU that forward passes leave
        (1000, 800, 0.5, 200),
        (1000, 800, 2.0, 400),  # an actor computes on one of them
    ],
)
def test_chips_may_take_what_the_host_and_half_of_a_gpu_have(
    host: int, gpu: int | None, gpus: float, expected: int
) -> None:
    assert chip_memory(host, gpu_share(gpu, gpus)) == expected
