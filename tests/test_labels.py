"""A label is laid on its image by where both say that they lie, and refused where they don't say enough."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import UTM, MakeScene
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window as RasterioWindow

import seg_core.imagery.labels
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.labels import AlignedLabel, describe_warps, open_label
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene, resample_grid

CUT = Window(1200, 1200, 768, 768)  # of the real imagery
HEIGHT, WIDTH = 60, 80
INDICES = np.random.default_rng(1).integers(0, 2, (HEIGHT + 200, WIDTH + 200), dtype=np.uint8)


def moved(rows: float, cols: float, gsd_m: float = 1.0) -> tuple[float, ...]:
    """The transform of a grid whose corner lies so many metres south and east of an image's."""
    return (gsd_m, 0.0, 400_000.0 + cols, 0.0, -gsd_m, 5_800_000.0 - rows)


def ground(row_off: int, col_off: int, height: int, width: int) -> NDArray[np.uint8]:
    """The truth in a frame whose corner lies so many px from the image's."""
    return INDICES[100 + row_off :, 100 + col_off :][None, :height, :width]


def scene_of(make_scene: MakeScene, **options: Any) -> Scene:
    return read_scene(make_scene("image.tif", HEIGHT, WIDTH, **options), "image.tif")


# Real labels


def cut(source: Path, path: Path, window: Window) -> str:
    """A cut of a real file."""
    with rasterio.open(source) as whole:
        at = RasterioWindow(window.col_off, window.row_off, window.width, window.height)
        a, b, c, d, e, f = tuple(whole.transform)[:6]
        transform = (a, b, c + a * window.col_off, d, e, f + e * window.row_off)
        write_geotiff(str(path), whole.read(window=at), crs=str(whole.crs), transform=transform, nodata=whole.nodata)
    return str(path)


