"""Bulk segmentation through the command line: on one Ray for the session, and what runs hold without it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import MakeBundle, MakeScene, window_figures
from numpy.typing import NDArray
from parts import EXECUTION, RESOURCES, SETTINGS, WINDOW
from runs import part_digests, read_part, rows_of
from seg_command import SMALL, Json, seg

import aerial_seg.segment
from aerial_seg.segment import _reason
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.errors import JobError, SegError
from seg_core.grid import Window
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip
from seg_core.model.segmenter import Segmenter
from seg_core.run.plan import Part, Plan
from seg_core.run.record import read_record, write_record
from seg_core.run.rows import Failure, decode_mask, encode_mask, encode_png, failed_rows, tile_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part
from seg_core.run.verify import verify


@pytest.fixture
def command(finished: Path, run: Path) -> list[object]:
    """What made the run."""
    return ["segment", finished / "region", "--model", finished / "model", "--out", run, *SMALL]


@pytest.mark.usefixtures("ray_cluster")
def test_a_region_is_segmented_verified_and_summed_up(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = seg(capsys, "segment", region, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL, "--json")
    counts = json.loads(out)
    assert counts["tiles"] == 5 * 7 + 3 * 4
    assert counts["valid_px"] == 300 * 420 - 100 * 150 + 130 * 200
    assert 0 < counts["building_px"] < counts["valid_px"]
    seg(capsys, "verify", tmp_path / "run")
    assert {row["scene_id"] for row in rows_of(tmp_path / "run")} == {"north.tif", "south/scene.tif"}


def test_rows_are_those_of_the_plain_computation(finished: Path) -> None:
    segmenter = Segmenter(str(finished / "model"), "cpu")
    scene = read_scene(f"{finished}/region/north.tif", "north.tif")
    pixels, valid = read_chip(scene, Window(-16, -16, 336, 452))
    probability = segmenter(pixels, valid, 16, 300, 420)
    building = (probability >= 0.5) & valid[16:316, 16:436]
    for row in rows_of(finished / "run"):
        if row["scene_id"] == "north.tif":
            at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
            assert (decode_mask(row["mask"], row["height"], row["width"]) == building[at]).all()


@pytest.mark.usefixtures("ray_cluster")
def test_rows_do_not_depend_on_window_or_actors(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_bundle()
    for name, execution in {"one": ["--window", "64"], "two": ["--window", "256", "--actors", "1:2"]}.items():
        options = ["--tile-size", "64", "--part", "256", *execution, "--keep-probability"]
        seg(capsys, "segment", region, "--model", model, "--out", tmp_path / name, *options)
    assert part_digests(tmp_path / "one") == part_digests(tmp_path / "two")


@pytest.mark.usefixtures("without_actors")
def test_a_finished_run_is_left_alone(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", region, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    first, err = seg(capsys, *command)
    assert "16 of 16 windows" in err  # north: 4 + 4 + 2 + 2 in its four parts; south: 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again, err = seg(capsys, *command)
    assert "nothing to do: all 47 tiles are there" in err
    assert again == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.usefixtures("without_actors")
def test_a_run_of_other_settings_is_refused(
    command: list[object], run: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    before = part_digests(run)
    _, err = seg(capsys, *command, "--threshold", "0.4", code=2)
    assert "threshold 0.5 there, 0.4 now" in err
    other = [word if word != command[3] else make_bundle("other", seed=1) for word in command]
    _, err = seg(capsys, *other, code=2)
    assert "model" in err
    assert part_digests(run) == before


@pytest.mark.usefixtures("without_actors")
def test_what_is_missing_is_done_and_nothing_else(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = part_digests(run)
    lost = sorted(whole)[1]
    (run / "tiles" / lost).unlink()
    kept = {p: p.stat().st_mtime_ns for p in (run / "tiles").iterdir()}
    seg(capsys, *command)
    assert part_digests(run) == whole
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


@pytest.mark.usefixtures("without_actors")
def test_an_unreadable_window_is_a_recorded_failure_and_the_rest_is_finished(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(make_scene("region/a.tif", 1200, 600))
    make_scene("region/b.tif", 64, 64)
    path.write_bytes(path.read_bytes()[:1_800_000])  # the header is there, the last blocks are not
    command = ["segment", path.parent, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    out, err = seg(capsys, *command, "--json", code=1)
    counts = json.loads(out)
    assert 0 < counts["failed"] < 190
    assert counts["tiles"] + counts["failed"] == 19 * 10 + 1
    assert "tiles failed" in err
    failed = [row for row in rows_of(tmp_path / "run") if row["status"] == "failed"]
    assert all("a.tif" in row["error"] and row["valid_px"] is None and row["mask"] is None for row in failed)
    assert verify(str(tmp_path / "run")).ok
    seg(capsys, "verify", tmp_path / "run", code=1)
    seg(capsys, *command, code=1)  # tries the failed parts again


@pytest.mark.usefixtures("without_actors")
def test_the_next_run_redoes_the_parts_that_hold_a_failed_tile(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = part_digests(run)
    plan = read_plan(str(run))
    part = next(iter(plan.parts()))
    rows = failed_rows(part.scene, part.window, 64, Failure("ReadError", "a lost disk"))
    write_part(str(run), part.key, rows, plan.model, part.version)
    assert part_digests(run) != whole
    seg(capsys, *command)
    assert part_digests(run) == whole


def remake_masks(run: Path, encode: Callable[[NDArray[np.bool_]], bytes]) -> None:
    """Write a run again, with the masks of tiles that are all valid encoded by that function."""
    plan = read_plan(str(run))
    for part in plan.parts():
        rows = read_part(part_path(str(run), part.key))
        for row in rows:
            if row["mask"] is not None and row["valid"] is None:  # all of its pixels are valid
                row["mask"] = encode(decode_mask(row["mask"], row["height"], row["width"]))
        write_part(str(run), part.key, rows, plan.model, part.version)


@pytest.mark.usefixtures("without_actors")
def test_windows_segmented_again_say_what_is_stored(
    command: list[object], run: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    number = len(part_digests(run))
    assert json.loads(seg(capsys, "verify", run, "--deep", "--json")[0])["rechecked"] == number
    assert json.loads(seg(capsys, "verify", run, "--deep", "2", "--json")[0])["rechecked"] == 2
    _, err = seg(capsys, "verify", run, "--deep", "--model", make_bundle("other", seed=1), code=2)
    assert "the run was made with" in err

    plan = read_plan(str(run))
    remake_masks(run, lambda mask: encode_png(mask.astype(np.uint8) * 255))  # as another version may write them
    seg(capsys, "verify", run, "--deep")
    remake_masks(run, lambda mask: encode_mask(mask[::-1]))  # with as many pixels of building
    seg(capsys, "verify", run)
    assert "valid px stored" in seg(capsys, "verify", run, "--deep", code=1)[0]

    for part in plan.parts():  # rows that add up, and are wrong
        _, valid = read_chip(part.scene, part.window)
        rows = tile_rows(part.scene, part.window, 64, window_figures(valid.astype(np.float32), valid, 64))
        write_part(str(run), part.key, rows, plan.model, part.version)
    seg(capsys, "verify", run)
    out, err = seg(capsys, "verify", run, "--deep", code=1)
    assert "valid px stored" in out
    repair = err.partition(" removes")[0].split()[1:]  # as it says
    there = [str(path) for path in sorted(run.glob("tiles/*"))]
    assert json.loads(seg(capsys, *repair, "--json")[0])["removed"] == there
    seg(capsys, *command)
    seg(capsys, "verify", run, "--deep")
    _, err = seg(capsys, "repair", run, "part-none.parquet", code=2)
    assert "part-none.parquet: not a part of" in err


@pytest.mark.usefixtures("without_actors")
def test_a_run_of_the_built_in_model_is_segmented_again_where_the_package_lies_elsewhere(
    finished: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record, model = run / "run.json", str(finished / "model")
    assert model in record.read_text()
    record.write_text(record.read_text().replace(model, str(tmp_path / "gone")))
    shutil.copytree(model, tmp_path / "elsewhere")
    _, err = seg(capsys, "verify", run, "--deep", "1", code=2)
    assert str(tmp_path / "gone") in err
    monkeypatch.setattr("seg_core.inference.recheck.BUILT_IN", str(tmp_path / "elsewhere"))
    assert json.loads(seg(capsys, "verify", run, "--deep", "1", "--json")[0])["rechecked"] == 1


@pytest.mark.usefixtures("without_actors")
def test_repair_removes_the_parts_that_do_not_hold_and_the_next_run_makes_them_again(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, plan = part_digests(run), read_plan(str(run))
    assert json.loads(seg(capsys, "repair", run, "--json")[0])["removed"] == []
    part = list(plan.parts())[1]
    rows = read_part(part_path(str(run), part.key))
    write_part(str(run), part.key, [*rows[:-1], {**rows[-1], "building_px": 0}], plan.model, part.version)
    foreign = run / "tiles" / "part-foreign.parquet"
    foreign.write_bytes(b"PAR1")
    out, err = seg(capsys, "verify", run, code=1)
    assert "part-foreign.parquet: not a part of this run" in out
    assert "seg repair" in err
    removed = json.loads(seg(capsys, "repair", run, "--json")[0])["removed"]
    assert removed == [part_path(str(run), part.key), str(foreign)]
    assert set(part_digests(run)) == set(whole) - {Path(removed[0]).name}
    seg(capsys, *command)
    assert part_digests(run) == whole


@pytest.mark.usefixtures("without_actors")
def test_scenes_smaller_than_a_tile_are_segmented(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scene("tiny/one.tif", 1, 1)
    make_scene("tiny/two.tif", 30, 5)
    seg(capsys, "segment", tmp_path / "tiny", "--model", make_bundle(), "--out", tmp_path / "run")
    places = {(row["scene_id"], row["height"], row["width"], row["valid_px"]) for row in rows_of(tmp_path / "run")}
    assert places == {("one.tif", 1, 1, 1), ("two.tif", 30, 5, 150)}


@pytest.mark.usefixtures("without_actors")
def test_a_scene_without_crs_has_rows_without_areas(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = make_scene(crs=None, transform=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    _, err = seg(capsys, "segment", scene, "--model", make_bundle(), "--out", tmp_path / "run")
    assert "scene.tif: no CRS" in err
    for row in rows_of(tmp_path / "run"):
        assert row["geometry"] is row["bbox"] is row["area_m2"] is row["building_m2"] is None
        assert row["coverage"] is not None


@pytest.mark.usefixtures("without_actors")
def test_sixteen_bit_imagery_is_segmented_as_scaled(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = np.random.default_rng(3).integers(0, 256, (3, 90, 90)).astype(np.uint8)
    options = ["--model", make_bundle(), *SMALL, "--halo", "16"]
    seg(capsys, "segment", make_scene("a/s.tif", pixels=eight), "--out", tmp_path / "eight", *options)
    sixteen = make_scene("b/s.tif", pixels=eight.astype(np.uint16) * 10 + 100)
    _, err = seg(capsys, "segment", sixteen, "--out", tmp_path / "sixteen", *options, code=2)
    assert "--scale MIN MAX" in err
    seg(capsys, "segment", sixteen, "--out", tmp_path / "sixteen", *options, "--scale", "100", "2650")
    masks = [[row["mask"] for row in rows_of(tmp_path / name)] for name in ("eight", "sixteen")]
    assert masks[0] == masks[1]


@pytest.mark.usefixtures("without_actors")
def test_abutting_scenes_at_another_resolution_need_resampling(
    shared: Path, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", shared / "joplin", "--model", make_bundle(), "--out", tmp_path / "run"]
    _, err = seg(capsys, *command, code=2)
    assert "0.6 m per pixel" in err
    assert "--resample" in err
    assert not (tmp_path / "run").exists()
    out, _ = seg(capsys, *command, "--resample", "--json")
    counts = json.loads(out)
    assert counts["scenes"] == 4
    assert counts["area_km2"] == pytest.approx(4 * (1024 * 0.6) ** 2 / 1e6, rel=0.002)
    scenes = pq.read_table(tmp_path / "run" / "scenes").to_pylist()
    assert {(s["height"], s["width"], s["gsd_m"]) for s in scenes} == {(615, 615, 1.0)}
    assert verify(str(tmp_path / "run")).ok
    assert Path(part_path(str(tmp_path / "run"), next(read_plan(str(tmp_path / "run")).parts()).key)).exists()


@pytest.mark.usefixtures("without_actors")
def test_a_run_whose_parts_the_driver_does_not_see_is_not_finished(
    region: str,
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is where a worker on another node has written them to a disk of its own."""
    run, pipe = tmp_path / "run", aerial_seg.segment.run_pipe
    command = ["segment", region, "--model", make_bundle(), "--out", run, *SMALL]

    def lose_a_part(*arguments: Any) -> Iterator[Any]:
        yield from pipe(*arguments)
        next((run / "tiles").iterdir()).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(aerial_seg.segment, "run_pipe", lose_a_part)
        _, err = seg(capsys, *command, code=1)
    assert re.search(r"run: \d+ tiles are missing, though workers have segmented them", err)
    record = json.loads((run / "run.json").read_text())
    assert record["finished"] is None
    assert record["counts"]["missing"] > 0
    seg(capsys, *command)
    assert json.loads((run / "run.json").read_text())["counts"]["missing"] == 0


