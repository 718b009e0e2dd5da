"""Places of a run side by side: image, prediction, and the truth or the probability."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import NORTH_UP, UTM
from runs import SETTINGS, BuiltRun, bare_scene, build_run, fill_run, plan_scenes
from seg_command import seg

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip
from seg_core.plots.pictures import Panel, paint_state, truth_panels
from seg_core.report import panels as panels_module
from seg_core.report.panels import Labels, draw_panels
from seg_core.report.views import MAX_VIEWS, Place
from seg_core.results import Run
from seg_core.run.rows import decode_probability

Capture = pytest.CaptureFixture[str]
AT = Window(10, 20, 70, 90)  # of scene a, across parts and missing pixels


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    """A run of two scenes that keeps probabilities, of which a part is missing."""
    settings = replace(SETTINGS, keep_probability=True)
    found = BuiltRun(*build_run(tmp_path_factory.mktemp("panels"), settings=settings))
    found.path(2).unlink()
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """The panels that are assembled."""
    found: list[Panel] = []

    def keep(panels: Sequence[Panel], columns: int) -> bytes:
        found.extend(panels)
        return f"{columns}".encode()

    monkeypatch.setattr(panels_module, "assemble_panels", keep)
    return found


def window(at: Window, scene: str | None = "north/a.tif") -> Place:
    return Place(f"--window {scene}:...", scene, None, at)


def tile(row: int, col: int, scene: str | None = "north/a.tif") -> Place:
    return Place(f"--tile {scene}:{row},{col}", scene, (row, col), None)


def image_of(built: BuiltRun, at: Window) -> Any:
    pixels, _ = read_chip(built.plan.images[0], at)
    return np.moveaxis(pixels, 0, -1)


def mask_of(built: BuiltRun, at: Window) -> Any:
    return Run(built.run).read_mask("north/a.tif", tuple(at))


def test_a_place_is_shown_as_image_prediction_and_probability(built: BuiltRun, drawn: list[Panel]) -> None:
    columns, figures = draw_panels(built.run, [window(AT), tile(0, 0, "south/b.tif")])
    assert (columns, figures) == (b"3", {"windows": 2})
    image, prediction, probability, *other = drawn
    assert [image.title, prediction.title] == ["north/a.tif, 90 x 70 px at x 20, y 10", "prediction"]
    assert other[0].title == "south/b.tif, tile 0, 0"
    expected = image_of(built, AT)
    assert (image.picture == expected).all()
    assert (prediction.picture == paint_state(expected, mask_of(built, AT))).all()
    known = mask_of(built, AT) != MISSING
    assert (probability.picture[~known] == 128).all()
    brightness = probability.picture.astype(int).sum(axis=-1)
    row = next(
        row
        for row in Run(built.run).query("SELECT * FROM tiles").to_pylist()
        if row["tile_row"] == row["tile_col"] == 1
    )
    at = Window(32, 32, 32, 32)
    inner = brightness[22:54, 12:44][known[22:54, 12:44]]
    levels = decode_probability(row)[known[22:54, 12:44]]
    assert at == Window.from_row(row)
    assert np.corrcoef(inner, levels)[0, 1] > 0.9


def test_what_is_not_known_is_dark() -> None:
    image = np.full((1, 3, 3), 90, np.uint8)
    found = paint_state(image, np.array([[0, 1, MISSING]], np.uint8))
    assert found[0, 0].tolist() == [90, 90, 90]
    assert found[0, 1, 0] > 150
    assert found[0, 2].tolist() == [30, 30, 30]


def test_errors_are_of_what_is_known_and_labelled() -> None:
    image = np.full((1, 4, 3), 90, np.uint8)
    predicted, truth = (np.array([each], np.uint8) for each in ([1, 1, MISSING, 0], [1, MISSING, 1, 0]))
    titles = [panel.title for panel in truth_panels("a", image, predicted, truth)]
    assert titles == ["a", "truth", "prediction", "errors: false green, missed red"]
    errors = truth_panels("a", image, predicted, truth)[3].picture[0]
    assert errors[0].min() > 150
    assert errors[1].tolist() == errors[2].tolist() == [15, 15, 15]
    assert errors[3].tolist() == [45, 45, 45]


def write_label(built: BuiltRun, folder: Path) -> Any:
    """Write a label: the mask of the run, without rows 40 to 59, and 255 where nothing is known or labelled."""
    image = built.plan.images[0]
    label = Run(built.run).read_mask("north/a.tif")
    label[40:60][label[40:60] == 1] = 0
    label[10:20] = MISSING
    (folder / "north").mkdir(parents=True)
    place = {"crs": image.crs, "transform": image.transform, "nodata": MISSING}
    write_geotiff(str(folder / "north/a.tif"), label[None], **place)
    return label


def test_with_labels_truth_and_errors_are_shown_and_scored(built: BuiltRun, drawn: list[Panel], tmp_path: Path) -> None:
    label = write_label(built, tmp_path / "labels")
    columns, figures = draw_panels(built.run, [window(AT)], Labels(str(tmp_path / "labels")))
    truth, mask = label[AT.slices(built.plan.images[0].window)], mask_of(built, AT)
    hit, found = ((mask == 1) & (truth == 1)).sum(), ((mask == 1) & (truth != MISSING)).sum()
    assert (columns, figures) == (b"4", {"windows": 1, "iou": pytest.approx(hit / found)})
    expected = truth_panels(
        f"north/a.tif, 90 x 70 px at x 20, y 10: IoU {hit / found:.3f}", image_of(built, AT), mask, truth
    )
    assert [panel.title for panel in drawn] == [panel.title for panel in expected]
    for panel, other in zip(drawn, expected, strict=True):
        assert (panel.picture == other.picture).all(), panel.title


def test_a_window_of_a_mosaic_holds_all_scenes_and_parts_that_it_touches(tmp_path: Path, drawn: list[Panel]) -> None:
    whole = np.random.default_rng(0).integers(1, 250, (3, 32, 1600)).astype(np.uint8)
    a, b, x, d, e, y = NORTH_UP
    scenes = []
    for name, col in (("a.tif", 0), ("b.tif", 800)):
        place = (a, b, x + col * a, d, e, y)
        write_geotiff(
            str(tmp_path / name), np.ascontiguousarray(whole[:, :, col : col + 800]), crs=UTM, transform=place
        )
        scenes.append(read_scene(str(tmp_path / name), name))
    run, plan = plan_scenes(tmp_path, scenes, replace(SETTINGS, mosaic=True))
    fill_run(run, plan, lambda tile: np.ones(tile.shape, np.bool_))
    at = Window(5, 100, 20, 1400)
    draw_panels(run, [window(at, None)])
    assert (drawn[0].picture == np.moveaxis(whole[:, 5:25, 100:1500], 0, -1)).all()
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (tile(4, 0), "has the tiles 0,0 to 3,3 (row,column)"),
        (tile(0, 4), "has the tiles 0,0 to 3,3 (row,column)"),
        (window(Window(0, 0, 101, 10)), "not within north/a.tif, which is 120 x 100 px"),
        (window(Window(0, 0, 10, 0)), "not within north/a.tif"),
        (tile(0, 0, None), "say which scene, as SCENE:...: north/a.tif, south/b.tif"),
        (tile(0, 0, "c.tif"), "no scene of this run is c.tif: it has north/a.tif, south/b.tif"),
    ],
)
def test_a_place_outside_of_the_run_is_refused(built: BuiltRun, place: Place, reason: str) -> None:
    with pytest.raises(SegError, match=r"--(tile|window)") as refusal:
        draw_panels(built.run, [place])
    assert str(refusal.value).startswith(f"{place.option}: ")
    assert reason in str(refusal.value)


def test_a_window_between_the_scenes_of_a_mosaic_is_refused(tmp_path: Path) -> None:
    scenes = [
        bare_scene(64, 64, transform=(1.0, 0.0, x, 0.0, -1.0, 5_800_000.0), scene_id=f"{x:.0f}.tif", gsd_m=1.0)
        for x in (400_000.0, 400_512.0)
    ]
    run, _ = plan_scenes(tmp_path, scenes, replace(SETTINGS, mosaic=True))
    with pytest.raises(SegError, match=r"mosaic, tile 0, 8: no scene is there"):
        draw_panels(run, [tile(0, 8, None)])


def test_windows_and_pictures_are_bounded(tmp_path: Path, built: BuiltRun) -> None:
    write_geotiff(str(tmp_path / "wide.tif"), np.zeros((3, 8, 4200), np.uint8), crs=UTM, transform=NORTH_UP)
    run, _ = plan_scenes(tmp_path, [read_scene(str(tmp_path / "wide.tif"), "wide.tif")])
    with pytest.raises(SegError, match=r"at most 4,096 px a side"):
        draw_panels(run, [window(Window(0, 0, 8, 4097), None)])
    with pytest.raises(SegError, match=f"{MAX_VIEWS + 1} places: a picture has room for {MAX_VIEWS}"):
        draw_panels(built.run, [tile(0, 0)] * (MAX_VIEWS + 1))


def test_the_command_draws_places_with_labels(built: BuiltRun, tmp_path: Path, capsys: Capture) -> None:
    write_label(built, tmp_path / "labels")
    places = ["--tile", "north/a.tif:0,0", "--window", "north/a.tif:20,10,90,70"]
    out, err = seg(
        capsys, "export", "picture", built.run, "--out", tmp_path / "a.png", *places,
        "--labels", tmp_path / "labels", "--json", code=1,
    )  # fmt: skip
    assert "4 tiles failed or are not done yet: they are dark, or grey (exit code 1)" in err
    found = json.loads(out)
    assert 0 < found.pop("iou") < 1
    assert found == {"file": str(tmp_path / "a.png"), "windows": 2, "failed": 0, "missing": 4}
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture is not None
    assert picture.shape[1] == 4 * 660
    assert 1200 < picture.shape[0] < 1300  # the second window is flat


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--labels", "x"], "--labels, --data: are for places: name some with --tile or --window"),
        (["--data", "x"], "--labels, --data: are for places"),
        (["--tile", "north/a.tif:0,0", "--data", "x"], "--data x: says what the colours of labels mean"),
        (["--tile", "north/a.tif:0,0", "--labels", "nowhere"], "nowhere: no such file or folder"),
        (["--tile", "0,0"], "--tile 0,0: say which scene"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    built: BuiltRun, tmp_path: Path, capsys: Capture, options: list[str], reason: str
) -> None:
    _, err = seg(capsys, "export", "picture", built.run, "--out", tmp_path / "a.png", *options, code=2)
    assert reason in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("value", ["--tile=1", "--tile=a,b", "--tile=1,2,3", "--window=1,2,3", "--window=-1,0,5,5"])
def test_what_is_no_place_is_refused(built: BuiltRun, tmp_path: Path, capsys: Capture, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        seg(capsys, "export", "picture", built.run, "--out", tmp_path / "a.png", value)
    assert "expected " in capsys.readouterr().err
