"""The proof that a run is complete, and every damage that must break it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import SETTINGS, build_run, read_part
from runs import BuiltRun as Made
from seg_command import seg

from seg_core.errors import SegError
from seg_core.run.lease import acquire_lease
from seg_core.run.part_reading import read_versioned
from seg_core.run.parts import Location
from seg_core.run.resume import parts_to_do
from seg_core.run.rows import Failure, Row, decode_valid, encode_mask, encode_png, failed_rows
from seg_core.run.schema import TILES
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, scenes_path
from seg_core.run.verify import VerifyReport, repair, verify

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(*build_run(tmp_path_factory.mktemp("original")))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy of the run, whose scenes stay where they are."""
    return Made(str(shutil.copytree(original.run, tmp_path / "run")), original.plan)


def test_a_whole_run_holds(made: Made) -> None:
    assert made.verdict() == VerifyReport(num_planned=18, num_done=18, num_failed=0, problems=[])
    assert made.verdict().ok is True


def test_the_proof_needs_no_scene_and_no_model(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    shutil.rmtree(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "bundle")
    assert verify(run).ok


def test_windows_are_not_segmented_again_if_files_have_problems(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.path(1).write_bytes(b"no Parquet")
    out, err = seg(capsys, "verify", made.run, "--deep", "--json", code=1)
    assert (json.loads(out)["rechecked"], json.loads(out)["complete"]) == (0, False)
    assert "--deep: no window was segmented again" in err


def test_the_proof_changes_nothing(made: Made) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(made.run).rglob("*") if p.is_file()}
    made.verdict()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(made.run).rglob("*") if p.is_file()} == before


def test_failed_rows_are_counted_and_the_proof_still_holds(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, failed_parts={4})
    made = Made(run, plan)
    assert made.verdict() == VerifyReport(num_planned=18, num_done=16, num_failed=2, problems=[])
    part = made.parts[0]
    broken = list(failed_rows(part.scene, part.window, SETTINGS.tile_size, Failure("ReadError", "the disk said no")))
    made.rewrite(lambda rows: [broken[0], *rows[1:]])
    assert (made.verdict().num_done, made.verdict().num_failed, made.verdict().ok) == (15, 3, True)


def test_a_part_that_is_gone_is_named(made: Made) -> None:
    made.path(2).unlink()
    assert f"{made.path(2).name}: missing" in made.problems()
    assert "north/a.tif" in made.problems()
    assert made.verdict().num_done < made.verdict().num_planned


def test_all_parts_gone_are_named(made: Made) -> None:
    shutil.rmtree(Path(made.run, "tiles"))
    assert len(made.verdict().problems) == 5


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_part_is_named(made: Made, keep: float) -> None:
    content = made.path(1).read_bytes()
    made.path(1).write_bytes(content[: int(keep * len(content))])
    assert f"{made.path(1).name}: can't be read" in made.problems()


def test_a_part_of_damaged_pages_is_named(made: Made) -> None:
    content = bytearray(made.path(1).read_bytes())
    content[4:400] = bytes(396)
    made.path(1).write_bytes(content)
    assert made.path(1).name in made.problems()


def test_a_part_with_other_columns_is_named(made: Made) -> None:
    pq.write_table(pq.read_table(made.path(1)).drop_columns(["model"]), made.path(1))
    assert f"{made.path(1).name}: has no column model" in made.problems()


def test_a_foreign_part_is_named(made: Made) -> None:
    shutil.copy(made.path(0), Path(made.run, "tiles", "part-0123456789abcdef-0000000-0000000.parquet"))
    assert "part-0123456789abcdef-0000000-0000000.parquet: not a part of this run" in made.problems()


def test_a_part_of_a_foreign_grid_is_named(made: Made) -> None:
    key = made.parts[0].key.replace("-0000000-", "-0000032-", 1)
    shutil.copy(made.path(0), Path(part_path(made.run, key)))
    assert f"part-{key}.parquet: not a part of this run" in made.problems()


def test_a_file_that_is_not_published_yet_is_no_foreign_part(made: Made) -> None:
    Path(made.run, "tiles", ".partial-0123456789abcdef").write_bytes(b"PAR1")
    assert made.verdict().ok


def test_a_part_in_the_place_of_another_is_named(made: Made) -> None:
    shutil.copy(made.path(0), made.path(1))
    assert made.path(1).name in made.problems()


