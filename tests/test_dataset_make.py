"""`seg dataset make`: what is labelled is what seg train reads, ground is in one split, shifted labels are noticed."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from conftest import NORTH_UP, UTM, MakeScene
from footprints import to_map, write_vectors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.transform import Affine
from seg_command import seg

from seg_core.chips import MISSING, UNLABELLED
from seg_core.datasets.alignment import REACH, Fit, Offset, find_offset, judge, measure_fit
from seg_core.datasets.blocks import Made
from seg_core.datasets.ground import Cell, make_grids
from seg_core.datasets.labels import LabelSettings
from seg_core.datasets.make import MakeSettings, choose_colours, make_dataset
from seg_core.datasets.splits import assign_splits
from seg_core.datasets.summary import describe, figures
from seg_core.errors import SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.scene import Scene
from seg_core.synthetic import draw_town
from seg_core.training.dataset import find_pairs, read_classes, read_pair

SIDE = 256
HOUSE, SHED = shapely.box(10, 20, 30, 35), shapely.box(25, 30, 60, 60)


def vectorise(building: NDArray[np.uint8]) -> list[Any]:
    """Polygons along the edges of the pixels of a label, in pixels."""
    from rasterio.features import shapes

    return [shapely.geometry.shape(found) for found, value in shapes(building, building.astype(bool)) if value]


def write_town(folder: Path, seed: int = 3, name: str = "town.tif", col_off: int = 0) -> tuple[str, NDArray[np.uint8]]:
    """Write a drawn town with missing pixels; its path, and its truth: class indices and MISSING."""
    image, building, valid = draw_town(SIDE, SIDE, seed)
    a, b, x, d, e, y = NORTH_UP
    pixels = np.ascontiguousarray(np.moveaxis(np.where(valid[..., None], image, 255), -1, 0))
    place = (a, b, x + col_off, d, e, y)
    write_geotiff(f"{folder}/{name}", pixels, crs=UTM, transform=place, nodata=255)
    return f"{folder}/{name}", np.where(valid, building, MISSING).astype(np.uint8)


def make(scenes: Sequence[str], labels: str, out: Path, block: int = 100, **options: Any) -> Made:
    """Make a dataset by a plain call."""
    splits = {name: options.pop(name) for name in ("val", "test", "seed") if name in options}
    headers = [read_scene(path, Path(path).name) for path in scenes]
    return make_dataset(headers, labels, str(out), MakeSettings(LabelSettings(**options), block, **splits))


def assemble(data: Path, made: Made) -> dict[str, NDArray[np.uint8]]:
    """The labels of a dataset as training reads them, put together by scene; MISSING where there are none."""
    classes = read_classes(str(data))
    whole = {Path(s.uri).stem: np.full((s.height, s.width), MISSING, np.uint8) for s in made.scenes}
    for split in set(made.splits.values()):
        for pair in find_pairs(str(data), split):
            stem, row, col = Path(pair.image).stem.rsplit("_", 2)
            label = read_pair(pair, classes)[0].label
            into = whole[stem][int(row) :, int(col) :][: label.shape[0], : label.shape[1]]
            assert (into == MISSING).all()
            into[:] = np.where(label == UNLABELLED, MISSING, label)
    return whole


def test_a_town_is_read_back_as_it_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, truth = write_town(tmp_path)
    labels = write_vectors(tmp_path / "labels.geojson", vectorise((truth == 1).astype(np.uint8)), "EPSG:4326")
    data = tmp_path / "data"
    out, err = seg(capsys, "dataset", "make", scene, "--labels", labels, "--out", data, "--block", 64, "--json")
    found = json.loads(out)
    assert found["train_blocks"] + found["val_blocks"] == found["blocks"]
    assert found["val_blocks"] == round(0.2 * found["blocks"])
    assert found["building_share"] == pytest.approx((truth == 1).sum() / (truth != MISSING).sum(), abs=1e-5)
    classes = read_classes(str(data))
    assert classes.names == ("background", "building")
    assert classes.positive == 1
    whole = np.full((SIDE, SIDE), MISSING, np.uint8)
    for split in ("train", "val"):
        for pair in find_pairs(str(data), split):
            (image, label), header, off_px = read_pair(pair, classes)
            row, col = map(int, Path(pair.image).stem.split("_")[1:])
            assert off_px == 0.0
            assert header.crs == UTM
            assert image.shape[2] == 3
            whole[row:, col:][: label.shape[0], : label.shape[1]] = label
    assert np.array_equal(whole, truth)
    assert (data / "samples.png").stat().st_size > 10_000
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "labels.geojson", "town.tif"]


def test_outside_of_the_area_of_interest_nothing_is_labelled(tmp_path: Path) -> None:
    scene, truth = write_town(tmp_path)
    labels = write_vectors(tmp_path / "labels.gpkg", vectorise((truth == 1).astype(np.uint8)))
    area = write_vectors(tmp_path / "area.gpkg", [shapely.box(20, 30, 120, 200)], "EPSG:4326")
    made = make([scene], labels, tmp_path / "data", 64, area=area)
    truth[:30] = truth[200:] = truth[:, :20] = truth[:, 120:] = MISSING
    assert np.array_equal(assemble(tmp_path / "data", made)["town"], truth)
    assert len(made.blocks) == 8  # the others hold no labelled pixel


@pytest.mark.parametrize(("building", "missing"), [(1, 255), (255, None), (1, None)])
def test_a_raster_in_another_frame_is_laid_where_it_lies(tmp_path: Path, building: int, missing: int | None) -> None:
    scene, truth = write_town(tmp_path)
    values = np.array([0, building], np.uint8)[(truth == 1).astype(int)]
    if missing is not None:
        values[40:60] = missing
        truth[40:60] = MISSING
    a, b, x, d, e, y = NORTH_UP
    frame = np.pad(values, 7)[None, 2:, :-4]  # starts 5 px above and 7 px left of the scene
    write_geotiff(f"{tmp_path}/labels.tif", frame, crs=UTM, transform=(a, b, x - 7, d, e, y + 5))
    made = make([scene], f"{tmp_path}/labels.tif", tmp_path / "data")
    assert np.array_equal(assemble(tmp_path / "data", made)["town"], truth)


def test_an_attribute_names_classes_of_which_the_later_wins(make_scene: MakeScene, tmp_path: Path) -> None:
    labels = write_vectors(tmp_path / "labels.shp", [SHED, HOUSE], kind=["shed", "house"])
    scene = make_scene()
    for classes, names, both in (
        ((), ("background", "house", "shed"), 2),
        (("shed", "house", "road"), ("background", "shed", "house", "road"), 2),
    ):
        data = tmp_path / f"{len(names)}"
        made = make([scene], labels, data, 60, class_column="kind", classes=classes)
        found = assemble(data, made)["scene"]
        assert read_classes(str(data), "house").names == names
        assert found[32, 27] == both
        assert found[22, 12] == names.index("house")
        assert found[55, 55] == names.index("shed")
        assert found[90, 90] == 0
    with pytest.raises(SegError, match="kind is 'shed', which is not in --classes house"):
        make([scene], labels, tmp_path / "none", class_column="kind", classes=("house",))
    under = "--classes house,background,shed: background lies under all others"
    with pytest.raises(SegError, match=under):
        make([scene], labels, tmp_path / "none", class_column="kind", classes=("house", "background", "shed"))
    with pytest.raises(SegError, match="--classes house: add --class-column"):
        make([scene], labels, tmp_path / "none", classes=("house",))


def test_with_all_touched_more_pixels_are_labelled(make_scene: MakeScene, tmp_path: Path) -> None:
    labels = write_vectors(tmp_path / "labels.fgb", [shapely.box(10.2, 10.2, 20.2, 20.2)])
    for all_touched, area in ((False, 100), (True, 121)):
        made = make([make_scene()], labels, tmp_path / f"{area}", 60, all_touched=all_touched)
        assert (assemble(tmp_path / f"{area}", made)["scene"] == 1).sum() == area


@pytest.mark.parametrize("bands", [1, 4, 5])
def test_images_keep_their_bands_and_what_holds_data(make_scene: MakeScene, tmp_path: Path, bands: int) -> None:
    scene = make_scene(bands=bands, pixels=np.full((bands, 90, 90), 7, np.uint8))
    labels = write_vectors(tmp_path / "labels.fgb", [HOUSE])
    data = tmp_path / "data"
    make_dataset([read_scene(scene, "scene.tif", alpha=0)], labels, str(data), MakeSettings(block=45, val=0))
    for pair in find_pairs(str(data), "train"):
        image, label = read_pair(pair, read_classes(str(data)))[0]
        assert image.shape == (45, 45, bands)
        assert (image == 7).all()
        assert (label < UNLABELLED).all()


# Ground


def scene_at(row: float, col: float, height: int, width: int, gsd_m: float = 1.0, crs: str | None = UTM) -> Scene:
    """A scene without a file, whose corner lies so many metres south and east of others'."""
    place = (gsd_m, 0.0, 400_000.0 + col, 0.0, -gsd_m, 5_800_000.0 - row)
    names = {"scene_id": f"{row}-{col}", "uri": f"{row}-{col}", "size": 1, "version": "1", "bands": (1,)}
    rest = {"dtype": "uint8", "nodata": None, "masked": False, "gsd_m": gsd_m, "source_gsd_m": gsd_m}
    return Scene(**names, **rest, height=height, width=width, crs=crs, transform=place)  # type: ignore[arg-type]


