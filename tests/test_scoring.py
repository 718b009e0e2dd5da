"""A run is scored against labels as they mean it, and only against those."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
from conftest import MakeBundle, MakeScene, window_figures
from footprints import write_vectors
from numpy.typing import NDArray
from parts import SETTINGS, Made, open_plan, rows_of, work
from runs import build_run
from seg_command import seg

from aerial_seg.cli.main import main
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import make_plan
from seg_core.run.record import read_record, write_record
from seg_core.run.resume import open_run
from seg_core.run.rows import Failure, decode_mask, failed_rows, tile_rows
from seg_core.run.score import score_run
from seg_core.run.tables import part_path, write_part
from seg_core.training.dataset import Classes
from seg_core.training.metrics import Counts, count
from seg_core.training.shapes import count_shapes, score_figures

GREY = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
TRUTH = np.random.default_rng(7).random((256, 500)) < 0.3


@pytest.fixture
def made(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> Made:
    return open_plan(make_scene("region/a.tif", 256, 500), make_bundle(), str(tmp_path / "run"))


@pytest.fixture
def run(made: Made) -> str:
    work(made)
    return made[2]


def mask_of(made: Made) -> NDArray[np.bool_]:
    """What a run of one image calls building."""
    (image,) = made[0].images
    mask = np.zeros((image.height, image.width), np.bool_)
    for row in rows_of(made):
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        mask[at] = decode_mask(row["mask"], row["height"], row["width"])
    return mask


@pytest.fixture
def expected(run: str, made: Made) -> Counts:  # noqa: ARG001
    return count(mask_of(made), TRUTH, np.ones_like(TRUTH))


def moved(rows: float, cols: float, gsd_m: float = 1.0) -> tuple[float, ...]:
    """The transform of a grid whose corner lies so many metres south and east of the scene's."""
    return (gsd_m, 0.0, 400_000.0 + cols, 0.0, -gsd_m, 5_800_000.0 - rows)


def label(*values: int) -> NDArray[np.uint8]:
    """One band: the first value where there is no building, the second where there is one."""
    return np.where(TRUTH, values[1], values[0]).astype(np.uint8)[None]


@pytest.mark.parametrize(
    ("pixels", "classes", "options"),
    [
        (label(0, 1), None, {}),
        (label(0, 1), None, {"nodata": 255}),
        (label(0, 255), GREY, {}),
        (np.repeat(label(0, 255), 3, axis=0), GREY, {}),
        (label(1, 2), Classes(GREY.names, ((1, 1, 1), (2, 2, 2))), {}),
    ],
)
def test_labels_mean_what_their_classes_say_or_1_is_building(
    run: str, expected: Counts, make_scene: MakeScene, pixels: Any, classes: Classes | None, options: dict[str, Any]
) -> None:
    assert score_run(run, make_scene("label.tif", pixels=pixels, **options), classes)[:2] == (expected, 0)
    assert expected.tp > 0


@pytest.mark.parametrize(
    ("pixels", "classes", "options", "reason"),
    [
        (label(0, 255), None, {}, "holds no 1, but 255: in a label of one band 1 is building.* --data; "),
        (label(1, 2), None, {}, "holds 2: in a label of one band"),
        (label(0, 1), None, {"nodata": 0}, "its nodata value 0 is also a class: unset it .*gdal_edit -unsetnodata"),
        (label(0, 255), GREY, {"nodata": 0}, "its nodata value 0 is also a class"),
        (
            np.repeat(label(0, 255), 3, axis=0),
            None,
            {},
            "a label in colours: name the folder of its label_class_dict.csv",
        ),
        (label(0, 7), GREY, {}, r"colour \(7, 7, 7\) at row 0, column \d+ is not in"),
        (label(0, 1), None, {"transform": (1.0, 0.0, 500_000.0, 0.0, -1.0, 5_800_000.0)}, "does not overlap"),
        (label(0, 1)[:, 1:], None, {"crs": None}, "500 x 255 px, its image 500 x 256, and .* no georeference"),
    ],
)
def test_labels_that_could_mean_something_else_are_refused(
    run: str, make_scene: MakeScene, pixels: Any, classes: Classes | None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SegError, match=rf"label\.tif: .*{reason}"):
        score_run(run, make_scene("label.tif", pixels=pixels, **options), classes)


