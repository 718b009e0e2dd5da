"""A run's normalization: what is sampled, what is decided, that a resume keeps it, and that unlike imagery is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import NORTH_UP, MakeBundle, MakeScene
from rasters import write_jpeg
from runs import write_light_bundle
from seg_command import SMALL, seg

import seg_core
from seg_core.errors import ReadError, SegError
from seg_core.grey_levels import Normalization, count_levels, normalization_of, shares_of
from seg_core.grid import Window, split
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import read_region
from seg_core.inference.windows import infer_window
from seg_core.model.bundle import Bundle, read_bundle
from seg_core.model.segmenter import Segmenter
from seg_core.run import normalization
from seg_core.run.imagery_fit import MIN_PIXELS, choose_normalization, compare
from seg_core.run.normalization import (
    Frame,
    block_at,
    draw_blocks,
    frames_of,
    normalize_as_run,
    normalize_plan,
    read_levels,
)
from seg_core.run.plan import Plan, Settings, make_plan, pack_parts, unpack_parts
from seg_core.run.resume import find_run, open_run
from seg_core.run.stored_plan import read_plan

SIDE = 300  # px: a scene of it is enough to be judged
SETTINGS = Settings(tile_size=64, part=256, halo=16, threshold=0.5, normalize="auto")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are read in this process, which is quicker."""
    monkeypatch.setattr(normalization, "for_each_isolated", lambda function, _, items, __: map(function, items))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_light_bundle(tmp_path / "bundle"))


def draw(mean: float, std: float = 60, seed: int = 0, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, (3, side, side)).clip(1, 255).round().astype(np.uint8)


def plan_of(scenes: list[str], bundle: Bundle, **changes: Any) -> Plan:
    found, unreadable = read_region(scenes)
    plan, refused = make_plan(found, bundle, replace(SETTINGS, **changes))
    assert not unreadable + refused
    return plan


def statistics(pixels: np.ndarray, valid: np.ndarray) -> Normalization:
    return normalization_of(count_levels(pixels, valid))


@pytest.mark.usefixtures("in_process")
def test_imagery_like_that_of_the_training_is_left_as_it_is(make_scene: MakeScene, bundle: Bundle) -> None:
    plan = normalize_plan(plan_of([make_scene(pixels=draw(125))], bundle), bundle)
    assert plan.settings == replace(SETTINGS, normalize="model")
    assert plan.fit is not None
    assert (plan.fit.is_unlike, plan.fit.describe("model"), plan.fit.sampled_px) == (False, None, SIDE**2)


@pytest.mark.usefixtures("in_process")
def test_imagery_unlike_it_is_normalized_and_named(make_scene: MakeScene, bundle: Bundle) -> None:
    pixels = draw(190, 20)
    plan = normalize_plan(plan_of([make_scene(pixels=pixels)], bundle), bundle)
    expected = statistics(pixels, np.ones((SIDE, SIDE), np.bool_))
    assert (plan.settings.normalize, plan.settings.normalization) == ("region", expected)
    assert plan.fit is not None
    assert plan.fit.is_unlike
    warning = str(plan.fit.describe("region"))
    for text in ("mean 190/190/190 instead of 120/121/122", "--normalize region", "seg evaluate"):
        assert text in warning
    assert "\n" not in warning
    assert "try --normalize region" in str(plan.fit.describe("model"))


@pytest.mark.usefixtures("in_process")
def test_pixels_without_data_never_enter(make_scene: MakeScene, bundle: Bundle) -> None:
    pixels = draw(125)
    pixels[:, :, 40:] = 0
    plan = normalize_plan(plan_of([make_scene(pixels=pixels, nodata=0)], bundle, normalize="region"), bundle)
    assert plan.settings.normalization == statistics(pixels[:, :, :40], np.ones((SIDE, 40), np.bool_))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("mode", ["auto", "region", "scene", "model"])
def test_a_region_without_valid_pixels_keeps_the_normalization_of_the_model(
    make_scene: MakeScene, bundle: Bundle, mode: str
) -> None:
    path = make_scene(pixels=np.zeros((3, SIDE, SIDE), np.uint8), nodata=0)
    plan = normalize_plan(plan_of([path], bundle, normalize=mode), bundle)
    assert plan.settings.normalization is plan.scenes[0].normalization is None
    assert plan.fit is not None
    assert (plan.fit.distance, plan.fit.is_unlike, plan.fit.sampled_px) == (None, False, 0)


