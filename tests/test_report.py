"""The page of a run: its figures, what it shows of each tile, its size, and what it says where something is missing."""

import base64
import json
import re
import shutil
import sys
from dataclasses import replace
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import UTM, MakeScene
from runs import SETTINGS, BuiltRun, Mask, bare_scene, build_run, fill_run, plan_scenes, rows_of
from seg_command import seg

from seg_core.grid import Window
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene
from seg_core.report import cells as cells_module
from seg_core.report import crops as crops_module
from seg_core.report import quicklook as quicklook_module
from seg_core.report.cell_columns import make_columns
from seg_core.report.cells import Cells, make_cells
from seg_core.report.crops import Crops, choose_cells, cut_crops
from seg_core.report.frame import LONLAT, choose_frame
from seg_core.report.page import make_page
from seg_core.report.quicklook import draw_quicklook
from seg_core.report.texts import area_text, duration_text, share_text
from seg_core.report.tiles import SUMS, Best, Tally, add_up
from seg_core.run.plan import Plan
from seg_core.run.query import summary
from seg_core.run.record import SeamCounts, read_record, write_record
from seg_core.run.rows import Row
from seg_core.run.stored_plan import read_plan
from seg_core.storage.files import upload

pytestmark = pytest.mark.usefixtures("in_this_process")

LARGEST = 15_000_000  # bytes of a page


def scene_at(scene_id: str, height: int, width: int, x: float = 400_000.0, crs: str | None = UTM) -> Scene:
    """A scene without a file, of 1 m a pixel, with that western edge."""
    place = (1.0, 0.0, x, 0.0, -1.0, 5_800_000.0)
    return bare_scene(height, width, scene_id=scene_id, crs=crs, transform=place, gsd_m=None if crs is None else 1.0)


def fill(run: str, plan: Plan) -> None:
    """Write rows without imagery: a mask of ever more pixels in each tile."""
    numbers = count(1)

    def mask(tile: Window) -> Mask:
        building = next(numbers) % tile.num_pixels
        return np.arange(tile.num_pixels).reshape(tile.shape) < building

    fill_run(run, plan, mask)


def tally_of(run: str, plan: Plan, most: int = 1000) -> Tally:
    return add_up(run, plan, make_cells(plan, choose_frame(plan.images), most))


def columns_of(run: str, plan: Plan, most: int = 1000) -> dict[str, dict[str, Any]]:
    """What the map shows of each cell, by its name."""
    columns = make_columns(tally_of(run, plan, most), choose_frame(plan.images), Crops())
    return {name: {column: values[at] for column, values in columns.items()} for at, name in enumerate(columns["name"])}


def text_of(html: str) -> str:
    """The page without the library and the data of its charts."""
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


@pytest.fixture
def built(tmp_path: Path) -> BuiltRun:
    """A run of two scenes: the parts are done, failed, missing, done and done."""
    run, plan = build_run(tmp_path, failed_parts=[1])
    found = BuiltRun(run, plan)
    found.path(2).unlink()
    return found


@pytest.mark.parametrize("most", [1000, 10, 4, 1])
def test_cells_add_up_to_the_figures_of_the_run(built: BuiltRun, most: int) -> None:
    tally, whole = tally_of(built.run, built.plan, most), summary(built.run)
    assert tally.figures() == pytest.approx(whole)
    np.testing.assert_allclose(tally.by_cell.sum(axis=0), tally.by_image.sum(axis=0))
    assert tally.cells.num_cells <= max(most, 1)
    assert tally.cells.planned.sum() == whole["planned"]
    assert tally.histogram.sum() == sum(row["valid_px"] > 0 for row in done_rows(built))


def test_a_run_without_a_crs_has_no_areas(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, crs=None)
    assert tally_of(run, plan).figures() == pytest.approx(summary(run))
    cell = columns_of(run, plan)["north/a.tif, tile 0, 0"]
    assert cell["valid"] == "1,024 px"


def done_rows(built: BuiltRun) -> list[Row]:
    return [row for row in rows_of(built.run) if row["status"] == "done"]


