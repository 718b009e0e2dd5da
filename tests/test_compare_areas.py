"""Two runs by areas: what is gained, lost and kept in each, as the pixels of their masks say."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from areas import POLYGONS, X, Y, at, pixel_areas, pixel_shares, save
from conftest import NORTH_UP, UTM
from runs import SETTINGS, BuiltRun, build_run
from seg_command import seg

from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.run.area_files import make_areas
from seg_core.run.area_grids import bbox_area, grid_areas
from seg_core.run.areas import measure_areas
from seg_core.run.compare import compare_runs
from seg_core.run.compare_areas import Comparison, compare_areas
from seg_core.run.export_masks import read_mask

Capture = pytest.CaptureFixture[str]
Runs = tuple[str, str]
COLUMNS = [
    *("area_m2", "compared_m2", "before_m2", "after_m2", "difference_m2", "kept_m2", "gained_m2", "lost_m2"),
    *("coverage_before", "coverage_after", "covered", "unknown_tiles"),
]
CHANGE = ["kept_m2", "gained_m2", "lost_m2"]
POLYGONS_HERE = POLYGONS | {
    "no data in the second run": at(4, 66, 58, 97),
    "tiles without data in the second run": at(0, 64, 60, 100),
    "the whole scene": at(-5, -5, 130, 130),
}


def build_after(folder: Path, **changes: Any) -> BuiltRun:
    """The run of another date: other masks, and another block without data, which holds a whole tile."""
    return BuiltRun(*build_run(folder, seed=1, **{"missing": np.s_[60:100, 0:60], **changes}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two runs of one ground, whose masks and valid pixels differ."""
    folder = tmp_path_factory.mktemp("compared")
    return build_run(folder / "before")[0], build_after(folder / "after").run


@pytest.fixture(scope="module")
def found(runs: Runs) -> geopandas.GeoDataFrame:
    """All polygons, which overlap, compared at once."""
    return compare_polygons(runs, POLYGONS_HERE)


def frame_of(polygons: dict[str, Any]) -> geopandas.GeoDataFrame:
    return geopandas.GeoDataFrame({"name": list(polygons)}, geometry=list(polygons.values()), crs=UTM)


def compare_polygons(runs: Runs, polygons: dict[str, Any]) -> geopandas.GeoDataFrame:
    comparison = compare_areas(*runs, make_areas(frame_of(polygons), "name"))
    assert comparison.reason is None
    return comparison.frame.set_index("name")


def expected_change(runs: Runs, polygon: shapely.Polygon) -> dict[str, float]:
    """What two masks of the first scene say of a polygon, with the share of each pixel within it."""
    before, after = (read_mask(run, "north/a.tif") for run in runs)
    is_compared = (before != 255) & (after != 255)
    pixels = pixel_shares(before.shape, NORTH_UP, polygon) * pixel_areas(runs[0], "north/a.tif", before.shape)
    sums = {
        "compared_m2": pixels[is_compared].sum(),
        "kept_m2": pixels[is_compared & (before == 1) & (after == 1)].sum(),
        "gained_m2": pixels[is_compared & (before == 0) & (after == 1)].sum(),
        "lost_m2": pixels[is_compared & (before == 1) & (after == 0)].sum(),
    }
    sums |= {"before_m2": pixels[is_compared & (before == 1)].sum()}
    sums |= {"after_m2": pixels[is_compared & (after == 1)].sum()}
    return sums if sums["compared_m2"] else dict.fromkeys(sums, np.nan) | {"compared_m2": 0.0}


@pytest.mark.parametrize("name", POLYGONS_HERE)
def test_an_area_holds_the_change_of_its_pixels(runs: Runs, found: geopandas.GeoDataFrame, name: str) -> None:
    area, expected = found.loc[name], expected_change(runs, POLYGONS_HERE[name])
    assert {each: area[each] for each in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)
    assert area["before_m2"] == pytest.approx(area["kept_m2"] + area["lost_m2"], nan_ok=True)
    assert area["after_m2"] == pytest.approx(area["kept_m2"] + area["gained_m2"], nan_ok=True)
    assert area["difference_m2"] == pytest.approx(area["after_m2"] - area["before_m2"], nan_ok=True)
    assert area["area_m2"] == pytest.approx(POLYGONS_HERE[name].area, rel=1e-3)  # UTM is true to 0.04 %
    assert area["covered"] == pytest.approx(expected["compared_m2"] / area["area_m2"])
    assert area["unknown_tiles"] == 0
    if expected["compared_m2"]:
        assert min(expected[each] for each in CHANGE) > 0
        assert area["coverage_before"] == pytest.approx(expected["before_m2"] / expected["compared_m2"])
        assert area["coverage_after"] == pytest.approx(expected["after_m2"] / expected["compared_m2"])
    else:
        assert np.isnan(area["coverage_before"])
        assert np.isnan(area["coverage_after"])