@pytest.mark.usefixtures("in_process")
def test_each_scene_has_its_own_normalization_where_that_is_asked_for(make_scene: MakeScene, bundle: Bundle) -> None:
    pixels = [draw(60, 20, 1), draw(180, 30, 2), np.zeros((3, 64, 64), np.uint8)]
    paths = [make_scene(f"region/{i}.tif", pixels=each, nodata=0) for i, each in enumerate(pixels)]
    plan = normalize_plan(plan_of(paths, bundle, normalize="scene"), bundle)
    expected = [statistics(each, np.ones((SIDE, SIDE), np.bool_)) for each in pixels[:2]]
    assert [scene.normalization for scene in plan.scenes] == [*expected, None]
    assert plan.settings.normalization is None
    for part, scene in ((part, part.scene) for part in plan.parts()):
        assert unpack_parts(pack_parts([part]))[0].normalization(plan.settings) == scene.normalization
    assert plan.fit is not None
    assert plan.fit.sampled_px == 2 * SIDE**2


@pytest.mark.usefixtures("in_process", "one_thread")
@pytest.mark.parametrize(("mode", "decode"), [("region", "cpu"), ("scene", "cpu"), ("region", "device")])
def test_windows_of_a_run_and_whole_scenes_are_normalized_alike(
    tmp_path: Path, make_bundle: MakeBundle, mode: str, decode: str
) -> None:
    """Also where the device decodes; and not as by the mean and deviation of the training."""
    write_jpeg(tmp_path / "a.tif", height=SIDE, width=SIDE)
    segmenter = Segmenter(make_bundle(), "cpu")
    plan = normalize_plan(
        plan_of([str(tmp_path / "a.tif")], segmenter.bundle, normalize=mode, decode=decode, part=512), segmenter.bundle
    )
    (part,) = plan.parts()
    found = infer_window(part, part.window, plan.settings, segmenter).figures.probability_sums
    by_mode = [
        seg_core.segment_file(str(tmp_path / "a.tif"), segmenter, normalize=each).probability.sum(dtype=np.float64)
        for each in ("region", mode, "model")
    ]
    assert found.sum() == pytest.approx(by_mode[0], rel=1e-4)  # a device decodes a little differently
    assert by_mode[0] == by_mode[1]
    assert abs(by_mode[2] / by_mode[0] - 1) > 5e-4
    with pytest.raises(SegError, match="normalize = 'gamma': say one of auto, scene, region, model"):
        seg_core.segment_file(str(tmp_path / "a.tif"), segmenter, normalize="gamma")


def test_blocks_of_frames_are_drawn_once_each_and_the_same_each_time() -> None:
    frames = [Frame(None, (), Window(0, 0, 1000, 700)), Frame(None, (), Window(64, 32, 3000, 90))]  # type: ignore[arg-type]
    expected = [(frame, window) for frame in frames for window in split(frame.window, 512)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Frame, "block", 512)
        everything = draw_blocks(frames, 99)
        some = draw_blocks(frames, 4)
        assert some == draw_blocks(frames, 4)
    assert [(block.frame, block.window) for block in everything] == expected
    assert len(some) == len(set(some)) == 4
    assert set(some) < set(everything)
    assert draw_blocks([], 4) == []
    windows = list(split(Window(5, 7, 1100, 600), 512))
    assert [block_at(Window(5, 7, 1100, 600), 512, i) for i in range(len(windows))] == windows


@pytest.mark.usefixtures("in_process")
def test_a_sample_does_not_depend_on_parts_tiles_or_windows(make_scene: MakeScene, bundle: Bundle) -> None:
    path = make_scene(pixels=draw(190, 20, side=600))
    found = {
        normalize_plan(plan_of([path], bundle, part=part, tile_size=tile), bundle).settings.normalization
        for part, tile in ((64, 64), (256, 64), (512, 256))
    }
    assert len(found) == 1
    assert None not in found