def test_a_cell_of_several_tiles_has_the_coverage_of_their_pixels(built: BuiltRun) -> None:
    tally = tally_of(built.run, built.plan, 4)
    rows, cells = done_rows(built), tally.cells
    numbers = {image.scene_id: number for number, image in enumerate(built.plan.images)}
    places = [(numbers[row["scene_id"]], row["tile_row"], row["tile_col"]) for row in rows]
    at = cells.find(*np.array(places).T)
    for cell in range(cells.num_cells):
        inside = [row for row, where in zip(rows, at, strict=True) if where == cell]
        for name in ("valid_px", "building_px", "area_m2"):
            assert tally.by_cell[cell, SUMS.index(name)] == pytest.approx(sum(row[name] for row in inside))


def test_failed_missing_and_empty_tiles_differ_from_those_without_building(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, failed_parts=[1], missing=np.s_[0:32, 0:32])
    built = BuiltRun(run, plan)
    built.path(2).unlink()

    def without_building(rows: list[Row]) -> list[Row]:
        return [{**row, "building_px": 0, "coverage": 0.0, "building_m2": 0.0, "mask": None} for row in rows]

    built.rewrite(without_building, part=3)
    shown = columns_of(run, plan)
    expected = {"0, 0": "done, without data", "0, 2": "failed", "2, 0": "not done yet", "2, 2": "done", "1, 1": "done"}
    looks = {}
    for place, state in expected.items():
        cell = shown[f"north/a.tif, tile {place}"]
        assert cell["state"] == state
        looks[place] = tuple(cell[name] for name in ("fill", "hatch", "hatch_color", "line"))
    assert len(set(looks.values())) == len(looks)
    assert shown["north/a.tif, tile 2, 2"]["coverage"] == "0.0 %"
    assert shown["north/a.tif, tile 2, 2"]["hatch"] == " "
    assert shown["north/a.tif, tile 0, 0"]["coverage"] == "–"


def test_a_block_says_that_some_of_its_tiles_failed_or_are_missing(built: BuiltRun) -> None:
    shown = columns_of(built.run, built.plan, 3)
    (whole,) = (cell for name, cell in shown.items() if name.startswith("north"))
    assert whole["state"] == "4 failed, 4 not done yet, 8 done"
    assert whole["line"] == "#d62728"
    assert whole["hatch"] == " "
    assert whole["coverage"].endswith(" %")


def test_scenes_in_one_crs_are_drawn_in_it(built: BuiltRun) -> None:
    frame = choose_frame(built.plan.images)
    assert frame.crs == UTM
    assert "EPSG:32633" in frame.describe()
    cell = columns_of(built.run, built.plan)["north/a.tif, tile 1, 0"]
    assert sorted(set(cell["xs"])) == [400_000, 400_032]
    assert sorted(set(cell["ys"])) == [5_800_000 - 64, 5_800_000 - 32]


def test_scenes_in_several_crs_are_drawn_in_degrees_across_the_antimeridian_too() -> None:
    east = replace(scene_at("east.tif", 100, 100), crs="EPSG:32660", transform=(1.0, 0.0, 832_000.0, 0.0, -1.0, 5e5))
    west = replace(scene_at("west.tif", 100, 100), crs="EPSG:32601", transform=(1.0, 0.0, 168_000.0, 0.0, -1.0, 5e5))
    frame = choose_frame((east, west))
    assert frame.crs == LONLAT
    assert "2 CRS" in frame.describe()
    one, other = frame.box(east), frame.box(west)
    assert 0 < other.left - one.left < 0.1
    assert frame.aspect == pytest.approx(1.0, abs=0.01)


def test_scenes_without_a_crs_are_drawn_side_by_side_in_pixels() -> None:
    frame = choose_frame(tuple(scene_at(f"{name}.tif", 50, 40, crs=None) for name in "abc"))
    boxes = [frame.box(image) for image in frame.images]
    assert frame.crs is None
    assert "The place of the imagery is not known (no CRS)" in frame.describe()
    placed = scene_at("d.tif", 50, 40)
    assert "The place of 3 of 4 images is not known" in choose_frame((*frame.images, placed)).describe()
    assert boxes[0] == (0, -50, 40, 0)
    for at, one in enumerate(boxes):
        for other in boxes[at + 1 :]:
            apart = one.right <= other.left or other.right <= one.left or one.bottom >= other.top
            assert apart


def picture(uri: str) -> np.ndarray[Any, Any]:
    found = cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_UNCHANGED)
    assert found is not None
    return np.asarray(found)


