"""What a run was busy with: shares of the actors' time, which stage limited, and what to change."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBundle, MakeScene

from aerial_seg.cli.main import main
from aerial_seg.segmenting.bottleneck import ADVICE, STAGES, BottleneckReport
from aerial_seg.segmenting.receipts import Receipt
from aerial_seg.segmenting.stopwatch import StageTimes, Stopwatch
from seg_core.run.sizing import enough_readers


def receipt(actor: str = "a", started: float = 0.0, ended: float = 10.0, **seconds: float) -> Receipt:
    return Receipt(actor=actor, started=started, ended=ended, readers=2, pixels=0, times=StageTimes(**seconds))


def figures(*receipts: Receipt, writers: int = 1, gpus: float = 0, cores: int = 2) -> dict[str, Any]:
    busy = BottleneckReport()
    for each in receipts:
        busy.add(each)
    return busy.figures(writers, gpus, cores)


def test_shares_are_of_the_actors_time_and_reading_of_all_its_threads() -> None:
    found = figures(receipt(reading=5, decoding=4, model=8, writing=1))
    assert [found[stage] for stage in STAGES] == [0.25, 0.4, 0.8, 0.1]
    assert found["limit"] == "model"
    assert figures(receipt(writing=10), writers=4)["writing"] == 0.25


def test_reading_that_keeps_all_cores_busy_limits_though_some_of_its_threads_wait_for_them() -> None:
    more_threads = replace(receipt(reading=100, reading_cpu=95, model=8), readers=20)
    assert figures(more_threads, gpus=1, cores=16)["limit"] == "model"
    found = figures(more_threads, gpus=1, cores=10)
    assert (found["reading"], found["limit"]) == (0.95, "reading")


def test_time_between_receipts_of_an_actor_counts_and_actors_add_up() -> None:
    idle = figures(receipt(model=10), receipt(started=30, ended=40, model=10))
    assert idle["model"] == 0.5
    two = figures(receipt(model=10), receipt("b", started=30, ended=40, model=10))
    assert two["model"] == 1.0


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"reading": 19, "model": 6}, "reading"),
        ({"reading": 12, "model": 9}, "model"),
        ({"model": 3, "writing": 6.5}, "writing"),
        ({"reading": 2, "decoding": 9, "model": 4}, "decoding"),
        ({"reading": 4, "model": 3, "writing": 2}, "waiting"),
    ],
)
def test_the_busiest_stage_limits_and_its_remedy_is_named(seconds: dict[str, float], limit: str) -> None:
    found = figures(receipt(**seconds))
    assert found["limit"] == limit
    assert found["advice"].startswith(f"{limit} limits (busy: reading ")
    assert found["advice"].endswith(ADVICE[limit])
    assert "\n" not in found["advice"]


@pytest.mark.parametrize(
    ("model", "gpus", "limit"),
    [
        (9.0, 1.0, "model"),
        (6.0, 1.0, "process"),
        (6.0, 0.5, "model"),  # it is shared already
        (6.0, 0.0, "model"),
        (4.0, 1.0, "waiting"),  # a run that is over before it got going
    ],
)
def test_a_gpu_that_waits_for_its_only_process_is_to_be_shared(model: float, gpus: float, limit: str) -> None:
    found = figures(receipt(reading=3, model=model), gpus=gpus)
    assert found["limit"] == limit
    assert ("--gpus-per-actor 0.5" in found["advice"]) == (limit == "process")


def test_a_stopwatch_adds_up_threads_and_starts_again_once_taken() -> None:
    watch = Stopwatch()

    def read(_: int) -> None:
        with watch.on("reading"):
            time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(4)))
    taken = watch.take()
    assert taken.reading >= 0.2
    assert taken.model == taken.writing == 0.0
    assert watch.take() == StageTimes()
    assert watch.seconds["reading"] == taken.reading > 10 * watch.seconds["reading_cpu"]  # asleep


def test_a_lap_is_what_a_window_took_since_the_last_one_and_ends_when_enough_were_read_and_segmented() -> None:
    watch = Stopwatch()
    watch.add("reading", 8.0, 4)
    watch.add("reading_cpu", 2.0, 4)
    assert watch.lap(4) is None  # none was segmented yet
    watch.add("model", 1.0, 2)
    assert watch.lap(4) is None
    watch.add("model", 3.0, 2)
    assert watch.lap(4) == StageTimes(reading=2.0, reading_cpu=0.5, model=1.0)
    assert watch.lap(1) is None
    with watch.on("reading", 1):
        pass
    watch.add("model", 0.5, 1)
    again = watch.lap(1)
    assert again is not None
    assert again.reading < 0.1
    assert again.model == 0.5
    assert watch.take().model == 4.5  # laps take nothing away


def test_no_lap_ends_while_laps_are_paused() -> None:
    watch = Stopwatch()
    watch.pause_laps()
    for stage in ("reading", "reading_cpu", "model"):
        watch.add(stage, 1e4, 4)
    assert watch.lap(4) is None
    watch.new_lap()
    assert watch.lap(1) is None  # what was counted meanwhile is left out
    for stage in ("reading", "reading_cpu", "model"):
        watch.add(stage, 2.0, 2)
    assert watch.lap(2) == StageTimes(reading=1.0, reading_cpu=1.0, model=1.0)


def test_a_receipt_comes_back_from_its_row() -> None:
    sent = replace(receipt(reading=1.5, model=2.5), failed=3, exact=False, decoded_on_cpu=2)
    assert Receipt.from_row(json.loads(json.dumps(sent.to_row()))) == sent


@pytest.mark.parametrize(
    ("read", "computed", "inferred", "readers"),
    [
        (0.0, 0.0, 0.0, 4),  # nothing is known yet
        (1.0, 1.0, 10.0, 4),  # one would do
        (100.0, 100.0, 10.0, 4),  # decoding limits: there are no more cores
        (80.0, 40.0, 8.0, 8),  # beside others, on half of a core each
        (80.0, 4.0, 10.0, 10),  # waiting for a store
        (800.0, 4.0, 1.0, 64),
        (10.0, 0.1, 0.0, 64),  # nothing was valid
    ],
)
def test_as_many_threads_read_as_the_model_needs_and_the_cores_can_serve(
    read: float, computed: float, inferred: float, readers: int
) -> None:
    assert enough_readers(4, 4, read, computed, inferred) == readers


@pytest.mark.usefixtures("without_actors")
def test_a_run_ends_with_its_bottleneck_and_keeps_it(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", make_scene(height=300, width=420), "--model", make_bundle(), "--out", str(tmp_path / "run")]
    assert main([*command, "--tile-size", "64", "--part", "256", "--window", "128"]) == 0
    found = json.loads((tmp_path / "run/run.json").read_text())["bottleneck"]
    assert capsys.readouterr().err.splitlines()[-1] == found["advice"]
    assert all(0 < found[stage] <= 1 for stage in ("reading", "model", "writing"))
    assert found["decoding"] == 0  # there is no GPU that could
    assert "decoding" not in found["advice"]
    assert found["model"] + found["writing"] <= 1.001  # one thread does both
    assert found["limit"] in ADVICE
