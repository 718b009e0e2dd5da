"""A random sample of places of a run, what judges say of them, and building area with an interval."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from conftest import NORTH_UP, UTM, cut, window_figures
from footprints import write_vectors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.windows import Window as RasterWindow
from rasters import damage, write_raw
from runs import SETTINGS, build_run, rows_of, write_light_bundle
from seg_command import Json, seg

from seg_core.audit.estimate import Interval, Judged, estimate_areas, estimate_run
from seg_core.audit.report import audit_areas, audit_run, figures, look_first, wrong_places
from seg_core.audit.sample import TRUTHS, Place, allocate, draw_places, find_places, read_judged, to_frame
from seg_core.audit.strata import NAMES, Survey, is_building, survey_run
from seg_core.errors import ReadError, SegError, StoreUnavailableError
from seg_core.grid import Window, split
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_image
from seg_core.imagery.region import read_region
from seg_core.imagery.scene import Scene
from seg_core.model.bundle import read_bundle
from seg_core.plots.pictures import Panel
from seg_core.run.area_files import make_areas
from seg_core.run.areas import measure_areas
from seg_core.run.export_masks import read_mask
from seg_core.run.plan import Plan, Settings, make_plan
from seg_core.run.query import summary
from seg_core.run.record import now, write_record
from seg_core.run.resume import open_run
from seg_core.run.rows import Failure, failed_rows, tile_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part

Capture = pytest.CaptureFixture[str]
Paint = Callable[[Scene], NDArray[np.float32]]  # what the run says of an image: the probability of each pixel
X, Y = NORTH_UP[2], NORTH_UP[5]
TILE = SETTINGS.tile_size
HEIGHT, WIDTH = 160, 200  # of the town, in pixels of 1 m
STRIPES = Window(128, 96, TILE, TILE)  # a tile of the town, full of pixels that are near a border
FOOTPRINTS = [(8, 8, 30, 30), (40, 70, 90, 100), (20, 130, 23, 133)]  # its other buildings: left, top, right, bottom
BUILT = np.array([is_building(stratum) for stratum in range(len(NAMES))])
M2 = np.array([0, 6.84e6, 0.126e6, 0.081e6, 0.394e6])  # strata as those of Brookline, and how much of each is wrong
WRONG = np.array([0, 0.0069, 0.30, 0.35, 0.17])


def town_mask() -> NDArray[np.bool_]:
    """Three buildings, the second of them in six tiles, and a tile of stripes."""
    building = np.zeros((HEIGHT, WIDTH), np.bool_)
    for left, top, right, bottom in FOOTPRINTS:
        building[top:bottom, left:right] = True
    building[STRIPES.row_off : STRIPES.bottom : 2, STRIPES.col_off : STRIPES.right] = True
    return building


def town_truth() -> NDArray[np.bool_]:
    """The town as it is: its buildings lie 2 px to the east, there are no stripes, and one building was not found."""
    truth = np.roll(town_mask(), 2, axis=1)
    truth[STRIPES.row_off : STRIPES.bottom, STRIPES.col_off : STRIPES.right + 2] = False
    truth[100:125, 150:190] = True
    return truth


def town_validity() -> NDArray[np.bool_]:
    """Without a tile and what is around it, and without a hole in a building."""
    valid = np.ones((HEIGHT, WIDTH), np.bool_)
    valid[:40, 120:170] = False
    valid[90:95, 60:70] = False
    return valid


def paint_town(image: Scene) -> NDArray[np.float32]:
    """The probabilities of the town, 0.9 or 0.1; other images are background."""
    if (image.height, image.width) != (HEIGHT, WIDTH):
        return np.full((image.height, image.width), 0.1, np.float32)
    return np.where(town_mask(), 0.9, 0.1).astype(np.float32)


def write_scene(
    path: Path, valid: NDArray[np.bool_], *, pixel_m: float = 1.0, left: float = 0.0, crs: str | None = UTM
) -> None:
    """Write a random scene that begins so many metres to the east of the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(valid.size).integers(1, 250, (3, *valid.shape)).astype(np.uint8)
    pixels[:, ~valid] = 0
    write_geotiff(str(path), pixels, crs=crs, transform=(pixel_m, 0.0, X + left, 0.0, -pixel_m, Y), nodata=0)


def make_run(
    folder: Path, paint: Paint = paint_town, settings: Settings = SETTINGS, failed: Sequence[int] = ()
) -> tuple[str, Plan]:
    """Make a run of the scenes in `folder/scenes` by hand. Parts of those numbers have failed."""
    bundle = write_light_bundle(folder / "bundle", gsd_m=None)
    scenes, _ = read_region([str(folder / "scenes")])
    plan, refused = make_plan(scenes, read_bundle(bundle), settings)
    assert not refused
    run = str(folder / "run")
    record = open_run(run, plan, bundle)
    for number, part in enumerate(plan.parts()):
        image, window = part.scene, part.window
        probability = paint(image)[window.slices(image.window)]
        _, valid = read_image(image, part.sources, window)
        figures = window_figures(probability, valid, TILE, settings.threshold, keep=settings.keep_probability)
        rows = list(tile_rows(image, window, TILE, figures))
        if number in failed:
            rows = list(failed_rows(image, window, TILE, Failure("ReadError", "the disk said no")))
        write_part(run, part.key, rows, plan.model, part.version)
    record.finished, record.counts = now(), summary(run)
    write_record(run, record)
    return run, plan


def make_town(folder: Path, **options: Any) -> str:
    """A run of the town."""
    write_scene(folder / "scenes/town.tif", town_validity())
    return make_run(folder, **options)[0]


def write_truth(path: Path, truth: NDArray[np.bool_]) -> str:
    """Write the truth of the town as a label raster."""
    write_geotiff(str(path), truth[None].astype(np.uint8), crs=UTM, transform=NORTH_UP)
    return str(path)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one scene. Beside it is its truth."""
    folder = tmp_path_factory.mktemp("town")
    write_truth(folder / "truth.tif", town_truth())
    return make_town(folder)


@pytest.fixture(scope="module")
def truth(town: str) -> str:
    """The truth of the town, as a label raster."""
    return str(Path(town).parent / "truth.tif")


@pytest.fixture(scope="module")
def survey(town: str) -> Survey:
    return survey_run(town)


@pytest.fixture(scope="module")
def drawn(town: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sample of 50 places of the town. Nobody has judged them yet."""
    from aerial_seg.cli.main import main

    folder = tmp_path_factory.mktemp("drawn") / "sample"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seg_core.plots.pictures.PANEL", 200)  # small pictures are drawn sooner
        assert main(["audit", town, "--sample", "50", "--seed", "5", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Panel]]:
    """What is shown in the pictures of samples. They are not drawn, which takes a tenth of a second each."""
    shown: list[Sequence[Panel]] = []

    def keep(panels: Sequence[Panel]) -> bytes:
        shown.append(panels)
        return b""

    monkeypatch.setattr("seg_core.audit.folder.assemble_panels", keep)
    return shown


@pytest.fixture
def sample(drawn: Path) -> geopandas.GeoDataFrame:
    """This sample, to be judged."""
    return geopandas.read_file(drawn / "sample.gpkg")