def test_pixels_count_only_where_both_runs_have_data(runs: Runs, found: geopandas.GeoDataFrame) -> None:
    for name, valid_in in (("no data", 1), ("no data in the second run", 0)):
        polygons = make_areas(frame_of({name: POLYGONS_HERE[name]}), "name")
        assert measure_areas(runs[valid_in], polygons)["building_m2"][0] > 100
        assert found.loc[name, "compared_m2"] == 0
        assert found.loc[name, ["before_m2", "after_m2", "difference_m2", *CHANGE]].isna().all()


def test_all_areas_of_both_scenes_hold_what_the_whole_runs_do(runs: Runs) -> None:
    total = compare_runs(*runs).figures()
    box = geopandas.GeoSeries([at(-50, -50, 300, 10_300)], crs=UTM).to_crs("OGC:CRS84").total_bounds
    for areas in (
        make_areas(frame_of({"all": at(-10, -10, 200, 20_000)})),
        make_areas(frame_of({"a": at(-9, -9, 41.3, 20_000), "b": at(41.3, -9, 200, 20_000)})),
        grid_areas(runs[0], 37),
        bbox_area(*box),
    ):
        frame = compare_areas(*runs, areas).frame
        for name in ("compared", "kept", "gained", "lost"):
            assert frame[f"{name}_m2"].sum() == pytest.approx(total[f"{name}_km2"] * 1e6, rel=1e-6)


def test_a_run_and_itself_have_the_same_buildings(runs: Runs) -> None:
    polygons = make_areas(frame_of(POLYGONS), "name")
    frame, measured = compare_areas(runs[0], runs[0], polygons).frame, measure_areas(runs[0], polygons)
    assert (frame[["gained_m2", "lost_m2", "difference_m2"]].dropna() == 0).all(axis=None)
    assert frame["kept_m2"].to_numpy() == pytest.approx(measured["building_m2"].to_numpy(), nan_ok=True)
    assert frame["compared_m2"].to_numpy() == pytest.approx(measured["valid_m2"].to_numpy())


def test_the_other_way_round_what_was_gained_is_lost(runs: Runs, found: geopandas.GeoDataFrame) -> None:
    back = compare_polygons(runs[::-1], POLYGONS_HERE)
    swapped = {"gained_m2": "lost_m2", "lost_m2": "gained_m2", "before_m2": "after_m2", "kept_m2": "kept_m2"}
    for name, other in swapped.items():
        assert back[name].to_numpy() == pytest.approx(found[other].to_numpy(), rel=1e-9, abs=1e-9, nan_ok=True)
    expected = -found["difference_m2"].to_numpy()
    assert back["difference_m2"].to_numpy() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_areas_that_no_tile_touches_are_null(runs: Runs, found: geopandas.GeoDataFrame) -> None:
    outside = {"far": at(5000, 0, 5100, 100), "beside": at(120, 0, 140, 100), "a triangle": POLYGONS["a triangle"]}
    frame = compare_polygons(runs, outside)
    assert frame.columns.to_list() == [*COLUMNS, "geometry"]
    assert frame.loc[["far", "beside"], COLUMNS[1:]].isna().all(axis=None)
    assert frame.loc["far", "area_m2"] == pytest.approx(100 * 100, rel=1e-3)
    assert frame.loc["a triangle"].equals(found.loc["a triangle"])


def test_areas_in_another_crs_are_the_same_ground(runs: Runs, found: geopandas.GeoDataFrame) -> None:
    frame = compare_areas(*runs, make_areas(frame_of(POLYGONS_HERE).to_crs("EPSG:4326"), "name")).frame
    assert frame.crs == "EPSG:4326"
    for name in ("compared_m2", *CHANGE):
        assert frame[name].to_numpy() == pytest.approx(found[name].to_numpy(), rel=1e-3, abs=1, nan_ok=True)