OFFSETS, SIDES = st.floats(-50, 50), st.integers(1, 90)


@given(row=OFFSETS, col=OFFSETS, height=SIDES, width=SIDES, gsd_m=st.floats(0.3, 2), block=st.integers(8, 70))
@settings(max_examples=60, deadline=None)
def test_each_pixel_of_overlapping_scenes_is_in_one_block_of_the_cell_that_it_lies_in(
    row: float, col: float, height: int, width: int, gsd_m: float, block: int
) -> None:
    scenes = [scene_at(0, 0, 60, 70), scene_at(row, col, height, width, gsd_m)]
    for scene, grid in zip(scenes, make_grids(scenes, block), strict=True):
        seen = np.zeros((scene.height, scene.width), int)
        for cell, window in grid.windows(scene):
            inside = grid.inside(scene, cell, window)
            seen[window.slices(scene.window)] += inside
            for at in np.argwhere(inside)[:1]:
                a, _, x, _, e, y = scene.transform
                centre = y + e * (window.row_off + at[0] + 0.5), x + a * (window.col_off + at[1] + 0.5)
                across, _, left, _, down, top = grid.transform
                assert abs((centre[0] - top) / down - cell.row - 0.5) <= 0.5 + 1e-5
                assert abs((centre[1] - left) / across - cell.col - 0.5) <= 0.5 + 1e-5
        assert (seen == 1).all()