def judge(sample: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """The sample, with the truth that a person fills in."""
    is_built = town_truth()[sample["row"], sample["col"]]
    return sample.assign(truth=np.where(is_built, "building", "background"))


def audit_json(capsys: Capture, run: str, labels: object, *options: object) -> Json:
    found: Json = json.loads(seg(capsys, "audit", run, "--labels", labels, "--json", *options)[0])
    return found


def expected_strata(run: str, scene_id: str) -> NDArray[np.uint8]:
    """The stratum of each pixel of a scene, from its mask and the pixels within 3 px of each in its tile."""
    mask = read_mask(run, scene_id)
    found, whole = np.full(mask.shape, 255, np.uint8), Window(0, 0, *mask.shape)
    for tile in split(whole, TILE):
        pixels = mask[tile.slices(whole)]
        building, doubtful = pixels == 1, np.zeros(pixels.shape, np.bool_)
        for row, col in np.ndindex(pixels.shape):
            near = building[max(0, row - 3) : row + 4, max(0, col - 3) : col + 4]
            doubtful[row, col] = near.any() and not near.all()
        kinds = [pixels == 255, building & doubtful, building, doubtful, np.full(pixels.shape, building.any())]
        found[tile.slices(whole)] = np.select(kinds, [255, 3, 4, 2, 1], 0)
    return found


def strata_of(survey: Survey, scene_id: str) -> NDArray[np.uint8]:
    """The stratum of each pixel of a scene, as the survey has it. Each pixel is in one tile at most."""
    whole = next(image.window for image in survey.plan.images if image.scene_id == scene_id)
    found, times = np.full(whole.shape, 255, np.uint8), np.zeros(whole.shape, np.int64)
    for number, part in enumerate(survey.parts):
        for tile in survey.read_part(number) if part.scene.scene_id == scene_id else ():
            at = tile.window.slices(whole)
            found[at] = tile.strata
            times[at] += 1
    assert times.max() <= 1
    return found


def measured(run: str, strata: dict[str, NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Ground area by stratum, from the strata of each scene and the area of each tile's pixels."""
    total = np.zeros(len(NAMES))
    for row in rows_of(run):
        if row["status"] == "done" and row["valid_px"]:
            of_scene = strata[row["scene_id"]]
            pixels = of_scene[Window.from_row(row).slices(Window(0, 0, *of_scene.shape))]
            counts = np.bincount(pixels[pixels != 255], minlength=len(NAMES))
            total += counts * row["area_m2"] / row["valid_px"]
    return total


# How a number of places is divided among strata


def test_half_of_the_places_are_divided_equally_and_half_by_area() -> None:
    assert allocate(np.array([0, 6e6, 1e6, 1e6, 2e6]), 400).tolist() == [0, 170, 70, 70, 90]
    assert allocate(np.array([0, 0, 0, 0, 2.5]), 77).tolist() == [0, 0, 0, 0, 77]


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e12)), min_size=5, max_size=5).filter(any), st.integers(50, 5000)
)
def test_all_places_are_given_and_none_to_empty_strata(m2: list[float], number: int) -> None:
    areas = np.array(m2)
    found, there = allocate(areas, number), areas > 0
    assert found.sum() == number
    assert not found[~there].any()
    wanted = number * (0.5 / there.sum() + 0.5 * areas / areas.sum())
    assert (abs(found - wanted)[there] < 1 + 1e-6).all()


# Strata


def test_each_valid_pixel_is_in_one_stratum_and_doubtful_within_3_px_of_a_border(town: str, survey: Survey) -> None:
    expected = expected_strata(town, "town.tif")
    found = strata_of(survey, "town.tif")
    assert (found == expected).all()
    assert ((found == 255) == ~town_validity()).all()
    assert set(np.unique(found)) == {0, 1, 2, 3, 4, 255}
    assert set(np.unique(found[STRIPES.slices(Window(0, 0, HEIGHT, WIDTH))])) == {2, 3}
    assert not (found[96:128, 128:160] > 0).any()  # a tile without building
    assert BUILT.tolist() == [False, False, False, True, True]


def test_strata_add_up_to_the_areas_of_the_run(town: str, survey: Survey) -> None:
    total = summary(town)
    assert survey.m2.sum() == pytest.approx(total["area_km2"] * 1e6, rel=1e-6)
    assert survey.m2[BUILT].sum() == pytest.approx(total["building_km2"] * 1e6, rel=1e-6)
    assert survey.m2 == pytest.approx(measured(town, {"town.tif": expected_strata(town, "town.tif")}), rel=1e-6)


def test_pixels_of_a_run_that_keeps_probabilities_are_doubtful_near_the_threshold(tmp_path: Path) -> None:
    probability = np.random.default_rng(2).random((HEIGHT, WIDTH), np.float32)
    probability[96:128, 128:160] = 0.1  # a tile without building
    kept = replace(SETTINGS, threshold=0.6, keep_probability=True)
    run = make_town(tmp_path, paint=lambda _: probability, settings=kept)
    survey = survey_run(run)
    levels, whole = (probability * 255).round() / 255, Window(0, 0, HEIGHT, WIDTH)
    building, doubtful = probability >= 0.6, abs(levels - 0.6) < 0.25
    assert not np.isclose(abs(levels - 0.6), 0.25, atol=1e-4).any()
    expected = np.full(probability.shape, 255, np.uint8)
    for tile in split(whole, TILE):
        at = tile.slices(whole)
        seen = (building & town_validity())[at]
        kinds = [~town_validity()[at], building[at] & doubtful[at], building[at], doubtful[at]]
        expected[at] = np.select(kinds, [255, 3, 4, 2], 1 if seen.any() else 0)
    assert (strata_of(survey, "town.tif") == expected).all()
    assert (survey.m2 > 0).all()
    assert survey.m2[BUILT].sum() == pytest.approx(summary(run)["building_km2"] * 1e6, rel=1e-6)


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[str, Window, Window]:
    """A run of the town with a part that failed, and one that is not there; and what they cover."""
    run = make_town(tmp_path, failed=[0])
    parts = list(read_plan(run).parts())
    Path(part_path(run, parts[6].key)).unlink()
    return run, parts[0].window, parts[6].window


def test_failed_and_missing_tiles_are_in_no_stratum(unfinished: tuple[str, Window, Window]) -> None:
    run, *gone = unfinished
    survey, whole = survey_run(run), Window(0, 0, HEIGHT, WIDTH)
    done = town_validity()
    for window in gone:
        done[window.slices(whole)] = False
    assert ((strata_of(survey, "town.tif") != 255) == done).all()
    assert survey.m2.sum() == pytest.approx(summary(run)["area_km2"] * 1e6, rel=1e-6)
    assert all(done[place.row, place.col] for place in draw_places(survey, 300))


def test_an_unfinished_run_is_audited_as_far_as_it_is(
    unfinished: tuple[str, Window, Window], truth: str, capsys: Capture, tmp_path: Path
) -> None:
    run, failed, _ = unfinished
    found = audit_json(capsys, run, truth)
    assert found["mapped_km2"] == pytest.approx(summary(run)["building_km2"], rel=1e-6)
    assert found["judged"] == 500
    pd.DataFrame([{"scene_id": "town.tif", "row": 20, "col": 20, "truth": "1"}]).to_csv(tmp_path / "one.csv")
    assert (failed.height, failed.width) == (64, 64)
    _, err = seg(capsys, "audit", run, "--labels", tmp_path / "one.csv", code=2)
    unfinished_line, line = err.splitlines()
    assert "1 parts are not done yet and missing from this result" in unfinished_line
    assert line.startswith("seg: town.tif: row 20, column 20: holds no data in this run")
    for part in read_plan(run).parts():
        Path(part_path(run, part.key)).unlink(missing_ok=True)
    _, err = seg(capsys, "audit", run, "--labels", truth, code=2)
    assert err == f"seg: {run}: no tile holds data yet: run seg segment to the end first\n"


