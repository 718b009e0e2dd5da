"""Buildings of a run as polygons: each whole, none twice, and all of their pixels."""

import gzip
import json
import math
import os
from collections.abc import Container, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio.features
import shapely
from conftest import NORTH_UP, UTM
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import CRS
from ray import cloudpickle
from runs import SETTINGS, bare_scene, build_run, fill_run, plan_scenes, read_part
from scipy import ndimage
from seg_command import seg

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.footprints import pieces
from seg_core.footprints.export import Find, Found, Item, find_footprints
from seg_core.footprints.merge import OpenRow, join_row
from seg_core.footprints.outlines import drop_collinear, regularize
from seg_core.footprints.shape import make_shape
from seg_core.footprints.table import make_table
from seg_core.grid import Window, split
from seg_core.imagery.georef import GEOD, Transform
from seg_core.imagery.scene import Scene
from seg_core.results import Run
from seg_core.run.export_masks import read_mask
from seg_core.run.plan import Part, Plan, Settings
from seg_core.run.query import query
from seg_core.run.rows import Failure, decode_probability, failed_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part

Capture = pytest.CaptureFixture[str]
Frame = geopandas.GeoDataFrame
UTM_FEET = "+proj=utm +zone=33 +datum=WGS84 +units=us-ft"


def buildings_of(
    state: NDArray[np.uint8],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
    absent: Container[Window] = (),
    transform: Transform = NORTH_UP,
) -> Frame:
    """The buildings of an image of these pixels, found in parts of `size` px, by their first pixel."""
    image = bare_scene(*state.shape, transform=transform)
    settings = Settings(tile_size=8, halo=0, threshold=0.5, keep_probability=True)

    def read(_: Settings, part: Part, __: None) -> pieces._Pixels:
        tiles = np.full((-(-part.window.height // 8), -(-part.window.width // 8)), 2.0)
        own = state[part.window.slices(image.window)]
        return pieces._Pixels(own, own // 2, tiles)

    monkeypatch.setattr(pieces, "_read_pixels", read)
    windows = [window for window in split(image.window, size) if window not in absent]
    parts = [pieces.find_buildings(settings, Part("", image, window), None) for window in windows]
    found, above = [frame for frame, _ in parts], OpenRow()
    for _, row in groupby((each for _, each in parts), key=lambda each: each.window.row_off):
        whole, above = join_row(above, list(row))
        found += whole
    whole, _ = join_row(above, [])
    frame = pd.concat([*found, *whole], ignore_index=True).sort_values("first", ignore_index=True)
    frame.geometry = drop_collinear(frame.geometry.to_numpy())
    return frame


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(9, 40), st.integers(9, 40), st.data())
def test_a_part_of_a_mosaic_that_does_not_exist_is_a_gap(
    seed: int, height: int, width: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    state = (rng.random((height, width)) < 0.55).astype(np.uint8)
    windows = list(split(Window(0, 0, height, width), 8))
    absent = data.draw(st.lists(st.sampled_from(windows), min_size=1, max_size=len(windows) - 1, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        found = buildings_of(state, 8, patch, absent)
        for window in absent:
            state[window.slices(Window(0, 0, height, width))] = MISSING
        expected = buildings_of(state, 64, patch)
    assert found.geometry.geom_equals_exact(expected.geometry, 0).all()
    assert list(found["touches_gap"]) == list(expected["touches_gap"])


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 16, 24]), st.data())
def test_buildings_are_the_same_in_parts_of_any_size(
    seed: int, height: int, width: int, size: int, data: st.DataObject
) -> None:
    share = data.draw(st.sampled_from([0.3, 0.55, 0.8]))
    rng = np.random.default_rng(seed)
    state = (rng.random((height, width)) < share).astype(np.uint8)
    state[rng.random((height, width)) < 0.02] = MISSING
    with pytest.MonkeyPatch.context() as patch:
        whole, in_parts = (buildings_of(state, each, patch) for each in (64, size))
    labels, number = ndimage.label(state == 1)
    assert len(whole) == number
    assert list(whole["building_px"]) == [int((labels == label).sum()) for label in range(1, number + 1)]
    assert whole.geometry.is_valid.all()
    assert list(whole.geometry.area) == list(whole["building_px"])
    if number:
        drawn = rasterio.features.rasterize(zip(whole.geometry, range(1, number + 1), strict=True), state.shape)
        assert (drawn == labels).all()
    edge = np.pad(state == MISSING, 1, constant_values=True)
    beside = ndimage.binary_dilation(edge)[1:-1, 1:-1]
    assert list(whole["touches_gap"]) == [bool(beside[labels == label].any()) for label in range(1, number + 1)]
    assert whole.geom_equals_exact(in_parts, 0).all()
    for name in ("building_px", "building_m2", "level_sum", "first", "touches_gap"):
        assert list(whole[name]) == list(in_parts[name]), name


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Plan]:
    """A run of two scenes of noise, of which probabilities are kept."""
    folder = tmp_path_factory.mktemp("footprints")
    return build_run(folder, settings=Settings(**{**vars(SETTINGS), "keep_probability": True}))


def export(run: str, path: Path, capsys: Capture, *options: object, code: int = 0) -> tuple[Frame, dict[str, Any]]:
    out, _ = seg(capsys, "export", "footprints", run, "--out", path, *options, "--json", code=code)
    frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
    return frame, json.loads(out)


def test_polygons_are_the_masks(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    run, plan = noise
    frame, figures = export(run, tmp_path / "f.parquet", capsys)
    assert figures["building_px"] == Run(run).summary()["building_px"] == frame["building_px"].sum()
    assert figures["buildings"] == len(frame) == frame["id"].nunique()
    assert frame.crs == CRS.from_user_input(UTM)
    for polygon in frame.geometry:  # whole ones and those that several parts hold
        assert corners_of(polygon) == pytest.approx(90)
    for image in plan.images:
        own = frame[frame["scene_id"] == image.scene_id]
        mask = read_mask(run, image.scene_id)
        drawn = rasterio.features.rasterize(own.geometry, mask.shape, transform=rasterio.Affine(*image.transform))
        assert (drawn == (mask == 1)).all()
        assert len(own) == ndimage.label(mask == 1)[1]
        for _, row in own.iterrows():
            scene_id, first_row, first_col = row["id"].rsplit(":", 2)
            assert (scene_id, mask[int(first_row), int(first_col)]) == (image.scene_id, 1)


def test_areas_and_perimeters_are_those_of_the_ground(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    run, _ = noise
    frame, figures = export(run, tmp_path / "f.parquet", capsys)
    (total,) = query(run, "SELECT sum(building_m2) AS m2 FROM tiles").to_pylist()
    assert figures["area_m2"] == pytest.approx(total["m2"], rel=1e-12)
    for polygon, row in zip(frame.to_crs(4326).geometry, frame.itertuples(), strict=True):
        area = abs(GEOD.geometry_area_perimeter(shapely.orient_polygons(polygon))[0])
        length = sum(GEOD.geometry_length(ring) for ring in (polygon.exterior, *polygon.interiors))
        assert row.area_m2 == pytest.approx(area, rel=1e-5)
        assert row.perimeter_m == pytest.approx(length, rel=1e-5)


def test_confidence_is_the_mean_of_the_probabilities(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    run, plan = noise
    frame, _ = export(run, tmp_path / "f.parquet", capsys)
    for image in plan.images:
        levels = np.zeros((image.height, image.width))
        for part in plan.parts():
            for row in read_part(part_path(run, part.key)) if part.scene == image else ():
                levels[Window.from_row(row).slices(image.window)] = decode_probability(row)
        labels, _ = ndimage.label(read_mask(run, image.scene_id) == 1)
        own = frame[frame["scene_id"] == image.scene_id]
        for name, confidence in zip(own["id"], own["confidence"], strict=True):
            row, col = map(int, name.split(":")[1:])
            assert confidence == pytest.approx(levels[labels == labels[row, col]].mean() / 255)


def test_a_style_for_qgis_lies_beside_the_file(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    export(noise[0], tmp_path / "f.gpkg", capsys)
    assert "renderer-v2" in (tmp_path / "f.qml").read_text()
    (tmp_path / "f.qml").write_text("of one's own")
    capsys.readouterr()
    _, err = seg(capsys, "export", "footprints", noise[0], "--out", tmp_path / "f.parquet")
    assert (tmp_path / "f.qml").read_text() == "of one's own"
    assert f"{tmp_path}/f.qml: was there before, and is kept: it may be the style of another file" in err
    export(noise[0], tmp_path / "web.pmtiles", capsys)
    assert not (tmp_path / "web.qml").exists()
    _, err = seg(capsys, "export", "footprints", noise[0], "--out", tmp_path / "f.pmtiles")
    assert "was there before" not in err  # it has no style of its own


@pytest.mark.parametrize("suffix", [".parquet", ".gpkg", ".geojson", ".fgb"])
def test_each_format_holds_the_same_buildings(
    noise: tuple[str, Plan], tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    expected, _ = export(noise[0], tmp_path / "expected.parquet", capsys)
    frame, _ = export(noise[0], tmp_path / f"f{suffix}", capsys)
    assert frame.crs == (CRS.from_user_input("OGC:CRS84") if suffix == ".geojson" else expected.crs)
    frame = frame.set_index("id").loc[expected["id"]]
    assert list(frame["area_m2"]) == pytest.approx(list(expected["area_m2"]), rel=1e-9)
    assert list(frame["touches_gap"].astype(bool)) == list(expected["touches_gap"])
    there = frame.to_crs(UTM).geometry.to_numpy()
    assert shapely.hausdorff_distance(there, expected.geometry.to_numpy()).max() < 0.02  # seven digits of a degree


def test_tiles_for_the_web_show_the_buildings(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    expected, _ = export(noise[0], tmp_path / "expected.parquet", capsys)
    frame, _ = export(noise[0], tmp_path / "f.pmtiles", capsys)
    assert frame.crs == CRS.from_epsg(3857)
    assert set(frame["id"]) <= set(expected["id"])
    assert len(set(frame["id"])) > 0.9 * len(expected)  # the smallest are a pixel
    head = (tmp_path / "f.pmtiles").read_bytes()[:127]
    start, length = (int.from_bytes(head[at : at + 8], "little") for at in (24, 32))  # of the JSON metadata
    metadata = json.loads(gzip.decompress((tmp_path / "f.pmtiles").read_bytes()[start : start + length]))
    assert metadata["name"] == "f"


def test_tiles_for_the_web_cannot_be_empty(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    command = ["export", "footprints", noise[0], "--min-area", "1e9", "--out"]
    _, err = seg(capsys, *command, tmp_path / "f.pmtiles", code=2)
    said = f"seg: --out {tmp_path}/f.pmtiles: there are no buildings, and .pmtiles can't be empty: name a .gpkg file"
    assert err.splitlines()[-1] == said
    assert list(tmp_path.iterdir()) == []
    seg(capsys, *command, tmp_path / "f.gpkg")
    assert len(geopandas.read_file(tmp_path / "f.gpkg")) == 0


def test_geoparquet_is_sorted_along_a_curve_and_has_boxes(
    noise: tuple[str, Plan], tmp_path: Path, capsys: Capture
) -> None:
    frame, _ = export(noise[0], tmp_path / "f.parquet", capsys)
    geo = json.loads(pq.read_metadata(tmp_path / "f.parquet").metadata[b"geo"])
    column = geo["columns"]["geometry"]
    assert geo["version"] == "1.1.0"
    assert column["geometry_types"] == ["Polygon"]
    assert CRS.from_json_dict(column["crs"]) == CRS.from_user_input(UTM)
    boxes = pq.read_table(tmp_path / "f.parquet", columns=["bbox"]).column("bbox").to_pylist()
    assert [tuple(box.values()) for box in boxes] == [each.bounds for each in frame.geometry]
    whole = shapely.union_all([shapely.box(*bounds(image.window, image)) for image in noise[1].images]).bounds
    places = shapely.centroid(shapely.box(*frame.geometry.bounds.to_numpy().T))
    assert geopandas.GeoSeries(places).hilbert_distance(whole).is_monotonic_increasing
    assert sorted(frame["id"]) != list(frame["id"])
    near = geopandas.read_parquet(tmp_path / "f.parquet", bbox=tuple(frame.geometry.iloc[0].bounds))
    assert len(near) < len(frame)


def test_the_same_run_gives_the_same_file(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    for name in ("a", "b"):
        export(noise[0], tmp_path / f"{name}.parquet", capsys)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_what_is_missing_or_failed_is_a_gap(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path)
    before, _ = export(run, tmp_path / "before.parquet", capsys)
    first, second, *_ = plan.parts()
    os.remove(part_path(run, first.key))
    rows = failed_rows(second.scene, second.window, SETTINGS.tile_size, Failure("ReadError", "the disk said no"))
    write_part(run, second.key, rows, plan.model, second.version)
    after, figures = export(run, tmp_path / "after.parquet", capsys, code=1)
    assert (figures["missing"], figures["failed"]) == (4, 4)
    image, own = first.scene, after[after["scene_id"] == first.scene.scene_id]
    unknown = shapely.union_all([shapely.box(*bounds(part.window, image)) for part in (first, second)])
    assert own.geometry.intersection(unknown).area.sum() == 0
    beside = own.geometry.intersection(unknown).length > 0
    assert beside.any()
    assert own["touches_gap"][beside].all()
    was = before.set_index("id")["touches_gap"]
    unchanged = own[~beside & own["id"].isin(was.index)]
    assert list(unchanged["touches_gap"]) == list(was.loc[unchanged["id"]])
    assert not unchanged["touches_gap"].all()


def bounds(window: Window, image: Scene) -> tuple[float, float, float, float]:
    west, north = image.transform[2] + window.col_off, image.transform[5] - window.row_off
    return west, north - window.height, west + window.width, north


@pytest.mark.usefixtures("without_actors")
def test_a_building_across_scenes_of_a_mosaic_is_one(
    make_scene: Any, make_bundle: Any, tmp_path: Path, capsys: Capture
) -> None:
    for name, col in (("a.tif", 0), ("b.tif", 100)):
        make_scene(f"m/{name}", 90, 100, transform=(1.0, 0.0, NORTH_UP[2] + col, 0.0, -1.0, NORTH_UP[5]))
    found, model = {}, make_bundle()
    for name, options in {"apart": [], "mosaic": ["--mosaic"]}.items():
        command = ["segment", tmp_path / "m", "--model", model, "--out", tmp_path / name, *options]
        seg(capsys, *command, "--tile-size", 32, "--part", 64)
        found[name] = export(str(tmp_path / name), tmp_path / f"{name}.parquet", capsys)[0]
        masks = [read_mask(str(tmp_path / name), image.scene_id) for image in read_plan(str(tmp_path / name)).images]
        assert len(found[name]) == sum(ndimage.label(mask == 1)[1] for mask in masks)
    seam = shapely.box(NORTH_UP[2] + 99.5, 0, NORTH_UP[2] + 100.5, 1e8)
    across = {name: int((frame.geometry.intersection(seam).area > 0).sum()) for name, frame in found.items()}
    assert 0 < across["mosaic"] < across["apart"]
    at_seam = found["apart"][found["apart"].geometry.intersects(seam)]
    assert at_seam["touches_gap"].all()


def turned(polygon: shapely.Polygon, degrees: float) -> shapely.Polygon:
    return shapely.affinity.rotate(polygon, degrees, origin=(40, 40))


def pixels_of(polygon: shapely.Polygon) -> shapely.Polygon:
    """The pixels whose centres lie in a polygon, as a polygon."""
    mask = rasterio.features.rasterize([polygon], (80, 80), dtype="uint8")
    found = [shapely.geometry.shape(shape) for shape, value in rasterio.features.shapes(mask, mask > 0) if value]
    return max(found, key=lambda each: each.area)


def corners_of(polygon: shapely.Polygon) -> NDArray[np.float64]:
    """The angles of the shell of a polygon in degrees, from 0 to 180."""
    steps = np.diff(shapely.get_coordinates(polygon.exterior), axis=0)
    directions = np.arctan2(steps[:, 1], steps[:, 0])
    between = np.degrees(directions - np.roll(directions, 1)) % 360
    return np.minimum(between, 360 - between)


HOUSE = shapely.box(20, 30, 60, 50)
L_SHAPE = shapely.union(HOUSE, shapely.box(20, 50, 35, 65))
COURTYARD = shapely.difference(shapely.box(15, 15, 65, 65), shapely.box(30, 30, 50, 50))


@pytest.mark.parametrize("degrees", [0, 10, 30, 45, 77])
@pytest.mark.parametrize(("building", "num_corners"), [(HOUSE, 4), (L_SHAPE, 6), (COURTYARD, 4)])
def test_regularized_outlines_are_those_of_the_building(
    building: shapely.Polygon, num_corners: int, degrees: float
) -> None:
    truth = turned(building, degrees)
    outline = regularize(pixels_of(truth), 1.0)
    assert outline.is_valid
    assert len(outline.interiors) == len(building.interiors)
    assert len(corners_of(outline)) == num_corners
    assert corners_of(outline) == pytest.approx(90, abs=0.01)
    assert outline.intersection(truth).area / outline.union(truth).area > 0.9


def test_a_round_building_is_only_simplified() -> None:
    tower = pixels_of(shapely.Point(40, 40).buffer(25).difference(shapely.Point(40, 40).buffer(21)))
    outline = regularize(tower, 1.0)
    assert outline.is_valid
    assert abs(corners_of(outline) - 90).max() > 20
    assert outline.intersection(tower).area / outline.union(tower).area > 0.7


def test_options_choose_buildings_and_their_outlines(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    plain, _ = export(noise[0], tmp_path / "plain.parquet", capsys)
    large, figures = export(noise[0], tmp_path / "large.parquet", capsys, "--min-area", 3)
    assert list(large["id"]) == list(plain["id"][plain["area_m2"] >= 3])
    assert 0 < figures["buildings"] < len(plain)
    simple, _ = export(noise[0], tmp_path / "simple.parquet", capsys, "--simplify", 1)
    square, _ = export(noise[0], tmp_path / "square.parquet", capsys, "--regularize")
    for frame in (simple, square):
        assert frame.geometry.is_valid.all()
        assert frame.geometry.count_coordinates().sum() < plain.geometry.count_coordinates().sum()
        assert set(frame["id"]) == set(plain["id"])
    outlines = simple.set_index("id").loc[plain["id"]].geometry.boundary.to_numpy()
    vertices, building = shapely.get_coordinates(plain.geometry.to_numpy(), return_index=True)
    moved = shapely.distance(shapely.points(vertices), outlines[building])
    assert 0 < moved.max() < 1.5  # GEOS measures from outlines that are partly simplified
    other, _ = export(noise[0], tmp_path / "other.parquet", capsys, "--crs", "EPSG:3035")
    assert other.crs == CRS.from_epsg(3035)
    back = other.set_index("id").loc[plain["id"]].to_crs(UTM).geometry
    assert back.hausdorff_distance(plain.set_index("id").geometry).max() < 1e-3


OBLONG: Transform = (0.3, 0.0, NORTH_UP[2], 0.0, -0.6, NORTH_UP[5])  # pixels of 0.3 x 0.6 m


def test_outlines_are_drawn_in_metres(monkeypatch: pytest.MonkeyPatch) -> None:
    """On pixels that are neither squares nor 1 m, and of which two lie in each square metre in one direction."""
    house = shapely.affinity.rotate(shapely.box(6, 6, 24, 15), 30)
    state = rasterio.features.rasterize(
        [shapely.affinity.scale(house, 1 / 0.3, 1 / 0.6, origin=(0, 0))], (48, 96), dtype="uint8"
    )
    image = bare_scene(*state.shape, transform=OBLONG)
    buildings = buildings_of(state, 64, monkeypatch, transform=OBLONG)
    buildings["building_m2"] = buildings["building_px"] * 0.18
    tables = {
        name: make_table(buildings, image, make_shape([image], **options), "m")
        for name, options in {"plain": {}, "simple": {"simplify": 0.8}, "square": {"regularize": True}}.items()
    }
    plain, simple, square = (shapely.from_wkb(table["geometry"][0].as_py()) for table in tables.values())
    assert tables["plain"]["perimeter_m"][0].as_py() == pytest.approx(plain.length, rel=1e-3)
    assert tables["plain"]["area_m2"][0].as_py() == pytest.approx(plain.area, rel=1e-3)
    vertices = shapely.points(shapely.get_coordinates(plain))
    assert 0.3 < shapely.distance(vertices, simple.exterior).max() < 1.0
    assert corners_of(square) == pytest.approx([90.0] * 4, abs=0.2)
    assert square.intersection(plain).area / square.union(plain).area > 0.85
    (exact,) = buildings["building_m2"]
    assert len(make_table(buildings, image, make_shape([image], min_area=exact), "m")) == 1


def test_outlines_get_right_angles_by_the_size_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(polygon: shapely.Polygon, pixel: float) -> shapely.Polygon:
        seen.append(pixel)
        return polygon

    monkeypatch.setattr("seg_core.footprints.table.regularize", record)
    image = bare_scene(8, 8, transform=OBLONG)
    buildings = buildings_of(np.eye(8, dtype=np.uint8), 64, monkeypatch, transform=OBLONG)
    make_table(buildings, image, make_shape([image], regularize=True), "m")
    assert seen == pytest.approx([math.sqrt(0.3 * 0.6)] * 8, rel=1e-3)


def test_outlines_of_what_is_no_building_are_only_simplified() -> None:
    """A square whose upper side has teeth, which a rectangle would fit."""
    teeth = np.array([[(2 * at, 6000), (2 * at, 6003), (2 * at + 1, 6003), (2 * at + 1, 6000)] for at in range(3000)])
    for number in (1000, 3000):
        comb = shapely.Polygon([(0, 0), *teeth[:number].reshape(-1, 2), (2 * number, 6000), (2 * number, 0)])
        assert (len(corners_of(regularize(comb, 1.0))) == 4) == (number == 1000)


def test_the_area_that_is_asked_for_is_that_of_the_pixels(noise: tuple[str, Plan]) -> None:
    run = Run(noise[0])
    plain = run.footprints()
    expected = set(plain["id"][plain["building_px"] >= 4])
    assert 0 < len(expected) < len(plain)
    for options in ({}, {"simplify": 1.0}, {"regularize": True}):
        assert set(run.footprints(min_area=3.5, **options)["id"]) == expected


@pytest.mark.parametrize("down", [-1.0, 1.0])
def test_shells_are_counterclockwise_and_holes_clockwise(monkeypatch: pytest.MonkeyPatch, down: float) -> None:
    state = (np.random.default_rng(0).random((40, 40)) < 0.6).astype(np.uint8)
    transform: Transform = (1.0, 0.0, NORTH_UP[2], 0.0, down, NORTH_UP[5])
    image = bare_scene(40, 40, transform=transform)
    buildings = buildings_of(state, 64, monkeypatch, transform=transform)
    table = make_table(buildings, image, make_shape([image]), "m")
    polygons = shapely.from_wkb(table["geometry"].to_numpy())
    assert shapely.is_ccw(shapely.get_exterior_ring(polygons)).all()
    holes = [hole for polygon in polygons for hole in polygon.interiors]
    assert holes
    assert not shapely.is_ccw(holes).any()


def test_an_error_while_a_file_is_written_is_not_the_one_of_the_library(
    noise: tuple[str, Plan], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("seg_core.footprints.export._cast", interrupt)
    _, err = seg(capsys, "export", "footprints", noise[0], "--out", tmp_path / "f.gpkg", code=130)
    assert "stopped" in err
    assert list(tmp_path.iterdir()) == []


def test_footprints_in_python(noise: tuple[str, Plan], tmp_path: Path, capsys: Capture) -> None:
    written, _ = export(noise[0], tmp_path / "f.parquet", capsys)
    frame = Run(noise[0]).footprints()
    assert frame.crs == written.crs
    assert set(frame.columns) == set(written.columns)
    assert (
        frame.set_index("id").loc[written["id"]].geometry.geom_equals_exact(written.set_index("id").geometry, 0).all()
    )
    assert len(Run(noise[0]).footprints(min_area=3)) < len(frame)


def test_parts_can_be_spread_over_other_machines(noise: tuple[str, Plan]) -> None:
    run, plan = noise

    def spread(find: Find, items: Sequence[Item]) -> Iterator[Found]:
        for item in items:
            sent = cloudpickle.loads(cloudpickle.dumps(find))
            yield cloudpickle.loads(cloudpickle.dumps(sent(cloudpickle.loads(cloudpickle.dumps(item)))))

    shape = make_shape(plan.images)
    apart, here = (pa.concat_tables(find_footprints(run, shape, **each)) for each in ({"spread": spread}, {}))
    assert apart == here


def test_scenes_without_a_crs_have_pixels_for_coordinates(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, crs=None)
    out, err = seg(capsys, "export", "footprints", run, "--out", tmp_path / "f.gpkg", "--json")
    assert "the scenes have no CRS: coordinates are the pixels of each" in err
    frame = geopandas.read_file(tmp_path / "f.gpkg")
    assert frame.crs is None
    assert frame["area_m2"].isna().all()
    assert frame["perimeter_m"].isna().all()
    assert json.loads(out)["area_m2"] is None
    image = plan.images[0]
    own = frame[frame["scene_id"] == image.scene_id]
    drawn = rasterio.features.rasterize(own.geometry, image.window.shape, transform=rasterio.Affine(*image.transform))
    assert (drawn == (read_mask(run, image.scene_id) == 1)).all()
    for options, named in (
        (["g.parquet", "--min-area", 3], "north/a.tif has no CRS, so that its metres are not known"),
        (["g.parquet", "--crs", "EPSG:3035"], "--crs EPSG:3035: north/a.tif has no CRS to convert from: leave it out"),
        (
            ["g.geojson"],
            "is in longitude and latitude, and north/a.tif has no CRS: name a .gpkg, .fgb or .parquet file",
        ),
    ):
        name, *others = options
        _, err = seg(capsys, "export", "footprints", run, "--out", tmp_path / str(name), *others, code=2)
        assert named in err


def test_scenes_of_several_crs_are_in_longitude_and_latitude() -> None:
    other = bare_scene(10, 10, scene_id="b.tif", crs="EPSG:32632")
    assert make_shape([bare_scene(10, 10)]).crs == UTM
    assert make_shape([bare_scene(10, 10), other]).crs == "OGC:CRS84"
    with pytest.raises(SegError, match=r"c.tif: has no CRS, and other scenes have one"):
        make_shape([bare_scene(10, 10), bare_scene(10, 10, scene_id="c.tif", crs=None)])


def test_buildings_across_the_antimeridian_are_cut_there(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path, crs="EPSG:3832", corner=(3339584.72 - 50, 0.0))  # PDC Mercator, whose middle is 150 E
    plain, _ = export(run, tmp_path / "plain.parquet", capsys)
    frame, _ = export(run, tmp_path / "f.geojson", capsys)
    assert set(frame.geom_type) == {"MultiPolygon"}
    west, _, east, _ = frame.geometry.explode().bounds.to_numpy().T
    assert (east - west < 1).all()
    assert {west.min() < -179, east.max() > 179} == {True}
    cut = (
        frame.geometry.count_geometries() > 1
        if hasattr(frame.geometry, "count_geometries")
        else frame.geometry.apply(lambda each: len(each.geoms) > 1)
    )
    assert cut.any()
    areas = frame.set_index("id")["area_m2"].loc[plain["id"]]
    assert list(areas) == pytest.approx(list(plain["area_m2"]))


@pytest.mark.parametrize("suffix", [".geojson", ".parquet", ".gpkg"])
def test_buildings_of_a_scene_beyond_the_antimeridian_have_longitudes_on_its_other_side(
    tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    scene = bare_scene(64, 64, "EPSG:4326", (1e-5, 0.0, 180.001, 0.0, -1e-5, -17.0))
    run, plan = plan_scenes(tmp_path, [scene])
    fill_run(run, plan, lambda tile: np.pad(np.ones((10, 20), bool), ((4, tile.height - 14), (4, tile.width - 24))))
    frame, _ = export(run, tmp_path / f"f{suffix}", capsys)
    assert set(frame.geom_type) == {"Polygon"}
    assert frame.total_bounds == pytest.approx([-179.99896, -17.00046, -179.99844, -17.00004], abs=1e-9)


def test_a_run_without_a_building_has_no_footprints(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path, settings=Settings(**{**vars(SETTINGS), "threshold": 0.999999}))
    for suffix in (".parquet", ".gpkg", ".geojson", ".fgb"):
        frame, figures = export(run, tmp_path / f"{suffix[1:]}{suffix}", capsys)
        assert (len(frame), figures["buildings"], figures["area_m2"]) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--out", "f.shp"], "f.shp: not a format that footprints are written in: say .parquet, .gpkg"),
        (["--out", "there.gpkg"], "there.gpkg: already exists: choose another name"),
        (["--out", "f.geojson", "--crs", "EPSG:3035"], "--crs EPSG:3035: .geojson is always in longitude and latitude"),
        (["--out", "f.gpkg", "--crs", "EPSG:4978"], "--crs EPSG:4978: is not that of a map (Geocentric CRS)"),
        (["--out", "f.gpkg", "--crs", "+proj=gnom +lat_0=-90"], ": does not cover the scenes: name another one"),
        (["--out", "f.gpkg", "--simplify", "1", "--regularize"], "--simplify, --regularize: choose one"),
        (["--out", "f.gpkg", "--crs", "IAU_2015:30100"], "a.tif: PROJ knows no way from its CRS to Moon (2015)"),
        (["--out", "f.gpkg", "--crs", "EPSG:0"], "--crs EPSG:0: not a coordinate reference system that PROJ knows"),
        (
            ["--out", "f.fgb", "--crs", UTM_FEET],
            "f.fgb: .fgb would say WGS 84 / UTM zone 33N, not unknown: name a .gpkg",
        ),
        (["--out", "f.gpkg", "--min-area", "-1"], "--min-area -1: say square metres, 0 or more"),
        (["--out", "f.gpkg", "--simplify", "nan"], "--simplify nan: say metres, 0 or more"),
        (["--out", "none/f.gpkg"], "none/f.gpkg: there is no such folder: create it first"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(
    noise: tuple[str, Plan], tmp_path: Path, capsys: Capture, options: list[str], named: str
) -> None:
    (tmp_path / "there.gpkg").touch()
    before = sorted(tmp_path.rglob("*"))
    out, err = seg(capsys, "-C", tmp_path, "export", "footprints", noise[0], *options, code=2)
    assert out == ""
    assert named in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_part_is_named_and_leaves_no_file(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path)
    path = Path(part_path(run, next(plan.parts()).key))
    path.write_bytes(path.read_bytes()[:-100])
    _, err = seg(capsys, "export", "footprints", run, "--out", tmp_path / "f.gpkg", code=2)
    assert path.name in err
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith((".", "f."))] == []
