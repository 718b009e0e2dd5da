"""Areas that are made on the spot: cells of a grid, H3 cells and bounding boxes, and their figures."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import h3
import numpy as np
import pandas as pd
import pytest
import shapely
from areas import POLYGONS, X, Y, at, save
from conftest import UTM
from pyproj import Geod, Transformer
from runs import BuiltRun, build_run
from seg_command import seg

import seg_core
from seg_core.errors import SegError
from seg_core.run import area_grids
from seg_core.run.area_grids import grid_areas, h3_areas
from seg_core.run.query import summary

Capture = pytest.CaptureFixture[str]
TESTS = Path(__file__).parent
COLUMNS = ["area_m2", "valid_m2", "building_m2", "coverage", "covered", "failed_tiles", "missing_tiles"]
ACROSS = "EPSG:32660"  # UTM from 174 to 180 degrees
GRIDS: dict[str, tuple[Any, ...]] = {
    "equal area": (25.0,),
    "larger than a scene": (3000.0,),
    "the CRS of the scenes": (32.5, UTM),
    "a CRS of the country": (41.3, "EPSG:3035"),
    "metres that are no binary fraction": (8.1, "EPSG:3857"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of scenes of 100 x 120 px, with a block without data, and of 40 x 30 px, 10 km to the south."""
    return build_run(tmp_path_factory.mktemp("grids"))[0]


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Such a run, with the first scene across the antimeridian, in Fiji."""
    x, y = Transformer.from_crs("OGC:CRS84", ACROSS, always_xy=True).transform(180.0, -17.0)
    return build_run(tmp_path_factory.mktemp("across"), crs=ACROSS, corner=(round(x) - 60.0, round(y)))[0]


def check_whole(found: geopandas.GeoDataFrame, run: str, rel: float = 1e-6) -> None:
    """Check that areas together hold what the whole run holds."""
    total = summary(run)
    assert total["building_km2"] > 0
    assert found["valid_m2"].sum() == pytest.approx(total["area_km2"] * 1e6, rel=rel)
    assert found["building_m2"].sum() == pytest.approx(total["building_km2"] * 1e6, rel=rel)


@pytest.mark.parametrize("kind", GRIDS)
def test_the_cells_of_a_grid_hold_the_run(run: str, kind: str) -> None:
    found = seg_core.open_run(run).measure_grid(*GRIDS[kind])
    assert found.columns.to_list() == ["cell", *COLUMNS, "geometry"]
    assert found["cell"].is_unique
    assert found["valid_m2"].notna().all()  # each cell has ground of a scene
    check_whole(found, run)


@pytest.mark.parametrize("resolution", [5, 10, 12])
def test_h3_cells_hold_the_run(run: str, resolution: int) -> None:
    found = seg_core.open_run(run).measure_h3(resolution)
    assert found.columns.to_list() == ["h3", *COLUMNS, "geometry"]
    assert found.crs == "OGC:CRS84"
    assert found["h3"].is_unique
    check_whole(found, run)
    for cell in found.to_dict("records"):
        assert h3.get_resolution(cell["h3"]) == resolution
        assert h3.latlng_to_cell(cell["geometry"].centroid.y, cell["geometry"].centroid.x, resolution) == cell["h3"]
        assert cell["area_m2"] == pytest.approx(h3.cell_area(cell["h3"], "m^2"), rel=1e-2)  # that of a sphere


@pytest.mark.parametrize(("crs", "corner"), [("EPSG:32618", (330_000.0, 100_000.0)), ("EPSG:32735", (4e5, 6.25e6))])
def test_cells_of_the_equal_area_grid_have_one_ground_area_everywhere(
    tmp_path: Path, crs: str, corner: tuple[float, float]
) -> None:
    run, _ = build_run(tmp_path, crs=crs, corner=corner)
    found = seg_core.open_run(run).measure_grid(40)
    assert found["area_m2"].to_numpy() == pytest.approx(40**2, rel=1e-4)
    assert found.crs == "EPSG:6933"
    check_names(found, 40)
    check_whole(found, run)


def check_names(found: geopandas.GeoDataFrame, metres: float) -> None:
    """Check that each cell is the square that its name tells, at a multiple of its size."""
    for name, polygon in zip(found["cell"], found.geometry, strict=True):
        match = re.fullmatch(r"E(-?[\d.]+)N(-?[\d.]+)", name)
        assert match is not None
        west, south = map(float, match.groups())
        assert polygon.bounds == pytest.approx((west, south, west + metres, south + metres))
        assert polygon.area == pytest.approx(metres**2)
        assert (west / metres, south / metres) == pytest.approx((round(west / metres), round(south / metres)))


def test_a_cell_is_called_after_its_west_and_south_edge(run: str) -> None:
    found = seg_core.open_run(run).measure_grid(32.5, UTM)
    check_names(found, 32.5)
    assert found.crs == UTM
    first = math.floor(X / 32.5), math.floor((Y - 100) / 32.5)
    assert f"E{first[0] * 32.5:.12g}N{first[1] * 32.5:.12g}" in set(found["cell"])


def test_a_cell_has_the_figures_of_its_polygon(run: str) -> None:
    found = seg_core.open_run(run).measure_grid(32.5, UTM)
    again = seg_core.open_run(run).measure_areas(found[["cell", "geometry"]], "cell")
    assert again.equals(found)


def test_cells_are_made_where_there_is_a_scene(run: str) -> None:
    cells = grid_areas(run, 32.5, UTM).frame
    scenes = [at(0, 0, 120, 100), at(0, 10_000, 30, 10_040)]
    west, south = (np.floor(edge / 32.5) for edge in (X, Y - 10_040))
    shares_ground = {
        f"E{x:.12g}N{y:.12g}"
        for x in (west + np.arange(6)) * 32.5
        for y in (south + np.arange(320)) * 32.5
        if any(shapely.intersection(shapely.box(x, y, x + 32.5, y + 32.5), scene).area > 0 for scene in scenes)
    }
    assert set(cells["cell"]) == shares_ground


def test_cells_are_the_same_for_each_run(run: str, tmp_path: Path) -> None:
    other, _ = build_run(tmp_path, corner=(X + 60.5, Y + 31.25))
    for make, name in ((lambda path: grid_areas(path, 25), "cell"), (lambda path: h3_areas(path, 12), "h3")):
        cells = [make(path).frame.set_index(name).geometry for path in (run, other)]
        shared = cells[0].index.intersection(cells[1].index)
        assert 0 < len(shared) < min(map(len, cells))
        assert cells[0][shared].equals(cells[1][shared])


@pytest.mark.parametrize("make", [lambda run: grid_areas(run, 25), lambda run: h3_areas(run, 12)])
def test_cells_do_not_depend_on_the_pieces_in_which_a_scene_is_taken(
    run: str, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Any]
) -> None:
    whole = make(run).frame
    monkeypatch.setattr(area_grids, "PIECE_M", 30.0)
    monkeypatch.setattr(area_grids, "MAX_CELLS", len(whole))  # cells of several pieces count once
    pieces = make(run).frame
    assert pieces[pieces.columns[0]].to_list() == whole[whole.columns[0]].to_list()


def degrees(polygon: shapely.Polygon, margin: float = 0.0) -> tuple[float, ...]:
    """The bounding box of a polygon of the first scene's CRS, in degrees, and a margin around it."""
    west, south, east, north = geopandas.GeoSeries([polygon], crs=UTM).to_crs("OGC:CRS84").total_bounds
    return west - margin, south - margin, east + margin, north + margin


