"""Outlines on the page of a run: those of its mask, where they lie, and no more than a page can hold."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio.features
import shapely
from conftest import NORTH_UP, UTM
from rasterio.enums import MergeAlg
from rasterio.transform import Affine
from runs import SETTINGS, BuiltRun, Mask, bare_scene, build_run, fill_run, plan_scenes

from seg_core.grid import Window
from seg_core.imagery.scene import Scene
from seg_core.report import crops, quicklook
from seg_core.report import outlines as outlines_module
from seg_core.report.cells import make_cells
from seg_core.report.frame import LONLAT, Frame, choose_frame
from seg_core.report.outlines import MAX_VERTICES, Outlines, draw_outlines
from seg_core.report.page import make_page
from seg_core.report.tiles import Tally, add_up
from seg_core.results import Run
from seg_core.run.plan import Plan

LARGEST = 15_000_000  # bytes of a page

pytestmark = pytest.mark.usefixtures("in_this_process")


def tally_of(run: str, plan: Plan) -> tuple[Tally, Frame]:
    frame = choose_frame(plan.images)
    return add_up(run, plan, make_cells(plan, frame)), frame


def outline(run: str, plan: Plan) -> Outlines:
    tally, frame = tally_of(run, plan)
    return draw_outlines(run, tally, frame, tally.best)


def filled(outlines: Outlines, frame: Frame, image: Scene) -> Mask:
    """The pixels of an image within outlines, where it is north up in the coordinates of the map."""
    box = frame.box(image)
    across, down = (box.right - box.left) / image.width, (box.top - box.bottom) / image.height
    transform = Affine(across, 0.0, box.left, 0.0, -down, box.top)
    lines = map(shapely.Polygon, (np.stack(line, axis=1) for line in zip(outlines.xs, outlines.ys, strict=True)))
    inside = [line for line in lines if shapely.box(*box).buffer(1e-3).contains(line)]
    # A hole is a line of its own within another one: what an odd number of lines surround is building.
    drawn = rasterio.features.rasterize(
        inside, (image.height, image.width), transform=transform, merge_alg=MergeAlg.add, dtype=np.int32
    )
    found: Mask = drawn % 2 == 1
    return found


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines_module, "TOLERANCE", 0.0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("crs", [UTM, None])
def test_all_shapes_of_a_small_run_lie_where_its_mask_is(tmp_path: Path, crs: str | None) -> None:
    run, plan = build_run(tmp_path, crs=crs)
    found, frame = outline(run, plan), choose_frame(plan.images)
    assert found.num_shapes == len(Run(run).footprints())
    assert (found.num_tiles, found.pixel) == (None, 1.0)
    assert found.num_vertices == sum(map(len, found.xs)) == sum(map(len, found.ys))
    for image in plan.images:
        assert (filled(found, frame, image) == (Run(run).read_mask(image.scene_id) == 1)).all()


@pytest.mark.usefixtures("exact")
def test_scenes_in_several_crs_are_outlined_in_degrees(tmp_path: Path) -> None:
    scenes = [bare_scene(64, 64, crs, scene_id=crs[-5:], gsd_m=1.0) for crs in (UTM, "EPSG:32634")]
    run, plan = plan_scenes(tmp_path, scenes)
    fill_run(run, plan, lambda tile: np.arange(tile.num_pixels).reshape(tile.shape) % 32 > 20)
    found = outline(run, plan)
    assert choose_frame(plan.images).crs == LONLAT
    drawn = np.sort([(min(x), min(y), max(x), max(y)) for x, y in zip(found.xs, found.ys, strict=True)], axis=0)
    expected = np.sort(Run(run).footprints().bounds.to_numpy(), axis=0)
    np.testing.assert_allclose(drawn, expected, atol=2e-6)  # 0.2 m


def test_outlines_are_at_most_a_pixel_off(tmp_path: Path) -> None:
    y, x = np.mgrid[:128, :128]
    is_building = np.hypot(y - 64, x - 64) < 50
    run, plan = plan_scenes(tmp_path, [bare_scene(128, 128)])
    fill_run(run, plan, lambda tile: is_building[tile.slices(plan.images[0].window)])
    found = outline(run, plan)
    (exact,) = Run(run).footprints().geometry
    (line,) = map(np.array, zip(found.xs, found.ys, strict=True))
    assert shapely.hausdorff_distance(shapely.LineString(line.T), exact.exterior) <= 1.01
    assert len(line.T) < len(exact.exterior.coords) / 4


@pytest.mark.usefixtures("exact")
def test_of_a_large_region_the_tiles_with_the_most_are_outlined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlines_module, "MAX_PIXELS", 1000)
    run, plan = build_run(tmp_path)
    (tally, frame), image = tally_of(run, plan), plan.images[0]
    densest = sorted((tile for tile in tally.best.values() if tile.image == 0), key=lambda tile: -tile.building_px)
    cells = [cell for cell, tile in tally.best.items() if tile in densest[:3]]
    found = draw_outlines(run, tally, frame, cells)
    assert found.num_tiles == 3
    expected = np.zeros((image.height, image.width), np.bool_)
    for tile in densest[:3]:
        at = tile.window.slices(image.window)
        expected[at] = (Run(run).read_mask(image.scene_id) == 1)[at]
    assert (filled(found, frame, image) == expected).all()


def squares(tile: Window) -> Mask:
    """A pattern of squares of 2 x 2 px, more of them in the tiles to the south."""
    rows, cols = np.mgrid[: tile.height, : tile.width]
    found: Mask = (rows % 4 < 2) & (cols % 4 < 2) & (cols < 32 + tile.row_off // 64)
    return found


def test_a_page_is_small_however_many_buildings_there_are(tmp_path: Path) -> None:
    settings = replace(SETTINGS, tile_size=64, part=512)
    run, plan = plan_scenes(tmp_path, [bare_scene(2048, 2048)], settings)
    fill_run(run, plan, squares)
    found = outline(run, plan)
    assert 0.9 * MAX_VERTICES < found.num_vertices <= MAX_VERTICES
    assert found.num_tiles is not None
    assert 10 < found.num_tiles < 1024
    assert min(y for line in found.ys for y in line) < NORTH_UP[5] - 1984  # the tiles to the south have the most
    page = make_page(run).html
    assert "Zoom in to see the outlines of " in page
    assert f"those of {found.num_tiles} tiles, which have the most building of the tiles with pictures" in page
    assert len(page) + quicklook.MAX_BYTES + crops.MAX_BYTES < LARGEST


def test_a_page_says_how_many_outlines_it_has(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    number = len(Run(run).footprints())
    assert f"Zoom in to see the outlines of all {number:,} buildings, at most 1 px off the mask." in make_page(run).html


def test_a_run_without_a_building_has_no_outlines(tmp_path: Path) -> None:
    run, plan = plan_scenes(tmp_path, [bare_scene(64, 64)])
    fill_run(run, plan, lambda tile: np.zeros(tile.shape, np.bool_))
    assert outline(run, plan).num_shapes == 0
    assert "Zoom in" not in make_page(run).html


def test_a_run_of_which_no_part_is_done_has_no_outlines(tmp_path: Path) -> None:
    run, plan = plan_scenes(tmp_path, [bare_scene(64, 64)])
    assert outline(run, plan).num_shapes == 0
    assert "Zoom in" not in make_page(run).html


def test_masks_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    built = BuiltRun(*build_run(tmp_path))
    built.rewrite(lambda rows: [{**row, "valid": None} for row in rows])  # as older versions wrote them
    assert "Zoom in" in make_page(built.run).html
    shutil.move(tmp_path / "scenes", tmp_path / "moved")
    assert "No outlines are on the map, because masks can&#39;t be read now: " in make_page(built.run).html