@pytest.mark.parametrize("crs", [UTM, None])
def test_the_imagery_lies_under_its_tiles(tmp_path: Path, crs: str | None) -> None:
    _, plan = build_run(tmp_path, crs=crs)
    frame = choose_frame(plan.images)
    found = draw_quicklook(plan, frame)
    assert not found.problems
    assert sorted(found.boxes) == sorted(map(frame.box, plan.images))
    for uri, box in zip(found.uris, found.boxes, strict=True):
        height, width = picture(uri).shape[:2]
        assert (width, height) == (box.right - box.left, box.top - box.bottom)


def test_the_imagery_is_turned_into_the_coordinates_of_the_map(tmp_path: Path) -> None:
    pixels = np.zeros((3, 100, 100), np.uint8)
    pixels[:, :50, :50] = 250  # the north-west is white
    place = (0.0, -1.0, 400_100.0, -1.0, 0.0, 5_800_000.0)  # columns run to the south, rows to the west
    write_geotiff(str(tmp_path / "a.tif"), pixels[:, :, ::-1], crs=UTM, transform=place)
    _, plan = plan_scenes(tmp_path, [read_scene(str(tmp_path / "a.tif"), "a.tif")])
    frame = choose_frame(plan.images)
    found = draw_quicklook(plan, frame)
    assert found.boxes[0] == frame.box(plan.images[0])
    shown = picture(found.uris[0])[..., :3].mean(axis=-1)
    height, width = shown.shape
    quarters = {(row, col): shown[height * row // 4, width * col // 4] > 125 for row in (1, 3) for col in (1, 3)}
    x, y = frame.locate(plan.images[0], np.array([25.0]), np.array([75.0]))  # the middle of the white quarter
    box = found.boxes[0]
    white = (1 if y[0] > (box.top + box.bottom) / 2 else 3, 1 if x[0] < (box.left + box.right) / 2 else 3)
    assert [place for place, is_white in quarters.items() if is_white] == [white]


def test_pictures_become_smaller_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = build_run(tmp_path)
    frame = choose_frame(plan.images)
    before = sum(map(len, draw_quicklook(plan, frame).uris))
    monkeypatch.setattr(quicklook_module, "MAX_BYTES", before // 4)
    after = draw_quicklook(plan, frame)
    assert sum(map(len, after.uris)) <= before // 4
    assert sorted(after.boxes) == sorted(map(frame.box, plan.images))


def test_a_tile_is_shown_with_its_own_image_and_mask(built: BuiltRun) -> None:
    tally = tally_of(built.run, built.plan)
    crops = cut_crops(built.run, tally)
    (cell,) = (at for at, crop in crops.by_cell.items() if crop.where == "south/b.tif, tile 1, 0")
    (row,) = (r for r in done_rows(built) if (r["scene_id"], r["tile_row"]) == ("south/b.tif", 1))
    mask = picture(crops.by_cell[cell].mask)
    assert mask.shape == (row["height"], row["width"])
    assert (mask == 255).sum() == row["building_px"]
    image = picture(crops.by_cell[cell].image)
    source, _ = read_chip(built.plan.images[1], Window(32, 0, 8, 30))
    grey = image[..., :3].mean(axis=-1), source.mean(axis=0)
    assert np.corrcoef(*(each.ravel() for each in grey))[0, 1] > 0.8  # of noise, and lossy
    assert len(crops.by_cell) == crops.num_cells == sum(row["valid_px"] > 0 for row in done_rows(built))


def test_of_many_cells_the_densest_and_some_others_have_pictures() -> None:
    building = np.random.default_rng(0).permutation(1000).tolist()
    best = {cell: Best(building[cell], 0, Window(0, 0, 1, 1)) for cell in range(1000)}
    chosen = choose_cells(best, 100)
    assert len(set(chosen)) == 100
    densest = sorted(best, key=lambda cell: -best[cell].building_px)[:50]
    assert set(densest) < set(chosen)
    others = sorted(set(chosen) - set(densest))
    assert np.diff(others).max() <= 25  # all over the region


def test_a_page_is_small_however_many_tiles_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, tile_size=16, part=16 * 64)
    run, plan = plan_scenes(tmp_path, [scene_at("a.tif", 16 * 120, 16 * 120)], settings)
    fill(run, plan)
    assert plan.counts["tiles"] == 14_400
    page = make_page(run)
    assert page.figures == pytest.approx(summary(run))
    assert len(page.html) < LARGEST / 3  # there is no imagery: its part of the bound is below
    assert "2 x 2 tiles" in text_of(page.html)
    assert "Pictures of 200 tiles" in text_of(page.html)
    bounds = quicklook_module.MAX_BYTES + crops_module.MAX_BYTES
    assert len(page.html) + bounds < LARGEST
    monkeypatch.setattr(cells_module, "MAX_CELLS", 100)
    assert make_cells(plan, choose_frame(plan.images), 100).num_cells <= 100


def test_many_scenes_are_added_up_by_neighbourhood(tmp_path: Path) -> None:
    scenes = [scene_at(f"{number:03}.tif", 32, 32, 400_000.0 + 32 * number) for number in range(300)]
    run, plan = plan_scenes(tmp_path, scenes)
    fill(run, plan)
    tally = tally_of(run, plan, 20)
    assert tally.cells.groups is not None
    assert 5 <= tally.cells.num_cells <= 20
    np.testing.assert_allclose(tally.by_cell.sum(axis=0), tally.by_image.sum(axis=0))
    x, _ = tally.cells.outlines(choose_frame(plan.images))
    assert (x.min(), x.max()) == (400_000, 400_000 + 32 * 300)


def test_a_mosaic_has_only_the_cells_that_it_plans(tmp_path: Path) -> None:
    for name, x in (("a", 400_000.0), ("b", 401_024.0)):
        pixels = np.random.default_rng(0).integers(1, 250, (3, 64, 64)).astype(np.uint8)
        write_geotiff(str(tmp_path / f"{name}.tif"), pixels, crs=UTM, transform=(1.0, 0.0, x, 0.0, -1.0, 5_800_000.0))
    scenes = [read_scene(str(tmp_path / f"{name}.tif"), f"{name}.tif") for name in "ab"]
    run, plan = plan_scenes(tmp_path, scenes, replace(SETTINGS, mosaic=True))
    cells = make_cells(plan, choose_frame(plan.images))
    assert cells.num_cells == plan.counts["tiles"] == 8
    assert sorted(draw_quicklook(plan, choose_frame(plan.images)).boxes)[1].left == 401_024
    fill(run, plan)
    assert "mosaic" in text_of(make_page(run).html)


def test_tiles_that_are_not_planned_are_in_no_cell() -> None:
    cells = Cells((), 32, 1, None, np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert cells.find(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int)).tolist() == [-1, -1]


def test_text_of_others_is_never_markup(make_scene: MakeScene, tmp_path: Path) -> None:
    name, error = "<img src=x onerror=alert(1)>.tif", "</script><script>alert(2)</script>"
    make_scene(f"r/{name}", 64, 64)
    run, plan = plan_scenes(tmp_path, [read_scene(str(tmp_path / "r" / name), name)])
    fill(run, plan)
    built = BuiltRun(run, plan)
    figures = ("valid_px", "building_px", "coverage", "area_m2", "building_m2", "mean_probability", "mask")
    failed = {"status": "failed", "error_class": "ReadError", "error": error, "attempts": 1, **dict.fromkeys(figures)}
    built.rewrite(lambda rows: [{**rows[0], **failed}, *rows[1:]])
    html = make_page(run).html
    assert error not in html
    assert escape(error) in html
    assert name not in html
    assert escape(name) in html


def test_the_page_names_nothing_outside_of_itself(built: BuiltRun) -> None:
    html = make_page(built.run).html
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']*""", text_of(html))
    assert "://" not in text_of(html)
    assert "default-src 'none'" in html


def test_a_page_says_how_far_the_run_is_and_why_tiles_failed(built: BuiltRun) -> None:
    page = make_page(built.run)
    text = text_of(page.html)
    assert page.state == "not finished: 4 of 18 tiles are not done yet, 4 of 18 tiles failed"
    assert page.problems == 0
    for expected in (page.state, "ReadError: the disk said no", "10 of 18", "north/a.tif, tile 0, 2", built.plan.model):
        assert expected in text


def test_the_worst_borders_of_windows_are_on_the_page(built: BuiltRun) -> None:
    assert "Worst borders" not in make_page(built.run).html
    record, parts = read_record(built.run), list(read_plan(built.run).parts())
    first, last = parts[0], parts[-1]
    record.seams = SeamCounts(pixels=900, differing=3, worst={last.key: 0.25, first.key: 0.001, "gone": 0.0001})
    write_record(built.run, record)
    text = " ".join(re.sub("<[^>]*>", " ", text_of(make_page(built.run).html)).split())
    side = record.settings.tile_size
    places = [f"{p.scene.scene_id}, tile {p.window.row_off // side}, {p.window.col_off // side}" for p in (last, first)]
    assert places[0] != places[1]
    assert f"beside pixels that differ {places[0]} 25.0 % {places[1]} 0.1 %" in text


def test_a_run_without_any_tile_has_a_page(tmp_path: Path) -> None:
    run, plan = plan_scenes(tmp_path, [scene_at("a.tif", 100, 100)])
    page = make_page(run)
    assert page.figures["missing"] == plan.counts["tiles"]
    assert "No tile with data is done yet" in page.html


def test_a_run_without_a_building_has_a_page(built: BuiltRun) -> None:
    empty = {"building_px": 0, "building_m2": 0.0, "mask": None}
    for part in (0, 3, 4):
        built.rewrite(
            lambda rows: [{**row, **empty, "coverage": 0.0 if row["valid_px"] else None} for row in rows], part
        )
    page = make_page(built.run)
    assert page.figures["coverage"] == 0
    assert page.problems == 0
    assert "10 of 10 tiles with data hold nothing" in page.html


def test_scenes_that_are_gone_are_named_and_found_again_where_they_are(built: BuiltRun, tmp_path: Path) -> None:
    shutil.move(tmp_path / "scenes", tmp_path / "moved")
    gone = make_page(built.run).html
    assert "No scene is under the map" in text_of(gone)
    assert "data:image/png" in gone  # masks need no scene
    assert "data:image/webp" not in gone
    found = make_page(built.run, ((str(tmp_path / "scenes"), str(tmp_path / "moved")),)).html
    assert "under the map" not in text_of(found)
    assert "data:image/webp" in found


def test_a_run_in_a_bucket_has_the_page_of_one_on_disk(built: BuiltRun, s3: str) -> None:
    upload(built.run, f"{s3}/run")
    there, here = make_page(f"{s3}/run"), make_page(built.run)
    assert (there.state, there.figures) == (here.state, here.figures)
    assert there.html.count("data:image/webp") == here.html.count("data:image/webp") > 0


def test_damage_is_on_the_page(built: BuiltRun) -> None:
    built.rewrite(lambda rows: [{**rows[0], "building_px": 1}, *rows[1:]])
    page = make_page(built.run)
    assert page.problems == 3
    assert page.state == "not sound: 4 problems"
    assert "Problems that seg verify found" in page.html


def test_the_command_writes_a_page_and_says_where(
    built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.html"
    out, _ = seg(capsys, "report", built.run, "--out", path, "--json")
    found = json.loads(out)
    state = "not finished: 4 of 18 tiles are not done yet, 4 of 18 tiles failed"
    size = path.stat().st_size
    assert found == {"file": str(path), "bytes": size, "run": state, "tiles": 10, "failed": 4, "missing": 4}
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("there.html", "already exists"),
        ("new.pdf", "not a format that a page is written in: say .html, .htm"),
        ("none/a.html", "no such folder"),
        ("s3://bucket/a.html", "must be on a local disk"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(
    built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    (tmp_path / "there.html").write_text("mine")
    out = name if name.startswith("s3:") else tmp_path / name
    _, err = seg(capsys, "report", built.run, "--out", out, code=2)
    assert reason in err
    assert err.count("\n") == 1
    assert (tmp_path / "there.html").read_text() == "mine"


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = seg(capsys, "report", tmp_path, "--out", tmp_path / "a.html", code=2)
    assert "not a run" in err
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_extra_is_named(
    built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    _, err = seg(capsys, "report", built.run, "--out", tmp_path / "a.html", code=2)
    assert err == "seg: seg report: needs the package bokeh: pip install 'aerial-seg[report]'\n"


def test_figures_read_well() -> None:
    shares = {None: "–", 0.0: "0.0 %", 0.0001: "below 0.1 %", 0.0637: "6.4 %", 1.0: "100.0 %"}
    assert {each: share_text(each) for each in shares} == shares
    assert [area_text(*each) for each in ((None, None), (None, 1234), (0.4753, 1), (7.4437, 1))] == [
        "–",
        "1,234 px",
        "475,300 m²",
        "7.44 km²",
    ]
    assert [duration_text(each) for each in (None, 0.2, 61, 7322)] == ["–", "0 s", "1 min 1 s", "2 h 2 min 2 s"]
