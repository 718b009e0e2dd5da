"""Failures are rows: of windows that can't be read, that are too much for the device, or that kill their process."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import MakeBundle, MakeScene
from forks import exit_code
from parts import EXECUTION, RESOURCES, SETTINGS, WINDOW, Made, Rows, open_plan, rows_of, work
from runs import published_parts

from aerial_seg.resources import ExecutionOptions
from aerial_seg.segmenting import reading, writers
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.errors import StoreUnavailableError
from seg_core.grid import Window
from seg_core.imagery import raster
from seg_core.model.device_chips import DeviceChip
from seg_core.model.segmenter import Pending, Segmenter
from seg_core.model.window_results import WindowResult, WindowSpec
from seg_core.run import attempts
from seg_core.run.plan import ReadBlock
from seg_core.run.verify import verify
from seg_core.storage.files import published


@pytest.fixture
def made(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> Made:
    """A plan of a scene of two parts of four windows each, its model, and its run, which is open."""
    return open_plan(make_scene("region/a.tif", 256, 500), make_bundle(), str(tmp_path / "run"))


@pytest.fixture
def wide(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> Made:
    """A run of six parts, each a square of four windows."""
    return open_plan(make_scene("region/a.tif", 256, 1536), make_bundle(), str(tmp_path / "run"))


def undisturbed(made: Made) -> Rows:
    rows = work(made)
    assert {row["status"] for row in rows} == {"done"}
    return rows


def assert_the_rest_is_done(rows: Rows, whole: Rows) -> None:
    """All rows but the failed ones are what they would be."""
    assert [now if now["status"] == "done" else then for then, now in zip(whole, rows, strict=True)] == whole


def failed_places(rows: Rows) -> set[tuple[int, int]]:
    return {(row["row_off"], row["col_off"]) for row in rows if row["status"] == "failed"}


def test_whatever_a_reader_raises_becomes_rows_and_the_other_windows_go_on(
    wide: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read, asked = undisturbed(wide), raster.read_chip, []

    def broken(scene: Any, at: Window, scale: Any, **named: Any) -> Any:
        asked.append(at)
        if at.col_off == 512 - 24 and at.bottom > 300:  # chips measure 204 px
            raise MemoryError("array is too big")
        return read(scene, at, scale, **named)

    monkeypatch.setattr(raster, "read_chip", broken)
    rows = work(wide)
    assert failed_places(rows) == {(128, 512), (128, 576), (192, 512), (192, 576)}
    assert len(asked) == 6 + 4  # those of the broken square are read alone then
    failed = [row for row in rows if row["status"] == "failed"]
    assert {(row["error_class"], row["attempts"]) for row in failed} == {("MemoryError", 1)}
    assert all("a.tif: array is too big" in row["error"] for row in failed)
    assert_the_rest_is_done(rows, whole)
    assert verify(wide[2]).ok
    monkeypatch.undo()
    assert work(wide) == whole


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_store_that_does_not_answer_is_asked_for_each_window_where_that_may_be_in_another_file(
    wide: Made, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    whole, read, asked = undisturbed(wide), reading.stage_windows, []
    parts = [replace(part, sources=(part.scene,) * pieces) for part in wide[0].parts()]

    def silent(block: ReadBlock, *rest: Any) -> Any:
        asked.append(block)
        if any(window.origin == (128, 512) for window in block.windows):
            raise StoreUnavailableError("a.tif: no answer")
        return read(block, *rest)

    monkeypatch.setattr(reading, "stage_windows", silent)
    rows = work(wide, parts=parts)
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["error_class"] for row in failed} == {"StoreUnavailableError"}
    assert (len(failed), len(asked)) == ((4, 6 + 4) if pieces else (16, 6))
    assert_the_rest_is_done(rows, whole)


def test_a_window_that_is_too_much_for_the_device_is_halved(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, start, seen = undisturbed(made), Segmenter.start, set()

    def small(self: Segmenter, chips: Sequence[DeviceChip], cut: WindowSpec, may_compile: bool) -> Pending:
        seen.add(cut.width)
        if cut.width > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return start(self, chips, cut, may_compile)

    monkeypatch.setattr(Segmenter, "start", small)
    assert work(made) == whole
    assert seen == {128, 64, 116, 52}


def test_a_window_that_fits_once_others_have_left_the_device_is_not_halved(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, start, seen = undisturbed(made), Segmenter.start, []

    def crowded(self: Segmenter, chips: Sequence[DeviceChip], cut: WindowSpec, may_compile: bool) -> Pending:
        seen.append(cut.width)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return start(self, chips, cut, may_compile)

    monkeypatch.setattr(Segmenter, "start", crowded)
    assert work(made) == whole
    assert sorted(seen) == sorted([128] * 7 + [116] * 2)


def test_batches_of_fewer_windows_than_others_are_not_compiled_for_at_once(
    wide: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, start, seen = undisturbed(wide), Segmenter.start, []

    def note(self: Segmenter, chips: Sequence[DeviceChip], cut: WindowSpec, may_compile: bool) -> Pending:
        seen.append((len(chips), may_compile))
        return start(self, chips, cut, may_compile)

    monkeypatch.setattr(Segmenter, "start", note)
    assert work(wide, execution=replace(EXECUTION, batch=5, compiling="yes")) == whole  # what is exact is not compiled
    assert seen == [(5, True)] * 4 + [(4, False)]
    seen.clear()
    work(wide, execution=replace(EXECUTION, batch=5))
    assert seen == [(5, True)] * 4 + [(4, True)]


def test_a_tile_that_is_too_much_for_the_device_is_a_failure(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Segmenter, "start", full)
    assert {(row["status"], row["error_class"]) for row in work(made)} == {("failed", "OutOfMemoryError")}


@pytest.mark.parametrize("fails", ["when begun", "when waited for"])
def test_windows_that_are_too_many_for_the_device_are_taken_by_half_as_many(
    made: Made, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    whole, start, seen = undisturbed(made), Segmenter.start, []

    def small(self: Segmenter, chips: Sequence[DeviceChip], cut: WindowSpec, may_compile: bool) -> Pending:
        seen.append(len(chips))
        pending = start(self, chips, cut, may_compile)
        if len(chips) > 1 and fails == "when begun":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return replace(pending, outputs=()) if len(chips) > 1 else pending

    def broken(self: Pending) -> list[WindowResult]:
        if not self.outputs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return result(self)

    result = Pending.result
    monkeypatch.setattr(Segmenter, "start", small)
    monkeypatch.setattr(Pending, "result", broken)
    assert work(made, execution=ExecutionOptions(device="cpu", batch=4)) == whole
    # The first part's four windows are of one size; those of the second measure 128 and 116 px in turns.
    assert seen == [4, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("in_flight", [0, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_do_not_depend_on_how_many_windows_are_under_way(
    made: Made, monkeypatch: pytest.MonkeyPatch, in_flight: int, batch: int
) -> None:
    whole, prepare = undisturbed(made), Segmenter.__init__

    def prepared(self: Segmenter, *args: Any, **options: Any) -> None:
        prepare(self, *args, **options)
        self.in_flight = in_flight

    monkeypatch.setattr(Segmenter, "__init__", prepared)
    assert work(made, execution=ExecutionOptions(device="cpu", batch=batch)) == whole


def segment_deadly(made: Made, places: Sequence[int]) -> None:
    """Segment, but die of windows of the second line at these columns, whose chips measure 204 px."""
    read = raster.read_chip

    def deadly(scene: Any, at: Window, *rest: Any, **named: Any) -> Any:
        if at.bottom > 300 and any(at.col_off <= col - 24 and at.right >= col - 24 + 204 for col in places):
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(scene, at, *rest, **named)

    raster.read_chip = deadly
    work(made, "new")


def segment_on_a_lost_device(made: Made) -> None:
    def start(*_: Any) -> NoReturn:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    Segmenter.start, Segmenter.is_lost = start, lambda _: True  # type: ignore[method-assign,assignment]
    work(made, "new")


def test_windows_that_kill_their_process_are_found_and_given_up(wide: Made) -> None:
    run = wide[2]
    places = [128, 1152]
    whole = undisturbed(wide)
    codes: list[int | None] = []
    while not codes or codes[-1] != 0:
        assert len(codes) <= 3 * len(places)
        codes.append(exit_code(segment_deadly, wide, places))
    # For each once at full speed, and twice with the window named; then it is left out.
    assert codes == [-signal.SIGSEGV] * 3 * len(places) + [0]
    rows = rows_of(wide)
    assert failed_places(rows) == {(row, col + off) for row in (128, 192) for col in places for off in (0, 64)}
    failed = [row for row in rows if row["status"] == "failed"]
    assert {(row["error_class"], row["attempts"]) for row in failed} == {("Crash", 2)}
    assert_the_rest_is_done(rows, whole)
    assert published(attempts.attempts_folder(run), ".json") == []
    assert work(wide, "later") == whole


def test_nothing_is_read_beside_a_part_over_which_a_process_died(wide: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model, run = wide
    keys = [part.key for part in plan.parts()]
    for key in (keys[1], keys[4]):
        attempts.mark_started(run, key, "s")
    read, write, events = reading.stage_windows, writers.write_part, []

    def note_read(block: ReadBlock, *rest: Any) -> Any:
        events.append(("read", keys.index(block.part.key)))
        return read(block, *rest)

    def note_write(out: str, key: str, *rest: Any) -> bytes:
        content = write(out, key, *rest)
        events.append(("written", keys.index(key)))
        return content

    monkeypatch.setattr(reading, "stage_windows", note_read)
    monkeypatch.setattr(writers, "write_part", note_write)
    segmenter = PartSegmenter(model, run, SETTINGS, WINDOW, RESOURCES, EXECUTION, "s", frozenset(keys))
    receipts = list(segmenter.segment_parts(list(plan.parts())))
    assert [number for what, number in events if what == "written"] == list(range(6))
    ends = [0, *(events.index(("written", number)) + 1 for number in (0, 1, 3, 4, 5))]
    stretches = [{number for _, number in events[start:end]} for start, end in pairwise(ends)]
    assert stretches == [{0}, {1}, {2, 3}, {4}, {5}]
    assert sum(receipt.seam_pixels for receipt in receipts) == 0  # no neighbour was looked at


def test_a_process_that_has_lost_its_device_ends_and_leaves_no_row(made: Made) -> None:
    plan, _, run = made
    assert exit_code(segment_on_a_lost_device, made) == 1
    begun = {Path(path).stem for path in published(attempts.attempts_folder(run), ".json")}
    assert begun
    assert begun <= {part.key for part in plan.parts()}
    assert list(published_parts(run)) == []


def test_deaths_of_an_earlier_session_do_not_count(made: Made) -> None:
    plan, _, run = made
    part, other = (part.key for part in islice(plan.parts(), 2))
    assert attempts.claim_interrupted(run, [part, other], "one") == {}
    attempts.mark_started(run, part, "one")
    assert attempts.claim_interrupted(run, [part, other], "two") == {}
    attempts.mark_started(run, part, "two")
    assert attempts.claim_interrupted(run, [other], "two") == {}
    known = attempts.claim_interrupted(run, [part, other], "two")
    assert set(known) == {part}
    assert not known[part].is_deadly("0 0")
    attempts.mark_window(run, part, known[part], "0 0")
    for deaths in (1, 2):
        known = attempts.claim_interrupted(run, [part], "two")
        assert known[part].is_deadly("0 0") == (deaths == attempts.MAX_DEATHS)
        attempts.mark_window(run, part, known[part], "0 0")
    attempts.mark_done(run, part)
    assert os.listdir(attempts.attempts_folder(run)) == []
