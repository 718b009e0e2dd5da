"""Another threshold without segmenting again: the rows are those that segmenting would give."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeBundle, cut
from rasterio.windows import Window
from runs import build_run, published_parts, read_part, rows_of
from seg_command import SMALL, seg

from seg_core.errors import SegError
from seg_core.run.plan import Settings
from seg_core.run.query import summary
from seg_core.run.rethreshold import measure_curve, nearest_level, rethreshold, threshold_of
from seg_core.run.rows import encode_png
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part
from seg_core.run.verify import verify

Capture = pytest.CaptureFixture[str]
KEPT = Settings(tile_size=32, part=64, halo=16, threshold=0.5, keep_probability=True)


def test_thresholds_that_are_known_are_between_levels() -> None:
    assert threshold_of(128) == 0.5
    assert nearest_level(0.5) == 128
    assert all(nearest_level(threshold_of(level)) == level for level in range(1, 256))
    assert (nearest_level(1e-9), nearest_level(1 - 1e-9)) == (1, 255)


@pytest.mark.usefixtures("without_actors")
@pytest.mark.parametrize("mosaic", [False, True])
def test_a_run_at_another_threshold_has_the_rows_of_one_that_was_segmented_so(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture, mosaic: bool
) -> None:
    command = ["segment", region, "--model", make_bundle(), *SMALL, "--keep-probability", "--halo", "16"]
    command += ["--mosaic"] if mosaic else []
    seg(capsys, *command, "--out", tmp_path / "run")
    out, err = seg(capsys, "rethreshold", tmp_path / "run", "--threshold", "0.51", "--out", tmp_path / "new", "--json")
    exact = threshold_of(nearest_level(0.51))
    assert f"the threshold is {exact}, not 0.51" in err
    expected, _ = seg(capsys, *command, "--threshold", str(exact), "--out", tmp_path / "anew", "--json")
    assert rows_of(tmp_path / "new") == rows_of(tmp_path / "anew") != rows_of(tmp_path / "run")
    assert json.loads(out).items() <= json.loads(expected).items()
    seg(capsys, "verify", tmp_path / "new", "--deep")
    _, err = seg(capsys, *command, "--threshold", str(exact), "--out", tmp_path / "new")
    assert "nothing to do" in err


@pytest.mark.usefixtures("without_actors")
def test_real_imagery_at_another_threshold_is_as_segmented_so(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    cut(shared / "brookline/region.tif", tmp_path / "region.tif", Window(430, 0, 768, 768))
    command = ["segment", tmp_path / "region.tif", "--tile-size", "256", "--keep-probability"]
    seg(capsys, *command, "--out", tmp_path / "run")
    exact = str(threshold_of(nearest_level(0.7)))
    seg(capsys, "rethreshold", tmp_path / "run", "--threshold", exact, "--out", tmp_path / "new")
    seg(capsys, *command, "--threshold", exact, "--out", tmp_path / "anew")
    assert rows_of(tmp_path / "new") == rows_of(tmp_path / "anew")
    assert 0 < summary(str(tmp_path / "new"))["building_px"] < summary(str(tmp_path / "run"))["building_px"]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run of two scenes that keeps probabilities. One part has failed."""
    return build_run(tmp_path, settings=KEPT, failed_parts=[1])[0]


def test_coverage_at_each_threshold_is_that_of_a_run_at_it(run: str, tmp_path: Path, capsys: Capture) -> None:
    curve = measure_curve(run).rows()
    assert len(curve) == 255
    assert curve[127]["building_px"] == summary(run)["building_px"]
    for level in (1, 40, 255):
        new = str(tmp_path / f"at-{level}")
        rethreshold(run, threshold_of(level), new)
        found = {name: summary(new)[name] for name in ("building_px", "coverage", "building_km2")}
        expected = {**curve[level - 1]}
        assert expected.pop("threshold") == threshold_of(level)
        assert found == pytest.approx(expected)
    assert json.loads(seg(capsys, "rethreshold", run, "--json")[0]) == {"curve": curve}
    head, *lines = seg(capsys, "rethreshold", run)[0].splitlines()
    assert head.split() == ["threshold", "building_px", "coverage", "building_km2"]
    assert len(lines) == 17


