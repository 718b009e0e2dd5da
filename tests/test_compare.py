"""Two runs on the same ground: what is gained, lost and kept, pixel by pixel."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from conftest import MakeBundle
from runs import SETTINGS, build_run, read_part, rows_of
from seg_command import SMALL, seg

from seg_core.errors import SegError
from seg_core.run.compare import CHANGES, COLOURS, GAINED, KEPT, LOST, NONE, compare_runs, describe_differences
from seg_core.run.export_masks import read_mask
from seg_core.run.plan import Settings
from seg_core.run.query import summary
from seg_core.run.rethreshold import rethreshold
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part

Capture = pytest.CaptureFixture[str]
KEEPING = replace(SETTINGS, keep_probability=True)
SCENES = ("north/a.tif", "south/b.tif")


@pytest.fixture
def before(tmp_path: Path) -> str:
    """A run of two scenes, of which one holds a block without data."""
    return build_run(tmp_path, settings=KEEPING)[0]


@pytest.fixture
def after(before: str, tmp_path: Path) -> str:
    """The same run, with the masks of another date: turned by half, as far as all pixels of a tile are valid."""
    return changed(before, str(tmp_path / "after"))


def changed(run: str, out: str) -> str:
    from seg_core.run.rows import decode_mask, encode_mask

    rethreshold(run, 0.5, out)
    plan = read_plan(out)
    for part in plan.parts():
        rows = read_part(part_path(out, part.key))
        for row in rows:
            if row["valid"] is None and row["mask"] is not None:
                row["mask"] = encode_mask(decode_mask(row["mask"], row["height"], row["width"])[::-1, ::-1].copy())
        write_part(out, part.key, rows, plan.model, part.version)
    return out


def expected_change(before: str, after: str, scene_id: str) -> np.ndarray[Any, Any]:
    one, two = (read_mask(run, scene_id) for run in (before, after))
    is_one, is_two = one == 1, two == 1
    change = np.select([is_one & is_two, ~is_one & is_two, is_one & ~is_two], [KEPT, GAINED, LOST], NONE)
    return np.where((one == 255) | (two == 255), 255, change)


def test_each_pixel_is_none_kept_gained_or_lost(before: str, after: str, tmp_path: Path, capsys: Capture) -> None:
    out, rasters = tmp_path / "change.parquet", tmp_path / "change"
    found = json.loads(seg(capsys, "compare", before, after, "--out", out, "--rasters", rasters, "--json")[0])
    each = {scene_id: expected_change(before, after, scene_id) for scene_id in SCENES}
    for scene_id, expected in each.items():
        with rasterio.open(rasters / scene_id) as file:
            assert [file.colormap(1)[value][:3] for value in (KEPT, GAINED, LOST)] == [
                COLOURS[value] for value in (KEPT, GAINED, LOST)
            ]
            assert np.array_equal(file.read(1), expected)
            assert file.nodata == 255
    pixels = np.concatenate([expected.ravel() for expected in each.values()])
    for name, value in (("kept", KEPT), ("gained", GAINED), ("lost", LOST)):
        assert found[f"{name}_px"] == (pixels == value).sum() > 0
    assert found["compared_px"] == (pixels != 255).sum() == summary(before)["valid_px"]
    assert found["coverage_before"] == summary(before)["coverage"]
    assert found["coverage_after"] == summary(after)["coverage"]
    assert found["kept_km2"] + found["lost_km2"] == pytest.approx(summary(before)["building_km2"])
    assert found["kept_km2"] + found["gained_km2"] == pytest.approx(summary(after)["building_km2"])
    assert (found["tiles"], found["unknown"]) == (len(rows_of(before)), 0)

    rows = geopandas.read_parquet(out)
    assert pq.read_schema(out).names == CHANGES.names
    assert rows.columns.to_list() == CHANGES.names[:-1]  # geopandas takes the bounds for what they are
    assert len(rows) == found["tiles"]
    for row in rows.to_dict("records"):
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        tile = each[row["scene_id"]][at]
        assert row["gained_px"] == (tile == GAINED).sum()
        assert row["compared_px"] == (tile != 255).sum()
    assert rows["lost_m2"].sum() == pytest.approx(found["lost_km2"] * 1e6)
    assert rows.crs == "OGC:CRS84"


def test_a_run_and_itself_are_the_same(before: str, tmp_path: Path) -> None:
    found = compare_runs(before, before, rasters=str(tmp_path / "change"))
    assert found.pixels["gained"] == found.pixels["lost"] == 0
    assert found.pixels["kept"] == summary(before)["building_px"]
    with rasterio.open(tmp_path / "change" / SCENES[0]) as file:
        assert set(np.unique(file.read(1))) == {NONE, KEPT, 255}


def test_tiles_that_one_run_lacks_are_unknown(before: str, tmp_path: Path, capsys: Capture) -> None:
    other, plan = build_run(tmp_path / "other", settings=KEEPING, failed_parts=[1])
    lost = list(plan.parts())[3]
    Path(part_path(other, lost.key)).unlink()
    table = tmp_path / "change.parquet"
    out, err = seg(capsys, "compare", before, other, "--rasters", tmp_path / "change", "--out", table, "--json")
    found = json.loads(out)
    outlines = {(row["scene_id"], row["row_off"], row["col_off"]): row["geometry"] for row in rows_of(before)}
    rows = pq.read_table(table).to_pylist()
    assert {(row["scene_id"], row["row_off"], row["col_off"]): row["geometry"] for row in rows} == outlines
    assert all(row["bbox"] and row["tile_row"] == row["row_off"] // 32 for row in rows)
    unknown = [part for number, part in enumerate(plan.parts()) if number in {1, 3}]
    tiles = sum(-(-part.window.height // 32) * -(-part.window.width // 32) for part in unknown)
    assert (found["unknown"], found["tiles"]) == (tiles, plan.counts["tiles"])
    assert f"{tiles} of {found['tiles']} tiles failed or are not done in one of the runs" in err
    with rasterio.open(tmp_path / "change" / SCENES[0]) as file:
        change = file.read(1)
    for part in unknown:
        assert (change[part.window.slices(part.scene.window)] == 255).all()
    assert seg(capsys, "compare", other, before, "--json")[0] != ""


def test_runs_that_differ_in_more_than_their_imagery_are_noted(before: str, tmp_path: Path, capsys: Capture) -> None:
    other, _ = build_run(tmp_path / "other", settings=replace(KEEPING, threshold=0.65))
    for options in ([], ["--grid", "50"]):
        _, err = seg(capsys, "compare", before, other, *options, "--json")
        assert err == "the runs differ in threshold 0.5 and 0.65: part of the change may come from that\n"
    assert seg(capsys, "compare", before, before, "--json")[1] == ""
    record = json.loads(Path(other, "run.json").read_text())
    model = record["model"]["hash"][:8]
    record["model"]["hash"] = "0123456789"
    record["settings"]["normalize"] = "scene"
    Path(other, "run.json").write_text(json.dumps(record))
    differences = ["threshold 0.5 and 0.65", f"model {model} and 01234567", "normalize model and scene"]
    assert describe_differences(before, other) == differences


@pytest.mark.usefixtures("without_actors")
def test_two_images_of_other_names_on_one_grid_are_compared(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    scene, model = Path(region) / "north.tif", make_bundle()
    later = (tmp_path / "later.tif").as_posix()
    Path(later).write_bytes(scene.read_bytes())
    for name, path, threshold in (("one", scene, "0.4"), ("two", later, "0.6")):
        options = ["--model", model, *SMALL, "--threshold", threshold]
        seg(capsys, "segment", path, *options, "--out", tmp_path / name)
    found = compare_runs(str(tmp_path / "one"), str(tmp_path / "two"))
    assert found.pixels["gained"] == 0 < found.pixels["lost"]
    assert found.pixels["kept"] == summary(str(tmp_path / "two"))["building_px"]


def shift(run: str, **changes: Any) -> None:
    """Change what the table of scenes says of the first scene, and the record with it."""
    from seg_core.run.record import PlanFigures, read_record, write_record
    from seg_core.run.tables import write_scenes

    plan = read_plan(run)
    plan = replace(plan, scenes=(replace(plan.scenes[0], **changes), *plan.scenes[1:]))
    record = read_record(run)
    record.plan = PlanFigures.of(plan)
    write_scenes(run, plan.scenes)
    write_record(run, record)


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "shifted": (
        lambda run: shift(run, transform=(1.0, 0.0, 400_000.5, 0.0, -1.0, 5_800_000.0)),
        r"north/a\.tif: the runs have other grids, 0\.50 px apart: compare them by areas",
    ),
    "another crs": (lambda run: shift(run, crs="EPSG:32634"), "other grids, in EPSG:32633 and EPSG:32634"),
    "another size": (lambda run: shift(run, width=119), "other grids, of 120 x 100 and 119 x 100 px"),
    "another scene": (lambda run: shift(run, scene_id="north/c.tif"), r"north/a\.tif: a scene of the first run alone"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_runs_of_other_grids_are_refused_with_the_reason(before: str, tmp_path: Path, kind: str) -> None:
    other, _ = build_run(tmp_path / "other", settings=KEEPING)
    change, message = REFUSED[kind]
    change(other)
    with pytest.raises(SegError, match=message):
        compare_runs(before, other)


def test_what_cannot_be_compared_is_refused_in_a_line(before: str, tmp_path: Path, capsys: Capture) -> None:
    other, _ = build_run(tmp_path / "other", settings=Settings(tile_size=32, part=32, halo=16, threshold=0.5))
    (tmp_path / "there.parquet").touch()
    for args, message in (
        ([before, other], "the runs have other tiles: part 64 and 32"),
        ([before, tmp_path / "none"], "none: no such run"),
        ([before, before, "--out", tmp_path / "change.gpkg"], "change.gpkg: is written as GeoParquet"),
        ([before, before, "--out", tmp_path / "there.parquet"], "there.parquet: already exists"),
    ):
        _, err = seg(capsys, "compare", *args, code=2)
        assert message in err
        assert err.count("\n") == 1


def test_a_comparison_that_fails_leaves_no_file(before: str, after: str, tmp_path: Path) -> None:
    part = list(read_plan(after).parts())[-1]
    Path(part_path(after, part.key)).write_bytes(b"PAR1")
    with pytest.raises(SegError, match=part.key):
        compare_runs(before, after, str(tmp_path / "change.parquet"))
    assert not [path.name for path in tmp_path.iterdir() if "change" in path.name]