@pytest.mark.usefixtures("in_process")
def test_a_mosaic_is_sampled_from_its_scenes(make_scene: MakeScene, bundle: Bundle) -> None:
    pixels, (a, b, x, d, e, y) = draw(190, 20, side=400), NORTH_UP
    paths = [
        make_scene(f"m/{col}.tif", pixels=pixels[:, :, col : col + 200], transform=(a, b, x + col, d, e, y))
        for col in (0, 200)
    ]
    plan = normalize_plan(plan_of(paths, bundle, mosaic=True), bundle)
    assert plan.settings.normalization == statistics(pixels, np.ones((400, 400), np.bool_))
    levels = [read_levels(block) for block in draw_blocks(frames_of(plan, plan.images), 9)]
    assert sum(int(each[0].sum()) for each in levels if each is not None) == 400**2


def test_a_block_that_can_not_be_read_counts_nothing(make_scene: MakeScene, bundle: Bundle) -> None:
    """In processes of their own, as in a run."""
    pixels = draw(190, 20)
    paths = [make_scene(f"region/{i}.tif", pixels=pixels) for i in range(2)]
    plan = plan_of(paths, bundle)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:2000])
    assert normalize_plan(plan, bundle).settings.normalization == statistics(pixels, np.ones((SIDE, SIDE), np.bool_))
    with pytest.raises(ReadError):
        read_chip(plan.scenes[1], Window(0, 0, SIDE, SIDE))


def test_the_limit_goes_with_the_spread_of_the_training_images(bundle: Bundle) -> None:
    levels = count_levels(draw(175), np.ones((SIDE, SIDE), np.bool_))
    assert choose_normalization("auto", levels, bundle) == normalization_of(levels)
    diverse = replace(bundle, spread=1.5)
    assert choose_normalization("auto", levels, diverse) is None
    assert choose_normalization("region", levels, diverse) == normalization_of(levels)
    assert choose_normalization("model", levels, bundle) is None
    alike = replace(bundle, levels=shares_of(levels))
    assert compare(levels, alike).distance == 0


def test_a_network_with_the_normalization_of_an_earlier_training_sees_what_it_was_trained_on(bundle: Bundle) -> None:
    rng, valid = np.random.default_rng(0), np.ones((300, 300), np.bool_)
    pixels = rng.normal(110, 12, (3, 300, 300)).clip(0, 255).astype(np.uint8)
    tuned = replace(bundle, mean=(90.0,) * 3, std=(30.0,) * 3, levels=shares_of(count_levels(pixels, valid)))
    other = (pixels * 0.5 + 140).astype(np.uint8)  # the same ground in another light
    found = choose_normalization("region", count_levels(other, valid), tuned)
    assert found is not None
    seen, known = (
        ((pixels - 90.0) / 30.0),
        (other - np.reshape(found.mean, (3, 1, 1))) / np.reshape(found.std, (3, 1, 1)),
    )
    assert abs(seen.mean() - known.mean()) < 0.05
    assert abs(seen.std() - known.std()) < 0.05


def test_a_mean_probability_far_from_that_on_validation_is_named(bundle: Bundle) -> None:
    levels = count_levels(draw(125), np.ones((SIDE, SIDE), np.bool_))
    fit = compare(levels, replace(bundle, confidence=(0.8, 0.0, 0.0, 0.2)))
    assert fit.validated_probability == pytest.approx(0.8 * 0.125 + 0.2 * 0.875)
    assert "few buildings" in str(fit.describe_probability(0.007))
    for known in (0.1, None):
        assert fit.describe_probability(known) is None
    assert compare(levels, bundle).describe_probability(0.007) is None  # of an older bundle it is not known


def test_a_small_sample_is_not_judged(make_scene: MakeScene, bundle: Bundle) -> None:
    levels = count_levels(draw(250, 5, side=255), np.ones((255, 255), np.bool_))
    assert levels[0].sum() < MIN_PIXELS
    assert choose_normalization("auto", levels, bundle) is None
    assert normalize_plan(plan_of([make_scene()], bundle), bundle).settings == replace(SETTINGS, normalize="model")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("mode", ["region", "scene"])