def test_a_part_of_another_scene_in_its_place_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [{**row, "scene_id": "south/b.tif"} for row in rows])
    assert made.path().name in made.problems()


def test_a_row_of_another_model_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [{**rows[0], "model": "0" * 32}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: belongs to another scene or model" in made.problems()


@pytest.mark.parametrize("index", [0, 3])
def test_a_row_that_is_missing_is_named(made: Made, index: int) -> None:
    row = read_part(str(made.path()))[index]
    made.rewrite(lambda rows: rows[:index] + rows[index + 1 :])
    place = (row["row_off"], row["col_off"], row["height"], row["width"])
    assert f"{made.path().name}: tile {place} has no row" in made.problems()


def test_a_row_that_is_there_twice_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [*rows, rows[2]])
    assert f"{made.path().name}: tile (32, 0, 32, 32) has 2 rows" in made.problems()


def test_a_failed_and_a_done_row_of_one_tile_are_named(made: Made) -> None:
    part = made.parts[0]
    broken = list(failed_rows(part.scene, part.window, SETTINGS.tile_size, Failure("ReadError", "the disk said no")))
    made.rewrite(lambda rows: [*rows, broken[0]])
    assert f"{made.path().name}: tile (0, 0, 32, 32) has 2 rows" in made.problems()


@pytest.mark.parametrize("change", [{"row_off": 16}, {"col_off": 64}, {"height": 31}, {"width": 33}])
def test_a_tile_that_was_not_planned_is_named(made: Made, change: Row) -> None:
    made.rewrite(lambda rows: [{**rows[0], **change}, *rows[1:]])
    assert "was not planned" in made.problems()
    assert "tile (0, 0, 32, 32) has no row" in made.problems()


@pytest.mark.parametrize("change", [{"tile_row": 1}, {"tile_col": 7}])
def test_a_wrong_tile_number_is_named(made: Made, change: Row) -> None:
    made.rewrite(lambda rows: [{**rows[0], **change}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: has the numbers of tile" in made.problems()


def test_a_mask_of_another_tile_is_named(made: Made) -> None:
    first, second = read_part(str(made.path()))[:2]
    assert first["building_px"] != second["building_px"]
    made.rewrite(lambda rows: [{**rows[0], "mask": second["mask"]}, *rows[1:]])
    assert (
        f"tile 0, 0: the mask has {second['building_px']} building px, the row has {first['building_px']}"
        in made.problems()
    )


@pytest.mark.parametrize(
    "mask",
    [None, b"", b"no picture", encode_mask(np.ones((32, 31), np.bool_)), encode_mask(np.ones((32, 32), np.bool_))],
)
def test_a_mask_that_is_not_the_rows_is_named(made: Made, mask: bytes | None) -> None:
    made.rewrite(lambda rows: [{**rows[0], "mask": mask}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: the mask" in made.problems()


@pytest.mark.parametrize(
    ("valid", "problem"),
    [
        (b"no picture", "the column valid is not a PNG"),
        (encode_mask(np.ones((32, 31), np.bool_)), "the column valid has 31 x 32 px, the tile has 32 x 32"),
        (encode_mask(np.eye(32, dtype=np.bool_)), "the column valid has 32 px, the row has"),
    ],
)
def test_valid_pixels_that_are_not_the_rows_are_named(made: Made, valid: bytes, problem: str) -> None:
    made.rewrite(lambda rows: [{**rows[0], "valid": valid}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: {problem}" in made.problems()


def test_building_where_nothing_is_valid_is_named(made: Made) -> None:
    rows = read_part(str(made.path()))
    number = next(number for number, row in enumerate(rows) if row["valid"] is not None and row["building_px"])
    valid = decode_valid(rows[number])
    assert valid is not None
    rows[number]["valid"] = encode_mask(valid[::-1, ::-1])
    made.rewrite(lambda _: rows)
    assert "building px are not valid" in made.problems()


def altered(made: Made, change: Callable[[Row], Row]) -> str:
    """The problems after a change to the figures of a done row."""
    made.rewrite(lambda rows: [{**rows[0], **change(rows[0])}, *rows[1:]])
    problems = made.problems()
    assert f"{made.path().name}: tile 0, 0: " in problems
    return problems


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"building_px": row["building_px"] - 1},
        lambda row: {"building_px": row["building_px"] + 1},
        lambda row: {"building_px": row["building_px"] + 1, "coverage": (row["building_px"] + 1) / row["valid_px"]},
        lambda _: {"building_px": 0, "coverage": 0.0},
        lambda _: {"building_px": None},
        lambda _: {"building_px": -1},
        lambda row: {"building_px": row["valid_px"] + 1},
    ],
)
def test_another_building_px_is_named(made: Made, change: Callable[[Row], Row]) -> None:
    altered(made, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"valid_px": row["valid_px"] - 1},
        lambda _: {"valid_px": None},
        lambda _: {"valid_px": 0},
        lambda row: {"valid_px": 32 * 32 + 1, "coverage": row["building_px"] / (32 * 32 + 1)},
    ],
)
def test_another_valid_px_is_named(made: Made, change: Callable[[Row], Row]) -> None:
    altered(made, change)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"coverage": row["coverage"] + 1e-9},
        lambda _: {"coverage": None},
        lambda _: {"coverage": float("nan")},
        lambda _: {"coverage": 0.0},
    ],
)
def test_another_coverage_is_named(made: Made, change: Callable[[Row], Row]) -> None:
    assert "coverage" in altered(made, change)