def test_a_box_around_all_scenes_holds_the_run(run: str) -> None:
    box = degrees(at(0, 0, 120, 10_040), margin=0.3)
    found = seg_core.open_run(run).measure_bbox(*box)
    assert found.columns.to_list() == ["area", *COLUMNS, "geometry"]
    assert (len(found), found.crs) == (1, "OGC:CRS84")
    check_whole(found, run)
    plane = Transformer.from_crs("OGC:CRS84", "EPSG:6933", always_xy=True)
    (west, south), (east, north) = plane.transform(*box[:2]), plane.transform(*box[2:])
    assert found["area_m2"][0] == pytest.approx((east - west) * (north - south), rel=1e-4)
    assert found["covered"][0] == pytest.approx(found["valid_m2"][0] / found["area_m2"][0])


def test_boxes_that_share_an_edge_share_no_ground(run: str) -> None:
    west, south, east, north = degrees(at(0, 0, 120, 10_040), margin=0.01)
    middle = (west + east) / 2 - 0.0002
    opened = seg_core.open_run(run)
    halves = [opened.measure_bbox(west, south, middle, north), opened.measure_bbox(middle, south, east, north)]
    assert all(half["building_m2"][0] > 100 for half in halves)
    total = summary(run)["building_km2"] * 1e6
    assert sum(half["building_m2"][0] for half in halves) == pytest.approx(total, rel=1e-6)


