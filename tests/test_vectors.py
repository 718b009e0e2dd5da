"""Polygons of any vector format lie where they lie, are repaired and counted, and name no other file."""

import sqlite3
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio.features
import shapely
from conftest import NORTH_UP, UTM, MakeScene
from footprints import DRIVERS, index, to_map, write_json, write_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import bare_scene

from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.burning import burn
from seg_core.imagery.georef import position
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.vectors import Tally, index_polygons, open_vectors, read_bounds, repair_polygons

HEIGHT, WIDTH = 100, 120  # of make_scene
ONE = np.ones(1, np.uint8)
HOUSE, COURT = shapely.box(10, 20, 30, 35), shapely.box(40, 40, 80, 80).difference(shapely.box(50, 50, 60, 70))
TWINS = shapely.MultiPolygon([shapely.box(90, 5, 100, 15), shapely.box(105, 5, 112, 18)])
BOWTIE = shapely.Polygon([(0, 0), (20, 20), (20, 0), (0, 20)])


def truth(geometries: Any, all_touched: bool = False) -> Any:
    """What rasterio burns onto the whole scene."""
    shapes = [(geometry, 1) for geometry in geometries]
    return rasterio.features.rasterize(shapes, (HEIGHT, WIDTH), all_touched=all_touched, dtype="uint8")


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:3857"])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb", ".parquet"])
def test_polygons_of_each_format_and_crs_are_burnt_where_they_lie(
    make_scene: MakeScene, tmp_path: Path, suffix: str, crs: str
) -> None:
    path = write_vectors(tmp_path / f"labels{suffix}", [HOUSE, COURT, TWINS, shapely.box(500, 500, 510, 510)], crs)
    found, scene = index(path, make_scene(), tmp_path / "index")
    assert (found.tally.read, found.tally.repaired, sum(found.tally.dropped.values())) == (3, 0, 0)
    # Edges lie between centres, so that the rounding of a CRS decides nothing.
    assert np.array_equal(burn(found, scene, scene.window, ONE), truth([HOUSE, COURT, TWINS]))


@pytest.mark.parametrize("unit", ["us-ft", "km"])
def test_polygons_of_a_utm_crs_in_another_unit_than_metres_are_burnt_where_they_lie(
    make_scene: MakeScene, tmp_path: Path, unit: str
) -> None:
    crs = f"+proj=utm +zone=33 +datum=WGS84 +units={unit}"
    path = write_vectors(tmp_path / "labels.gpkg", [HOUSE, COURT, TWINS], crs)
    found, scene = index(path, make_scene(), tmp_path / "index")
    assert np.array_equal(burn(found, scene, scene.window, ONE), truth([HOUSE, COURT, TWINS]))


WORLD, HEMISPHERE = shapely.box(-180, -90, 180, 90), shapely.segmentize(shapely.box(-80, 0, 110, 80), 1.0)


@pytest.mark.parametrize("wide", [WORLD, HEMISPHERE], ids=["world", "hemisphere"])
def test_polygons_that_are_wider_than_a_crs_describes_are_burnt_where_the_scene_is(
    make_scene: MakeScene, tmp_path: Path, wide: Any
) -> None:
    geopandas.GeoDataFrame(geometry=[wide], crs="EPSG:4326").to_file(tmp_path / "wide.geojson")
    found, scene = index(f"{tmp_path}/wide.geojson", make_scene(), tmp_path / "index")
    assert burn(found, scene, scene.window, ONE).all()


@pytest.mark.parametrize("first_col", [-120, -60, 0])  # of the scene, to the east of a meridian that ends the CRS
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(("crs", "half"), [("EPSG:4326", 180.0), ("EPSG:3857", 20_037_508.342789244)])
def test_polygons_lie_on_a_scene_that_goes_on_beyond_the_antimeridian(
    tmp_path: Path, crs: str, half: float, side: int, first_col: int
) -> None:
    pixel = half / 2e7
    scene = bare_scene(100, 120, crs, (pixel, 0, side * half + first_col * pixel, 0, -pixel, 10 * pixel))
    pixels = [shapely.box(10, 20, 30, 35), shapely.box(70, 40, 110, 80)]
    placed = shapely.transform(pixels, lambda p: np.stack(position(scene.transform, *p.T[::-1]), axis=1))
    lonlat = geopandas.GeoSeries(placed, crs=crs).to_crs("EPSG:4326").to_numpy()
    wrapped = shapely.transform(lonlat, lambda p: np.stack([(p[:, 0] + 180) % 360 - 180, p[:, 1]], axis=1))
    geopandas.GeoDataFrame(geometry=wrapped, crs="EPSG:4326").to_file(tmp_path / "labels.geojson")
    found = index_polygons(open_vectors(f"{tmp_path}/labels.geojson"), [scene], str(tmp_path))
    assert np.array_equal(burn(found, scene, scene.window, ONE), truth(pixels))


