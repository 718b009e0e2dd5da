"""Building area of polygons: what pixels of the masks say, with the share of each that lies within."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from areas import POLYGONS, X, Y, at, expected_sums, save
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, cut
from rasterio.windows import Window as RasterWindow
from runs import bare_scene, build_run, read_part
from seg_command import SMALL, seg
from shapely.affinity import translate

import seg_core
from seg_core.errors import SegError
from seg_core.imagery.area_projection import project_areas
from seg_core.imagery.georef import Transform
from seg_core.run.area_files import read_areas, write_areas
from seg_core.run.areas import measure_areas
from seg_core.run.query import summary
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part

Capture = pytest.CaptureFixture[str]
TURNED = (0.8, 0.6, 400_000.0, 0.6, -0.8, 5_800_000.0)
SOUTH_UP = (1.0, 0.0, 400_000.0, 0.0, 1.0, 5_800_000.0)


def measure(run: str, polygons: Sequence[Any], folder: Path, crs: str = UTM) -> geopandas.GeoDataFrame:
    path = folder / "areas.gpkg"
    save(path, polygons, crs)
    found = measure_areas(run, read_areas(str(path)))
    path.unlink()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of scenes of 100 x 120 px, with a block without data, and of 40 x 30 px, 10 km to the south."""
    return build_run(tmp_path_factory.mktemp("areas"))[0]


@pytest.mark.parametrize("name", POLYGONS)
def test_an_area_is_the_sum_of_the_shares_of_its_pixels(run: str, tmp_path: Path, name: str) -> None:
    (found,) = measure(run, [POLYGONS[name]], tmp_path).to_dict("records")
    expected = expected_sums(run, "north/a.tif", NORTH_UP, POLYGONS[name])
    assert {each: found[each] for each in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)
    assert found["area_m2"] == pytest.approx(POLYGONS[name].area, rel=1e-3)  # UTM is true to 0.04 %
    assert found["covered"] == pytest.approx(expected["valid_m2"] / found["area_m2"])
    assert (found["failed_tiles"], found["missing_tiles"]) == (0, 0)
    if expected["valid_m2"]:
        assert found["coverage"] == pytest.approx(expected["building_m2"] / expected["valid_m2"])
    else:
        assert np.isnan(found["coverage"])


def test_areas_that_overlap_are_each_measured_and_those_outside_are_null(run: str, tmp_path: Path) -> None:
    whole, outside, beside = at(-10, -10, 200, 200), at(5000, 0, 5100, 100), at(120, 0, 140, 100)
    both = at(-10, -10, 200, 20_000)
    found = measure(run, [whole, POLYGONS["a triangle"], outside, beside, both], tmp_path)
    alone = measure(run, [POLYGONS["a triangle"]], tmp_path)
    assert found["building_m2"][1] == alone["building_m2"][0]
    figures = ["valid_m2", "building_m2", "coverage", "covered", "failed_tiles", "missing_tiles"]
    assert found.loc[[2, 3], figures].isna().all(axis=None)
    assert (found.loc[[2, 3], "area_m2"] > 0).all()
    total = summary(run)
    assert found["building_m2"][4] == pytest.approx(total["building_km2"] * 1e6)
    assert found["valid_m2"][4] == pytest.approx(total["area_km2"] * 1e6)
    assert 0 < found["building_m2"][0] < found["building_m2"][4]


@pytest.mark.parametrize("lon", [-172.0, -80.0, 102.0, 178.0])
def test_areas_on_the_other_side_of_the_earth_are_null(run: str, tmp_path: Path, lon: float) -> None:
    """A transverse Mercator projection folds them onto the scenes, or has no numbers for them."""
    far = [shapely.box(lon - 4, south, lon + 4, south + 8) for south in (-50, -12, -4, 48)]
    found = measure(run, [*far, shapely.box(4, 44, 20, 60)], tmp_path, "EPSG:4326")
    assert found["valid_m2"][:4].isna().all() or (found["valid_m2"][:4] == 0).all()
    assert found["valid_m2"][4] > 0