def test_tiles_that_one_run_lacks_are_unknown_where_they_lie(tmp_path: Path) -> None:
    before = BuiltRun(*build_run(tmp_path / "before", failed_parts=[0]))
    after = build_after(tmp_path / "after", failed_parts=[0, 1])
    after.path(3).unlink()
    parts = [part.window for part in before.parts]
    assert parts[:4] == [Window(0, 0, 64, 64), Window(0, 64, 64, 56), Window(64, 0, 36, 64), Window(64, 64, 36, 56)]
    polygons = {"all": at(-1, -1, 130, 130), "failed": at(0, 0, 64, 64), "both": at(40, 40, 90, 90)}
    polygons |= {"missing": at(97, 97, 119, 99), "done": at(0, 66, 60, 99)}
    frame = compare_polygons((before.run, after.run), polygons)
    assert frame["unknown_tiles"].to_dict() == {"all": 4 + 4 + 4, "failed": 4, "both": 3, "missing": 1, "done": 0}
    for name, polygon in polygons.items():
        expected = expected_change((before.run, after.run), polygon)
        figures = {each: frame.loc[name, each] for each in expected}
        assert figures == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)
    assert (frame.loc[["failed", "missing"], "compared_m2"] == 0).all()
    assert frame.loc["all", "compared_m2"] > 0
    back = compare_polygons((after.run, before.run), polygons)
    assert back["unknown_tiles"].equals(frame["unknown_tiles"])


OTHER_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "shifted": ({"corner": (X + 0.5, Y)}, "north/a.tif: the runs have other grids, 0.50 px apart"),
    "partly beside": ({"corner": (X + 60.0, Y)}, "north/a.tif: the runs have other grids, 60.00 px apart"),
    "another tile size": (
        {"settings": replace(SETTINGS, tile_size=16)},
        "the runs have other tiles: tile_size 32 and 16",
    ),
    "another crs": (
        {"crs": "EPSG:32634", "corner": (-8_400.0, 5_825_281.0)},
        "north/a.tif: the runs have other grids, in EPSG:32633 and EPSG:32634",
    ),
}


@pytest.mark.parametrize("kind", OTHER_GRIDS)
def test_runs_of_other_grids_are_each_measured(runs: Runs, tmp_path: Path, capsys: Capture, kind: str) -> None:
    changes, reason = OTHER_GRIDS[kind]
    after = build_after(tmp_path, **changes).run
    areas = make_areas(frame_of({"here": at(-2000, -2000, 4000, 3000), "far": at(50_000, 0, 50_100, 100)}), "name")
    before, later = (measure_areas(run, areas).loc[0] for run in (runs[0], after))
    save(tmp_path / "areas.gpkg", list(areas.frame.geometry), name=["here", "far"])
    options = ["--areas", tmp_path / "areas.gpkg", "--id", "name", "--json"]
    out, err = seg(capsys, "compare", runs[0], after, *options)
    assert err == (
        f"{reason}: each is measured by itself, so that kept, gained and lost are not known\n"
        "1 of 2 areas are not known to both runs as a whole: they have no difference\n"
    )
    here, far = json.loads(out)
    assert list(here) == ["name", *COLUMNS]
    assert set(far.values()) == {"far", far["area_m2"], None}
    expected = {
        "name": "here",
        "area_m2": before["area_m2"],
        "compared_m2": min(before["valid_m2"], later["valid_m2"]),
        "before_m2": before["building_m2"],
        "after_m2": later["building_m2"],
        "difference_m2": None,
        **dict.fromkeys(CHANGE),
        "coverage_before": before["building_m2"] / before["valid_m2"],
        "coverage_after": later["building_m2"] / later["valid_m2"],
        "covered": min(before["valid_m2"], later["valid_m2"]) / before["area_m2"],
        "unknown_tiles": 0,
    }
    assert expected["before_m2"] > 1000 < expected["after_m2"]
    assert here == pytest.approx(expected)