def test_scenes_of_another_crs_share_the_cells(make_scene: MakeScene) -> None:
    from pyproj import Transformer

    x, y = Transformer.from_crs(UTM, "EPSG:3857", always_xy=True).transform(400_000, 5_800_000)
    place = (1.6, 0.0, x, 0.0, -1.6, y)
    path = make_scene("mercator.tif", 80, 80, crs="EPSG:3857", transform=place)
    scenes = [scene_at(0, 0, 90, 90), read_scene(path, "mercator.tif")]
    for scene, grid in zip(scenes, make_grids(scenes, 30), strict=True):
        seen = np.zeros((scene.height, scene.width), int)
        for cell, window in grid.windows(scene):
            seen[window.slices(scene.window)] += grid.inside(scene, cell, window)
        assert (seen == 1).all()
        assert grid.crs == UTM


def test_blocks_of_a_turned_scene_have_names_of_their_own(make_scene: MakeScene, tmp_path: Path) -> None:
    # The cells of the straight scene lie askew in the turned one, so the boxes of two may begin at one pixel.
    turned = tuple(Affine.translation(400_015, 5_799_979) @ Affine.rotation(37) @ Affine.scale(0.5, -0.5))[:6]
    paths = [make_scene("straight.tif", 100, 100), make_scene("turned.tif", 60, 60, transform=turned)]
    labels = write_vectors(tmp_path / "labels.fgb", [HOUSE, SHED])
    made = make(paths, labels, tmp_path / "data", 16, val=0.3)
    names = [path.stem for path in (tmp_path / "data").glob("*_labels/*.tif")]
    assert len(names) == len(made.blocks)
    assert any(name.endswith("-2") for name in names)