def test_longitudes_of_areas_may_run_from_0_to_360(run: str, tmp_path: Path) -> None:
    (whole,) = geopandas.GeoSeries([at(-10, -10, 200, 20_000)], crs=UTM).to_crs("OGC:CRS84")
    turns = [translate(whole, turn) for turn in (-360, 0, 360)]
    found = measure(run, [*turns, shapely.box(0, -90, 360, 90), shapely.box(-180, -90, 180, 90)], tmp_path, "EPSG:4326")
    total = summary(run)
    assert found["valid_m2"].to_numpy() == pytest.approx(total["area_km2"] * 1e6, rel=1e-6)
    assert found["building_m2"].to_numpy() == pytest.approx(total["building_km2"] * 1e6, rel=1e-6)
    assert found["area_m2"][3:].to_numpy() == pytest.approx(5.1007e14, rel=1e-4)


def test_areas_beside_a_pole_are_those_of_the_plane() -> None:
    scene = bare_scene(200, 200, crs="EPSG:3031", transform=(1.0, 0.0, -100.0, 0.0, -1.0, 100.0))
    areas = geopandas.GeoSeries([shapely.box(40, -20, 60, 20), shapely.box(20, -60, 40, -40)], crs="EPSG:3031")
    assert shapely.area(project_areas(areas, "EPSG:3031", [scene])).tolist() == [800.0, 400.0]
    lonlat = geopandas.GeoSeries(shapely.segmentize(areas, 0.1), crs="EPSG:3031").to_crs("OGC:CRS84")
    assert shapely.area(project_areas(lonlat, "EPSG:3031", [scene])) == pytest.approx([800, 400], rel=1e-3)


def test_where_no_pixel_is_valid_rounding_makes_none(run: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    within = zip(rng.uniform(60, 80, 100), rng.uniform(30, 45, 100), rng.uniform(5, 25, 100), strict=True)
    found = measure(run, [at(left, top, left + side, top + side) for left, top, side in within], tmp_path)
    assert (found["valid_m2"] == 0).all()
    assert found["coverage"].isna().all()


def test_areas_in_another_crs_are_the_same_ground(run: str, tmp_path: Path) -> None:
    expected = measure(run, list(POLYGONS.values()), tmp_path)
    lonlat = geopandas.GeoSeries(list(POLYGONS.values()), crs=UTM).to_crs("EPSG:4326")
    found = measure(run, list(lonlat), tmp_path, "EPSG:4326")
    for name in ("area_m2", "valid_m2", "building_m2"):
        assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-3, abs=1, nan_ok=True)


@pytest.mark.usefixtures("without_actors")
@pytest.mark.parametrize("transform", [TURNED, SOUTH_UP])
def test_scenes_that_are_turned_or_south_up_lie_where_they_do(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture, transform: Transform
) -> None:
    scene, run = make_scene("a.tif", 70, 90, transform=transform), str(tmp_path / "run")
    seg(capsys, "segment", scene, "--model", make_bundle(), "--out", run, "--tile-size", "32", "--part", "64")
    a, b, c, d, e, f = transform
    corners = [(10.5, 3), (80, 20), (50, 66.3)]
    polygon = shapely.Polygon([(a * x + b * y + c, d * x + e * y + f) for x, y in corners])
    (found,) = measure(run, [polygon], tmp_path).to_dict("records")
    expected = expected_sums(run, "a.tif", transform, polygon)
    assert expected["building_m2"] > 0
    assert {each: found[each] for each in expected} == pytest.approx(expected, rel=1e-6)


def test_failed_and_missing_tiles_are_counted_where_they_lie(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, failed_parts=[0])
    lost = list(plan.parts())[3]
    Path(part_path(run, lost.key)).unlink()
    polygons = [at(0, 0, 64, 64), at(40, 40, 90, 90), at(100, 100, 110, 110)]
    found = measure(run, polygons, tmp_path)
    assert found["failed_tiles"].to_list()[:2] == [4, 1]  # tiles of 32 px in parts of 64 px
    assert found["missing_tiles"].to_list()[:2] == [0, 1]
    assert found["valid_m2"][0] == 0
    assert np.isnan(found["coverage"][0])
    save(tmp_path / "areas.geojson", polygons[:1], UTM)
    _, err = seg(capsys, "query", run, "--areas", tmp_path / "areas.geojson")
    assert "1 parts are not done yet" in err