def test_runs_of_other_grids_have_a_difference_where_they_know_the_same_ground(tmp_path: Path) -> None:
    before = build_run(tmp_path / "before")[0]
    after = build_after(tmp_path / "after", settings=replace(SETTINGS, tile_size=16)).run
    polygons = {"same": at(62, 2, 110, 30), "partly": at(2, 2, 110, 90), "unknown in one": at(0, 64, 58, 97)}
    areas = make_areas(frame_of(polygons), "name")
    found = compare_areas(before, after, areas)
    frame, one, two = (
        each.set_index("name") for each in (found.frame, *(measure_areas(r, areas) for r in (before, after)))
    )
    assert one["valid_m2"]["same"] == pytest.approx(two["valid_m2"]["same"])
    difference = two["building_m2"]["same"] - one["building_m2"]["same"]
    assert frame["difference_m2"]["same"] == pytest.approx(difference, rel=1e-9)
    assert abs(difference) > 1
    assert frame["difference_m2"][["partly", "unknown in one"]].isna().all()
    assert frame["before_m2"]["unknown in one"] > 0
    assert np.isnan(frame["after_m2"]["unknown in one"])
    assert found.num_without_difference == 2


def test_halves_of_an_area_of_which_each_run_knows_one_have_no_difference(tmp_path: Path) -> None:
    before = build_run(tmp_path / "before", missing=np.s_[:, :60])[0]
    after = build_run(tmp_path / "after", missing=np.s_[:, 60:], settings=replace(SETTINGS, tile_size=16))[0]
    areas = make_areas(frame_of({"both": at(0, 0, 120, 100), "right": at(61, 1, 119, 99)}), "name")
    frame = compare_areas(before, after, areas).frame
    assert frame["before_m2"][0] > 0 < frame["after_m2"][0]
    assert frame["difference_m2"].isna().all()


def test_unknown_tiles_of_runs_of_other_grids_are_those_of_both(tmp_path: Path) -> None:
    before = BuiltRun(*build_run(tmp_path / "before", failed_parts=[0]))
    after = build_after(tmp_path / "after", corner=(X, Y + 64.0))
    after.path(2).unlink()
    found = compare_areas(before.run, after.run, make_areas(frame_of({"all": at(-100, -100, 200, 200)})))
    assert found.reason is not None
    assert found.frame["unknown_tiles"].to_list() == [4 + 4]


def read_back(path: Path) -> geopandas.GeoDataFrame:
    return geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet", ".csv"])
