"""What a run has found, in Python: the steps of a notebook, and masks at bounds."""

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
from conftest import NORTH_UP, UTM
from pyproj import Transformer
from runs import build_run
from shapely import box

import seg_core
from seg_core.errors import SegError
from seg_core.results import Run

X, Y = NORTH_UP[2], NORTH_UP[5]  # corner of the scene north/a.tif, 100 x 120 px of 1 m


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path, _ = build_run(tmp_path_factory.mktemp("results"))
    return seg_core.open_run(path)


def test_a_notebook_gets_from_a_run_to_a_map(run: Run, tmp_path: Path) -> None:
    assert run.summary()["coverage"] == pytest.approx(run.tiles["building_px"].sum() / run.tiles["valid_px"].sum())

    tiles = run.geo_tiles
    assert tiles.crs == "OGC:CRS84"
    assert len(tiles) == len(run.tiles) > 6
    metres = tiles.to_crs(UTM)
    assert metres.area.max() == pytest.approx(32 * 32, rel=0.01)
    tiles.to_file(tmp_path / "tiles.gpkg")

    by_scene = run.relation().aggregate("scene_id, sum(building_m2) AS m2").order("scene_id").df()
    assert list(by_scene["scene_id"]) == ["north/a.tif", "south/b.tif"]
    assert by_scene["m2"].sum() == pytest.approx(run.tiles["building_m2"].sum())

    arrow = run.query("SELECT coverage FROM tiles WHERE coverage > 0.1")
    assert arrow.num_rows == (run.tiles["coverage"] > 0.1).sum()

    districts = geopandas.GeoDataFrame({"name": ["west"]}, geometry=[box(X, Y - 100, X + 60, Y)], crs=UTM)
    (district,) = run.measure_areas(districts, "name").itertuples()
    found = run.read_window("north/a.tif", window=(0, 0, 100, 60))
    assert district.building_m2 == pytest.approx(found.mask.sum(), rel=1e-3)
    assert district.coverage == pytest.approx(found.coverage)


def test_a_window_has_its_place(run: Run) -> None:
    found = run.read_window("north/a.tif", window=(20, 40, 30, 50))
    whole = run.read_window("north/a.tif")
    mask = run.read_mask("north/a.tif")
    assert whole.mask.shape == (100, 120)
    assert np.array_equal(whole.mask, mask == 1)
    assert np.array_equal(whole.valid, mask != 255)
    assert np.array_equal(found.mask, whole.mask[20:50, 40:90])
    assert np.array_equal(found.valid, whole.valid[20:50, 40:90])
    assert (found.crs, found.transform) == (UTM, (1.0, 0.0, X + 40, 0.0, -1.0, Y - 20))
    assert found.coverage == found.mask.sum() / found.valid.sum()
    assert not (found.mask & ~found.valid).any()


@pytest.mark.parametrize(
    ("bounds", "window"),
    [
        ((40, 20, 90, 50), (20, 40, 30, 50)),
        ((40.2, 20.3, 89.1, 49.5), (20, 40, 30, 50)),  # all pixels that are touched
        ((-50, -50, 10, 10), (0, 0, 10, 10)),  # cut at the image's edge
        ((-50, -50, 500, 500), (0, 0, 100, 120)),
    ],
)
def test_bounds_mean_the_pixels_that_they_touch(run: Run, bounds: Any, window: Any) -> None:
    left, top, right, bottom = bounds
    found = run.read_window("north/a.tif", bounds=(X + left, Y - bottom, X + right, Y - top))
    expected = run.read_window("north/a.tif", window=window)
    assert found.transform == expected.transform
    assert np.array_equal(found.mask, expected.mask)


def test_bounds_find_their_scene_in_another_crs_too(run: Run) -> None:
    to_lonlat = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    west, south, east, north = to_lonlat.transform_bounds(X + 10, Y - 10_000 - 20, X + 20, Y - 10_000 - 10)
    found = run.read_window(bounds=(west, south, east, north), crs="EPSG:4326")
    assert found.scene_id == "south/b.tif"
    rows, cols = found.mask.shape
    assert 10 <= rows <= 13
    assert 10 <= cols <= 13


def test_what_is_not_there_is_refused_in_a_line(run: Run) -> None:
    for options, message in (
        ({}, "scene_id: say which scene: north/a.tif, south/b.tif"),
        ({"scene_id": "c.tif"}, "c.tif: no scene of this run: it has north/a.tif, south/b.tif"),
        ({"bounds": (0, 0, 1, 1)}, "not within north/a.tif, south/b.tif: are they in"),
        ({"bounds": (1, 0, 0, 1)}, "hold nothing: give west, south, east, north"),
        ({"bounds": (0, 0, 1, 1), "crs": "nonsense"}, "crs nonsense: PROJ knows no way"),
        ({"scene_id": "north/a.tif", "window": (0, 0, 101, 5)}, "not within north/a.tif"),
        ({"window": (0, 0, 1, 1), "bounds": (0, 0, 1, 1)}, "window, bounds: give one of them"),
    ):
        with pytest.raises(SegError, match=message) as raised:
            run.read_window(**options)
        assert "\n" not in str(raised.value)


def test_each_public_name_says_how_it_is_used() -> None:
    for name in ("summary", "query", "relation", "measure_areas", "read_window", "read_mask", "tiles", "geo_tiles"):
        text = getattr(Run, name).__doc__
        assert text
        assert len(text.split()) > 8, name