def test_a_box_around_one_scene_holds_that_scene(run: str) -> None:
    found = seg_core.open_run(run).measure_bbox(*degrees(at(0, 10_000, 30, 10_040), margin=0.01))
    tiles = seg_core.open_run(run).tiles
    assert found["building_m2"][0] == pytest.approx(tiles["building_m2"][tiles["scene_id"] == "south/b.tif"].sum())


def test_a_box_outside_is_null(run: str, capsys: Capture) -> None:
    out, _ = seg(capsys, "query", run, "--bbox", "-71.5", "42", "-71", "42.5", "--json")
    (found,) = json.loads(out)
    assert found.pop("area_m2") > 1e9
    assert found == {"area": 1} | dict.fromkeys(COLUMNS[1:])


def test_a_box_across_the_antimeridian_holds_the_run(across: str, capsys: Capture) -> None:
    opened = seg_core.open_run(across)
    found = opened.measure_bbox(179.5, -17.5, -179.5, -16.5)
    check_whole(found, across)
    assert found["area_m2"][0] == pytest.approx(opened.measure_bbox(0, -17.5, 1, -16.5)["area_m2"][0])
    assert (found.total_bounds[0], found.total_bounds[2]) == (-180, 180)
    west = opened.measure_bbox(179.5, -17.5, 180, -16.5)
    east = opened.measure_bbox(-180, -17.5, -179.5, -16.5)
    assert west["building_m2"][0] > 100 < east["building_m2"][0]
    assert west["building_m2"][0] + east["building_m2"][0] == pytest.approx(found["building_m2"][0])
    out, _ = seg(capsys, "query", across, "--bbox", "179.5", "-17.5", "-179.5", "-16.5", "--json")
    assert json.loads(out)[0]["building_m2"] == found["building_m2"][0]


@pytest.mark.parametrize("resolution", [6, 12])
def test_h3_cells_across_the_antimeridian_hold_the_run(across: str, resolution: int) -> None:
    found = seg_core.open_run(across).measure_h3(resolution)
    check_whole(found, across)
    bounds = found.geometry.bounds
    assert (bounds["minx"].min(), bounds["maxx"].max()) == (-180, 180)
    is_split = bounds["maxx"] - bounds["minx"] > 180
    assert is_split.any()
    assert (found.geometry[is_split].geom_type == "MultiPolygon").all()
    areas = [h3.cell_area(name, "m^2") for name in found["h3"]]
    assert found["area_m2"].to_numpy() == pytest.approx(areas, rel=1e-2)


def test_a_grid_in_the_crs_of_scenes_across_the_antimeridian_holds_the_run(across: str) -> None:
    found = seg_core.open_run(across).measure_grid(23.7, ACROSS)
    check_whole(found, across)
    assert found["area_m2"].to_numpy() == pytest.approx(23.7**2, rel=2e-2)


def test_the_command_prints_what_the_library_gives(run: str, capsys: Capture) -> None:
    opened, box = seg_core.open_run(run), degrees(at(20, 20, 60, 70))
    for options, found in (
        (["--grid", "40"], opened.measure_grid(40)),
        (["--grid", "32.5", "--crs", UTM], opened.measure_grid(32.5, UTM)),
        (["--h3", "11"], opened.measure_h3(11)),
        (["--bbox", *box], opened.measure_bbox(*box)),
    ):
        out, err = seg(capsys, "query", run, *options, "--json")
        printed = pd.DataFrame(json.loads(out))
        pd.testing.assert_frame_equal(printed, pd.DataFrame(found.drop(columns="geometry")), check_dtype=False)
        assert err == ""


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_a_file_of_cells_keeps_their_geometry_and_crs(run: str, tmp_path: Path, capsys: Capture, suffix: str) -> None:
    opened, box, path = seg_core.open_run(run), degrees(at(20, 20, 60, 70)), tmp_path / f"cells{suffix}"
    for options, found in (
        (["--grid", "40"], opened.measure_grid(40)),
        (["--h3", "11"], opened.measure_h3(11)),
        (["--bbox", *box], opened.measure_bbox(*box)),
    ):
        out, err = seg(capsys, "query", run, *options, "--out", path)
        assert (out, err) == (f"file   {path}\nareas  {len(found)}\n", "")
        written = geopandas.read_parquet(path) if suffix == ".parquet" else geopandas.read_file(path)
        assert written.crs.equals(found.crs, ignore_axis_order=True)
        assert written[found.columns[0]].to_list() == found.iloc[:, 0].to_list()
        assert written["building_m2"].to_numpy() == pytest.approx(found["building_m2"].to_numpy(), nan_ok=True)
        assert written.geometry.geom_equals_exact(found.geometry, 1e-9).all()
        path.unlink()