@pytest.fixture(scope="module")
def image(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    path = tmp_path_factory.mktemp("brookline") / "image.tif"
    return read_scene(cut(shared / "brookline/region.tif", path, CUT), "image.tif")


@pytest.fixture(scope="module")
def truth(shared: Path, image: Scene) -> str:
    """The label of the image on its own grid."""
    path = Path(image.uri).with_name("label.tif")
    return cut(shared / "brookline/region_label.tif", path, CUT)


def warp(path: str, other: Path, crs: str, size: float) -> str:
    """A file on another grid of such pixels, as GDAL makes it."""
    with rasterio.open(path) as file:
        left, bottom, right, top = transform_bounds(file.crs, crs, *file.bounds)
        grid = {"height": math.ceil((top - bottom) / size), "width": math.ceil((right - left) / size)}
        transform = (size, 0.0, left, 0.0, -size, top)
        with WarpedVRT(file, crs=crs, transform=Affine(*transform), resampling=Resampling.nearest, **grid) as warped:
            write_geotiff(str(other), warped.read(), crs=crs, transform=transform, nodata=255)
    return str(other)


def read_all(label: AlignedLabel) -> NDArray[np.uint8]:
    pixels, labelled = label.read(label.image.window)
    return np.where(labelled, pixels[0], 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("frame", "covered"),
    [
        (Window(1205, 1205, 768, 768), np.s_[5:, 5:]),
        (Window(1220, 1180, 768, 768), np.s_[20:, :-20]),
        (Window(1100, 1150, 1000, 900), np.s_[:, :]),
        (Window(1300, 1250, 400, 300), np.s_[100:500, 50:350]),
    ],
    ids=["5 px off", "20 px off", "larger", "smaller"],
)
def test_a_label_of_another_frame_is_laid_where_it_lies(
    image: Scene, truth: str, shared: Path, tmp_path: Path, frame: Window, covered: tuple[slice, slice]
) -> None:
    path = cut(shared / "brookline/region_label.tif", tmp_path / "label.tif", frame)
    found, whole = (read_all(open_label(each, image, [0, 1])) for each in (path, truth))
    expected = np.full_like(whole, 255)
    expected[covered] = whole[covered]
    assert np.array_equal(found, expected)
    assert {0, 1} <= set(np.unique(found).tolist())


@pytest.mark.parametrize(
    ("crs", "size"),
    [("EPSG:32619", 1.0), ("EPSG:26986", 1.05), ("EPSG:26986", 0.4), ("EPSG:4326", 1e-5)],
    ids=["UTM", "1.05 m", "0.4 m", "lon/lat"],
)
def test_a_label_on_another_grid_is_warped_as_gdal_warps_it(
    image: Scene, truth: str, tmp_path: Path, crs: str, size: float
) -> None:
    # Others lay them on by row and column: https://github.com/azavea/raster-vision/issues/1739,
    # https://github.com/microsoft/torchgeo/issues/2345.
    path = warp(truth, tmp_path / "label.tif", crs, size)
    found, whole = (read_all(open_label(each, image, [0, 1])) for each in (path, truth))
    exact: dict[str, Any] = {"resampling": Resampling.nearest, "tolerance": 1e-6}
    grid = {"crs": image.crs, "transform": Affine(*image.transform), "height": image.height, "width": image.width}
    with rasterio.open(path) as file, WarpedVRT(file, **grid, **exact) as theirs:
        assert (found == theirs.read(1)).mean() > 0.99999
    assert ((found == 1) & (whole == 1)).sum() / ((found == 1) | (whole == 1)).sum() > 0.93  # edges are a pixel off


# Grids


@pytest.mark.parametrize(
    ("transform", "warped"), [(moved(0, 0), False), (moved(0.009, -0.009), False), (moved(-0.4, 0.4), True)]
)
def test_an_offset_of_less_than_half_a_pixel_changes_nothing(
    make_scene: MakeScene, transform: tuple[float, ...], warped: bool
) -> None:
    truth = ground(0, 0, HEIGHT, WIDTH)
    label = open_label(make_scene("label.tif", pixels=truth, transform=transform), scene_of(make_scene), [0, 1])
    assert label.warped == warped
    pixels, labelled = label.read(Window(7, 9, 30, 40))
    assert np.array_equal(pixels[0], truth[0, 7:37, 9:49])
    assert labelled.all()
    assert describe_warps({"label.tif": label.off_px}) == []


@pytest.mark.parametrize(
    ("transform", "turn"),
    [
        ((1.0, 0.0, 400_000.0, 0.0, 1.0, 5_800_000.0 - HEIGHT), lambda truth: truth[::-1]),  # its south is up
        ((0.0, 1.0, 400_000.0, -1.0, 0.0, 5_800_000.0), lambda truth: truth.T),  # its west is up
    ],
)
def test_a_label_that_is_mirrored_or_turned_is_turned_back(
    make_scene: MakeScene, transform: tuple[float, ...], turn: Any
) -> None:
    truth = ground(0, 0, HEIGHT, WIDTH)[0]
    path = make_scene("label.tif", pixels=np.ascontiguousarray(turn(truth))[None], transform=transform)
    label = open_label(path, scene_of(make_scene), [0, 1])
    assert np.array_equal(read_all(label), truth)


def test_where_centres_lie_on_edges_of_a_label_rounding_does_not_decide(make_scene: MakeScene) -> None:
    fine = ground(0, 0, 2 * HEIGHT, 2 * WIDTH)
    label = open_label(make_scene("label.tif", pixels=fine, transform=moved(0, 0, 0.5)), scene_of(make_scene), [0, 1])
    assert np.array_equal(read_all(label), fine[0, 1::2, 1::2])


def test_a_resampled_image_has_its_label_on_its_own_grid(make_scene: MakeScene) -> None:
    coarse = resample_grid(scene_of(make_scene), 2.0)
    truth = ground(0, 0, HEIGHT, WIDTH)
    label = open_label(make_scene("label.tif", pixels=truth), coarse, [0, 1])
    assert np.array_equal(read_all(label), truth[0, 1::2, 1::2])


@pytest.mark.parametrize("crs", [UTM, "EPSG:32632"])
def test_a_label_is_the_same_however_it_is_cut(
    make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, crs: str
) -> None:
    image = scene_of(make_scene)
    x, y = Transformer.from_crs(UTM, crs).transform(400_000, 5_800_000)
    path = make_scene("label.tif", pixels=INDICES[None], crs=crs, transform=(0.7, 0.1, x - 60, 0.1, -0.7, y + 60))
    label = open_label(path, image, [0, 1])
    whole, labelled = label.read(image.window)
    assert labelled.mean() > 0.5
    monkeypatch.setattr(seg_core.imagery.labels, "BLOCK", 16)
    for window in split(image.window, 23):
        pixels, there = label.read(window)
        assert np.array_equal(pixels[0], whole[0][window.slices(image.window)])
        assert np.array_equal(there, labelled[window.slices(image.window)])


def test_of_a_label_however_fine_little_is_read_at_once(make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def read(scene: Scene, window: Window) -> Any:
        sides.append(max(window.height, window.width))
        return read_chip(scene, window)

    fine = np.random.default_rng(2).integers(0, 2, (1, 600, 600), dtype=np.uint8)
    label = open_label(make_scene("label.tif", pixels=fine, transform=moved(0, 0, 0.1)), scene_of(make_scene), [0, 1])
    monkeypatch.setattr(seg_core.imagery.labels, "BLOCK", 64)
    monkeypatch.setattr(seg_core.imagery.labels, "read_chip", read)
    assert np.array_equal(label.read(label.image.window)[0][0, :60, :60], fine[0, 5::10, 5::10])
    assert max(sides) <= 64


@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha"])
def test_what_a_label_leaves_out_stays_left_out_when_it_is_warped(make_scene: MakeScene, kind: str) -> None:
    truth = ground(-10, -10, HEIGHT, WIDTH)
    there = np.random.default_rng(3).random(truth.shape[1:]) < 0.5
    opacity = there.astype(np.uint8) * 255
    pixels = np.where(there, truth, 9).astype(np.uint8) if kind == "nodata" else truth
    bands = np.concatenate([pixels, opacity[None]]) if kind == "alpha" else pixels
    nodata = 9 if kind == "nodata" else None
    path = make_scene("label.tif", pixels=bands, transform=moved(-10, -10), nodata=nodata)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        if kind == "alpha":
            dataset.colorinterp = (ColorInterp.gray, ColorInterp.alpha)
        elif kind == "mask":
            dataset.write_mask(opacity)
    label = open_label(path, scene_of(make_scene), [0, 1])
    expected = np.full((HEIGHT, WIDTH), 255, np.uint8)
    expected[:-10, :-10] = np.where(there, truth[0], 255)[10:, 10:]
    assert np.array_equal(read_all(label), expected)


# Refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"transform": moved(60, 0)}, "does not overlap its image, .*image.tif: .*gdal_edit -a_srs"),
        ({"transform": moved(0, -500)}, "does not overlap its image"),
        ({"crs": "EPSG:32632"}, "does not overlap its image"),
        ({"crs": "EPSG:32733"}, "does not overlap its image"),
        ({"dtype": "float32"}, r"its pixels are float32, but a label must be uint8 \(gdal_translate -ot Byte\)"),
        ({"nodata": 1}, "its nodata value 1 is also a class: unset it .*gdal_edit -unsetnodata"),
        ({"crs": None, "transform": moved(0.0, 0.6)}, "different transforms, and .*label.tif has no CRS .*-a_srs"),
    ],
)
def test_a_label_that_is_not_of_its_image_is_refused(
    make_scene: MakeScene, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SegError, match=rf"label\.tif: .*{reason}"):
        open_label(make_scene("label.tif", HEIGHT, WIDTH, **options), scene_of(make_scene), [0, 1])