def test_overlapping_scenes_share_no_ground_across_splits(tmp_path: Path) -> None:
    (one, truth), (other, _) = write_town(tmp_path), write_town(tmp_path, 4, "other.tif", col_off=130)
    labels = write_vectors(tmp_path / "labels.fgb", vectorise((truth == 1).astype(np.uint8)))
    made = make([one, other], labels, tmp_path / "data", 64, val=0.3, test=0.2)
    ground = {}
    for split in ("train", "val", "test"):
        frames = []
        for pair in find_pairs(str(tmp_path / "data"), split):
            header = read_scene(pair.image, "a")
            a, _, x, _, e, y = header.transform
            frames.append(shapely.box(x, y + e * header.height, x + a * header.width, y))
        ground[split] = shapely.union_all(frames)
    assert ground["train"].intersection(ground["val"]).area == 0
    assert ground["train"].intersection(ground["test"]).area == 0
    assert ground["val"].intersection(ground["test"]).area == 0
    assert len({block.cell for block in made.blocks}) < len(made.blocks)  # some ground is in both scenes
    again = make([one, other], labels, tmp_path / "again", 64, val=0.3, test=0.2)
    assert again.splits == made.splits
    assert make([one, other], labels, tmp_path / "more", 64, val=0.3, test=0.2, seed=1).splits != made.splits


@pytest.mark.parametrize("val", [-0.1, 1.0, float("nan"), float("inf")])
def test_shares_that_are_none_are_refused(val: float) -> None:
    with pytest.raises(SegError, match="shares are at least 0 and less than 1 together"):
        assign_splits({Cell(0, at, 0): True for at in range(9)}, val, 0.0, 0)


@example(number=4, marked=3, val=0.5, test=0.25)
@given(number=st.integers(2, 60), marked=st.integers(0, 60), val=st.floats(0, 0.5), test=st.floats(0, 0.4))
@settings(max_examples=60, deadline=None)
def test_splits_have_their_shares_and_each_has_the_class_where_there_is_enough(
    number: int, marked: int, val: float, test: float
) -> None:
    cells = {Cell(0, at, 0): at < marked for at in range(number)}
    needed = 1 + (val > 0) + (test > 0)
    if number < needed:
        with pytest.raises(SegError, match="blocks of labelled ground for 3 splits"):
            assign_splits(cells, val, test, 0)
        return
    found = assign_splits(cells, val, test, 0)
    counts = {split: sum(each == split for each in found.values()) for split in ("train", "val", "test")}
    assert counts["train"] >= 1
    assert (counts["val"] > 0, counts["test"] > 0) == (val > 0, test > 0)
    if number > 12:
        assert (counts["val"], counts["test"]) == tuple(max(1, round(s * number)) if s else 0 for s in (val, test))
    if marked:
        assert any(found[cell] == "train" for cell in cells if cells[cell])
    if marked >= needed:
        assert {found[cell] for cell in cells if cells[cell]} == {each for each in counts if counts[each]}


def test_colours_of_classes_differ() -> None:
    assert len(set(choose_colours(254))) == 254


# Alignment


def town_fit(shift: tuple[int, int], seed: int) -> Fit:
    image, building, valid = draw_town(SIDE, SIDE, seed)
    label = np.where(valid, np.roll(building, shift, (0, 1)), MISSING).astype(np.uint8)
    return measure_fit(np.ascontiguousarray(np.moveaxis(image, -1, 0)), valid, label)


@pytest.mark.parametrize("shift", [(0, 0), (4, 0), (-3, 5), (20, -30)])
def test_the_offset_of_shifted_labels_is_found(shift: tuple[int, int]) -> None:
    offset = find_offset([town_fit(shift, 1), town_fit(shift, 2)])
    assert offset is not None
    assert np.hypot(offset.rows + shift[0], offset.cols + shift[1]) <= 1.5
    assert offset.is_shifted == (shift != (0, 0))


def test_labels_of_another_place_and_too_few_houses_do_not_look_shifted() -> None:
    image, _, valid = draw_town(SIDE, SIDE, 1)
    pixels = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    offset = find_offset([measure_fit(pixels, valid, draw_town(SIDE, SIDE, 9)[1])])
    assert offset is not None
    assert not offset.is_shifted
    one_house = cv2.rectangle(np.zeros((SIDE, SIDE), np.uint8), (90, 90), (110, 120), 1, -1)
    assert find_offset([measure_fit(pixels, valid, one_house)]) is None
    assert find_offset([measure_fit(pixels, valid, np.zeros((SIDE, SIDE), np.uint8))]) is None