@given(seed=st.integers(0, 10**6), size=st.integers(30, 130), all_touched=st.booleans())
@settings(max_examples=10, deadline=None)
def test_windows_are_burnt_as_the_whole_scene_is(
    seed: int, size: int, all_touched: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("burn")
    centres, radii = rng.uniform(-10, 130, (6, 2)), rng.uniform(0.3, 30, 6)
    blobs = [shapely.Point(centre).buffer(radius, quad_segs=3) for centre, radius in zip(centres, radii, strict=True)]
    rings = [blobs[0].difference(blobs[0].centroid.buffer(radii[0] / 2)), *blobs[1:]]
    path = write_vectors(folder / "a.fgb", rings)
    found, scene = index(path, write_blank(folder / "scene.tif"), folder / "index")
    burnt = np.zeros((HEIGHT, WIDTH), np.uint8)
    for window in split(scene.window, size):
        burnt[window.slices(scene.window)] = burn(found, scene, window, ONE, all_touched)
    # In pixels of the scene, as they come out of its CRS.
    pixels = shapely.transform(to_map(np.array(rings, object)), lambda p: (p - (400_000, 5_800_000)) * (1, -1))
    assert np.array_equal(burnt, truth(pixels, all_touched))


def write_blank(path: Path) -> str:
    """Write a scene of one colour."""
    write_geotiff(str(path), np.zeros((1, HEIGHT, WIDTH), np.uint8), crs=UTM, transform=NORTH_UP)
    return str(path)


def test_what_is_no_area_is_dropped_and_what_is_invalid_repaired_and_both_are_counted(
    make_scene: MakeScene, tmp_path: Path
) -> None:
    twice = shapely.MultiPolygon([shapely.box(30, 30, 50, 50), shapely.box(40, 40, 60, 60)])
    line, point = shapely.LineString([(1, 1), (9, 9)]), shapely.Point(5, 5)
    mixed = shapely.GeometryCollection([line, shapely.box(70, 70, 80, 80)])
    flat = shapely.Polygon([(3, 3), (8, 3), (3, 3)])
    everything = [BOWTIE, twice, line, point, mixed, flat, shapely.Polygon(), HOUSE]
    path = write_vectors(tmp_path / "labels.geojson", everything)
    found, scene = index(path, make_scene(), tmp_path / "index")
    assert found.tally.read == 8
    assert found.tally.repaired == 2
    assert +found.tally.dropped == {"lines": 1, "points": 1, "empty": 1, "without area": 1}
    burnt = burn(found, scene, scene.window, ONE)
    assert burnt[45, 45]  # where the parts of a multipolygon overlap there is no hole
    assert burnt[75, 75]
    assert np.array_equal(burnt[:20, :20], truth([BOWTIE.buffer(0), shapely.make_valid(BOWTIE)])[:20, :20])


def test_of_overlapping_polygons_the_highest_value_wins_in_any_order(make_scene: MakeScene, tmp_path: Path) -> None:
    both = [shapely.box(10, 10, 40, 40), shapely.box(30, 30, 60, 60)]
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        path = write_vectors(tmp_path / f"{name}.fgb", [both[at] for at in order], kind=["xy"[at] for at in order])
        found, scene = index(path, make_scene(), tmp_path / name, "kind")
        values = np.array([{"x": 1, "y": 2}[str(value)] for value in list(found.tally.numbers)], np.uint8)
        burnt = burn(found, scene, scene.window, values)
        assert (burnt[35, 35], burnt[15, 15]) == (2, 1)


def test_without_a_polygon_nearby_nothing_is_burnt(make_scene: MakeScene, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "labels.parquet", [shapely.box(500, 500, 510, 520)])
    found, scene = index(path, make_scene(), tmp_path / "index")
    assert not found.tally.numbers
    assert not burn(found, scene, Window(0, 0, 10, 10), ONE).any()
    assert read_bounds(open_vectors(path)) == (400_500, 5_799_480, 400_510, 5_799_500)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb", ".parquet"])
def test_a_file_without_a_polygon_has_no_bounds(tmp_path: Path, suffix: str) -> None:
    frame, path = geopandas.GeoDataFrame({"kind": []}, geometry=[], crs="EPSG:4326"), f"{tmp_path}/labels{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path, driver=DRIVERS[suffix], geometry_type="Polygon")
    with pytest.raises(SegError, match=rf"labels{suffix}: holds no polygon$"):
        read_bounds(open_vectors(path))


def test_geoparquet_without_a_bbox_column_is_read_too(make_scene: MakeScene, tmp_path: Path) -> None:
    frame = geopandas.GeoDataFrame(geometry=[to_map(HOUSE)], crs=UTM)
    frame.to_parquet(tmp_path / "plain.parquet")
    found, scene = index(f"{tmp_path}/plain.parquet", make_scene(), tmp_path / "index")
    assert burn(found, scene, scene.window, ONE).sum() == HOUSE.area


VRT = '<OGRVRTDataSource><OGRVRTLayer name="a"><SrcDataSource>other.geojson</SrcDataSource></OGRVRTLayer>'


def test_a_file_that_names_another_one_is_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "other.geojson", [HOUSE], "EPSG:4326")
    (tmp_path / "labels.vrt").write_text(VRT)
    (tmp_path / "vrt.geojson").write_text(VRT)
    (tmp_path / "vrt.gpkg").write_text(VRT)
    command = f"gdal vector pipeline ! read {tmp_path}/other.geojson"
    write_json(tmp_path / "pipeline.geojson", {"type": "gdal_streamed_alg", "command_line": command})
    with sqlite3.connect(write_vectors(tmp_path / "virtual.gpkg", [HOUSE])) as database:
        database.execute("CREATE VIRTUAL TABLE other USING fts4(content)")
    database.close()
    for name, reason in (
        ("labels.vrt", "not a vector file"),
        ("vrt.geojson", "its content is not GeoJSON"),
        ("vrt.gpkg", "its content is not GPKG"),
        ("pipeline.geojson", "can't be read"),
        ("virtual.gpkg", "virtual table"),
    ):
        with pytest.raises(SegError, match=f"{name}.*{reason}"):
            open_vectors(f"{tmp_path}/{name}")