def test_what_is_not_done_yet_is_counted_and_said(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, failed_parts=[1])
    BuiltRun(run, plan).path(0).unlink()
    out, err = seg(capsys, "query", run, "--grid", "3000", "--json")
    (north, south) = sorted(json.loads(out), key=lambda cell: -int(cell["cell"].partition("N")[2]))
    assert (north["missing_tiles"], north["failed_tiles"]) == (4, 4)
    assert (south["missing_tiles"], south["failed_tiles"]) == (0, 0)
    assert "1 parts are not done yet" in err


def test_the_library_measures_a_frame_as_a_file(run: str, tmp_path: Path) -> None:
    opened, names = seg_core.open_run(run), list(POLYGONS)
    save(tmp_path / "areas.gpkg", list(POLYGONS.values()), name=names)
    of_file = opened.measure_areas(str(tmp_path / "areas.gpkg"), "name")
    frame = geopandas.GeoDataFrame({"name": names, "place": list(POLYGONS.values())}, geometry="place", crs=UTM)
    frame.index = frame.index[::-1]
    of_frame = opened.measure_areas(frame, "name")
    assert of_frame.index.equals(frame.index)
    assert of_frame.drop(columns="geometry").reset_index(drop=True).equals(of_file.drop(columns="geometry"))
    assert of_frame["name"].to_list() == names
    assert opened.measure_areas(frame)["area"].to_list() == list(range(1, len(names) + 1))
    lonlat = opened.measure_areas(frame.to_crs("EPSG:4326"), "name")
    assert lonlat.crs == "EPSG:4326"
    assert lonlat["building_m2"].to_numpy() == pytest.approx(
        of_file["building_m2"].to_numpy(), rel=1e-3, abs=1, nan_ok=True
    )


def test_a_frame_without_areas_is_refused(run: str) -> None:
    opened, square = seg_core.open_run(run), at(0, 0, 10, 10)
    for frame, column, message in (
        (geopandas.GeoDataFrame(geometry=[square]), None, "areas: has no CRS: set it, as by set_crs of geopandas"),
        (geopandas.GeoDataFrame(geometry=[], crs=UTM), None, "areas: holds no areas"),
        (geopandas.GeoDataFrame(geometry=[square.centroid], crs=UTM), None, "areas: areas are polygons, and 1 of 1"),
        (geopandas.GeoDataFrame({"n": [1]}, geometry=[square], crs=UTM), "m", "id m: areas has no such attribute"),
    ):
        with pytest.raises(SegError, match=re.escape(message)):
            opened.measure_areas(frame, column)