def test_a_cell_with_few_objects_is_judged_with_its_neighbours() -> None:
    def fit(row: int, num_objects: int) -> Fit:
        surface = np.zeros((2 * REACH + 1, 2 * REACH + 1), np.float32)
        surface[REACH + row, REACH] = 50.0
        return Fit(surface, 1.0, num_objects)

    fits = {Cell(0, 0, 0): [fit(9, 100)], Cell(0, 0, 1): [fit(-9, 3)], Cell(0, 0, 9): [fit(5, 3)]}
    found = judge(fits)
    assert (found[Cell(0, 0, 0)].rows, found[Cell(0, 0, 0)].is_shifted) == (9, True)
    assert Cell(0, 0, 1) in found  # with its neighbour
    assert Cell(0, 0, 9) not in found  # too far from any


def test_shifted_labels_are_warned_of_with_their_median_offset(tmp_path: Path) -> None:
    scene, truth = write_town(tmp_path, 7)
    for shift, lines in ((0, 0), (8, 1)):
        houses = np.roll(truth == 1, shift, 0).astype(np.uint8)
        labels = write_vectors(tmp_path / f"{shift}.fgb", vectorise(houses))
        made = make([scene], labels, tmp_path / f"{shift}", 128)
        said = list(describe(made))
        assert len(said) == lines
        if shift:
            assert "look shifted in 4 of 4 blocks (100%), by 8 px, 8 m" in said[0]
            assert "8 px further up" in said[0]
            assert figures(made)["shifted_share"] == 1.0


def test_an_offset_that_only_all_labels_together_tell_is_said(tmp_path: Path) -> None:
    scene, _ = write_town(tmp_path)
    made = make([scene], write_vectors(tmp_path / "labels.fgb", [HOUSE]), tmp_path / "data")
    (said,) = describe(replace(made, overall=Offset(-2.0, 1.0, 0.1, is_shifted=True)))
    assert said.startswith("all labels together would fit better 2 px further up and 1 px further right")


# Refusals


def refusals(make_scene: MakeScene, tmp_path: Path) -> list[tuple[str, list[str], str, dict[str, Any]]]:
    scene = make_scene()
    good = write_vectors(tmp_path / "good.geojson", [HOUSE], "EPSG:4326")
    far = write_vectors(tmp_path / "far.fgb", [to_map(HOUSE)])
    lines = write_vectors(tmp_path / "lines.gpkg", [HOUSE.exterior, shapely.Point(3, 3)])
    empty = write_vectors(tmp_path / "kinds.gpkg", [HOUSE], kind=[None])
    odd = make_scene("odd.tif", pixels=np.full((1, 100, 120), 7, np.uint8))
    away = make_scene("away.tif", bands=1, transform=(1.0, 0.0, 10_000.0, 0.0, -1.0, 5_800_000.0))
    return [
        ("bare.tif: has no CRS, so .*good", [make_scene("bare.tif", crs=None)], good, {}),
        (r"labels are at longitude .*, scenes at longitude 13\.5\d+ to", [scene], far, {}),
        ("holds no polygon on the scenes, only 1 lines, 1 points", [scene], lines, {}),
        ("a polygon has no kind", [scene], empty, {"class_column": "kind"}),
        ("--class-column x: ", [scene], good, {"class_column": "x"}),
        ("far.fgb: no polygon lies on a scene", [scene], good, {"area": far}),
        ("1 block of labelled ground for 2 splits", [scene], good, {"block": 1000}),
        ("shares are at least 0", [scene], good, {"val": 1.5}),
        ("uint16: a dataset's are uint8 .gdal_translate", [make_scene("deep.tif", dtype="uint16")], good, {}),
        ("1 and 3 bands: choose", [scene, make_scene("grey.tif", bands=1)], good, {}),
        ("odd.tif: holds 7: in a label raster", [scene], odd, {}),
        ("scene.tif: 3 bands: a label raster has one", [scene], scene, {}),
        ("away.tif: does not touch a scene: labels are at longitude", [scene], away, {}),
        ("a raster: --class-column", [scene], odd, {"all_touched": True}),
    ]


