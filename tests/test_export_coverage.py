"""Coverage as a grid for a GIS: each cell is what the masks say of its ground, as far as they know it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
from areas import X, Y, expected_sums
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rio_cogeo.cogeo import cog_validate
from runs import BuiltRun, build_run
from seg_command import SMALL, seg
from shapely import box

import seg_core
from seg_core.run import export_coverage as exporting
from seg_core.run.query import summary
from seg_core.run.stored_plan import read_plan

Capture = pytest.CaptureFixture[str]
Export = Callable[..., Path]
ACROSS = "EPSG:32660"  # UTM from 174 to 180 degrees


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of scenes of 100 x 120 px, with a block without data, and of 40 x 30 px, 10 km to the south."""
    return build_run(tmp_path_factory.mktemp("coverage"))[0]


@pytest.fixture
def export(tmp_path: Path, capsys: Capture) -> Export:
    """Export the coverage of a run to a file."""

    def make(run: object, *options: object, name: str = "coverage.tif", code: int = 0) -> Path:
        seg(capsys, "export", "coverage", run, *options, "--out", tmp_path / name, code=code)
        return tmp_path / name

    return make


def read(path: Path) -> tuple[NDArray[Any], NDArray[Any], Any]:
    """Both bands of a raster of coverage, and the transform."""
    with rasterio.open(path) as file:
        return file.read(1), file.read(2), file.transform