@pytest.mark.parametrize(("bare", "named"), [("label", "label.tif"), ("image", "image.tif")])
def test_without_georeference_sizes_must_agree(make_scene: MakeScene, bare: str, named: str) -> None:
    options: dict[str, Any] = {bare: {"crs": None, "transform": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}}
    image = scene_of(make_scene, **options.get("image", {}))
    truth = ground(0, 0, HEIGHT, WIDTH)
    path = make_scene("label.tif", pixels=truth, **options.get("label", {}))
    assert np.array_equal(read_all(open_label(path, image, [0, 1])), truth[0])
    path = make_scene("label.tif", pixels=truth[:, :, :-1], **options.get("label", {}))
    with pytest.raises(
        SegError, match=rf"label\.tif: .*79 x 60 px, its image 80 x 60, and .*{named} has no georeference.*gdal_edit"
    ):
        open_label(path, image, [0, 1])


def test_without_a_crs_transforms_that_agree_are_enough(make_scene: MakeScene) -> None:
    image = scene_of(make_scene, crs=None)
    for transform in (moved(0, 0), moved(0.4, 0)):
        path = make_scene("label.tif", HEIGHT, WIDTH, crs=None, transform=transform)
        assert not open_label(path, image, [0, 1]).warped


def test_a_warped_label_must_hold_data_for_a_valid_pixel(make_scene: MakeScene) -> None:
    label = open_label(make_scene("label.tif", HEIGHT, WIDTH, transform=moved(5, 0)), scene_of(make_scene), [0, 1])
    label.check_labelled(num_valid=7, num_labelled=1)
    label.check_labelled(num_valid=0, num_labelled=0)
    with pytest.raises(SegError, match=r"label\.tif: this label holds no data where its image, .*image\.tif, does: "):
        label.check_labelled(num_valid=7, num_labelled=0)
    replace(label, warped=False).check_labelled(num_valid=7, num_labelled=0)  # it leaves its whole image out, and may


# Messages


def test_a_few_warped_labels_are_named_with_their_offset() -> None:
    off_px = {"same": 0.0, "near": 0.5, "a": 7.06, "b": 20.0, "c": 0.6}
    near, far, third = describe_warps(off_px)
    assert near == "a: warped to the pixel grid of its image: by row and column, it would be up to 7.1 px off"
    assert [line.split(":")[0] for line in (far, third)] == ["b", "c"]
    assert describe_warps({**off_px, "d": 1.0, "e": 2.0})[3:] == ["and 2 more labels were warped"]