def test_what_does_not_fit_is_refused_and_nothing_is_left(make_scene: MakeScene, tmp_path: Path) -> None:
    for reason, scenes, labels, options in refusals(make_scene, tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SegError, match=reason):
            make(scenes, labels, tmp_path / "data", **{"block": 60, **options})
        assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_refused(
    make_scene: MakeScene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_vectors(tmp_path / "labels.gpkg", [HOUSE])
    (tmp_path / "data").mkdir()
    command = ("dataset", "make", make_scene(), "--labels", labels, "--out", tmp_path / "data")
    _, err = seg(capsys, *command, code=2)
    assert err.splitlines()[-1].endswith("data: is there already: remove it, or choose another folder")


def test_a_scene_that_can_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_vectors(tmp_path / "labels.gpkg", [HOUSE])
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no image")
    command = ("dataset", "make", tmp_path / "bad.tif", "--labels", labels, "--out", tmp_path / "data")
    _, err = seg(capsys, *command, code=2)
    assert "bad.tif" in err.splitlines()[-1]


def test_unmapped_scenes_and_dropped_geometries_are_said(tmp_path: Path) -> None:
    (one, _), (other, _) = write_town(tmp_path), write_town(tmp_path, 4, "other.tif", col_off=1000)
    geometries = [HOUSE, shapely.LineString([(1, 1), (9, 9)]), shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)])]
    made = make([one, other], write_vectors(tmp_path / "labels.gpkg", geometries), tmp_path / "data")
    said = list(describe(made))
    assert said[0] == "1 invalid footprints were repaired"
    assert said[1] == "dropped, because they are no area: 1 lines"
    assert said[2].startswith("1 of 2 scenes hold no footprint, and count as background")
    assert {name: figures(made)[name] for name in ("footprints", "repaired", "dropped")} == {
        "footprints": 3,
        "repaired": 1,
        "dropped": 1,
    }


def test_a_folder_holds_a_label_raster_for_each_scene(tmp_path: Path) -> None:
    scenes, buildings = [], {}
    (tmp_path / "labels").mkdir()
    for seed, name in enumerate(("one", "two")):
        image, buildings[name], _ = draw_town(SIDE, SIDE, seed)
        scenes.append(f"{tmp_path}/{name}.tif")
        write_geotiff(scenes[-1], np.ascontiguousarray(np.moveaxis(image, -1, 0)))
    write_geotiff(f"{tmp_path}/labels/one.tif", buildings["one"][None])
    known = buildings["two"].astype(np.uint8)
    known[:40] = 255  # of two.tif this is not known, as one.tif calls its buildings 1
    write_geotiff(f"{tmp_path}/labels/two.tiff", known[None])
    made = make(scenes, f"{tmp_path}/labels", tmp_path / "data")
    found = assemble(tmp_path / "data", made)
    assert np.array_equal(found["one"], buildings["one"])
    assert np.array_equal(found["two"][40:], buildings["two"][40:])
    assert figures(made)["missing_share"] == pytest.approx(40 / SIDE / 2)
    Path(f"{tmp_path}/labels/one.tif").unlink()
    message = "/labels: no label for scene one.tif in this folder (looked for one.tif, one.tiff)"
    with pytest.raises(SegError, match=re.escape(message)):
        make(scenes, f"{tmp_path}/labels", tmp_path / "other")


def test_rasters_that_call_buildings_differently_are_refused(tmp_path: Path) -> None:
    scenes = []
    (tmp_path / "labels").mkdir()
    for seed, (name, building) in enumerate({"one": 1, "two": 255}.items()):
        image, truth, _ = draw_town(SIDE, SIDE, seed)
        scenes.append(f"{tmp_path}/{name}.tif")
        write_geotiff(scenes[-1], np.ascontiguousarray(np.moveaxis(image, -1, 0)))
        write_geotiff(f"{tmp_path}/labels/{name}.tif", (truth[None] * building).astype(np.uint8))
    labels = f"{tmp_path}/labels"
    message = f"{labels}: buildings are 1 in {labels}/one.tif and 255 in {labels}/two.tif: give all labels the same"
    with pytest.raises(SegError, match=re.escape(message)):
        make(scenes, labels, tmp_path / "data")


def test_rasters_label_scenes_without_a_crs_by_row_and_column(tmp_path: Path) -> None:
    image, building, _ = draw_town(SIDE, SIDE, 3)
    write_geotiff(f"{tmp_path}/plain.tif", np.ascontiguousarray(np.moveaxis(image, -1, 0)))
    write_geotiff(f"{tmp_path}/labels.tif", building[None])
    made = make([f"{tmp_path}/plain.tif"], f"{tmp_path}/labels.tif", tmp_path / "data")
    assert np.array_equal(assemble(tmp_path / "data", made)["plain"], building)
    assert figures(made)["shifted_m"] is None
    assert figures(made)["pixels"] == SIDE**2
