"""A run as one picture: each tile in the colour of its coverage, and what a map needs."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import NORTH_UP, UTM
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pyproj import Transformer
from runs import BuiltRun, bare_scene, build_run
from seg_command import seg

from seg_core.imagery.georef import GEOD
from seg_core.report.cell_columns import FAILED, MISSING, end_of_ramp
from seg_core.report.cells import make_cells
from seg_core.report.frame import Box, Frame, choose_frame
from seg_core.report.picture import choose_scale_bar, make_figure, north_angle
from seg_core.report.quicklook import Quicklook
from seg_core.report.tiles import Tally, add_up
from seg_core.results import Run

Capture = pytest.CaptureFixture[str]


def draw(run: str, plan: Any) -> tuple[Figure, Tally, Frame]:
    frame = choose_frame(plan.images)
    tally = add_up(run, plan, make_cells(plan, frame))
    return make_figure("run", tally, frame, Quicklook(), "building"), tally, frame


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    """A run of two scenes, with a failed part and one that is missing."""
    run, plan = build_run(tmp_path_factory.mktemp("picture"), failed_parts=[1])
    found = BuiltRun(run, plan)
    found.path(0).unlink()
    return found


def test_the_legend_names_what_the_run_finds(built: BuiltRun) -> None:
    frame = choose_frame(built.plan.images)
    tally = add_up(built.run, built.plan, make_cells(built.plan, frame))
    figure = make_figure("run", tally, frame, Quicklook(), "road")
    assert "road, % of the valid pixels" in [axes.get_xlabel() for axes in figure.axes]


def test_each_tile_has_the_colour_of_its_coverage(built: BuiltRun) -> None:
    figure, tally, frame = draw(built.run, built.plan)
    drawn = [each for each in figure.axes[0].collections if isinstance(each, PolyCollection)]
    colours = {
        tuple(np.round(path.vertices[:4].mean(axis=0), 3)): (tuple(np.round(colour[:3], 6)), each.get_hatch())
        for each in drawn
        for path, colour in zip(each.get_paths(), each.get_facecolors(), strict=True)
    }
    assert len(colours) == tally.cells.num_cells
    end, ramp = end_of_ramp(tally), colormaps["viridis"]
    for row in Run(built.run).tiles.itertuples():
        image = next(each for each in built.plan.images if each.scene_id == row.scene_id)
        x, y = frame.locate(image, np.array([row.row_off + row.height / 2]), np.array([row.col_off + row.width / 2]))
        expected = tuple(np.round(ramp(row.coverage / end)[:3], 6))
        assert colours[round(x[0], 3), round(y[0], 3)] == (expected, "")
    hatches = [hatch for _, hatch in colours.values()]
    assert (hatches.count("xx"), hatches.count("///")) == (4, 4)
    faults = {colour for colour, hatch in colours.values() if hatch in {"xx", "///"}}
    assert faults == {tuple(np.round(to_rgb(style.fill or ""), 6)) for style in (FAILED, MISSING)}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"not done yet", "failed"} <= set(legend)


@pytest.mark.parametrize("crs", [UTM, "EPSG:3857", "EPSG:4326"])
def test_the_scale_bar_has_its_length_on_the_ground(crs: str) -> None:
    degrees = crs == "EPSG:4326"
    place = (1e-5, 0.0, 13.0, 0.0, -1e-5, 52.0) if degrees else NORTH_UP
    image = bare_scene(1000, 3000, crs, place)
    frame = choose_frame((image,))
    box = frame.box(image)
    bar = choose_scale_bar(frame, box)
    y = (box.bottom + box.top) / 2
    lon, lat = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True).transform(
        [box.left, box.left + bar.length], [y, y]
    )
    assert GEOD.inv(lon[0], lat[0], lon[1], lat[1])[2] == pytest.approx(bar.metres, rel=1e-3)
    assert str(bar.metres)[0] in "125"
    assert 0.1 < bar.length / (box.right - box.left) <= 0.25


def test_a_map_around_the_earth_has_a_scale_bar_of_its_middle() -> None:
    frame = choose_frame((bare_scene(180, 360, "EPSG:4326", (1.0, 0.0, -180.0, 0.0, -1.0, 90.0)),))
    assert choose_scale_bar(frame, frame.box(frame.images[0])) == pytest.approx((1e7, 89.8315), rel=1e-4)


@pytest.mark.parametrize(("crs", "half"), [("EPSG:4326", 180.0), ("EPSG:3857", 20_037_508.342789244)])
def test_scenes_on_both_sides_of_the_antimeridian_are_neighbours_on_the_map(crs: str, half: float) -> None:
    pixel = half / 2e7
    east, west = (
        bare_scene(100, 100, crs, (pixel, 0.0, x, 0.0, -pixel, 0.0), scene_id=f"{x}.tif")
        for x in (half - 100 * pixel, -half)
    )
    for images in ((east, west), (west, east)):
        frame = choose_frame(images)
        boxes = sorted(map(frame.box, images))
        assert boxes[0].right == pytest.approx(boxes[1].left, abs=pixel / 100)
        whole = Box(boxes[0].left, boxes[0].bottom, boxes[1].right, boxes[0].top)
        assert choose_scale_bar(frame, whole).metres == 50


def test_north_is_where_the_crs_has_it() -> None:
    image = bare_scene(1000, 1000, "EPSG:3035", (1.0, 0.0, 6_000_000.0, 0.0, -1.0, 3_000_000.0))  # east of its middle
    frame = choose_frame((image,))
    assert 5 < abs(north_angle(frame, frame.box(image))) < 30
    upright = choose_frame((bare_scene(1000, 1000, "EPSG:3857", NORTH_UP),))
    assert north_angle(upright, Box(0.0, 0.0, 1000.0, 1000.0)) == pytest.approx(0, abs=1e-6)


def test_a_map_without_a_crs_has_neither_scale_nor_north(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, crs=None)
    figure, _, _ = draw(run, plan)
    assert [text.get_text() for text in figure.axes[0].texts] == []
    assert len(figure.axes[0].lines) == 0


def test_the_command_draws_a_picture(built: BuiltRun, tmp_path: Path, capsys: Capture) -> None:
    out, err = seg(capsys, "export", "picture", built.run, "--out", tmp_path / "run.png", "--json", code=1)
    assert json.loads(out) == {"file": str(tmp_path / "run.png"), "failed": 4, "missing": 4}
    assert "8 tiles failed or are not done yet: they are hatched (exit code 1)" in err
    assert "under the map" not in err
    picture = cv2.imread(str(tmp_path / "run.png"))
    assert picture is not None
    assert max(picture.shape) > 1600
    for name, named in (
        ("run.png", "already exists"),
        ("run.jpg", "not a format that a picture is written in: say .png"),
    ):
        _, err = seg(capsys, "export", "picture", built.run, "--out", tmp_path / name, code=2)
        assert named in err


def test_scenes_that_are_not_under_the_map_are_named(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path)
    shutil.move(tmp_path / "scenes", tmp_path / "moved")
    _, err = seg(capsys, "export", "picture", run, "--out", tmp_path / "bare.png")
    assert "No scene is under the map, because they can't be read now, such as: " in err
    moved = f"{tmp_path}/scenes={tmp_path}/moved"
    _, err = seg(capsys, "export", "picture", run, "--out", tmp_path / "whole.png", "--relocate", moved)
    assert "under the map" not in err