def test_coverage_of_a_tile_without_valid_pixels_must_be_null(made: Made) -> None:
    empty = [(n, i) for n in range(5) for i, row in enumerate(read_part(str(made.path(n)))) if row["valid_px"] == 0]
    part, index = empty[0]
    made.rewrite(lambda rows: [{**row, "coverage": 0.0} if i == index else row for i, row in enumerate(rows)], part)
    assert "coverage 0.0 is not 0 / 0" in made.problems()


@pytest.mark.parametrize("mean", [None, float("nan"), -0.01, 1.01])
def test_a_mean_probability_that_is_none_is_named(made: Made, mean: float | None) -> None:
    assert f"mean_probability {mean} of" in altered(made, lambda _: {"mean_probability": mean})


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"building_m2": row["building_m2"] * 1.001},
        lambda row: {"area_m2": row["area_m2"] * 0.999},
        lambda _: {"building_m2": -5.0, "area_m2": 1e12},
        lambda row: {"building_m2": -row["building_m2"], "area_m2": -row["area_m2"]},
        lambda _: {"building_m2": None},
        lambda _: {"area_m2": None},
        lambda _: {"area_m2": float("nan")},
    ],
)
def test_areas_that_do_not_fit_the_pixels_are_named(made: Made, change: Callable[[Row], Row]) -> None:
    assert "building_m2" in altered(made, change)


@pytest.mark.parametrize(("crs", "corner"), [(None, (0.0, 0.0)), ("EPSG:3413", (-50.0, 50.0))])
def test_areas_hold_without_a_crs_and_at_a_pole(tmp_path: Path, crs: str | None, corner: tuple[float, float]) -> None:
    run, _ = build_run(tmp_path, crs=crs, corner=corner)
    assert verify(run, again=True).ok


def test_areas_of_a_tile_that_can_not_be_measured_hold(made: Made) -> None:
    made.rewrite(lambda rows: [{**row, "area_m2": float("nan"), "building_m2": float("nan")} for row in rows])
    assert made.verdict().ok


@pytest.mark.parametrize("png", [None, b"no PNG", encode_png(np.zeros((32, 31), np.uint8))])
def test_a_kept_probability_that_can_not_be_read_is_named(tmp_path: Path, png: bytes | None) -> None:
    kept = Made(*build_run(tmp_path, settings=replace(SETTINGS, keep_probability=True), failed_parts=[2]))
    assert verify(kept.run, again=True).ok
    assert "the column probability" in altered(kept, lambda _: {"probability": png})