def test_files_that_can_not_be_placed_or_chosen_from_are_refused(make_scene: MakeScene, tmp_path: Path) -> None:
    bare = write_vectors(tmp_path / "bare.shp", [HOUSE])
    (tmp_path / "bare.prj").unlink()
    with pytest.raises(SegError, match=r"bare.shp: has no CRS.*-a_srs"):
        open_vectors(bare)
    several = write_vectors(tmp_path / "two.gpkg", [HOUSE])
    geopandas.GeoDataFrame(geometry=[to_map(HOUSE)], crs=UTM).to_file(several, layer="more", driver="GPKG")
    with pytest.raises(SegError, match=r"needs one layer.*two, more"):
        open_vectors(several)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(SegError, match="no GeoParquet"):
        open_vectors(f"{tmp_path}/table.parquet")
    (tmp_path / "damaged.fgb").write_bytes(b"fgb\3fgb\0" + bytes(50))
    with pytest.raises(SegError, match="needs one layer with geometries, it has none"):
        open_vectors(f"{tmp_path}/damaged.fgb")
    with pytest.raises(SegError, match=r"absent.gpkg: can't be read: No such file"):
        open_vectors(f"{tmp_path}/absent.gpkg")
    good = open_vectors(write_vectors(tmp_path / "good.fgb", [HOUSE], floors=[2]))
    with pytest.raises(SegError, match=r"--class-column kind: .*it has floors"):
        index_polygons(good, [read_scene(make_scene(), "a")], str(tmp_path), "kind")


def test_whole_numbers_are_read_as_such_and_absent_values_as_none(make_scene: MakeScene, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "labels.parquet", [HOUSE, COURT, TWINS], kind=[1.0, 2.5, None])
    found, _ = index(path, make_scene(), tmp_path / "index", "kind")
    assert found.tally.numbers == {"1": 0, "2.5": 1, None: 2}


def test_blank_text_is_an_absent_value(make_scene: MakeScene, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "labels.geojson", [HOUSE, COURT, TWINS], kind=["house", "", " "])
    found, _ = index(path, make_scene(), tmp_path / "index", "kind")
    assert found.tally.numbers == {"house": 0, None: 1}


def test_collections_keep_all_of_their_polygons() -> None:
    one, two, three = (shapely.box(x, 0, x + 10, 10) for x in (0, 20, 25))
    line = shapely.LineString([(50, 0), (60, 10)])
    collections = [[one, shapely.MultiPolygon([two])], [shapely.MultiPolygon([one, two]), line], [one, two, three]]
    tally = Tally()
    found = repair_polygons(np.array([shapely.GeometryCollection(each) for each in collections], object), tally)
    assert shapely.area(found).tolist() == [200, 200, 250]
    assert shapely.is_valid(found).all()
    assert not +tally.dropped
