"""Benchmarks and estimates: their figures are positive, fit each other, and are the same in JSON and in the table."""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
from conftest import MakeBundle, MakeScene, outside_environment
from parts import EXECUTION, RESOURCES
from seg_command import seg

from aerial_seg.benchmarks.scenes import make_scene as make_town
from aerial_seg.benchmarks.scenes import scratch_folder
from aerial_seg.benchmarks.segmenting import Bench, bench_scale, bench_segment, steady_rate
from aerial_seg.benchmarks.sleeping import measure as measure_sleepers
from aerial_seg.benchmarks.stages import Stages
from aerial_seg.segmenting.receipts import Receipt
from aerial_seg.terminal import print_figures
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.geotiff import CODECS
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip, read_whole
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import Settings, make_plan, pack_parts
from seg_core.storage.files import walk

TINY = ["--side", "300", "--tile-size", "64", "--part", "128", "--window", "64", "--seconds", "0.2"]
Json = dict[str, Any]


@pytest.mark.usefixtures("ray_cluster")
def test_all_stages_a_loop_and_the_pipe_are_measured_in_one_run(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = seg(
        capsys, "bench", "segment", "--model", make_bundle(), *TINY, "--rounds", "1", "--device", "cpu", "--json"
    )
    found = json.loads(out)
    assert all(line.startswith("measuring: round 1 of 1 ... ") for line in err.splitlines())
    rates = {name: found[f"{name}_mpx_s"] for name in ("decode", "model", "loop", "pipe")}
    assert all(rate > 0 for rate in rates.values())
    assert found["copy_mpx_s"] is None
    slower = found["slower"]
    assert rates[slower] == min(rates["decode"], rates["model"])  # rounded, they may be the same
    assert found["efficiency"] == pytest.approx(rates["pipe"] / rates[slower], abs=0.001)
    assert found["pipe_to_loop"] == pytest.approx(rates["pipe"] / rates["loop"], abs=0.001)
    assert found["start_up_s"] > 0
    assert found["seconds"] > 0
    assert found["host_peak_mb"] > 100
    assert (found["window"], found["actors"]) == (64, 1)
    # parts of 128 px, of which the last column and row are cut to 44
    assert found["windows"] >= 2
    assert found["pixels"] <= found["windows"] * 64**2


@pytest.mark.usefixtures("ray_cluster")
def test_the_slower_stage_is_the_slower_one_before_and_after_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are measured twice. A machine that changes its speed in between may swap them."""
    halves = iter(
        [
            {"decode": 3.0, "model": 4.0, "loop": 2.0, "copy": None},
            {"decode": 9.0, "model": 6.0, "loop": 2.0, "copy": None},
        ]
    )
    monkeypatch.setattr(Bench, "__init__", lambda *_: None)
    monkeypatch.setattr(Bench, "describe", lambda _: {})
    monkeypatch.setattr(Bench, "measure_stages", lambda *_: next(halves))
    monkeypatch.setattr(Bench, "measure_pipe", lambda *_, **__: {"pipe_mpx_s": 4.0, "start_up_s": 1.0})
    found = bench_segment(None, "", "", EXECUTION, 1.0, rounds=1)  # type: ignore[arg-type]
    assert found["slower"] == "model"
    assert (found["decode_mpx_s"], found["model_mpx_s"], found["efficiency"]) == (6.0, 5.0, 0.8)


@pytest.mark.usefixtures("ray_cluster")
def test_growth_is_measured_in_all_sizes_and_drawn(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "scale", "--model", make_bundle(), *TINY, "--sizes", "12,20", "--windows", "64"]
    out, _ = seg(capsys, *command, "--out", tmp_path / "scale.png", "--json")
    points = json.loads(out)["points"]
    assert [point["window"] for point in points] == [64, 64]
    for point, least in zip(points, [12, 20], strict=True):
        assert least <= point["windows"] <= least + 4
        assert point["pipe_mpx_s"] > 0
        assert point["efficiency"] > 0
        assert point["host_peak_mb"] > 100
        assert point["driver_cpu_s"] > 0
    picture = cv2.imread(str(tmp_path / "scale.png"))
    assert picture is not None
    assert np.count_nonzero(np.ptp(picture.astype(int), axis=2) > 40) > 500  # the lines: all else is grey

    monkeypatch.setattr("aerial_seg.benchmarks.segmenting.bench_scale", lambda *_: points)
    head, *lines = seg(capsys, *command)[0].splitlines()
    assert head.split() == list(points[0])
    for line, point in zip(lines, points, strict=True):
        assert_same(dict(zip(head.split(), line.split(), strict=True)), point)


def assert_same(texts: dict[str, str], figures: Json) -> None:
    """Assert that a table says what the JSON object says."""
    assert list(texts) == list(figures)
    for name, value in figures.items():
        text = texts[name].replace(",", "")
        assert text == {None: "-"}.get(value, value) if not isinstance(value, int | float) else float(text) == value


def test_figures_are_the_same_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"pipe_mpx_s": 12.345, "copy_mpx_s": None, "slower": "model", "pixels": 1234567}
    print_figures(figures, as_json=False)
    assert_same(dict(line.split() for line in capsys.readouterr().out.splitlines()), figures)


def test_what_is_made_is_not_told_how_where_scenes_are_named(
    make_scene: MakeScene, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = seg(capsys, "bench", "segment", make_scene(), "--codec", "jpeg", code=2)
    assert "--codec" in err


def test_the_plain_loop_writes_the_masks_of_the_model(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 250, (3, 200, 130)).astype(np.uint8)
    pixels[:, :50, :60] = 255
    model, path = make_bundle(), make_scene(pixels=pixels, nodata=255)
    settings = Settings(tile_size=64, part=128, halo=24, threshold=0.5)
    plan, _ = make_plan(read_region([path])[0], read_bundle(model), settings)
    stages = Stages(model, pack_parts(plan.parts()), settings, 64, RESOURCES, EXECUTION)
    loop = stages.run_plain_loop(str(tmp_path))
    sizes = [next(loop) for _ in stages.windows.tasks]
    loop.close()
    assert sum(sizes) == 200 * 130
    for (pixels, valid, number), task in zip(stages.windows, stages.windows.tasks, strict=False):
        at = task.window
        probability = stages.segmenter(pixels, valid, 24, at.height, at.width)
        expected = (probability >= 0.5) & valid[24 : 24 + at.height, 24 : 24 + at.width]
        mask = cv2.imread(str(tmp_path / f"{number}.png"), cv2.IMREAD_GRAYSCALE)
        assert mask is not None
        assert ((mask > 0) == expected).mean() > 0.999
        assert set(np.unique(mask)) <= {0, 255}


@pytest.mark.usefixtures("ray_cluster")
def test_what_many_processes_cost_is_measured_on_some_that_sleep() -> None:
    found = measure_sleepers(2, window_seconds=0.02, seconds=1.0)
    assert found["actors"] == 2
    assert 0 < found["slowest_actor"] <= found["windows_s_per_actor"] <= 1 / 0.02 + 4  # a part has four windows
    assert found["driver_cores"] > 0


def test_rates_leave_out_the_time_in_which_not_all_actors_worked() -> None:
    def receipt(actor: str, started: float, ended: float) -> Receipt:
        return Receipt(actor=actor, started=started, ended=ended, pixels=10_000_000)

    alone = [receipt("a", 0, 10), receipt("a", 10, 20)]
    assert steady_rate(alone) == pytest.approx(1.0)
    late = [*alone, receipt("b", 15, 25), receipt("b", 25, 35)]  # together from 15 to 20
    assert steady_rate(late) == pytest.approx(2.0)
    assert steady_rate([*alone, receipt("b", 20, 30)]) == pytest.approx(1.0)  # one after the other


def test_parts_that_are_published_before_the_one_before_them_count() -> None:
    published = [number + (2.5 if number % 5 == 0 else 0.0) for number in range(1, 201)]  # s; the device does one a s
    ended = list(accumulate(published, max))  # a receipt waits for those before it
    started = [0.0, *ended[:-1]]
    receipts = [
        Receipt(actor="a", started=start, ended=end, pixels=10_000_000)
        for start, end in zip(started, ended, strict=True)
    ]
    assert steady_rate(receipts[1:]) == pytest.approx(10.0, rel=0.02)
    assert min(receipt.ended - receipt.started for receipt in receipts) == 0


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_town_is_made_in_every_codec_without_a_missing_pixel(
    codec: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_town(str(tmp_path), codec, 700, read_bundle(make_bundle()))
    with rasterio.open(path) as dataset:
        compression = dataset.compression.name.lower() if dataset.compression else "none"
        assert (compression, dataset.block_shapes[0]) == (codec, (512, 512))
    pixels, valid = read_chip(read_scene(path, "scene.tif"), Window(0, 0, 700, 700))
    assert valid.all()
    lossless = read_whole(make_town(str(tmp_path), "none", 700, read_bundle(make_bundle("again"))))
    assert not (lossless == 255).all(axis=0).any()  # as a town is where it is missing
    assert np.abs(pixels.astype(int) - lossless).mean() < (6 if codec == "jpeg" else 1e-9)


def test_a_made_scene_repeats_its_town_and_has_the_bands_and_pixel_size_of_the_model(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aerial_seg.benchmarks.scenes.TOWN_SIDE", 128)
    bundle = read_bundle(make_bundle(bands=4, gsd_m=0.5))
    path = make_town(str(tmp_path), "zstd", 300, bundle)
    pixels = read_whole(path)
    assert pixels.shape == (4, 300, 300)
    assert (pixels[:, 128:256, :128] == pixels[:, :128, 128:256]).all()
    assert read_scene(path, "scene.tif").gsd_m == pytest.approx(0.5, rel=0.01)


def test_a_scene_in_a_bucket_is_gone_afterwards(s3: str, make_bundle: MakeBundle) -> None:
    bundle = read_bundle(make_bundle())
    with scratch_folder(f"{s3}/measured") as folder:
        scene = read_scene(make_town(folder, "deflate", 100, bundle), "scene.tif")
        assert scene.uri.startswith(f"{s3}/measured/bench-")
        assert list(walk(folder)) == [scene.uri]
    assert list(walk(f"{s3}/measured")) == []


# In a process of its own: below this one are those of Ray, which come and go.
PARENT = """
import subprocess, sys
from aerial_seg.benchmarks.peak import Peak
child = "import sys; held = bytearray(b'1' * 200_000_000); print(flush=True); sys.stdin.read()"
with Peak() as before:
    pass
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
with subprocess.Popen([sys.executable, "-c", child], **pipes) as process:
    process.stdout.readline()
    with Peak() as after:
        pass
    process.communicate()
print(before.host_mb, after.host_mb)
"""


def test_peak_memory_is_that_of_all_processes_below() -> None:
    command = [sys.executable, "-c", PARENT]
    done = subprocess.run(command, env=outside_environment(), capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 3
    assert after - before == pytest.approx(200, abs=20)


def test_a_plan_is_calibrated_where_asked_for(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", make_scene(height=400, width=500), "--model", make_bundle()]
    command += ["--tile-size", "64", "--part", "128", "--window", "64", "--json"]
    free = json.loads(seg(capsys, *command)[0])
    options = ["--calibrate", "--devices", "4", "--price", "2.5", "--device", "cpu"]
    found = json.loads(seg(capsys, *command, *options)[0])
    assert {name: found[name] for name in free} == free
    assert (found["calibrated_on"], found["devices"]) == (8, 4)
    slower = min(found["decode_mpx_s"], found["model_mpx_s"])
    assert found[f"{found['limit']}_mpx_s"] == slower > 0
    assert found["device_hours"] == pytest.approx(400 * 500 / slower / 1e6 / 3600, rel=0.01)
    assert found["hours"] == pytest.approx(found["device_hours"] / 4)
    assert found["cost"] == pytest.approx(found["device_hours"] * 2.5)
    out, _ = seg(capsys, *command[:-1], *options)
    assert "cost" in out
    assert json.loads(seg(capsys, *command, "--calibrate", "--device", "cpu")[0])["cost"] is None


@pytest.mark.parametrize(("side", "windows"), [(64, 1), (200, 4)])
def test_of_a_small_scene_a_quarter_is_segmented_to_calibrate(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], side: int, windows: int
) -> None:
    command = ["plan", make_scene(height=side, width=side), "--model", make_bundle(), "--calibrate", "--device", "cpu"]
    found = json.loads(seg(capsys, *command, "--tile-size", "64", "--part", "128", "--window", "64", "--json")[0])
    assert found["calibrated_on"] == windows


def test_windows_that_cannot_be_read_are_left_out_of_an_estimate(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", make_bundle(), "--calibrate", "--device", "cpu"]
    command += ["--tile-size", "64", "--part", "128", "--window", "64", "--json"]
    path = Path(make_scene(height=1600, width=250))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out, err = seg(capsys, *command, path)
    assert 0 < json.loads(out)["calibrated_on"] < 8
    assert " of 8 windows can't be read, and are left out: " in err
    path.write_bytes(path.read_bytes()[:2000])
    _, err = seg(capsys, *command, path, code=2)
    assert "scene.tif: nothing that was sampled for --calibrate can be read: leave the option out, or" in err


def test_no_rate_is_estimated_from_windows_without_data(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = make_scene(pixels=np.zeros((3, 128, 128), np.uint8), nodata=0)
    _, err = seg(capsys, "plan", empty, "--model", make_bundle(), "--calibrate", "--device", "cpu", code=2)
    assert "scene.tif: no window that was sampled for --calibrate holds data: leave the option out, or" in err


def test_a_price_needs_an_estimate(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = seg(capsys, "plan", make_scene(), "--model", make_bundle(), "--price", "2", code=2)
    assert "add --calibrate" in err


def test_windows_that_tiles_do_not_fit_in_are_refused(
    tmp_path: Path, make_scene: MakeScene, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle()
    plan, _ = make_plan([read_scene(make_scene(), "a")], read_bundle(bundle), Settings(halo=16, threshold=0.5))
    with pytest.raises(SegError, match=r"^--window 700: use a multiple of the tile size, 512$"):
        bench_scale(plan, bundle, str(tmp_path), EXECUTION, [1], [], [512, 700], 1.0)