def test_a_resume_has_the_statistics_of_its_run_and_another_mode_is_refused(
    make_scene: MakeScene, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    paths, out = [make_scene(f"region/{i}.tif", pixels=draw(170 + i, 30, i)) for i in range(2)], str(tmp_path / "run")
    begun = normalize_plan(plan_of(paths, bundle, normalize=mode), bundle)
    record = open_run(out, begun, str(tmp_path / "bundle"))
    assert record.fit == begun.fit
    assert read_plan(out).scenes == begun.scenes
    assert (
        json.loads(Path(out, "run.json").read_text())["fit"]["distance"] == record.setting_figures()["imagery_distance"]
    )
    monkeypatch.setattr(normalization, "sum_levels", None)  # nothing is read again
    for asked in ("auto", mode) if mode == "region" else (mode,):
        resumed = normalize_as_run(out, plan_of(paths, bundle, normalize=asked), bundle)
        assert resumed.fingerprint == begun.fingerprint
        assert find_run(out, resumed) is not None
    for other in {"model", "region", "scene"} - {mode}:
        with pytest.raises(SegError, match=rf"\(normalize {mode} there, {other} now\): choose another folder"):
            find_run(out, normalize_as_run(out, plan_of(paths, bundle, normalize=other), bundle))


def test_a_run_from_before_the_setting_goes_on_as_it_was(make_scene: MakeScene, bundle: Bundle, tmp_path: Path) -> None:
    path, out = make_scene(pixels=draw(190, 20)), str(tmp_path / "run")
    older = plan_of([path], bundle, normalize="model")
    assert "normalize" not in older.settings.named()
    open_run(out, older, str(tmp_path / "bundle"))
    resumed = normalize_as_run(out, plan_of([path], bundle), bundle)
    assert resumed.fingerprint == older.fingerprint


@pytest.mark.usefixtures("without_actors")
def test_a_region_that_looks_unlike_the_training_is_brought_to_it_and_named(
    make_scene: MakeScene, make_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model, run = make_scene(pixels=draw(190, 20)), make_bundle(), tmp_path / "run"
    planned = json.loads(seg(capsys, "plan", path, "--model", model, *SMALL, "--json")[0])
    assert planned["imagery_is_unlike"]
    assert planned["settings"]["normalize"] == "region"
    assert any("looks unlike" in line for line in planned["doubts"])
    command = ("segment", path, "--model", model, "--out", run, *SMALL, "--json")
    found, messages = seg(capsys, *command)
    assert (json.loads(found)["normalize"], json.loads(found)["imagery_is_unlike"]) == ("region", True)
    assert messages.count("the imagery looks unlike what the model was trained on") == 2  # as it begins and ends
    assert "nothing to do" in seg(capsys, *command)[1]
    assert "normalize region there, model now" in seg(capsys, *command, "--normalize", "model", code=2)[1]
    assert json.loads(seg(capsys, "verify", run, "--deep", "--json")[0])["complete"]
    summary, messages = seg(capsys, "query", run)
    assert "imagery_is_unlike  yes" in summary
    assert "looks unlike" in messages


@pytest.fixture(scope="module")
def hazy(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with its images to validate on as if taken through haze, each through another one."""
    folder = tmp_path_factory.mktemp("hazy")
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    for number, path in enumerate(sorted((folder / "val").iterdir())):
        with rasterio.open(path, "r+") as image:
            pixels = image.read()
            image.write(np.where(pixels > 0, 110 + 20 * number + pixels // 3, 0).astype(np.uint8))
    return folder


@pytest.mark.usefixtures("without_actors")
@pytest.mark.parametrize(("mode", "decided"), [("auto", "region"), ("scene", "scene"), ("model", "model")])
def test_a_bundle_is_scored_as_a_run_is_segmented(
    hazy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, decided: str
) -> None:
    found, said = seg(capsys, "evaluate", "built-in", "--data", hazy, "--normalize", mode, "--json")
    alone = json.loads(found)
    assert alone["normalize"] == decided
    assert alone["imagery_is_unlike"]
    assert f"(--normalize {decided}), but nothing else\n" in said or "it is not adapted" in said
    seg(capsys, "segment", hazy / "val", "--out", tmp_path / "run", "--normalize", mode, "--json")
    labels = ["--labels", hazy / "val_labels", "--data", hazy]
    of_run = json.loads(seg(capsys, "evaluate", tmp_path / "run", *labels, "--json")[0])
    assert {name: alone[name] for name in ("tp", "fp", "fn", "tn")} == {
        name: of_run[name] for name in ("tp", "fp", "fn", "tn")
    }


def test_haze_costs_less_if_it_is_normalized(hazy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ("model", "region", "scene")
    ious = [
        json.loads(seg(capsys, "evaluate", "built-in", "--data", hazy, "--normalize", mode, "--json")[0])["iou"]
        for mode in modes
    ]
    assert ious == sorted(ious)
    assert ious[1] > ious[0] + 0.05