def test_a_file_holds_what_is_printed(
    runs: Runs, found: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    polygons = POLYGONS | {"far": at(5000, 0, 5100, 100)}
    save(tmp_path / "areas.gpkg", list(polygons.values()), name=list(polygons))
    command = ["compare", *runs, "--areas", tmp_path / "areas.gpkg", "--id", "name"]
    printed = pd.DataFrame(json.loads(seg(capsys, *command, "--json")[0]))
    expected = found.loc[list(POLYGONS), "lost_m2"].to_list()
    assert printed["lost_m2"].to_list()[:-1] == pytest.approx(expected, nan_ok=True)
    path = tmp_path / f"found{suffix}"
    out, err = seg(capsys, *command, "--out", path, "--json")
    assert (json.loads(out), err) == ({"file": str(path), "areas": len(polygons)}, "")
    written = pd.read_csv(path) if suffix == ".csv" else read_back(path)
    assert written.columns.to_list()[: len(COLUMNS) + 1] == ["name", *COLUMNS]
    plain = pd.DataFrame(written[["name", *COLUMNS]]).sort_values("name", ignore_index=True)
    pd.testing.assert_frame_equal(plain, printed.sort_values("name", ignore_index=True), check_dtype=False)
    if suffix != ".csv":
        shapes = written.set_index("name").to_crs(UTM).geometry[list(polygons)]
        assert (shapely.area(shapely.symmetric_difference(shapes.to_numpy(), list(polygons.values()))) < 0.1).all()


def test_cells_and_boxes_are_compared_by_the_command(runs: Runs, capsys: Capture) -> None:
    box = geopandas.GeoSeries([at(20, 20, 70, 90)], crs=UTM).to_crs("OGC:CRS84").total_bounds.tolist()
    for options, areas in (
        (["--grid", "50"], grid_areas(runs[0], 50)),
        (["--grid", "32.5", "--crs", UTM], grid_areas(runs[0], 32.5, UTM)),
        (["--bbox", *box], bbox_area(*box)),
    ):
        out, err = seg(capsys, "compare", *runs, *options, "--json")
        expected = pd.DataFrame(compare_areas(*runs, areas).frame.drop(columns="geometry"))
        pd.testing.assert_frame_equal(pd.DataFrame(json.loads(out)), expected, check_dtype=False)
        assert expected["gained_m2"].sum() > 0
        assert err == ""
    cells = json.loads(seg(capsys, "compare", *runs, "--h3", "11", "--json")[0])
    assert sum(cell["lost_m2"] or 0.0 for cell in cells) == pytest.approx(compare_runs(*runs).areas["lost"], rel=1e-6)
    assert seg(capsys, "compare", *runs, "--bbox", *box)[0].splitlines()[0].split() == ["area", *COLUMNS]


def test_what_cannot_be_compared_by_areas_is_refused_in_a_line(runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path / "areas.gpkg", [at(0, 0, 9, 9)], kept_m2=[1], name=["a"])
    (tmp_path / "there.gpkg").touch()
    nowhere, _ = build_run(tmp_path / "nowhere", crs=None)
    areas: list[Any] = ["--areas", tmp_path / "areas.gpkg"]
    cases: list[tuple[list[Any], str]] = [
        ([*runs, *areas, "--rasters", tmp_path / "r"], "--rasters: shows pixels of whole images: leave out the areas"),
        ([*runs, "--grid", "50", "--rasters", tmp_path / "r"], "--rasters: shows pixels of whole images"),
        ([*runs, *areas, "--id", "kept_m2"], "id kept_m2: the answer has a column of that name: choose another"),
        ([*runs, "--id", "name"], "--id: is for --areas"),
        ([*runs, *areas, "--crs", UTM], "--crs: is for --grid"),
        ([*runs, "--areas", tmp_path / "none.gpkg"], f"{tmp_path}/none.gpkg: can't be read"),
        ([*runs, *areas, "--out", tmp_path / "a.tif"], f"--out {tmp_path}/a.tif: not a format that areas are written"),
        ([*runs, *areas, "--out", tmp_path / "there.gpkg"], f"--out {tmp_path}/there.gpkg: already exists: choose"),
        ([runs[0], tmp_path / "none", *areas], f"{tmp_path}/none: no such run"),
        ([runs[0], nowhere, *areas], "north/a.tif: has no CRS, so that it is not known in which area it lies"),
        ([nowhere, runs[0], *areas], "north/a.tif: has no CRS, so that it is not known in which area it lies"),
    ]
    for args, message in cases:
        out, err = seg(capsys, "compare", *args, code=2)
        assert err.startswith(f"seg: {message}")
        assert (out, err.count("\n")) == ("", 1)
    assert (tmp_path / "there.gpkg").read_bytes() == b""


def test_a_file_that_exists_is_refused_before_the_runs_are_read(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: Any) -> Comparison:
        raise AssertionError("the runs are compared")

    monkeypatch.setattr("seg_core.run.compare_areas.compare_areas", fail)
    (tmp_path / "there.csv").touch()
    _, err = seg(capsys, "compare", *runs, "--grid", "50", "--out", tmp_path / "there.csv", code=2)
    assert err.startswith(f"seg: --out {tmp_path}/there.csv: already exists")


@pytest.mark.parametrize("make", [lambda _: make_areas(frame_of(POLYGONS)), lambda run: grid_areas(run, 50)])
def test_a_comparison_with_a_damaged_part_writes_no_file(
    runs: Runs, tmp_path: Path, capsys: Capture, make: Callable[[str], Any]
) -> None:
    after = build_after(tmp_path)
    after.path(3).write_bytes(b"PAR1")
    with pytest.raises(SegError, match=after.parts[3].key):
        compare_areas(runs[0], after.run, make(runs[0]))
    seg(capsys, "compare", runs[0], after.run, "--grid", "50", "--out", tmp_path / "found.gpkg", code=2)
    assert [path.name for path in tmp_path.iterdir() if "found" in path.name] == []


def test_cells_are_made_of_the_ground_of_both_runs(tmp_path: Path, capsys: Capture) -> None:
    runs = [build_run(tmp_path / name, **options)[0] for name, options in (("a", {}), ("b", {"corner": (X + 500, Y)}))]
    cells = [json.loads(seg(capsys, "query", run, "--grid", "50", "--json")[0]) for run in runs]
    out, _ = seg(capsys, "compare", *runs, "--grid", "50", "--json")
    names = {cell["cell"] for each in cells for cell in each}
    assert {cell["cell"] for cell in json.loads(out)} == names
    assert len(names) > max(map(len, cells))