# Drawing


def test_a_seed_stands_for_its_places(survey: Survey) -> None:
    first = draw_places(survey, 100, 1)
    assert draw_places(survey, 100, 1) == first
    assert draw_places(survey_run(survey.run), 100, 1) == first
    other = draw_places(survey, 100, 2)
    assert len({place[:4] for place in first} & {place[:4] for place in other}) < 20


def test_a_place_is_a_pixel_of_its_stratum_where_it_lies(town: str, survey: Survey) -> None:
    strata, places = expected_strata(town, "town.tif"), draw_places(survey, 1000)
    assert [place.stratum for place in places] == [strata[place.row, place.col] for place in places]
    assert np.bincount([place.stratum for place in places]).tolist() == allocate(survey.m2, 1000).tolist()
    to_map = Transformer.from_crs("OGC:CRS84", UTM, always_xy=True)
    x, y = to_map.transform([place.lon for place in places], [place.lat for place in places])
    assert np.array(x) - X == pytest.approx([place.col + 0.5 for place in places], abs=1e-3)
    assert Y - np.array(y) == pytest.approx([place.row + 0.5 for place in places], abs=1e-3)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Two scenes of 96 x 96 px without building: one has pixels of 1 m, and one of 3 m. A part of a tile is missing."""
    folder, valid = tmp_path_factory.mktemp("fields"), np.ones((96, 96), np.bool_)
    valid[:32, :24] = False
    write_scene(folder / "scenes/near.tif", valid)
    write_scene(folder / "scenes/wide.tif", valid, pixel_m=3.0, left=10_000)
    return survey_run(make_run(folder)[0])


def test_places_follow_ground_area_and_not_pixels(fields: Survey) -> None:
    number = 4000
    places = draw_places(fields, number, seed=3)
    wide = np.array([place.scene_id == "wide.tif" for place in places])
    assert wide.mean() == pytest.approx(0.9, abs=4 * (0.9 * 0.1 / number) ** 0.5)  # of pixels it is half
    rows, cols = np.array([(place.row, place.col) for place in places])[wide].T
    tiles = np.bincount(rows // TILE * 3 + cols // TILE, minlength=9)
    share = np.array([8 / 32, *[1] * 8]) / 8.25
    expected = share * wide.sum()
    assert ((tiles - expected) ** 2 / expected).sum() < 26.1  # chi-square of 8 degrees of freedom, 1 of 1000
    within = np.bincount(rows[cols >= TILE] % TILE // 8, minlength=4)  # and within tiles
    assert ((within - within.mean()) ** 2 / within.mean()).sum() < 16.3  # of 3 degrees


def test_the_first_places_are_a_sample_too(fields: Survey, survey: Survey) -> None:
    order = np.arange(400)
    for each, name in ((fields, "part"), (survey, "part"), (survey, "stratum")):
        values = [getattr(place, name) for place in draw_places(each, 400, seed=8)]
        assert abs(np.corrcoef(order, values)[0, 1]) < 4 / 400**0.5


def test_a_place_may_be_drawn_from_a_stratum_of_few_pixels(tmp_path: Path) -> None:
    lone = np.full((HEIGHT, WIDTH), 0.1, np.float32)
    lone[70, 70] = 0.9
    survey = survey_run(make_town(tmp_path, paint=lambda _: lone))
    places = [place for place in draw_places(survey, 60) if is_building(place.stratum)]
    assert {(place.row, place.col, NAMES[place.stratum]) for place in places} == {(70, 70, "doubtful building")}


# Estimates


def judged_places(places: Sequence[int], wrong: Sequence[int]) -> Judged:
    return Judged(np.array(places), np.array(wrong))


def test_estimates_are_those_of_a_stratified_sample() -> None:
    m2 = np.array([0.0, 7000, 1000, 500, 1500])
    found = estimate_run(m2, judged_places([0, 100, 40, 20, 40], [0, 2, 10, 6, 4]))
    assert found.shares.tolist() == [0, 0.02, 0.25, 0.3, 0.1]
    right, missed = 500 * 0.7 + 1500 * 0.9, 7000 * 0.02 + 1000 * 0.25
    assert found.building_m2.estimate == pytest.approx(right + missed)
    assert found.users_accuracy.estimate == pytest.approx(right / 2000)
    assert found.producers_accuracy.estimate == pytest.approx(right / (right + missed))
    assert found.overall_accuracy.estimate == pytest.approx((7000 * 0.98 + 1000 * 0.75 + right) / 10_000)
    accuracies = (found.users_accuracy, found.producers_accuracy, found.overall_accuracy)
    for low, high, estimate in ((each.low, each.high, each.estimate) for each in (found.building_m2, *accuracies)):
        assert low < estimate < high
    assert all(0 < each.low < each.high < 1 for each in accuracies)


OLOFSSON = (  # the deforestation of section 5 there: areas of map classes in ha, places, and places that are wrong
    np.array([0.015, 0.32, 0.645, 0, 0.02]) * 900_000,
    judged_places([75, 165, 325, 0, 75], [0, 1, 2, 0, 9]),
)


def normal_interval(m2: NDArray[np.float64], judged: Judged) -> Interval:
    """The interval of Olofsson et al. 2014, from equations 9 and 10."""
    shares = judged.wrong / np.maximum(judged.places, 1)
    building = float(m2[BUILT] @ (1 - shares[BUILT]) + m2[~BUILT] @ shares[~BUILT])
    variance = m2**2 * shares * (1 - shares) / np.maximum(judged.places - 1, 1)
    half = 1.96 * float(variance.sum()) ** 0.5
    return Interval(*(np.array(each) for each in (building, building - half, building + half)))


def test_the_example_of_olofsson_gives_its_published_area() -> None:
    found, normal = estimate_run(*OLOFSSON), normal_interval(*OLOFSSON)
    assert found.building_m2.estimate == pytest.approx(21_158, abs=0.5)
    assert normal.estimate == pytest.approx(21_158, abs=0.5)
    assert normal.high - normal.estimate == pytest.approx(6_158, abs=0.5)
    assert found.users_accuracy.estimate == pytest.approx(0.88, abs=0.005)
    assert found.producers_accuracy.estimate == pytest.approx(0.75, abs=0.005)
    assert found.building_m2.low < 21_158 < found.building_m2.high


REPETITIONS = 2000
TOWNS: dict[str, tuple[list[float], list[float]]] = {  # ground area of each stratum in m2, and the share that is wrong
    "a town": (M2.tolist(), WRONG.tolist()),
    "few houses": ([50e6, 40e6, 0.3e6, 0.2e6, 0.5e6], [2e-5, 5e-4, 0.3, 0.35, 0.17]),
    "few houses, more missed": ([50e6, 40e6, 0.3e6, 0.2e6, 0.5e6], [2e-4, 2e-3, 0.3, 0.35, 0.17]),
}


def holds(interval: Interval, truth: float) -> float:
    return float(np.mean((interval.low <= truth) & (truth <= interval.high)))


@pytest.mark.parametrize("number", [200, 500])
@pytest.mark.parametrize("name", TOWNS)
def test_of_100_intervals_95_hold_the_truth(name: str, number: int) -> None:
    m2, shares = map(np.array, TOWNS[name])
    right, missed = m2[BUILT] @ (1 - shares[BUILT]), m2[~BUILT] @ shares[~BUILT]
    places = allocate(m2, number)
    wrong = np.random.default_rng(number).binomial(places, shares, (REPETITIONS, len(m2)))
    found = [estimate_run(m2, Judged(places, each)) for each in wrong]
    for figure, truth in (("building_m2", right + missed), ("producers_accuracy", right / (right + missed))):
        held = np.mean([holds(getattr(each, figure), truth) for each in found])
        assert 0.93 < held < 0.98, figure  # the standard deviation of this share is 0.005
    assert np.mean([each.building_m2.estimate for each in found]) == pytest.approx(right + missed, rel=0.05)
    if name == "a town":
        assert np.mean([holds(normal_interval(m2, Judged(places, each)), right + missed) for each in wrong]) < 0.92


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_of_100_intervals_of_areas_95_hold_the_truth(share: float) -> None:
    places, rng = allocate(M2, 300), np.random.default_rng(1)
    wrong = rng.binomial(places, WRONG, (REPETITIONS, len(M2)))
    inside = rng.binomial(places, share, wrong.shape)
    wrong_inside = rng.hypergeometric(wrong, places - wrong, inside)
    truth = share * float(M2[BUILT] @ (1 - WRONG[BUILT]) + M2[~BUILT] @ WRONG[~BUILT])
    m2 = np.tile(share * M2, (REPETITIONS, 1))
    held = holds(estimate_areas(m2, Judged(inside, wrong_inside), Judged(places, wrong)), truth)
    assert 0.94 < held <= 1  # little is known of a small area, and what is, is taken to be wider than it is


def test_an_interval_holds_its_estimate_where_nothing_is_wrong() -> None:
    m2 = np.array([5e7, 5e7, 3e4, 2e4, 5e4])
    places = allocate(m2, 200)
    found = estimate_run(m2, Judged(places, np.zeros(5, np.int64))).building_m2
    assert found.estimate == pytest.approx(7e4)
    assert 0.9 * 7e4 < found.low < found.estimate < found.high


def test_the_same_places_give_the_same_interval_and_more_places_a_shorter_one() -> None:
    few = judged_places([0, 100, 40, 20, 40], [0, 2, 10, 6, 4])
    many = Judged(few.places * 4, few.wrong * 4)
    found, again, shorter = (estimate_run(M2, each) for each in (few, few, many))
    for name in ("building_m2", "users_accuracy", "producers_accuracy", "overall_accuracy"):
        assert getattr(found, name) == getattr(again, name)
        assert getattr(shorter, name).estimate == pytest.approx(getattr(found, name).estimate)
        assert 0.4 < length(getattr(shorter, name)) / length(getattr(found, name)) < 0.65


def length(interval: Interval) -> float:
    return float(interval.high - interval.low)


def test_a_stratum_without_wrong_places_may_still_be_wrong() -> None:
    judged = judged_places([0, 120, 25, 25, 30], [0, 0, 0, 0, 0])
    found, normal = estimate_run(M2, judged).building_m2, normal_interval(M2, judged)
    assert length(normal) == 0
    assert found.high > found.estimate + 0.01 * M2[1]
    assert 0.9 * found.estimate < found.low < found.estimate


def test_too_few_judged_places_of_a_stratum_are_refused_by_its_name() -> None:
    for places in ([0, 50, 1, 9, 9], [0, 50, 0, 9, 9]):
        with pytest.raises(SegError, match=rf"^doubtful background: {places[2]} judged places: judge 2 or more"):
            estimate_run(M2, judged_places(places, [0, 0, 0, 0, 0]))
    empty = np.where(np.arange(5) == 2, 0, M2)
    assert estimate_run(empty, judged_places([0, 50, 0, 9, 9], [0, 1, 0, 1, 1])).building_m2.estimate > 0


WHOLE = judged_places([0, 300, 70, 60, 70], [0, 3, 21, 21, 14])


def estimate_area(m2: NDArray[np.float64], places: Sequence[int], wrong: Sequence[int]) -> Interval:
    """The estimate of one area within the run of WHOLE."""
    found = estimate_areas(m2[None], Judged(np.array([places]), np.array([wrong])), WHOLE)
    return Interval(*(each[0] for each in found))


def test_an_area_without_places_is_taken_to_be_as_the_run() -> None:
    whole = estimate_run(M2, WHOLE).building_m2
    found = estimate_area(M2 / 50, [0] * 5, [0] * 5)
    assert found.estimate == pytest.approx(whole.estimate / 50)
    assert length(found) > 1.5 * length(whole) / 50
    assert estimate_area(np.zeros(5), [0] * 5, [0] * 5) == (0, 0, 0)


def test_an_area_that_is_the_whole_run_has_its_interval() -> None:
    whole, found = estimate_run(M2, WHOLE).building_m2, estimate_area(M2, WHOLE.places, WHOLE.wrong)
    assert tuple(found) == pytest.approx(tuple(whole))


def test_places_within_an_area_count_the_more_the_more_they_are() -> None:
    m2, lengths = np.array([0, 1000.0, 0, 0, 0]), []
    for number in (10, 100, 250):
        found = estimate_area(m2, [0, number, 0, 0, 0], [0, 3, 0, 0, 0])
        assert found.estimate == pytest.approx(1000 * 3 / (number + 10))  # as if ten places more were all right
        assert found.low < found.estimate < found.high
        lengths.append(length(found))
    assert lengths[0] > 2 * lengths[1] > 4 * lengths[2]


# From the sample to the estimate


def test_a_sample_is_a_file_of_places_to_fill_in_and_pictures(
    town: str, drawn: Path, sample: geopandas.GeoDataFrame, survey: Survey
) -> None:
    columns = ["place", "truth", "mapped", "stratum", "scene_id", "row", "col", "picture", "geometry"]
    assert list(sample.columns) == columns
    assert sample["place"].to_list() == list(range(1, 51))
    assert sample["truth"].isna().all()
    strata = expected_strata(town, "town.tif")[sample["row"], sample["col"]]
    assert sample["stratum"].to_list() == [NAMES[each] for each in strata]
    assert sample["mapped"].to_list() == ["building" if each > 2 else "background" for each in strata]
    on_map = sample.to_crs(UTM).geometry
    assert (on_map.x - X).to_numpy() == pytest.approx(sample["col"] + 0.5, abs=1e-3)
    assert (Y - on_map.y).to_numpy() == pytest.approx(sample["row"] + 0.5, abs=1e-3)
    assert sample[["row", "col"]].to_numpy().tolist() == [[each.row, each.col] for each in draw_places(survey, 50, 5)]
    assert sorted(path.name for path in drawn.iterdir()) == ["places", "sample.gpkg"]
    pictures = sorted(str(path.relative_to(drawn)) for path in (drawn / "places").iterdir())
    assert sample["picture"].to_list() == pictures
    for name in pictures:
        assert (drawn / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        picture = cv2.imread(str(drawn / name))
        assert picture is not None
        assert min(picture.shape[:2]) > 150  # at the edge of the scene it is not as high as elsewhere


def marked_pixel(picture: NDArray[np.uint8]) -> tuple[int, int]:
    """The point between the four strokes."""
    rows, cols = np.nonzero((picture == (255, 0, 0)).all(axis=-1))
    return (rows.min() + rows.max()) // 2, (cols.min() + cols.max()) // 2


def test_a_picture_shows_the_image_around_its_place_and_the_mask(
    town: str, tmp_path: Path, capsys: Capture, pictures: list[Sequence[Panel]]
) -> None:
    seg(capsys, "audit", town, "--sample", "50", "--out", tmp_path / "sample")
    with rasterio.open(Path(town).parent / "scenes/town.tif") as file:
        image = np.moveaxis(file.read(), 0, -1)
    sample, num_marked = geopandas.read_file(tmp_path / "sample/sample.gpkg"), 0
    for number, ((plain, outlined), row, col) in enumerate(zip(pictures, sample["row"], sample["col"], strict=True), 1):
        assert plain.title == f"place {number}"
        if 8 <= row < HEIGHT - 8 and 8 <= col < WIDTH - 8:  # all four strokes are in the picture
            num_marked += 1
            assert plain.picture[marked_pixel(plain.picture)].tolist() == image[row, col].tolist()
        near = np.s_[max(0, row - 30) : row + 31, max(0, col - 30) : col + 31]
        if town_mask()[near].any():
            assert (outlined.picture == (255, 140, 0)).all(axis=-1).any()
        assert not (plain.picture == (255, 140, 0)).all(axis=-1).any()
    assert num_marked > 20


def test_what_is_damaged_around_a_place_is_black_in_its_picture(
    tmp_path: Path, capsys: Capture, pictures: list[Sequence[Panel]]
) -> None:
    scene = tmp_path / "scenes/town.tif"
    scene.parent.mkdir()
    image = np.random.default_rng(0).integers(1, 250, (3, HEIGHT, WIDTH)).astype(np.uint8)
    write_raw(scene, image, tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    run, _ = make_run(tmp_path, failed=[0])
    damage(scene, {(0, 0)})
    seg(capsys, "audit", run, "--sample", "50", "--out", tmp_path / "sample")
    sample, num_black = geopandas.read_file(tmp_path / "sample/sample.gpkg"), 0
    for (plain, _), row, col in zip(pictures, sample["row"], sample["col"], strict=True):
        is_near = row < 32 + 40 and col < 32 + 40
        assert plain.title.endswith("black can't be read") == is_near
        assert (plain.picture == 0).all(axis=-1).any() == is_near
        num_black += is_near
    assert 0 < num_black < 50


def test_a_store_that_falls_silent_while_the_rest_of_a_picture_is_read_is_not_taken_for_damage(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path / "scenes/town.tif", np.ones((HEIGHT, WIDTH), np.bool_))
    run, _ = make_run(tmp_path)
    problems = iter([ReadError("a block is damaged"), StoreUnavailableError("the store does not answer")])

    def fail(*_: object) -> None:
        raise next(problems)

    monkeypatch.setattr("seg_core.audit.folder.read_image", fail)
    _, err = seg(capsys, "audit", run, "--sample", "50", "--out", tmp_path / "sample", code=2)
    assert err.splitlines()[-1] == "seg: the store does not answer"
    assert not (tmp_path / "sample").exists()


FIGURES = [
    "places",
    "judged",
    "wrong",
    "mapped_km2",
    *(
        name
        for first, unit in (
            ("building", "_km2"),
            ("users_accuracy", ""),
            ("producers_accuracy", ""),
            ("overall_accuracy", ""),
        )
        for name in (f"{first}{unit}", f"{first}_low{unit}", f"{first}_high{unit}")
    ),
    "strata",
    "wrong_places",
    "look_first",
]


def test_a_judged_sample_gives_the_figures_of_labels_in_its_stead(
    town: str, truth: str, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    judge(sample).to_file(tmp_path / "judged.gpkg")
    found = audit_json(capsys, town, tmp_path / "judged.gpkg")
    assert found == audit_json(capsys, town, truth, "--sample", 50, "--seed", 5)
    assert found != audit_json(capsys, town, truth, "--sample", 50, "--seed", 6)
    assert list(found) == FIGURES
    assert (found["places"], found["judged"]) == (50, 50)
    assert found["mapped_km2"] == pytest.approx(summary(town)["building_km2"], rel=1e-6)
    strata, wrong = expected_strata(town, "town.tif"), town_mask() != town_truth()
    for row in found["strata"]:
        at = strata[sample["row"], sample["col"]] == NAMES.index(row["stratum"])
        number = int(wrong[sample["row"][at], sample["col"][at]].sum())
        assert (row["places"], row["wrong"], row["share_wrong"]) == (at.sum(), number, number / at.sum())
    assert found["wrong"] == sum(row["wrong"] for row in found["strata"]) == len(found["wrong_places"]) > 0
    assert [row["place"] for row in found["wrong_places"]] == [
        place for place, row, col in zip(sample["place"], sample["row"], sample["col"], strict=True) if wrong[row, col]
    ]
    for row in found["wrong_places"]:
        words = ["building" if each[row["row"], row["col"]] else "background" for each in (town_mask(), town_truth())]
        assert [row["scene_id"], row["mapped"], row["truth"]] == ["town.tif", *words]


def test_a_judged_sample_may_be_of_any_format(
    town: str, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    judged = judge(sample)
    for name in ("judged.gpkg", "judged.geojson", "judged.fgb"):
        judged.to_file(tmp_path / name)
    judged.to_parquet(tmp_path / "judged.parquet")
    judged.drop(columns="geometry").to_csv(tmp_path / "judged.csv", index=False)
    judged[["truth", "col", "row", "scene_id"]].to_csv(tmp_path / "judged.CSV", index=False)
    expected = audit_json(capsys, town, tmp_path / "judged.gpkg")
    for name in ("judged.geojson", "judged.parquet", "judged.csv", "judged.CSV"):
        assert audit_json(capsys, town, tmp_path / name) == expected
    found = audit_json(capsys, town, tmp_path / "judged.fgb")  # FlatGeobuf orders features by place
    assert {**found, "wrong_places": []} == {**expected, "wrong_places": []}


@pytest.mark.usefixtures("pictures")
def test_figures_are_printed_for_people_too(
    town: str, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    judge(sample).to_file(tmp_path / "judged.gpkg")
    out, err = seg(capsys, "audit", town, "--labels", tmp_path / "judged.gpkg")
    head, strata, tiles = out.split("\n\n")
    assert [line.split()[0] for line in head.splitlines()] == FIGURES[:-3]
    assert strata.splitlines()[0] == "by stratum:"
    assert len(strata.splitlines()) == 2 + len(NAMES)
    assert tiles.splitlines()[0] == "look first here:"
    assert len(tiles.splitlines()) == 2 + 10
    assert err == ""
    out, err = seg(capsys, "audit", town, "--sample", "50", "--out", tmp_path / "sample", "--json")
    found = json.loads(out)
    assert found["places"] == sum(found["strata"].values()) == 50
    assert list(found["strata"]) == list(NAMES)
    assert f"seg audit {town} --labels {tmp_path}/sample/sample.gpkg" in err


def test_places_that_nobody_has_judged_are_left_out(
    town: str, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    judged = judge(sample)
    judged.loc[[3, 20], "truth"] = None
    judged.loc[[31], "truth"] = "unsure"
    judged.to_file(tmp_path / "some.gpkg")
    out, err = seg(capsys, "audit", town, "--labels", tmp_path / "some.gpkg", "--json")
    assert err == "3 of 50 places have no truth: they are taken to be like the others\n"
    found = json.loads(out)
    assert (found["places"], found["judged"]) == (50, 47)
    judge(sample).drop(index=[3, 20, 31]).to_file(tmp_path / "rest.gpkg")
    rest = audit_json(capsys, town, tmp_path / "rest.gpkg")
    assert [found["building_low_km2"], found["strata"]] == [rest["building_low_km2"], rest["strata"]]
    sample.to_file(tmp_path / "none.gpkg")
    _, err = seg(capsys, "audit", town, "--labels", tmp_path / "none.gpkg", code=2)
    assert err == "seg: no place of the sample is judged: fill in its column truth with building or background\n"
    first = judge(sample).head(1)
    first.to_file(tmp_path / "one.gpkg")
    _, err = seg(capsys, "audit", town, "--labels", tmp_path / "one.gpkg", code=2)
    assert re.fullmatch(r"seg: .*: [01] judged places: judge 2 or more, or draw a larger sample\n", err)


def test_a_truth_is_a_word_or_a_number_that_is_known(
    town: str, survey: Survey, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    words = {"building": True, " Building ": True, "1": True, "1.0": True, "background": False, "BACKGROUND": False}
    words |= {"0": False, "unsure": None, "?": None, "": None}  # type: ignore[dict-item]
    known: dict[Any, bool | None] = {**words, 1: True, 0: False, None: None, float("nan"): None}
    rows = [{"scene_id": "town.tif", "row": 20, "col": "21", "truth": word} for word in known]
    places, truths = find_places(survey, rows)
    assert truths == list(known.values())
    assert {(place.row, place.col, NAMES[place.stratum]) for place in places} == {(20, 21, "building")}
    assert {text.strip().lower() for text in words} <= set(TRUTHS)
    judge(sample).assign(truth=town_truth()[sample["row"], sample["col"]].astype(int)).to_file(tmp_path / "int.gpkg")
    judge(sample).to_file(tmp_path / "text.gpkg")
    assert audit_json(capsys, town, tmp_path / "int.gpkg") == audit_json(capsys, town, tmp_path / "text.gpkg")
    for word in ("house", "2", "build ing", "none"):
        judged = judge(sample)
        judged.loc[7, "truth"] = word
        judged.to_file(tmp_path / f"{word}.gpkg")
        _, err = seg(capsys, "audit", town, "--labels", tmp_path / f"{word}.gpkg", code=2)
        place = f"town.tif: row {sample['row'][7]}, column {sample['col'][7]}"
        assert err == f"seg: {place}: truth is '{word}': say building or background, or leave it empty\n"


def test_a_run_that_finds_roads_is_judged_in_its_own_words(town: str, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(town, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "class_name": "road"}))
    survey, row = survey_run(str(run)), {"scene_id": "town.tif", "row": 20, "col": 21}
    places, truths = find_places(survey, [{**row, "truth": "Road"}])
    assert truths == [True]
    frame = to_frame(survey, places, ["a.png"])
    assert frame.loc[0, ["mapped", "stratum"]].to_list() == ["road", "road"]
    with pytest.raises(SegError, match="say road or background"):
        find_places(survey, [{**row, "truth": "house"}])
    _, err = seg(capsys, "audit", run, "--sample", "50", "--out", tmp_path / "a sample")
    assert "fill in the column truth with road or background" in err
    assert err.splitlines()[-1].endswith(f"then: seg audit {run} --labels '{tmp_path}/a sample/sample.gpkg'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": 5000}, "row 5000, column 20: not in this run: it is of the sample of another one"),
        ({"row": -1}, "row -1, column 20: not in this run"),
        ({"scene_id": "city.tif"}, "city.tif: row 20, column 20: not in this run"),
        ({"row": HEIGHT + 3}, f"row {HEIGHT + 3}, column 20: holds no data in this run"),  # within the last part
        ({"row": 10, "col": 150}, "town.tif: row 10, column 150: holds no data in this run"),  # a tile without data
        ({"row": 92, "col": 65}, "town.tif: row 92, column 65: holds no data in this run"),  # a hole in a tile
        ({"col": ""}, "town.tif: row 20, column : not a pixel: leave the columns of the sample as they are"),
        ({"col": "east"}, "town.tif: row 20, column east: not a pixel"),
    ],
)
def test_a_place_of_another_run_is_refused(
    town: str, tmp_path: Path, capsys: Capture, change: Json, message: str
) -> None:
    row = {"scene_id": "town.tif", "row": 20, "col": 20, "truth": "building", **change}
    pd.DataFrame([row]).to_csv(tmp_path / "judged.csv", index=False)
    out, err = seg(capsys, "audit", town, "--labels", tmp_path / "judged.csv", code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_what_cannot_be_done_is_refused_in_a_line(
    town: str, truth: str, drawn: Path, sample: geopandas.GeoDataFrame, tmp_path: Path, capsys: Capture
) -> None:
    judge(sample).to_file(tmp_path / "judged.gpkg")
    (tmp_path / "taken").mkdir()
    (tmp_path / "other.csv").write_text("name,truth\na,1\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.gpkg").write_text("no GeoPackage")
    new, judged = tmp_path / "new", tmp_path / "judged.gpkg"
    for args, message in (
        (["--sample", 60, "--out", tmp_path / "taken"], "taken: already exists: choose another folder"),
        (["--sample", 60, "--out", drawn], "already exists: choose another folder, so that no judged sample is lost"),
        (["--sample", 10, "--out", new], "--sample 10: too few places to tell anything: say 50 or more"),
        (["--sample", 49, "--out", new], "--sample 49: too few places"),
        (["--sample", 60], "say --sample N --out FOLDER to draw places to be judged, or --labels FILE to estimate"),
        (["--out", new], "say --sample N --out FOLDER"),
        ([], "say --sample N --out FOLDER"),
        (["--sample", 60, "--out", tmp_path / "new.gpkg"], "must be a folder, but looks like a file"),
        (["--sample", 60, "--out", new, "--grid", 50], "--areas, --grid, --h3, --bbox, --aoi: are for --labels"),
        (["--sample", 60, "--out", new, "--aoi", truth], "--areas, --grid, --h3, --bbox, --aoi: are for --labels"),
        (["--labels", truth, "--out", new], "--out: with --labels it is the file for areas: add --areas, --grid"),
        (["--labels", truth, "--grid", 50, "--out", new], "not a format that areas are written in"),
        (["--labels", truth, "--grid", 50, "--out", judged], "judged.gpkg: already exists"),
        (["--labels", truth, "--sample", 10], "--sample 10: too few places"),
        (["--labels", judged, "--sample", 60], "judged.gpkg is a judged sample, which has its places"),
        (["--labels", judged, "--aoi", judged], "judged.gpkg is a judged sample, which has its places"),
        (["--labels", tmp_path / "none.gpkg"], "none.gpkg: can't be read"),
        (["--labels", tmp_path / "none.csv"], "none.csv: can't be read"),
        (["--labels", tmp_path / "other.csv"], "other.csv: not a judged sample: it does not have the columns scene_id"),
        (["--labels", tmp_path / "empty.csv"], "empty.csv: not a judged sample"),
        (["--labels", tmp_path / "broken.gpkg"], "broken.gpkg: its content is not GPKG"),
    ):
        out, err = seg(capsys, "audit", town, *args, code=2)
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert not new.exists()
    assert not list((tmp_path / "taken").iterdir())
    assert "no such run" in seg(capsys, "audit", tmp_path / "none", "--labels", truth, code=2)[1]


def test_a_scene_without_crs_is_refused(tmp_path: Path, capsys: Capture) -> None:
    write_scene(tmp_path / "scenes/a.tif", np.ones((64, 64), np.bool_))
    write_scene(tmp_path / "scenes/b.tif", np.ones((64, 64), np.bool_), crs=None)
    run, _ = make_run(tmp_path)
    write_truth(tmp_path / "truth.tif", np.ones((64, 64), np.bool_))
    for args in (["--sample", 60, "--out", tmp_path / "sample"], ["--labels", tmp_path / "truth.tif"]):
        _, err = seg(capsys, "audit", run, *args, code=2)
        assert err == "seg: b.tif: has no CRS, so that its ground area is not known\n"
    assert not (tmp_path / "sample").exists()


def test_footprints_judge_within_the_area_that_they_are_of(
    town: str, survey: Survey, tmp_path: Path, capsys: Capture
) -> None:
    rings = [shapely.box(*each) for each in FOOTPRINTS]
    rings += [shapely.box(96, row, 128, row + 1) for row in range(128, 160, 2)]
    labels = write_vectors(tmp_path / "footprints.gpkg", rings, crs="EPSG:4326")
    found = audit_json(capsys, town, labels, "--sample", 60)
    assert (found["places"], found["judged"], found["wrong"]) == (60, 60, 0)
    assert found["building_km2"] == pytest.approx(found["mapped_km2"])
    aoi = write_vectors(tmp_path / "aoi.geojson", [shapely.box(0, 0, 128, 160)])
    out, err = seg(capsys, "audit", town, "--labels", labels, "--aoi", aoi, "--sample", 60, "--json")
    within = sum(place.col < 128 for place in draw_places(survey, 60))
    assert 0 < within < 60
    assert json.loads(out)["judged"] == within
    assert err == f"{60 - within} of 60 places have no truth: they are taken to be like the others\n"


def test_a_mosaic_is_audited_as_the_image_that_it_is(
    tmp_path: Path, capsys: Capture, pictures: list[Sequence[Panel]]
) -> None:
    for name, left in (("east.tif", 64), ("west.tif", 0)):
        write_scene(tmp_path / f"scenes/{name}", np.ones((96, 96), np.bool_), left=left)
    building = np.zeros((96, 160), np.bool_)
    building[20:60, 40:120] = True
    paint: Paint = lambda image: np.where(building, 0.9, 0.1).astype(np.float32)  # noqa: ARG005, E731
    run, plan = make_run(tmp_path, paint, replace(SETTINGS, mosaic=True))
    truth = write_truth(tmp_path / "truth.tif", np.roll(building, 5, axis=1))
    seg(capsys, "audit", run, "--sample", 50, "--out", tmp_path / "sample")
    sample = geopandas.read_file(tmp_path / "sample/sample.gpkg")
    assert set(sample["scene_id"]) == {image.scene_id for image in plan.images}
    assert all((plain.picture > 0).any(axis=-1).all() for plain, _ in pictures)  # across the border of two scenes
    is_built = np.roll(building, 5, axis=1)[sample["row"], sample["col"]]
    sample.assign(truth=is_built.astype(int)).to_file(tmp_path / "judged.gpkg")
    found = audit_json(capsys, run, tmp_path / "judged.gpkg")
    assert found == audit_json(capsys, run, truth, "--sample", 50)
    assert found["wrong"] > 0
    assert found["mapped_km2"] == pytest.approx(summary(run)["building_km2"], rel=1e-6)


# Areas


def test_what_is_mapped_in_an_area_is_what_a_query_measures(town: str, truth: str, capsys: Capture) -> None:
    corner = geopandas.GeoSeries([shapely.box(X + 20, Y - 120, X + 95.5, Y - 3.25)], crs=UTM).to_crs("EPSG:4326")
    for options in (["--grid", 50], ["--grid", 37, "--crs", UTM], ["--bbox", *corner.total_bounds]):
        command = ["audit", town, "--labels", truth, "--sample", 100, *options, "--json"]
        found = json.loads(seg(capsys, *command)[0])
        queried = json.loads(seg(capsys, "query", town, *options, "--json")[0])
        (name,) = set(found[0]) & {"cell", "area"}
        columns = [name, "area_m2", "mapped_m2", "building_m2", "building_low_m2", "building_high_m2"]
        assert list(found[0]) == [*columns, "places", "wrong"]
        for one, two in zip(found, queried, strict=True):
            assert [one[name], one["area_m2"]] == [two[name], two["area_m2"]]
            if two["valid_m2"]:
                assert one["mapped_m2"] == pytest.approx(two["building_m2"], rel=1e-6, abs=1e-6)
                assert one["building_low_m2"] < one["building_m2"] + 1e-6 < one["building_high_m2"]
        if name == "cell":
            assert sum(row["places"] or 0 for row in found) == 100


def test_areas_of_a_file_are_null_where_the_run_holds_nothing(
    town: str, truth: str, tmp_path: Path, capsys: Capture
) -> None:
    within, empty = shapely.box(X + 3, Y - 99.5, X + 100, Y - 2), shapely.box(X + 130, Y - 30, X + 150, Y - 10)
    outside = shapely.box(X + 5000, Y, X + 5100, Y + 100)
    frame = geopandas.GeoDataFrame({"n": ["far", "in", "bare"]}, geometry=[outside, within, empty], crs=UTM)
    frame.to_file(tmp_path / "areas.gpkg")
    command = ["audit", town, "--labels", truth, "--sample", 100]
    command += ["--areas", tmp_path / "areas.gpkg", "--id", "n"]
    far, inside, bare = json.loads(seg(capsys, *command, "--json")[0])
    for name, found in (("far", far), ("bare", bare)):
        assert found.pop("n") == name
        assert found.pop("area_m2") > 0
        assert set(found.values()) == {None}
    assert 0 < inside["wrong"] < inside["places"] < 100
    out, _ = seg(capsys, *command, "--out", tmp_path / "found.gpkg", "--json")
    assert json.loads(out) == {"file": f"{tmp_path}/found.gpkg", "areas": 3}
    written = geopandas.read_file(tmp_path / "found.gpkg")
    assert written["building_high_m2"].isna().to_list() == [True, False, True]
    assert written["building_high_m2"][1] == pytest.approx(inside["building_high_m2"])
    assert written.geometry.geom_equals_exact(frame.geometry, 1e-6).all()


def test_places_and_wrong_ones_are_counted_where_they_lie(survey: Survey) -> None:
    places = draw_places(survey, 400)
    truths = [None if place.col % 7 == 0 else bool(town_truth()[place.row, place.col]) for place in places]
    box = shapely.box(X + 30, Y - 110, X + 160, Y - 60)
    areas = make_areas(geopandas.GeoDataFrame(geometry=[box, shapely.box(X, Y - 160, X + 200, Y)], crs=UTM))
    found = audit_areas(audit_run(survey, places, truths), areas)
    known = [(place, known) for place, known in zip(places, truths, strict=True) if known is not None]
    within = [each for each in known if 30 <= each[0].col < 160 and 60 <= each[0].row < 110]
    wrong = [sum(one != is_building(place.stratum) for place, one in each) for each in (within, known)]
    assert found["places"].to_list() == [len(within), len(known)]
    assert found["wrong"].to_list() == wrong


def test_places_across_the_antimeridian_are_within_their_areas(tmp_path: Path) -> None:
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32660", always_xy=True).transform(179.9995, 17.0)
    run, _ = build_run(tmp_path, crs="EPSG:32660", corner=(x, y))
    survey = survey_run(run)
    places = draw_places(survey, 60)
    boxes = [shapely.box(x, y - 100, x + 120, y), shapely.box(x, y - 100, x + 50, y)]
    areas = make_areas(geopandas.GeoDataFrame(geometry=boxes, crs="EPSG:32660"))
    found = audit_areas(audit_run(survey, places, [is_building(place.stratum) for place in places]), areas)
    there = [place for place in places if place.scene_id == "north/a.tif"]
    assert {place.lon > 0 for place in there} == {False, True}
    assert found["places"].to_list() == [len(there), sum(place.col < 50 for place in there)]


def judge_town(survey: Survey, number: int, seed: int = 0) -> tuple[list[Place], list[bool | None]]:
    places = draw_places(survey, number, seed)
    return places, [bool(town_truth()[place.row, place.col]) for place in places]


def test_a_large_sample_finds_the_truth(town: str, survey: Survey) -> None:
    found = figures(audit_run(survey, *judge_town(survey, 2000)))
    truth, mask = town_truth()[town_validity()], town_mask()[town_validity()]
    building = truth.mean() * summary(town)["area_km2"]
    assert found["building_low_km2"] < building < found["building_high_km2"]
    assert found["building_high_km2"] - found["building_low_km2"] < 0.3 * building
    assert abs(found["mapped_km2"] - building) > 0.1 * building
    assert found["users_accuracy"] == pytest.approx((truth & mask).sum() / mask.sum(), abs=0.04)
    assert found["producers_accuracy"] == pytest.approx((truth & mask).sum() / truth.sum(), abs=0.06)
    assert found["overall_accuracy"] == pytest.approx((truth == mask).mean(), abs=0.02)


def test_an_area_that_holds_the_whole_run_has_its_estimate(town: str, survey: Survey) -> None:
    whole = make_areas(geopandas.GeoDataFrame(geometry=[shapely.box(X - 9, Y - 200, X + 300, Y + 9)], crs=UTM))
    lengths = []
    for number in (400, 3200):
        audit = audit_run(survey, *judge_town(survey, number))
        (found,) = audit_areas(audit, whole).to_dict("records")
        assert found["building_m2"] == pytest.approx(audit.estimate.building_m2.estimate, rel=1e-6)
        assert found["building_low_m2"] < found["building_m2"] < found["building_high_m2"]
        lengths.append(found["building_high_m2"] - found["building_low_m2"])
    assert lengths[1] < 0.6 * lengths[0]
    assert lengths[1] == pytest.approx(length(audit.estimate.building_m2), rel=0.2)
    assert found["mapped_m2"] == pytest.approx(measure_areas(town, whole)["building_m2"][0], rel=1e-6)


# Where to look first


def test_tiles_are_listed_by_the_ground_that_may_be_wrong(survey: Survey) -> None:
    audit = audit_run(survey, *judge_town(survey, 500))
    found = look_first(audit)
    expected = {
        (tile.window.row_off, tile.window.col_off): float(tile.areas() @ audit.estimate.shares)
        for number in range(len(survey.parts))
        for tile in survey.read_part(number)
    }
    first = sorted(expected.values(), reverse=True)[:10]
    assert [row["expected_wrong_m2"] for row in found] == pytest.approx(first, rel=1e-5)
    for row in found:
        assert row["expected_wrong_m2"] == pytest.approx(expected[row["row_off"], row["col_off"]], rel=1e-5)
    assert (found[0]["scene_id"], found[0]["row_off"], found[0]["col_off"]) == ("town.tif", *STRIPES.origin)
    x, y = Transformer.from_crs("OGC:CRS84", UTM, always_xy=True).transform(found[0]["lon"], found[0]["lat"])
    middle = (STRIPES.col_off + TILE / 2, STRIPES.row_off + TILE / 2)
    assert (x - X, Y - y) == pytest.approx(middle, abs=1e-3)
    assert len(look_first(audit, 3)) == 3
    assert len(look_first(audit, 1000)) == len(expected)


def test_wrong_places_keep_the_number_that_they_have_in_the_sample(survey: Survey) -> None:
    places, truths = judge_town(survey, 60)
    for at in range(0, 60, 9):
        truths[at] = None
    found = wrong_places(audit_run(survey, places, truths))
    wrong = [at for at, place in enumerate(places) if truths[at] not in {None, is_building(place.stratum)}]
    assert [row["place"] - 1 for row in found] == wrong
    assert [(row["row"], row["col"]) for row in found] == [(places[at].row, places[at].col) for at in wrong]


# Real imagery


@pytest.mark.usefixtures("without_actors")
def test_a_sample_of_real_imagery_finds_what_all_labels_say(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    cut(shared / "brookline/region.tif", tmp_path / "region.tif", RasterWindow(430, 0, 600, 600))
    seg(capsys, "segment", tmp_path / "region.tif", "--tile-size", "256", "--out", tmp_path / "run")
    labels = shared / "brookline/region_label.tif"
    found = audit_json(capsys, str(tmp_path / "run"), labels, "--sample", 800)
    with rasterio.open(labels) as file:
        truth = file.read(1, window=RasterWindow(430, 0, 600, 600)) > 0
    mask = read_mask(str(tmp_path / "run"), "region.tif")
    building = truth[mask != 255].sum() * summary(str(tmp_path / "run"))["area_km2"] / (mask != 255).sum()
    accuracy = (truth & (mask == 1)).sum() / (mask == 1).sum()
    for name, unit, expected in (("building", "_km2", building), ("users_accuracy", "", accuracy)):
        low, high = found[f"{name}_low{unit}"], found[f"{name}_high{unit}"]
        assert abs((low + high) / 2 - expected) < high - low  # twice the interval: one sample of 20 lies outside of it
    assert found["building_high_km2"] - found["building_low_km2"] < 0.6 * building


def test_an_accuracy_of_nothing_is_null(tmp_path: Path, capsys: Capture) -> None:
    valid = np.ones((64, 64), np.bool_)
    write_scene(tmp_path / "scenes/bare.tif", valid)
    run, _ = make_run(tmp_path)  # other images than the town are background
    write_geotiff(str(tmp_path / "truth.tif"), np.zeros((1, 64, 64), np.uint8), crs=UTM, transform=NORTH_UP)
    out, _ = seg(capsys, "audit", run, "--labels", tmp_path / "truth.tif", "--sample", "60", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (found["users_accuracy"], found["producers_accuracy"], found["overall_accuracy"]) == (None, None, 1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_judged_table_may_come_from_a_spreadsheet(
    sample: geopandas.GeoDataFrame, survey: Survey, tmp_path: Path, encoding: str
) -> None:
    table = pd.DataFrame(sample.drop(columns="geometry"))[["scene_id", "row", "col", "truth"]]
    table = table.assign(truth="building", row=table["row"].astype(float))
    table.to_csv(tmp_path / "judged.csv", index=False, encoding=encoding)
    rows = read_judged(str(tmp_path / "judged.csv"))
    assert rows is not None
    places, truths = find_places(survey, rows)
    assert [(place.row, place.col) for place in places] == list(zip(sample["row"], sample["col"], strict=True))
    assert set(truths) == {True}
    table.drop(columns="truth").assign(truth="building").to_parquet(tmp_path / "judged.parquet")
    assert read_judged(str(tmp_path / "judged.parquet")) is not None


def test_files_that_cannot_be_read_are_refused_in_a_line(town: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "latin.csv").write_bytes("scene_id,row,col,truth\nStra\xdfe.tif,1,1,building\n".encode("latin-1"))
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    for name in ("latin.csv", "half.parquet", "none.csv"):
        _, err = seg(capsys, "audit", town, "--labels", tmp_path / name, code=2)
        assert err.count("\n") == 1
        assert f"{name}: can't be read" in err
