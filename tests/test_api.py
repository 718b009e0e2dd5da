"""The public interface: the values of a bulk run without Ray, and a run's results in Python."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, outside_environment, write_untrained
from numpy.typing import NDArray

import seg_core
from aerial_seg.cli.main import main
from seg_core.api import Run, Segmentation
from seg_core.errors import ReadError, SegError
from seg_core.grid import Window
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_whole
from seg_core.inference import scenes
from seg_core.run.rows import decode_mask
from seg_core.run.tables import published_parts, read_part

HEIGHT, WIDTH = 300, 420
pytestmark = pytest.mark.usefixtures("one_thread")  # of which two are made where it counts


def noise(height: int = HEIGHT, width: int = WIDTH, bands: int = 3) -> NDArray[np.uint8]:
    """`(height, width, bands)`."""
    return np.random.default_rng(1).integers(0, 250, (height, width, bands)).astype(np.uint8)


def test_an_array_is_segmented_as_a_file_of_it(make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    image, bundle = noise(), make_bundle()
    image[:100, :150] = 255
    path = make_scene(pixels=np.moveaxis(image, -1, 0), nodata=255)
    by_file = seg_core.segment_file(path, bundle)
    by_array = seg_core.segment_array(image, bundle, valid=by_file.valid)
    assert not by_file.valid[:100, :150].any()
    assert by_file.valid.sum() == HEIGHT * WIDTH - 100 * 150
    assert np.array_equal(by_file.probability, by_array.probability)
    assert np.array_equal(by_file.mask, by_array.mask)
    assert 0.2 < by_file.mask.mean() < 0.8
    assert not by_file.mask[~by_file.valid].any()
    assert (by_array.crs, by_array.building_m2, by_array.area_m2) == (None, None, None)


@pytest.mark.parametrize("window", [(0, 0, 300, 420), (0, 0, 1, 1), (37, 101, 150, 211), (299, 419, 1, 1)])
def test_a_window_of_a_file_has_the_values_of_the_whole(
    make_scene: MakeScene,
    make_bundle: MakeBundle,
    monkeypatch: pytest.MonkeyPatch,
    window: tuple[int, int, int, int],
) -> None:
    path, model = make_scene(height=HEIGHT, width=WIDTH), seg_core.load_model(make_bundle(), device="cpu")
    whole = seg_core.segment_file(path, model)
    monkeypatch.setattr(scenes, "WINDOW", 128)
    found = seg_core.segment_file(path, model, window=window)
    row, col, height, width = window
    assert np.array_equal(found.probability, whole.probability[row : row + height, col : col + width])
    assert found.transform == (1.0, 0.0, NORTH_UP[2] + col, 0.0, -1.0, NORTH_UP[5] - row)
    assert found.area_m2 == pytest.approx(height * width, rel=0.002)  # UTM's scale


def test_only_the_windows_pixels_are_read(
    make_scene: MakeScene, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = make_scene(height=2000, width=600), []
    whole = scenes.read_chip
    monkeypatch.setattr(scenes, "read_chip", lambda scene, chip, scale: read.append(chip) or whole(scene, chip, scale))
    seg_core.segment_file(path, make_bundle(), window=(1000, 0, 10, 10))
    (chip,) = read
    assert chip.row_off > 900
    assert chip.height < 600


def test_the_mask_is_saved_with_its_place(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> None:
    image = noise()
    image[:50] = 0
    found = seg_core.segment_file(make_scene(pixels=np.moveaxis(image, -1, 0), nodata=0), make_bundle())
    found.save_mask(str(tmp_path / "mask.tif"))
    with rasterio.open(tmp_path / "mask.tif") as file:
        assert (file.crs.to_string(), file.nodata, tuple(file.transform)[:6]) == (UTM, 255, NORTH_UP)
        assert np.array_equal(file.read(1), np.where(found.valid, found.mask, 255))


def test_the_threshold_is_the_models_unless_another_is_named(make_bundle: MakeBundle) -> None:
    image, bundle = noise(64, 64), make_bundle(threshold=0.4)
    found, none = seg_core.segment_array(image, bundle), seg_core.segment_array(image, bundle, threshold=1.1)
    assert (found.threshold, none.threshold) == (0.4, 1.1)
    assert found.coverage == pytest.approx((found.probability >= np.float32(0.4)).mean())
    assert none.coverage == 0


def test_an_image_without_data_has_no_coverage(make_bundle: MakeBundle) -> None:
    found = seg_core.segment_array(noise(20, 30), make_bundle(), valid=np.zeros((20, 30), np.bool_))
    assert found.coverage is None
    assert not found.probability.any()


def test_the_model_of_the_package_is_the_default() -> None:
    found = seg_core.segment_array(noise(40, 50))
    assert found.probability.shape == (40, 50)
    assert found.threshold == seg_core.load_model().bundle.threshold


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise().astype(np.float32), r"image: is float32 \(300, 420, 3\): give uint8 \(height, width, 3\)"),
        (np.moveaxis(noise(), -1, 0), r"image: is uint8 \(3, 300, 420\): .*: np.moveaxis\(image, 0, -1\) turns it"),
        (noise(bands=4), r"image: is uint8 \(300, 420, 4\): "),
        (noise()[..., 0], r"image: is uint8 \(300, 420\): "),
        (noise(0, 5), r"image: is uint8 \(0, 5, 3\): "),
    ],
)
def test_an_array_of_another_kind_is_refused_in_a_line(
    make_bundle: MakeBundle, image: NDArray[np.uint8], message: str
) -> None:
    with pytest.raises(SegError, match=f"^{message}"):
        seg_core.segment_array(image, make_bundle())


def test_what_is_valid_has_the_images_shape(make_bundle: MakeBundle) -> None:
    model = seg_core.load_model(make_bundle())
    for valid in (np.ones((420, 300), np.bool_), np.ones((300, 420), np.uint8)):
        with pytest.raises(SegError, match=r"^valid: is .*: give bool \(300, 420\)"):
            seg_core.segment_array(noise(), model, valid=valid)


def test_a_file_that_is_not_served_is_refused_in_a_line(make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    path, bundle = make_scene(height=50, width=60), make_bundle()
    with pytest.raises(ReadError, match=r"nowhere\.tif: no such file"):
        seg_core.segment_file("nowhere.tif", bundle)
    with pytest.raises(SegError, match="no such bundle"):
        seg_core.segment_file(path, "nowhere")
    with pytest.raises(SegError, match=r"window \(0, 0, 51, 60\): not within .*, which has 50 rows and 60 columns"):
        seg_core.segment_file(path, bundle, window=(0, 0, 51, 60))
    with pytest.raises(SegError, match="--bands 1,2: names 2 bands, the model wants 3"):
        seg_core.segment_file(path, bundle, bands=[1, 2])
    with pytest.raises(SegError, match="no such run"):
        seg_core.open_run("nowhere")


def test_a_finer_scene_is_segmented_at_the_models_resolution(make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    path = make_scene(height=200, width=240, transform=(0.5, 0.0, 400_000.0, 0.0, -0.5, 5_800_000.0))
    with pytest.raises(SegError, match="add --resample"):
        seg_core.segment_file(path, make_bundle("a"))
    found = seg_core.segment_file(path, make_bundle("b"), resample=True)
    assert found.probability.shape == (100, 120)
    assert found.transform[0] == 1.0


def test_no_ray_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, seg_core\n"
        "assert 'numpy.linalg' not in sys.modules or 'torch' not in sys.modules\n"
        "found = seg_core.segment_array(np.zeros((32, 32, 3), np.uint8))\n"
        "print(found.probability.shape, 'ray' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=outside_environment(), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(32, 32) False\n", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Run, str, str]:  # noqa: ARG001
    """A run of two scenes, one with a missing corner, and where scenes and bundle are."""
    folder = tmp_path_factory.mktemp("api")
    image = np.moveaxis(noise(), -1, 0).copy()
    image[:, :100, :150] = 255
    (folder / "scenes").mkdir()
    write_geotiff(str(folder / "scenes/a.tif"), image, crs=UTM, transform=NORTH_UP, nodata=255)
    far = (*NORTH_UP[:5], NORTH_UP[5] - 10_000)
    write_geotiff(str(folder / "scenes/b.tif"), np.moveaxis(noise(70, 90), -1, 0), crs=UTM, transform=far)
    bundle = write_untrained(str(folder / "bundle"), width=4, depth=2)
    options = ["--tile-size", "64", "--part", "256", "--window", "128", "--precision", "exact", "--device", "cpu"]
    assert main(["segment", str(folder / "scenes"), "--model", bundle, "--out", str(folder / "run"), *options]) == 0
    return seg_core.open_run(str(folder / "run")), str(folder / "scenes"), bundle


def test_a_run_has_the_values_of_a_segmented_file(run: tuple[Run, str, str]) -> None:
    opened, folder, bundle = run
    rows = [row for path in published_parts(opened.path) for row in read_part(path)]
    areas = 0.0
    for name in ("a.tif", "b.tif"):
        found = seg_core.segment_file(f"{folder}/{name}", seg_core.load_model(bundle, device="cpu"))
        whole = Window(0, 0, *found.mask.shape)
        for row in (row for row in rows if row["scene_id"] == name):
            at = Window.from_row(row).slices(whole)
            assert np.array_equal(found.mask[at], decode_mask(row["mask"], row["height"], row["width"]))
            assert found.valid[at].sum() == row["valid_px"]
        assert np.array_equal(opened.read_mask(name), np.where(found.valid, found.mask, 255))
        areas += found.building_m2 or 0
    assert opened.summary()["building_km2"] == pytest.approx(areas / 1e6, rel=1e-6)


@pytest.mark.parametrize("window", [(0, 0, 300, 420), (90, 140, 30, 20), (255, 255, 2, 2), (0, 0, 1, 1)])
def test_a_window_of_a_runs_mask_is_cut_out_of_the_whole(
    run: tuple[Run, str, str], window: tuple[int, int, int, int]
) -> None:
    whole = run[0].read_mask("a.tif")
    row, col, height, width = window
    found = run[0].read_mask("a.tif", window)
    assert np.array_equal(found, whole[row : row + height, col : col + width])
    assert set(np.unique(whole)) == {0, 1, 255}


def test_a_mask_that_is_not_there_is_refused_in_a_line(run: tuple[Run, str, str]) -> None:
    with pytest.raises(SegError, match=r"^c.tif: no scene of .*/run: it has a.tif, b.tif$"):
        run[0].read_mask("c.tif")
    with pytest.raises(SegError, match=r"^window \(0, 0, 71, 90\): not within b.tif"):
        run[0].read_mask("b.tif", (0, 0, 71, 90))


def test_a_run_answers_questions(run: tuple[Run, str, str]) -> None:
    opened = run[0]
    assert opened.verify().ok
    figures = opened.summary()
    assert (figures["scenes"], figures["failed"], figures["missing"]) == (2, 0, 0)
    assert list(opened.scenes["scene_id"]) == ["a.tif", "b.tif"]
    tiles = opened.tiles
    assert len(tiles) == figures["tiles"] == figures["planned"]
    assert tiles["building_px"].sum() == figures["building_px"]
    assert not {"mask", "probability"} & set(tiles)
    assert {"geometry", "coverage"} <= set(tiles)
    found: list[dict[str, Any]] = opened.query("SELECT count(*) AS n FROM tiles WHERE scene_id = 'b.tif'").to_pylist()
    assert found == [{"n": 4}]
    with pytest.raises(SegError, match=r"^SQL: .*nothing"):
        opened.query("SELECT nothing FROM tiles")
    assert repr(opened) == f"Run({opened.path!r})"


def test_a_saved_mask_holds_what_it_is_given(tmp_path: Path) -> None:
    valid = np.array([[True, True, False]])
    found = Segmentation(np.array([[0.9, 0.1, 0.9]], np.float32), valid, 0.5, UTM, NORTH_UP)
    found.save_mask(str(tmp_path / "mask.tif"))
    assert read_whole(str(tmp_path / "mask.tif")).tolist() == [[[1, 0, 255]]]


def test_the_surface_is_small() -> None:
    public = ["Run", "SegError", "Segmentation", "load_model", "open_run", "segment_array", "segment_file"]
    assert sorted(seg_core.__all__) == public