@pytest.mark.parametrize("status", ["unknown", "", "DONE", "Failed"])
def test_an_unknown_status_is_named(made: Made, status: str) -> None:
    made.rewrite(lambda rows: [{**rows[0], "status": status}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: status '{status}'" in made.problems()


def test_a_failed_row_without_a_reason_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [{**rows[0], "status": "failed"}, *rows[1:]])
    assert "tile 0, 0: status 'failed', error None" in made.problems()


def test_a_failed_row_with_figures_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [{**rows[0], "status": "failed", "error": "it said no"}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: " in made.problems()


def test_a_done_row_with_an_error_is_named(made: Made) -> None:
    made.rewrite(lambda rows: [{**rows[0], "error": "the disk said no"}, *rows[1:]])
    assert f"{made.path().name}: tile 0, 0: " in made.problems()


def test_all_problems_are_listed(made: Made) -> None:
    made.path(3).unlink()
    made.rewrite(lambda rows: [{**row, "coverage": None} for row in rows])
    made.rewrite(lambda rows: rows[1:], part=1)
    assert len(made.verdict().problems) == 1 + 4 + 1


def test_a_scene_that_is_dropped_with_its_parts_is_noticed(made: Made) -> None:
    made.path(4).unlink()
    table = pq.read_table(Path(scenes_path(made.run)))
    pq.write_table(table.slice(0, 1), Path(scenes_path(made.run)))
    noticed(made)


def test_a_scene_that_is_made_smaller_with_its_parts_is_noticed(made: Made) -> None:
    for number in (1, 2, 3):
        made.path(number).unlink()
    table = pq.read_table(Path(scenes_path(made.run)))
    smaller = [{**row, "height": min(64, row["height"]), "width": min(64, row["width"])} for row in table.to_pylist()]
    pq.write_table(type(table).from_pylist(smaller, schema=table.schema), Path(scenes_path(made.run)))
    noticed(made)


@pytest.mark.parametrize(("name", "value"), [("threshold", 0.6), ("halo", 32), ("bands", [3, 2, 1])])
def test_settings_that_were_altered_afterwards_are_noticed(made: Made, name: str, value: Any) -> None:
    path = Path(made.run, "run.json")
    record = json.loads(path.read_text())
    record["settings"][name] = value
    path.write_text(json.dumps(record))
    noticed(made)


def noticed(made: Made) -> None:
    """Assert that a run whose plan is not the one it was made with is no proof: refused, or named as a problem."""
    try:
        assert made.verdict().ok is False
    except SegError as refusal:
        assert made.run in str(refusal)  # noqa: PT017  both ways of saying so are fine


def test_the_plan_is_read_from_the_run_itself(made: Made) -> None:
    assert read_plan(made.run) == made.plan


@pytest.mark.parametrize("name", ["run.json", "scenes/scenes.parquet"])
def test_a_run_without_its_record_or_scenes_is_refused(made: Made, name: str) -> None:
    Path(made.run, name).unlink()
    with pytest.raises(SegError):
        made.verdict()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SegError, match="not a run"):
        verify(str(tmp_path))
    with pytest.raises(SegError, match="nowhere: no such run"):
        verify(str(tmp_path / "nowhere"))


def test_the_helper_damages_only_what_it_is_told_to(made: Made) -> None:
    before = made.path().read_bytes()
    made.rewrite(lambda rows: rows)
    assert made.path().read_bytes() == before
    assert pq.read_schema(made.path()).equals(TILES)
    assert len(os.listdir(Path(made.run, "tiles"))) == 5


def refuse(*_: object) -> None:
    raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")


def test_a_part_that_arrow_cannot_fetch_is_fetched_in_another_way(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_versioned(Location(str(made.path())))
    closed = SimpleNamespace(open_input_file=refuse)
    monkeypatch.setattr("seg_core.run.parquet.filesystem", lambda path: (closed, path))
    assert read_versioned(Location(str(made.path()))) == expected


def test_parts_that_cannot_be_read_are_not_taken_for_damaged(made: Made) -> None:
    made.path().unlink()
    made.path().symlink_to("/proc/self/mem")  # whose first bytes are an input/output error
    for find_out in (made.verdict, lambda: parts_to_do(made.run, made.plan), lambda: repair(made.run)):
        with pytest.raises(SegError, match=r"can't be read: Input/output error$"):
            find_out()
    assert all(os.path.lexists(made.path(number)) for number in range(len(made.parts)))


def test_a_run_is_not_repaired_while_a_driver_is_at_work(made: Made) -> None:
    made.path().write_bytes(b"")
    with acquire_lease(made.run), pytest.raises(SegError, match="another driver is at work on this run"):
        repair(made.run)
    assert made.path().exists()
    assert repair(made.run).bad_parts == [str(made.path())]
    assert not made.path().exists()