@pytest.mark.parametrize("classes", [None, GREY])
def test_a_label_in_another_frame_is_scored_where_it_lies(
    run: str,
    made: Made,
    make_scene: MakeScene,
    classes: Classes | None,
) -> None:
    pixels = label(0, 255 if classes else 1)[:, 5:, 20:]
    path = make_scene("label.tif", pixels=pixels, transform=moved(5, 20))
    found, _, off_px, *_ = score_run(run, path, classes)
    assert found == count(mask_of(made)[5:, 20:], TRUTH[5:, 20:], np.ones((251, 480), np.bool_))
    assert off_px == {path: 20.0}
    path = make_scene("label.tif", pixels=np.pad(pixels, ((0, 0), (9, 7), (21, 3))), transform=moved(-4, -1))
    found, *_ = score_run(run, path, classes)
    truth = TRUTH.copy()
    truth[:5], truth[:, :20] = False, False
    assert found == count(mask_of(made), truth, np.ones_like(truth))


@pytest.mark.parametrize(
    ("pixels", "cols", "reason"),
    [(label(0, 1), 500, "does not overlap its image"), (label(255, 255), 5, "holds no data where its image")],
)
def test_a_label_that_says_nothing_of_its_scene_is_refused(
    run: str, make_scene: MakeScene, pixels: NDArray[np.uint8], cols: int, reason: str
) -> None:
    path = make_scene("label.tif", pixels=pixels, transform=moved(0, cols), nodata=255)
    with pytest.raises(SegError, match=rf"label\.tif: this label {reason}, .*a\.tif"):
        score_run(run, path, None)