def test_failed_tiles_stay_failed_and_missing_parts_missing(run: str, tmp_path: Path, capsys: Capture) -> None:
    new = str(tmp_path / "new")
    lost = published_parts(run)[-1]
    Path(lost).unlink()
    _, err = seg(capsys, "rethreshold", run, "--threshold", "0.5", "--out", new)
    assert f"{new}: 1 parts are not done yet" in err
    assert "the threshold is" not in err
    assert rows_of(new) == rows_of(run)
    assert {row["status"] for row in rows_of(new)} == {"done", "failed"}
    assert json.loads(Path(new, "run.json").read_text())["finished"] is None
    assert verify(new).num_missing_parts == 1


def test_the_same_command_goes_on_and_finishes(run: str, tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    record = rethreshold(run, 0.3, new)
    before = rows_of(new)
    Path(published_parts(new)[0]).unlink()
    reported: list[str] = []
    assert rethreshold(run, 0.3, new, reported.append).counts == record.counts
    assert rows_of(new) == before
    assert len(reported) == 2  # the part that was lost, and the one with failed tiles
    assert verify(new).ok


def test_what_cannot_be_done_is_refused_in_a_line(run: str, tmp_path: Path, capsys: Capture) -> None:
    without, _ = build_run(tmp_path / "without")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for args, message in (
        ([without], f"{without}: keeps no probabilities: segment with --keep-probability into another folder"),
        ([run, "--out", tmp_path / "new"], "--threshold, --out: a new run needs both"),
        ([run, "--threshold", "0.4"], "--threshold, --out: a new run needs both"),
        ([run, "--threshold", "1", "--out", tmp_path / "new"], "--threshold 1.0: use a probability between 0 and 1"),
        ([run, "--threshold", "nan", "--out", tmp_path / "new"], "--threshold nan: use a probability between 0 and 1"),
        ([run, "--threshold", "0.4", "--out", run], f"{run}: is a run with other settings (threshold 0.5 there, 0."),
        ([run, "--threshold", "0.4", "--out", tmp_path / "taken"], "exists and is not a run"),
    ):
        out, err = seg(capsys, "rethreshold", *args, code=2)
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == ["file"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [None, b"no picture", encode_png(np.zeros((32, 31), np.uint8))])
def test_a_damaged_probability_is_named(run: str, tmp_path: Path, content: bytes | None) -> None:
    part = next(read_plan(run).parts())
    rows: list[dict[str, Any]] = read_part(part_path(run, part.key))
    rows[0]["probability"] = content
    write_part(run, part.key, rows, read_plan(run).model, part.version)
    for ask in (lambda: measure_curve(run), lambda: rethreshold(run, 0.4, str(tmp_path / "new"))):
        with pytest.raises(SegError, match=r"north/a\.tif: tile 0, 0: the column probability (is not|has 31)"):
            ask()


def test_a_part_of_another_state_of_its_scene_is_not_taken(run: str, tmp_path: Path) -> None:
    part = next(read_plan(run).parts())
    rows = read_part(part_path(run, part.key))
    write_part(run, part.key, rows, read_plan(run).model, "of before")
    with pytest.raises(SegError, match=r"north/a\.tif: has changed since: repeat the seg segment command"):
        rethreshold(run, 0.4, str(tmp_path / "new"))


def test_scenes_without_crs_have_a_curve_without_areas(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, settings=KEPT)
    for part in plan.parts():
        rows = [{**row, "area_m2": None, "building_m2": None} for row in read_part(part_path(run, part.key))]
        write_part(run, part.key, rows, plan.model, part.version)
    assert {row["building_km2"] for row in measure_curve(run).rows()} == {None}
    shutil.rmtree(run)
    with pytest.raises(SegError, match="no such run"):
        measure_curve(run)