def test_a_worker_that_does_not_see_the_run_ends(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"elsewhere: the run that began there isn't seen from .*: use an --out on a"):
        PartSegmenter(make_bundle(), str(tmp_path / "elsewhere"), SETTINGS, WINDOW, RESOURCES, EXECUTION, "s")


@pytest.mark.usefixtures("without_actors")
def test_bfloat16_is_a_setting_of_the_run(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", region, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL[:-2]]
    seg(capsys, *command, "--precision", "bfloat16")
    assert read_plan(str(tmp_path / "run")).settings.precision == "bfloat16"
    out, _ = seg(capsys, "verify", tmp_path / "run", "--deep", "--json")
    assert json.loads(out)["rechecked"] > 1
    seg(capsys, *command)  # goes on in the precision that it began with
    _, err = seg(capsys, *command, "--precision", "float32", code=2)
    assert "precision bfloat16 there, float32 now" in err


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_ends_early_has_noted_that_its_rows_are_rounded(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(make_scene(height=300, width=300))
    path.write_bytes(path.read_bytes()[:200_000])
    command = ["segment", path, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL, "--precision", "bfloat16"]
    _, err = seg(capsys, *command, "--max-failures", "0", code=1)
    assert "more than --max-failures 0" in err
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["finished"], record["exact"]) == (None, False)


@pytest.mark.usefixtures("without_actors")
def test_the_seam_is_looked_at_where_there_is_data_and_forgotten_with_its_scene(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 250, (3, 128, 256)).astype(np.uint8)
    pixels[:, :64] = 255  # the first tile beside the border holds nothing
    scene = make_scene(pixels=pixels, nodata=255)
    command = ["segment", scene, "--model", make_bundle(), "--out", tmp_path / "run", *SMALL, "--json"]
    out, _ = seg(capsys, *command)
    assert json.loads(out)["seam_disagreement"] == 0.0
    pixels[:, :, 60:] = 255  # now no tile beside it holds any
    make_scene(pixels=pixels, nodata=255)
    out, _ = seg(capsys, *command)
    assert json.loads(out)["seam_disagreement"] is None


@pytest.mark.usefixtures("without_actors")
def test_a_finished_run_that_is_worked_on_again_is_finished_only_at_the_end(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = seg(capsys, *command)  # nothing to do
    next(iter((run / "tiles").iterdir())).unlink()

    def away(_: str) -> Json:
        raise SegError("S3 is away")

    with monkeypatch.context() as broken:
        broken.setattr("aerial_seg.segment.summary", away)
        seg(capsys, *command, code=1)  # it has begun
    assert json.loads((run / "run.json").read_text())["finished"] is None
    again, _ = seg(capsys, *command)
    assert again == first
    assert json.loads((run / "run.json").read_text())["finished"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_another_driver_did_while_ray_started_is_not_done_again(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = next(iter((run / "tiles").iterdir()))
    content = part.read_bytes()
    part.unlink()

    @contextmanager
    def start(*_: object, **__: object) -> Iterator[None]:
        part.write_bytes(content)
        yield

    monkeypatch.setattr("aerial_seg.segment.ray_session", start)
    assert not part.exists()
    _, err = seg(capsys, *command)
    assert "windows" not in err
    assert part.read_bytes() == content


@pytest.mark.usefixtures("without_actors")
def test_what_another_driver_noted_at_its_end_stays(
    command: list[object], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, find = read_record(str(run)), aerial_seg.segment.parts_to_do
    write_record(str(run), replace(record, finished=None, seconds=None))

    def find_while_another_ends(out: str, plan: Plan) -> list[Part]:
        found = find(out, plan)
        write_record(out, replace(record, seconds=4000.0, exact=False))
        return found

    monkeypatch.setattr(aerial_seg.segment, "parts_to_do", find_while_another_ends)
    seg(capsys, *command)
    assert (read_record(str(run)).seconds, read_record(str(run)).exact) == (4000.0, False)


@pytest.mark.usefixtures("ray_cluster")
def test_the_reason_why_workers_stopped_is_in_our_words_alone() -> None:
    def refuse(_: Any) -> NoReturn:
        raise JobError(reason)

    class Refuser:
        def __call__(self, _: Any) -> Iterator[NoReturn]:
            yield refuse(_)

    reason = "run/tiles/a: can't be written: Disk quota exceeded"
    rows, actors = ray.data.range(1), ray.data.ActorPoolStrategy(size=1)
    reasons = []
    for dataset in (rows.map_batches(refuse), rows.map_batches(Refuser, compute=actors)):
        with pytest.raises(ray.exceptions.RayError) as raised:
            dataset.take_all()
        reasons.append(_reason(raised.value))
    assert reasons == [reason, reason]