def in_cells(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """The sums over cells of so many pixels, `(rows, columns)`."""
    height, width = (-(-length // side) * side for length in pixels.shape)
    padded = np.pad(pixels, [(0, height - pixels.shape[0]), (0, width - pixels.shape[1])])
    return padded.reshape(height // side, side, width // side, side).sum(axis=(1, 3))


def test_each_cell_is_what_the_exported_masks_say_of_its_pixels(
    run: str, export: Export, tmp_path: Path, capsys: Capture
) -> None:
    seg(capsys, "export", "masks", run, "--out", tmp_path / "masks")
    coverage, known, transform = read(export(run, "--cell", 20, "--crs", UTM))
    assert transform[:6] == (20, 0, X, 0, -20, Y)
    assert coverage.shape == known.shape == (10_040 // 20, 120 // 20)
    is_cell = np.zeros(coverage.shape, np.bool_)
    for name, row in (("north/a.tif", 0), ("south/b.tif", 10_000 // 20)):
        with rasterio.open(tmp_path / "masks" / name) as file:
            mask = file.read(1)
        building, valid = in_cells(mask == 1, 20), in_cells(mask != 255, 20)
        at = np.s_[row : row + len(valid), : valid.shape[1]]
        is_cell[at] = True
        assert (known[at] == 0).sum() == (valid == 0).sum() == (name == "north/a.tif") * 2
        assert known[at] == pytest.approx(valid / 20**2, rel=1e-5)
        with np.errstate(invalid="ignore"):
            assert coverage[at] == pytest.approx(building / valid, rel=1e-5, nan_ok=True)
    assert np.isnan(coverage[~is_cell]).all()
    assert np.isnan(known[~is_cell]).all()


def test_pixels_at_the_edge_of_a_cell_count_by_their_share(run: str, export: Export) -> None:
    coverage, known, transform = read(export(run, "--cell", 32.5, "--crs", UTM))
    assert (transform.c / 32.5, transform.f / 32.5) == (X // 32.5, Y // 32.5 + 1)
    for row, col in np.ndindex(3, 4):
        left, top = transform.c + 32.5 * col, transform.f - 32.5 * row
        cell = box(left, top - 32.5, left + 32.5, top)
        sums = expected_sums(run, "north/a.tif", NORTH_UP, cell)
        assert known[row, col] == pytest.approx(sums["valid_m2"] / cell.area, rel=1e-3)  # UTM is true to 0.04 %
        if sums["valid_m2"]:
            assert coverage[row, col] == pytest.approx(sums["building_m2"] / sums["valid_m2"], rel=1e-5)


def test_each_cell_is_at_its_place_though_rounding_moves_its_edges(run: str, export: Export) -> None:
    path = export(run, "--cell", 13.7, "--crs", "EPSG:3857")  # floor(col * 13.7 / 13.7) is col - 1 for some
    cells = seg_core.open_run(run).measure_grid(13.7, "EPSG:3857")
    centres = cells.geometry.centroid
    with rasterio.open(path) as file:
        found = np.array(list(file.sample(zip(centres.x, centres.y, strict=True))))
        assert (~np.isnan(file.read(2))).sum() == len(cells)
    expected = np.column_stack([cells["coverage"], np.minimum(cells["covered"], 1)])
    assert np.array_equal(found, expected.astype(np.float32), equal_nan=True)


def test_the_default_grid_holds_the_building_of_the_run(run: str, export: Export) -> None:
    path = export(run, "--cell", 40)
    coverage, known, _ = read(path)
    total = summary(run)
    assert np.nansum(known) * 40**2 == pytest.approx(total["area_km2"] * 1e6, rel=1e-4)
    assert np.nansum(coverage * known) * 40**2 == pytest.approx(total["building_km2"] * 1e6, rel=1e-4)
    with rasterio.open(path) as file:
        assert file.crs.to_epsg() == 6933


def test_the_raster_is_cloud_optimised_and_says_what_its_bands_are(run: str, export: Export) -> None:
    path = export(run, "--cell", 4, "--crs", UTM)
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.dtypes == ("float32", "float32")
        assert file.descriptions == ("coverage", "known")
        assert np.isnan(file.nodatavals).all()
        assert len(file.overviews(1)) > 0
        masked = file.read(masked=True)
    assert np.array_equal(masked.mask, np.isnan(masked.data))
    assert 0 <= masked.min() < masked.max() <= 1
    assert path.with_suffix(".qml").is_file()


@pytest.mark.parametrize("crs", ["EPSG:3035", "ESRI:54009", "+proj=laea +lat_0=52 +lon_0=13 +units=m"])
def test_the_raster_is_in_the_crs_that_is_named(run: str, export: Export, crs: str) -> None:
    with rasterio.open(export(run, "--cell", 50, "--crs", crs)) as file:
        assert CRS(file.crs.to_wkt()).equals(CRS(crs), ignore_axis_order=True)


def test_the_table_is_that_of_the_query(run: str, export: Export, tmp_path: Path, capsys: Capture) -> None:
    path = export(run, "--cell", 32.5, "--crs", UTM, name="coverage.parquet")
    seg(capsys, "query", run, "--grid", 32.5, "--crs", UTM, "--out", tmp_path / "query.parquet")
    found, expected = (geopandas.read_parquet(each) for each in (path, tmp_path / "query.parquet"))
    assert found.equals(expected)
    assert found.crs == expected.crs == UTM
    assert sorted(each.name for each in tmp_path.iterdir()) == ["coverage.parquet", "query.parquet"]


def test_ground_that_is_not_known_is_no_background(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, failed_parts=[1])
    BuiltRun(run, plan).path(0).unlink()
    for number, name in enumerate(("coverage.tif", "coverage.parquet")):
        path = tmp_path / name
        command = ["export", "coverage", run, "--cell", 4, "--crs", UTM, "--out", path]
        out, err = seg(capsys, *command, *["--json"] * (number == 0), code=1)
        assert err.splitlines() == [
            str(path),
            "8 tiles failed or are not done yet: their ground counts as not known (exit code 1)",
        ]
        if number == 0:
            assert json.loads(out) == {"file": str(path), "cells": 30 * 25 + 8 * 10, "failed": 4, "missing": 4}
    coverage, known, _ = read(tmp_path / "coverage.tif")
    parts = np.s_[:16, :]  # 64 px
    assert (known[parts] == 0).all()
    assert np.isnan(coverage[parts]).all()
    assert known[-10:, :7] == pytest.approx(1, rel=1e-6)


@pytest.mark.usefixtures("without_actors")
def test_where_scenes_overlap_no_more_than_all_is_known(
    make_scene: MakeScene, make_bundle: MakeBundle, export: Export, tmp_path: Path, capsys: Capture
) -> None:
    for name, left in (("a.tif", 0), ("b.tif", 60)):
        make_scene(f"m/{name}", 100, 120, transform=(1.0, 0.0, X + left, 0.0, -1.0, Y))
    arguments = ["--overlap", "count", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    seg(capsys, "segment", tmp_path / "m", *arguments)
    coverage, known, _ = read(export(tmp_path / "run", "--cell", 20, "--crs", UTM))
    assert known == pytest.approx(1, rel=1e-3)
    assert known.max() <= 1
    assert 0 <= coverage.min() < coverage.max() <= 1


def test_cells_that_the_antimeridian_cuts_are_where_they_are(tmp_path: Path, export: Export) -> None:
    x, y = Transformer.from_crs("OGC:CRS84", ACROSS, always_xy=True).transform(180.0, -17.0)
    run, _ = build_run(tmp_path, crs=ACROSS, corner=(round(x) - 60.0, round(y)))
    coverage, known, _ = read(export(run, "--cell", 20_000))
    assert coverage.shape[1] == 1738  # once around the Earth
    assert (~np.isnan(coverage[:, [0, -1]])).any(axis=0).all()
    assert np.isnan(coverage[:, 1:-1]).all()
    assert np.isnan(known[:, 1:-1]).all()


def test_scenes_too_far_apart_for_a_raster_have_a_table(
    run: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MAX_PIXELS", 3000)
    monkeypatch.setattr(exporting, "measure_areas", pytest.fail)
    command = ["export", "coverage", run, "--cell", 20, "--crs", UTM]
    _, err = seg(capsys, *command, "--out", tmp_path / "c.tif", code=2)
    assert (
        err
        == "seg: --cell 20: makes a raster of 6 x 502 pixels: choose larger cells, or a table (--out FILE.parquet)\n"
    )
    monkeypatch.undo()
    monkeypatch.setattr(exporting, "MAX_PIXELS", 3000)
    assert seg(capsys, *command, "--out", tmp_path / "c.parquet")[1] == f"{tmp_path}/c.parquet\n"


REFUSED = {
    "--cell 0 --out c.tif": "--cell 0: say the side of a cell in metres, 0.01 to 1e+06",
    "--cell -5 --out c.tif": "--cell -5: say the side of a cell in metres, 0.01 to 1e+06",
    "--cell nan --out c.tif": "--cell nan: say the side of a cell in metres, 0.01 to 1e+06",
    "--cell 0.01 --out c.tif": "--cell 0.01: makes more than 1,000,000 cells: choose larger ones",
    "--cell 20 --crs EPSG:4326 --out c.tif": (
        "--crs EPSG:4326: measures in degree: name one in metres, such as EPSG:3035"
    ),
    "--cell 20 --crs nonsense --out c.tif": (
        "--crs nonsense: not a coordinate reference system that PROJ knows, such as EPSG:3035"
    ),
    "--cell 20 --out c.png": "--out {folder}/c.png: not a format that coverage is written in: say .tif, .parquet",
    "--cell 20 --out there.tif": "--out {folder}/there.tif: already exists: choose another name",
    "--cell 20 --out there.parquet": "--out {folder}/there.parquet: already exists: choose another name",
    "--cell 20 --out styled.tif": "--out {folder}/styled.qml: already exists: choose another name",
    "--cell 20 --out s3://bucket/c.tif": (
        "s3://bucket/c.tif: must be on a local disk: only scenes, models, runs, masks and --work may be in S3"
    ),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_makes_no_grid_is_refused_in_a_line(
    run: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.tif", "there.parquet", "styled.qml"):
        Path(name).touch()
    out, err = seg(capsys, "export", "coverage", run, *options.split(), code=2)
    assert (out, err) == ("", f"seg: {REFUSED[options].format(folder=tmp_path)}\n")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_scene_without_crs_lies_in_no_cell(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path, crs=None)
    _, err = seg(capsys, "export", "coverage", run, "--cell", "20", "--out", tmp_path / "c.tif", code=2)
    assert err.startswith("seg: north/a.tif: has no CRS, ")
    assert err.count("\n") == 1
    assert not (tmp_path / "c.tif").exists()


@pytest.mark.usefixtures("without_actors")
def test_real_coverage_adds_up_to_that_of_the_run(
    shared: Path, export: Export, tmp_path: Path, capsys: Capture
) -> None:
    seg(capsys, "segment", *sorted((shared / "joplin").glob("tile_*.tif"))[:1], "--resample", "--out", tmp_path / "run")
    coverage, known, _ = read(export(tmp_path / "run", "--cell", 50))
    total = summary(str(tmp_path / "run"))
    assert total["building_km2"] > 0
    assert np.nansum(coverage * known) * 50**2 == pytest.approx(total["building_km2"] * 1e6, rel=1e-3)
    assert read_plan(str(tmp_path / "run")).images[0].crs == "EPSG:26915"
