"""How an actor goes about its parts: how many threads read, what is passed on together, what is said to be at work."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBundle, MakeScene
from runs import read_part

from aerial_seg.resources import ActorResources, ExecutionOptions
from aerial_seg.segment import share_out
from aerial_seg.segmenting import actor, device, publishing, reading, seams
from aerial_seg.segmenting.actor import PartSegmenter
from aerial_seg.segmenting.receipts import Receipt
from aerial_seg.segmenting.writers import make_writers, publish_part
from seg_core.imagery.region import read_region
from seg_core.inference.windows import infer_window
from seg_core.model.bundle import read_bundle
from seg_core.run.attempts import Attempt, attempts_folder, claim_interrupted, mark_started
from seg_core.run.check import Expected
from seg_core.run.plan import Part, Plan, Settings, WindowTask, make_plan, pack_parts
from seg_core.run.resume import open_run
from seg_core.run.rows import Failure, failed_rows
from seg_core.run.tables import part_path

SETTINGS = Settings(tile_size=64, part=128, halo=24, threshold=0.5)
# With as much memory as lets eight squares wait.
RESOURCES = ActorResources(min_actors=1, max_actors=1, num_cpus=1, num_gpus=0, threads=2, readers=2, memory=2**31)


@pytest.fixture
def made(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> tuple[Plan, str, str]:
    """A plan of 36 parts of one window each, its model, and its run."""
    model, run = make_bundle(), str(tmp_path / "run")
    plan, _ = make_plan(read_region([make_scene("region/a.tif", 768, 768)])[0], read_bundle(model), SETTINGS)
    open_run(run, plan, model)
    return plan, model, run


def start(made: tuple[Plan, str, str], **further: Any) -> PartSegmenter:
    _, model, run = made
    return PartSegmenter(model, run, SETTINGS, 128, RESOURCES, ExecutionOptions(), "s", **further)


@pytest.mark.parametrize(("waits", "infers"), [(0.0, 1.0), (0.1, 0.001)])
def test_more_threads_read_where_the_model_waits_for_a_store(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch, waits: float, infers: float
) -> None:
    read, at_once, most = reading.stage_windows, Counter[str](), []

    def slow(block: Any, settings: Any, segmenter: Any, turn: Any, *_: Any) -> Any:
        with turn():
            at_once["reading"] += 1
            most.append(at_once["reading"])
            time.sleep(waits)
            at_once["reading"] -= 1
        return read(block, settings, segmenter)

    monkeypatch.setattr(reading, "stage_windows", slow)
    segmenter = start(made)
    add = segmenter.clock.add

    def count(stage: str, seconds: float, windows: int = 0) -> None:
        add(stage, windows * infers if stage == "model" else seconds, windows)

    monkeypatch.setattr(segmenter.clock, "add", count)
    for expected in (4, 8) if waits else (2, 2):  # at most twice as many in one task
        receipts = list(segmenter.segment_parts(list(made[0].parts())))
        assert max(most) <= receipts[-1].readers == expected
        assert [segmenter.reader.turns.acquire(blocking=False) for _ in range(expected + 1)] == [True] * expected + [
            False
        ]
        segmenter.reader.turns.release(expected)


def test_receipts_are_passed_on_one_by_one_and_together_beside_a_gpu(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = list(made[0].parts())
    segmenter = start(made)

    def lengths() -> list[int]:
        found = [each["receipts"][0] for each in segmenter({"parts": [pack_parts(parts[:5]), pack_parts(parts[5:11])]})]
        assert sum(receipt["pixels"] for together in found for receipt in together) == 11 * 128 * 128
        return [len(together) for together in found]

    assert lengths() == [1] * 11
    receipts = [Receipt(actor="a", started=0.0, ended=1.0, pixels=128 * 128)] * 11
    monkeypatch.setattr(segmenter, "segment_parts", lambda parts: iter(receipts[: len(parts)]))
    monkeypatch.setattr(segmenter.segmenter, "on_gpu", True)
    assert lengths() == [1, 8, 2]


def test_a_part_is_said_to_be_at_work_before_it_is_read_and_not_long_before(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _, run = made
    read, seen, lock = reading.stage_windows, [], threading.Lock()

    def look(block: Any, *rest: Any) -> Any:
        with lock:
            begun = {name.removesuffix(".json") for name in os.listdir(attempts_folder(run))}
            seen.append((block.part.key in begun, len(begun)))
        return read(block, *rest)

    monkeypatch.setattr(reading, "stage_windows", look)
    list(start(made).segment_parts(list(plan.parts())))
    assert all(begun for begun, _ in seen)
    assert max(number for _, number in seen) < 36 / 2
    assert os.listdir(attempts_folder(run)) == []


def test_what_was_read_while_the_network_was_compiled_does_not_say_how_many_must_read(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = start(made)
    begin, results = device.start_windows, Counter[str]()

    def slow(chips: Any, *rest: Any) -> Any:
        """The third batch is compiled, and all are under way for a while; what is read stands still."""
        results["begun"] += 1
        pending = begin(chips, *rest)
        if results["begun"] <= 3:
            segmenter.clock.add("reading", 1e4, 1)
        return replace(pending, compiled=results["begun"] == 3, seconds=1.0)

    monkeypatch.setattr(device, "start_windows", slow)
    monkeypatch.setattr(segmenter.segmenter, "in_flight", 4)
    for stage in ("reading", "reading_cpu"):  # so that a lap is only a question of the model
        segmenter.clock.add(stage, 0.0, 10)
    monkeypatch.setattr(reading, "WINDOWS_TO_COUNT_READERS", 1)
    list(segmenter.segment_parts(list(made[0].parts())))
    assert segmenter.reader.num_threads == 2


def test_a_border_is_looked_at_beside_a_gpu_that_goes_on(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look, later = seams.compare_across_border, threading.Event()

    def wait(*given: Any) -> tuple[int, int]:
        assert later.wait(60)
        return look(*given)

    monkeypatch.setattr(seams, "compare_across_border", wait)
    part = next(made[0].parts())
    segmenter = start(made, watched=frozenset([part.key]))
    result = infer_window(part, part.window, SETTINGS, segmenter.segmenter)
    monkeypatch.setattr(segmenter.segmenter, "on_gpu", True)
    segmenter.seams.check(WindowTask(part, part.window), result)
    monkeypatch.undo()  # there is none
    assert not segmenter.seams.running[part.key].done()
    later.set()
    assert segmenter.seams.take(part) == (32 * 64, 0)  # of one tile's side


def test_what_was_found_at_a_border_is_told(made: tuple[Plan, str, str]) -> None:
    part = next(made[0].parts())
    segmenter = start(made, watched=frozenset([part.key]))
    (receipt,) = segmenter.segment_parts([part])
    assert (receipt.seam_pixels, receipt.seam_differing) == (32 * 64, 0)
    assert segmenter.seams.running == {}


@pytest.mark.parametrize("side", [128, 512])
def test_processes_publish_what_threads_do(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    plan, model, run = made
    settings = replace(SETTINGS, part=side, keep_probability=True)
    parts = list(replace(plan, settings=settings).parts())
    segmenter = PartSegmenter(model, run, settings, 128, RESOURCES, ExecutionOptions(), "s")
    threads = list(segmenter.segment_parts(parts))
    expected = [Path(part_path(run, part.key)).read_bytes() for part in parts]
    for part in parts:
        os.remove(part_path(run, part.key))
    with make_writers(2, processes=True) as writers:
        monkeypatch.setattr(segmenter.publisher, "writers", writers)
        processes = list(segmenter.segment_parts(parts))
    assert [Path(part_path(run, part.key)).read_bytes() for part in parts] == expected
    assert os.listdir(attempts_folder(run)) == []
    found, expected = (
        [(receipt.windows, receipt.pixels, receipt.failed, receipt.exact) for receipt in receipts]
        for receipts in (processes, threads)
    )
    assert found == expected
    assert min(receipt.times.writing for receipt in processes) > 0


def test_a_process_publishes_failures_and_keeps_what_is_known_of_a_window_that_was_given_up(
    made: tuple[Plan, str, str],
) -> None:
    plan, _, run = made
    part = next(plan.parts())
    known, expected = Attempt("s", "0 0", {"0 0": 2}), Expected(64, 256, "model", keep_probability=False)
    failed = partial(failed_rows, part.scene, part.window, 64, Failure("Crash", "it ended", 2))
    mark_started(run, part.key, "s")
    with make_writers(1, processes=True) as writers:
        found = writers.submit(publish_part, run, part, [failed], expected, known).result()
        wrong = writers.submit(publish_part, f"{run}/run.json", part, [failed], expected, None)
        assert isinstance(wrong.exception(), OSError)
    assert found.failed == 4
    assert {row["error"] for row in read_part(part_path(run, part.key))} == {"it ended"}
    assert claim_interrupted(run, [part.key], "s")[part.key].is_deadly("0 0")


def test_an_actor_ends_with_a_writer_that_is_killed(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = start(made)
    writers = make_writers(1, processes=True)
    monkeypatch.setattr(segmenter.publisher, "writers", writers)
    monkeypatch.setattr(actor.os, "_exit", sys.exit)
    os.kill(writers.submit(os.getpid).result(), signal.SIGKILL)
    with pytest.raises(SystemExit):
        list(segmenter({"parts": [pack_parts(made[0].parts())]}))


def test_of_a_large_part_rows_are_made_while_it_is_at_work(
    made: tuple[Plan, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model, run = made
    settings = replace(SETTINGS, part=512)  # of 16 windows
    part = next(replace(plan, settings=settings).parts())
    segmenter = PartSegmenter(model, run, settings, 128, RESOURCES, ExecutionOptions(), "s")
    at_work, kept = Counter[str](), []
    make, start_one = publishing.make_rows, segmenter.batches.start

    def note(*given: Any) -> Any:
        at_work["made"] += 1
        return make(*given)

    def count(*given: Any) -> Any:
        kept.append(at_work["begun"] - at_work["made"])
        at_work["begun"] += 1
        return start_one(*given)

    monkeypatch.setattr(publishing, "make_rows", note)
    monkeypatch.setattr(segmenter.batches, "start", count)
    (receipt,) = segmenter.segment_parts([part])
    assert (receipt.windows, len(kept)) == (16, 16)
    assert max(kept) <= 4
    assert len(read_part(part_path(run, part.key))) == 64


def test_writing_processes_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from aerial_seg.segmenting.writers import make_writers\n"
        "if __name__ == '__main__':\n"
        "    writers = make_writers(1, processes=True)\n"
        "    print(writers.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        writer = int(parent.stdout.readline())
        assert Path(f"/proc/{writer}").exists()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60
        while _runs(writer) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(writer)


def _runs(pid: int) -> bool:
    """Whether a process is there, and not just waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("actors", "pixels_a_task", "expected"),
    [
        (1, 2**40, [36]),  # a single one has nothing to share
        (2, 2**40, [9, 9, 9, 9]),
        (4, 2**40, [4, 5, 4, 5, 4, 5, 4, 5]),
        (1, 5 * 128 * 128, [5, 5, 5, 5, 5, 5, 6]),
        (100, 1, [1] * 36),
    ],
)
def test_parts_are_shared_out_evenly(
    made: tuple[Plan, str, str], actors: int, pixels_a_task: int, expected: list[int]
) -> None:
    parts = list(made[0].parts())
    shares = share_out(parts, actors, pixels_a_task)
    assert [len(share) for share in shares] == expected
    assert [part for share in shares for part in share] == parts


def test_no_parts_are_no_shares() -> None:
    nothing: list[Part] = []
    assert share_out(nothing, 2, 1) == []