DEGREES = "say degrees: west and east from -180 to 180, south and north from -90 to 90"
REFUSED = {
    "--grid 20 --crs EPSG:4326": "--crs EPSG:4326: measures in degree: name one in metres, such as EPSG:3035",
    "--grid 20 --crs EPSG:2263": "--crs EPSG:2263: measures in US survey foot: name one in metres, such as EPSG:3035",
    "--grid 20 --crs nonsense": "--crs nonsense: not a coordinate reference system that PROJ knows, such as EPSG:3035",
    "--grid 0": "--grid 0: say the side of a cell in metres",
    "--grid -5": "--grid -5: say the side of a cell in metres",
    "--grid nan": "--grid nan: say the side of a cell in metres",
    "--grid inf": "--grid inf: say the side of a cell in metres",
    "--grid 0.001": "--grid 0.001: say the side of a cell in metres, 0.01 to 1e+06",
    "--h3 16": "--h3 16: H3 has resolutions 0 to 15",
    "--h3 -1": "--h3 -1: H3 has resolutions 0 to 15",
    "--bbox 1 50 2 50": "--bbox 1 50 2 50: is empty: say WEST SOUTH EAST NORTH",
    "--bbox 1 50 2 49": "--bbox 1 50 2 49: is empty: say WEST SOUTH EAST NORTH",
    "--bbox 1 50 1 51": "--bbox 1 50 1 51: is empty: say WEST SOUTH EAST NORTH",
    "--bbox 50 1 51 91": f"--bbox 50 1 51 91: {DEGREES}",
    "--bbox 1 nan 2 50": f"--bbox 1 nan 2 50: {DEGREES}",
    "--bbox 181 50 190 51": f"--bbox 181 50 190 51: {DEGREES}",
    "--bbox 400000 5799900 400120 5800000": f"--bbox 400000 5.7999e+06 400120 5.8e+06: {DEGREES}",
    "--id name": "--id: is for --areas",
    "--grid 20 --id name": "--id: is for --areas",
    "--crs EPSG:3035": "--crs: is for --grid",
    "--h3 8 --crs EPSG:3035": "--crs: is for --grid",
    "--out cells.gpkg": "--out: is for --areas, --grid, --h3 and --bbox",
    "--grid 20 --out cells.txt": "--out {cwd}/cells.txt: not a format that areas are written in",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_make_no_areas_are_refused_in_a_line(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = seg(capsys, "query", run, *options.split(), code=2)
    assert err.startswith(f"seg: {REFUSED[options].format(cwd=tmp_path)}")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("options", ["--grid 20", "--h3 8", "--bbox 13 52 14 53"])
def test_sql_and_areas_are_not_asked_for_at_once(run: str, capsys: Capture, options: str) -> None:
    for command in ([run, "SELECT 1", *options.split()], [run, *options.split(), "SELECT 1"]):
        _, err = seg(capsys, "query", *command, code=2)
        assert err == "seg: --areas, --grid, --h3, --bbox: take no SQL: their table has one row for each area\n"


@pytest.mark.parametrize("options", ["--grid 20 --areas a.gpkg", "--h3 8 --grid 20", "--bbox 13 52 14 53 --h3 8"])
def test_two_kinds_of_areas_are_refused(run: str, capsys: Capture, options: str) -> None:
    words = options.split()
    with pytest.raises(SystemExit) as refusal:
        seg(capsys, "query", run, *words)
    assert refusal.value.code == 2
    option, other = [word for word in words if word.startswith("--")]
    assert f"argument {other}: not allowed with argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "size"), [("--grid", "25"), ("--h3", "12")])
def test_too_many_cells_are_refused_also_over_many_scenes(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, option: str, size: str
) -> None:
    number = len(json.loads(seg(capsys, "query", run, option, size, "--json")[0]))
    monkeypatch.setattr(area_grids, "MAX_CELLS", number)
    seg(capsys, "query", run, option, size)
    monkeypatch.setattr(area_grids, "MAX_CELLS", number - 1)
    _, err = seg(capsys, "query", run, option, size, code=2)
    assert err == f"seg: {option} {size}: makes more than {number - 1:,} cells: choose larger ones\n"


def test_without_the_package_h3_it_is_said_how_to_install_it(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "h3", None)
    _, err = seg(capsys, "query", run, "--h3", "8", code=2)
    assert err == "seg: --h3: needs the package h3: pip install 'aerial-seg[h3]'\n"
    assert json.loads(seg(capsys, "query", run, "--grid", "40", "--json")[0])


@pytest.mark.parametrize("options", ["--grid 20", "--h3 8", "--bbox 13 52 14 53"])
def test_scenes_without_crs_lie_in_no_cell(tmp_path: Path, capsys: Capture, options: str) -> None:
    run, _ = build_run(tmp_path, crs=None)
    _, err = seg(capsys, "query", run, *options.split(), code=2)
    assert err == "seg: north/a.tif: has no CRS, so that it is not known in which area it lies\n"


def test_a_damaged_part_is_named(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path)
    part = BuiltRun(run, plan).path(0)
    part.write_bytes(b"PAR1")
    _, err = seg(capsys, "query", run, "--grid", "40", code=2)
    assert part.name in err
    assert err.count("\n") == 1


def place(crs: str, lon: float, lat: float) -> tuple[float, float]:
    x, y = Transformer.from_crs("OGC:CRS84", crs, always_xy=True).transform(lon, lat)
    return round(x) - 60.0, round(y) + 50.0


CRASH = """
import sys
from dataclasses import replace
from pathlib import Path
import geopandas, shapely
from areas import X, Y
from conftest import UTM
from runs import SETTINGS, build_run
from seg_core.run.area_files import make_areas
from seg_core.run.areas import measure_areas
run, _ = build_run(Path(sys.argv[1]), settings=replace(SETTINGS, part=32))
ring = shapely.Point(X + 50, Y - 50).buffer(45, quad_segs=5000)
for _ in range(60):
    measure_areas(run, make_areas(geopandas.GeoDataFrame(geometry=[ring], crs=UTM)))
"""


def test_threads_do_not_use_prepared_polygons_at_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=TESTS, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


@pytest.mark.parametrize("metres", [50, 1000])
def test_a_grid_across_the_antimeridian_holds_the_run(tmp_path: Path, metres: float) -> None:
    run, _ = build_run(tmp_path, crs="EPSG:32660", corner=place("EPSG:32660", 180.0, -17.0))
    check_whole(seg_core.open_run(run).measure_grid(metres), run)


@pytest.mark.parametrize("metres", [20, 100])
def test_cells_that_only_touch_a_scene_are_not_made(tmp_path: Path, metres: float) -> None:
    run, _ = build_run(tmp_path)  # its corners lie at multiples of 20 m
    cells = grid_areas(run, metres, UTM).frame
    assert len(cells) == {20: 6 * 5 + 2 * 2, 100: 2 + 1}[metres]


@pytest.mark.parametrize("resolution", [0, 1, 2, 3, 4])
def test_large_h3_cells_hold_a_run_at_their_edge(tmp_path: Path, resolution: int) -> None:
    corners = h3.cell_to_boundary(h3.latlng_to_cell(52.3, 13.5, resolution))
    for number in range(6):
        (south, west), (north, east) = corners[number], corners[(number + 1) % 6]
        ((lon, lat),) = Geod(ellps="WGS84").npts(west, south, east, north, 1)
        crs = f"EPSG:{32601 + int((lon + 180) // 6)}"
        run, _ = build_run(tmp_path / str(number), crs=crs, corner=place(crs, lon, lat))
        check_whole(seg_core.open_run(run).measure_h3(resolution), run, rel=1e-5)


@pytest.mark.parametrize("box", [(-180, -90, 180, 90), (-179, -80, 179, 84), (170, 0, 160, 80), (-80, -60, 100, 80)])
def test_a_box_of_any_size_around_all_scenes_holds_the_run(tmp_path: Path, box: Any) -> None:
    run, _ = build_run(tmp_path)
    found = seg_core.open_run(run).measure_bbox(*box)
    check_whole(found, run)
    assert found["area_m2"][0] > 1e14


@pytest.mark.parametrize(
    "options",
    [
        "--bbox 180 -10 -180 10",
        "--grid 100 --crs EPSG:4978",  # geocentric: cells that lie nowhere
        "--grid 100 --crs EPSG:5773",  # heights
        "--grid 10000000",
        "--grid 1e-320",
    ],
)
def test_what_makes_no_areas_is_refused(tmp_path: Path, capsys: Any, options: str) -> None:
    run, _ = build_run(tmp_path)
    _, err = seg(capsys, "query", run, *options.split(), code=2)
    assert err.count("\n") == 1
    option = [word for word in options.split() if word.startswith("--")][-1]
    assert err.startswith(f"seg: {option} ")


@pytest.mark.parametrize("crs", ["EPSG:3857"])
@pytest.mark.parametrize("kind", ["bbox", "h3"])
def test_scenes_in_a_crs_that_ends_at_the_antimeridian_are_whole(tmp_path: Path, crs: str, kind: str) -> None:
    x, y = place(crs, 180.0, 0.5)
    run, _ = build_run(tmp_path, crs=crs, corner=(x, y))
    opened = seg_core.open_run(run)
    check_whole(opened.measure_h3(12) if kind == "h3" else opened.measure_bbox(179, 0, -179, 1), run)