def test_a_run_of_an_older_version_is_measured_with_its_scenes(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    before = measure(run, list(POLYGONS.values()), tmp_path)
    for part in plan.parts():
        rows = [{**row, "valid": None} for row in read_part(part_path(run, part.key))]
        write_part(run, part.key, rows, plan.model, part.version)
    assert measure(run, list(POLYGONS.values()), tmp_path).equals(before)
    shutil.rmtree(tmp_path / "scenes")
    with pytest.raises(SegError, match=r"north/a\.tif"):
        measure(run, list(POLYGONS.values()), tmp_path)


@pytest.mark.usefixtures("without_actors")
def test_real_areas_are_those_of_the_exported_mask(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    cut(shared / "brookline/region.tif", tmp_path / "region.tif", RasterWindow(430, 0, 400, 400))
    run = tmp_path / "run"
    seg(capsys, "segment", tmp_path / "region.tif", "--tile-size", "128", "--out", run)
    seg(capsys, "export", "masks", run, "--out", tmp_path / "masks")
    with rasterio.open(tmp_path / "masks/region.tif") as file:
        crs, transform = file.crs.to_wkt(), tuple(file.transform)[:6]
    x, y = transform[2], transform[5]
    across = shapely.Polygon([(x + 30, y - 90), (x + 370, y - 40), (x + 330.5, y - 360), (x + 60, y - 310)])
    outside = shapely.box(x + 200.5, y - 350, x + 500, y - 100.25)
    elsewhere = geopandas.GeoSeries([shapely.box(x + 20, y - 340, x + 251, y - 30)], crs=crs).to_crs("EPSG:26919")
    save(tmp_path / "own.gpkg", [across, outside], crs)
    elsewhere.to_file(tmp_path / "other.gpkg")
    for name, polygons in (("own", [across, outside]), ("other", list(elsewhere.to_crs(crs)))):
        out, _ = seg(capsys, "query", run, "--areas", tmp_path / f"{name}.gpkg", "--json")
        for found, polygon in zip(json.loads(out), polygons, strict=True):
            expected = expected_sums(str(run), "region.tif", transform, polygon)  # type: ignore[arg-type]
            assert expected["building_m2"] > 100
            assert {each: found[each] for each in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("without_actors")
def test_areas_of_a_mosaic_count_its_overlaps_once(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    for name, left in (("a.tif", 0), ("b.tif", 80)):
        make_scene(f"m/{name}", 100, 100, transform=(1.0, 0.0, X + left, 0.0, -1.0, Y))
    run = str(tmp_path / "run")
    seg(capsys, "segment", tmp_path / "m", "--mosaic", "--model", make_bundle(), "--out", run, *SMALL)
    (found,) = measure(run, [at(-5, -5, 500, 500)], tmp_path).to_dict("records")
    assert found["valid_m2"] == pytest.approx(180 * 100, rel=1e-3)
    (image,) = read_plan(run).images
    polygon = at(60.5, 10, 120, 70.25)
    (found,) = measure(run, [polygon], tmp_path).to_dict("records")
    expected = expected_sums(run, image.scene_id, image.transform, polygon)
    assert {each: found[each] for each in expected} == pytest.approx(expected, rel=1e-6)


def read_back(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path)
    return geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)


def test_answers_are_printed_and_written_in_each_format(run: str, tmp_path: Path, capsys: Capture) -> None:
    frame = geopandas.GeoDataFrame(
        {"name": ["east", "west"]}, geometry=[at(60, 0, 120, 100), at(5000, 0, 5100, 10)], crs=UTM
    )
    frame.to_file(tmp_path / "areas.gpkg")
    command = ["query", run, "--areas", tmp_path / "areas.gpkg", "--id", "name"]
    found = json.loads(seg(capsys, *command, "--json")[0])
    columns = ["name", "area_m2", "valid_m2", "building_m2", "coverage", "covered", "failed_tiles", "missing_tiles"]
    assert list(found[0]) == columns
    assert (found[0]["name"], found[0]["failed_tiles"]) == ("east", 0)
    assert set(found[1].values()) == {"west", found[1]["area_m2"], None}
    table = seg(capsys, *command)[0].splitlines()
    assert table[0].split() == columns
    read = pd.read_csv(io.StringIO(seg(capsys, *command, "--format", "csv")[0]))
    assert read["building_m2"][0] == pytest.approx(found[0]["building_m2"])
    for suffix in (".gpkg", ".parquet", ".geojson", ".fgb", ".csv"):
        path = tmp_path / f"found{suffix}"
        out, _ = seg(capsys, *command, "--out", path)
        assert out == f"file   {path}\nareas  2\n"
        written = read_back(path).sort_values("name", ignore_index=True)
        assert list(written.columns)[: len(columns)] == columns
        assert written["building_m2"][0] == pytest.approx(found[0]["building_m2"])
        assert written["building_m2"].isna().to_list() == [False, True]
        if suffix != ".csv":
            (outline, _) = written.to_crs(UTM).geometry.normalize()
            assert shapely.get_parts(outline)[0].equals_exact(at(60, 0, 120, 100).normalize(), 0.1)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    _, err = seg(capsys, *command, "--out", tmp_path / "found.gpkg", code=2)
    assert err == f"seg: --out {tmp_path}/found.gpkg: already exists: choose another name\n"


def test_geojson_is_in_longitude_and_latitude(run: str, tmp_path: Path, capsys: Capture) -> None:
    seg(capsys, "query", run, "--grid", "5000", "--out", tmp_path / "cells.geojson")
    west, south, east, north = geopandas.read_file(tmp_path / "cells.geojson").total_bounds
    assert 5 < west < east < 20
    assert 50 < south < north < 55


def test_the_library_gives_the_same_frame(run: str, tmp_path: Path) -> None:
    geopandas.GeoDataFrame({"name": ["a"]}, geometry=[POLYGONS["a hole"]], crs=UTM).to_file(tmp_path / "areas.gpkg")
    found = seg_core.open_run(run).measure_areas(str(tmp_path / "areas.gpkg"), "name")
    assert found.equals(measure_areas(run, read_areas(str(tmp_path / "areas.gpkg"), "name")))
    assert (found.crs, found["name"].to_list()) == (UTM, ["a"])


def test_rows_keep_the_index_of_the_frame(run: str, tmp_path: Path, capsys: Capture) -> None:
    found = seg_core.open_run(run)
    frame = found.geo_tiles.assign(name=lambda tiles: [f"tile {number}" for number in range(len(tiles))])
    some = frame.iloc[[3, 1]][["name", "geometry"]].copy()
    some["px"] = found.measure_areas(some, "name")["building_m2"]
    expected = frame.set_index("name").loc[some["name"], "building_m2"]
    assert some["px"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-3)
    dissolved = some.dissolve("name")
    by_index = found.measure_areas(dissolved, "name")
    assert by_index["name"].tolist() == by_index.index.tolist() == ["tile 1", "tile 3"]
    write_areas(by_index, str(tmp_path / "areas.gpkg"))
    assert [*geopandas.read_file(tmp_path / "areas.gpkg").columns] == [*by_index.columns]
    dissolved.to_parquet(tmp_path / "dissolved.parquet")
    out, _ = seg(capsys, "query", run, "--areas", tmp_path / "dissolved.parquet", "--id", "name", "--json")
    assert [each["name"] for each in json.loads(out)] == ["tile 1", "tile 3"]
    assert found.measure_areas(tmp_path / "dissolved.parquet", "name").equals(by_index)


def test_areas_that_are_none_are_refused_in_a_line(run: str, tmp_path: Path, capsys: Capture) -> None:
    square = at(0, 0, 10, 10)
    files: dict[str, tuple[dict[str, Any], Any, str]] = {
        "lines": ({}, [square, square.exterior], "areas are polygons, and 1 of 2 features are lines"),
        "points": ({}, [square.centroid], "areas are polygons, and 1 of 1 features are points"),
        "nothing": ({"n": [1, 2]}, [square, None], "1 of 2 features are without area"),
        "twice": ({"n": [3, 3]}, [square, square], "id n: two areas of"),
        "absent": ({"n": [1.0, None]}, [square, square], "id n: 1 areas of"),
        "figure": ({"coverage": [1]}, [square], "id coverage: the answer has a column of that name"),
        "other": ({"m": [1]}, [square], "has no such attribute: it has m"),
    }
    for name, (columns, shapes, message) in files.items():
        geopandas.GeoDataFrame(columns, geometry=list(shapes), crs=UTM).to_file(tmp_path / f"{name}.gpkg")
        column = "coverage" if name == "figure" else "n"
        options = ["--id", column] if "id " in message or name == "other" else []
        out, err = seg(capsys, "query", run, "--areas", tmp_path / f"{name}.gpkg", *options, code=2)
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    save(tmp_path / "good.gpkg", [square], UTM)
    for args, message in (
        (["--areas", tmp_path / "none.gpkg"], "none.gpkg: can't be read"),
        (["--areas", tmp_path / "good.txt"], "not a vector file"),
        (["--areas", tmp_path / "good.gpkg", "--out", tmp_path / "none/a.csv"], "none/a.csv: there is no such folder"),
        (["--id", "n"], "--id: is for --areas"),
        (["SELECT 1", "--areas", tmp_path / "good.gpkg"], "--areas, --grid, --h3, --bbox: take no SQL"),
        (["--areas", tmp_path / "good.gpkg", "--out", tmp_path / "a.txt"], "not a format that areas are written in"),
    ):
        assert message in seg(capsys, "query", run, *args, code=2)[1]


def test_areas_that_cross_themselves_are_repaired_and_it_is_said(run: str, tmp_path: Path, capsys: Capture) -> None:
    bow = shapely.Polygon([(X, Y - 10), (X + 20, Y - 30), (X + 20, Y - 10), (X, Y - 30)])
    save(tmp_path / "bow.geojson", [bow], UTM)
    out, err = seg(capsys, "query", run, "--areas", tmp_path / "bow.geojson", "--json")
    assert "1 areas were invalid, and have been repaired" in err
    assert json.loads(out)[0]["valid_m2"] == pytest.approx(200, rel=1e-2)


def test_scenes_without_crs_lie_in_no_area(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("without_actors")
    scene, run = make_scene("a.tif", 64, 64, crs=None), tmp_path / "run"
    seg(capsys, "segment", scene, "--model", make_bundle(), "--out", run, *SMALL)
    save(tmp_path / "areas.gpkg", [at(0, 0, 10, 10)], UTM)
    _, err = seg(capsys, "query", run, "--areas", tmp_path / "areas.gpkg", code=2)
    assert err == "seg: a.tif: has no CRS, so that it is not known in which area it lies\n"


def test_masks_of_tiles_within_an_area_are_not_read(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("seg_core.run.areas.decode_pixels", lambda *args: asked.append(args))
    assert measure(run, [at(-10, -10, 300, 20_000)], tmp_path)["building_m2"][0] > 0
    assert asked == []


def test_areas_that_all_miss_the_run_are_noted_with_both_extents(run: str, tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path / "far.geojson", [at(50_000, 0, 50_100, 100)])
    out, err = seg(capsys, "query", run, "--areas", tmp_path / "far.geojson", "--format", "csv")
    assert out.splitlines()[1].endswith(",,,,,,")
    extent = r"longitude -?\d+\.\d+ to -?\d+\.\d+, latitude -?\d+\.\d+ to -?\d+\.\d+"
    assert re.fullmatch(rf"no area touches a tile: areas are at {extent}, images at {extent}\n", err)
    _, err = seg(capsys, "query", run, "--bbox", "1", "2", "3", "4")
    assert "no area touches a tile: areas are at longitude 1.00000 to 3.00000, latitude 2.00000 to 4.00000" in err