def test_a_label_is_laid_on_the_grid_that_was_segmented(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    scene, fine = make_scene("scene.tif", 128, 256, transform=moved(0, 0, 0.5)), TRUTH[:128, :256]
    resampled = replace(SETTINGS, resample=True)
    plan, _ = make_plan(read_region([scene])[0], read_bundle(model := make_bundle()), resampled)
    open_run(run := str(tmp_path / "run"), plan, model)
    work((plan, model, run))
    path = make_scene("label.tif", pixels=fine[None].astype(np.uint8), transform=moved(0, 0, 0.5))
    expected = count(mask_of((plan, model, run)), fine[1::2, 1::2], np.ones((64, 128), np.bool_))
    assert score_run(run, path, None)[:2] == (expected, 0)


def test_one_label_may_cover_a_mosaic_and_more(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> None:
    for name, col in (("a", 0), ("b", 200)):
        make_scene(f"pieces/{name}.tif", 128, 200, seed=col, transform=moved(0, col))
    scenes, _ = read_region([str(tmp_path / "pieces")])
    plan, _ = make_plan(scenes, read_bundle(model := make_bundle()), replace(SETTINGS, mosaic=True))
    open_run(run := str(tmp_path / "run"), plan, model)
    work((plan, model, run))
    path = make_scene("label.tif", pixels=label(0, 1), transform=moved(-50, -60))
    truth = TRUTH[50:178, 60:460]
    assert score_run(run, path, None)[:2] == (count(mask_of((plan, model, run)), truth, np.ones_like(truth)), 0)


def test_missing_pixels_of_a_label_are_not_scored(run: str, make_scene: MakeScene) -> None:
    pixels = label(0, 1)
    pixels[:, :100] = 255
    found, *_ = score_run(run, make_scene("label.tif", pixels=pixels), None)
    assert sum(found) == 156 * 500
    pixels = np.full_like(pixels, 255)
    found, *_ = score_run(run, make_scene("label.tif", pixels=pixels, nodata=255), None)  # it says itself what 255 is
    assert sum(found) == 0


def test_a_scene_without_a_building_may_have_missing_pixels(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make_scene(f"two/{name}.tif", 64, 64)
    plan, _ = make_plan(read_region([str(tmp_path / "two")])[0], read_bundle(model := make_bundle()), SETTINGS)
    open_run(run := str(tmp_path / "both"), plan, model)
    work((plan, model, run))
    with_building, without = np.zeros((2, 1, 64, 64), np.uint8)
    with_building[:, :9], without[:, :5] = 1, 255
    make_scene("labels/a.tif", pixels=with_building)
    make_scene("labels/b.tif", pixels=without)
    score = score_run(run, str(tmp_path / "labels"), None)
    assert sum(score.counts) == 64 * 64 + 59 * 64
    assert [(image["image"], image["valid_px"]) for image in score.images] == [("a.tif", 64 * 64), ("b.tif", 59 * 64)]
    for name in ("tp", "fn", "building_fp", "building_fn", "boundary_union"):
        assert sum(image[name] for image in score.images) == {**score.counts._asdict(), **score.shapes._asdict()}[name]


def draw_boxes(seed: int, shape: tuple[int, int], num: int) -> NDArray[np.bool_]:
    mask, rng = np.zeros(shape, np.bool_), np.random.default_rng(seed)
    for row, col, height, width in rng.integers((0, 0, 6, 6), (*shape, 24, 24), (num, 4)):
        mask[row : row + height, col : col + width] = True
    return mask


@pytest.mark.parametrize("block", [32, 64, 2048])
def test_buildings_and_boundaries_are_those_of_the_whole_scenes(
    tmp_path: Path, make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Parts of 64 px, tiles of 32 px, missing pixels in scene and label, and one tile that failed."""
    monkeypatch.setattr("seg_core.run.score.BLOCK", block)
    run, plan = build_run(tmp_path)
    drawn = {image.scene_id: draw_boxes(1, image.window.shape, 9) for image in plan.images}
    drawn["north/a.tif"][50:80, 4:28] = drawn["north/a.tif"][4:25, 50:80] = True  # across the borders of parts
    valid = {image.scene_id: read_chip(image, image.window)[1] for image in plan.images}
    for part in plan.parts():
        name, at = part.scene.scene_id, part.window.slices(part.scene.window)
        figures = window_figures(drawn[name][at].astype(np.float32), valid[name][at], 32)
        rows = list(tile_rows(part.scene, part.window, 32, figures))
        if (name, part.window.origin) == ("north/a.tif", (64, 0)):
            tile = Window.from_row(rows[1])
            rows[1] = next(failed_rows(part.scene, tile, 32, Failure("ReadError", "no")))
            valid[name][tile.slices(part.scene.window)] = False
        write_part(run, part.key, rows, plan.model, part.version)
    expected = []
    for image in plan.images:
        name = image.scene_id
        truth, known = np.roll(drawn[name], (1, 2), (0, 1)) | draw_boxes(2, image.window.shape, 2), valid[name]
        known[10:16, 20:40] = False
        pixels = np.where(known, truth, 255).astype(np.uint8)[None]
        make_scene(f"labels/{name}", pixels=pixels, transform=image.transform)
        counts, shapes = count(drawn[name], truth, known), count_shapes(drawn[name] & known, truth & known)
        expected.append({"image": name, "valid_px": known.sum(), **score_figures(counts, shapes)})
    score = score_run(run, str(tmp_path / "labels"), None)
    assert score.images == expected
    total = {**score.counts._asdict(), **score.shapes._asdict()}
    assert total == {name: sum(image[name] for image in expected) for name in total}
    assert min(total.values()) > 0
    assert score.num_failed == 1


def test_polygons_are_scored_as_the_raster_that_they_cover(
    tmp_path: Path, make_scene: MakeScene, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes on the first scene, in longitude and latitude; the second has none. An area of interest leaves it out."""
    run, plan = build_run(tmp_path)
    boxes = [shapely.box(5, 70, 50, 95), shapely.box(20, 3, 64, 30)]
    polygons = write_vectors(tmp_path / "houses.geojson", boxes, "EPSG:4326")
    area = write_vectors(tmp_path / "area.gpkg", [shapely.box(0, 0, 60, 80)])
    for image in plan.images:
        truth = np.zeros((2, *image.window.shape), np.uint8)
        truth[1] = 255
        if image.scene_id == "north/a.tif":
            truth[:, 70:95, 5:50] = truth[:, 3:30, 20:64] = 1
            truth[1, :80, :60][truth[1, :80, :60] == 255] = 0
            truth[1, 80:], truth[1, :, 60:] = 255, 255
        for folder, pixels in zip(("all", "inside"), truth, strict=True):
            make_scene(f"{folder}/{image.scene_id}", pixels=pixels[None], transform=image.transform)
    for folder, options in (("all", []), ("inside", ["--aoi", area])):
        expected = score_run(run, str(tmp_path / folder), None)
        table = tmp_path / f"{folder}.csv"
        out, _ = seg(capsys, "evaluate", run, "--labels", polygons, *options, "--per-image", table, "--json")
        figures = {**score_figures(expected.counts, expected.shapes), "failed_tiles": 0}
        assert json.loads(out) == figures
        assert figures["tp"] > 0
        assert pd.read_csv(table)["tp"].tolist() == [image["tp"] for image in expected.images]


@pytest.mark.parametrize("name", ["building", "road"])
def test_polygons_that_count_as_another_class_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, _ = build_run(tmp_path)
    record = read_record(run)
    record.class_name = name
    write_record(run, record)
    polygons = write_vectors(tmp_path / "areas.gpkg", [shapely.box(5, 70, 50, 95)])
    _, err = seg(capsys, "evaluate", run, "--labels", polygons)
    said = f"{polygons}: each of its polygons counts as road, whatever its attributes say"
    assert (said in err) == (name == "road")


@pytest.mark.parametrize(
    ("labels", "options", "reason"),
    [
        ("houses.fgb", ["--data", "."], "--data: is for the colours of raster labels, .*fgb holds polygons"),
        ("truth.tif", ["--aoi", "houses.fgb"], "--aoi .*fgb: is for polygons, .*truth.tif is none"),
        ("far.fgb", [], "far.fgb: no polygon lies on a scene: labels are at longitude .*, scenes at longitude"),
    ],
)
def test_options_and_polygons_that_do_not_fit_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    labels: str,
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    build_run(tmp_path)
    Path("label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,1,1,1\n")
    write_vectors(tmp_path / "houses.fgb", [shapely.box(5, 70, 50, 95)])
    write_vectors(tmp_path / "far.fgb", [shapely.box(5000, 70, 5050, 95)])
    assert main(["evaluate", "run", "--labels", labels, *options]) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_failed_tiles_are_counted_and_left_out(made: Made, make_scene: MakeScene) -> None:
    Path(made[0].scenes[0].uri).rename(f"{made[0].scenes[0].uri}.away")
    work(made)
    Path(f"{made[0].scenes[0].uri}.away").rename(made[0].scenes[0].uri)
    found, failed, *_ = score_run(made[2], make_scene("label.tif", pixels=label(0, 1)), None)
    assert (sum(found), failed) == (0, 32)


def test_a_run_that_is_not_finished_is_not_scored(made: Made, run: str, make_scene: MakeScene) -> None:
    Path(part_path(run, next(iter(made[0].parts())).key)).unlink()
    with pytest.raises(SegError, match=r"run: 1 of 2 parts are not done yet: finish the run"):
        score_run(run, make_scene("label.tif", pixels=label(0, 1)), None)
