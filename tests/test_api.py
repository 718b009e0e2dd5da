"""The public interface: the values of a bulk run without Ray, and a run's results in Python."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, outside_environment
from numpy.typing import NDArray
from rasters import write_raw
from runs import build_run, rows_of
from seg_command import SMALL, seg

import seg_core
from seg_core.api import Segmentation
from seg_core.errors import ReadError, SegError
from seg_core.grid import Window
from seg_core.imagery.raster import read_whole
from seg_core.inference import scenes
from seg_core.results import Run
from seg_core.run.record import read_record, write_record
from seg_core.run.rows import decode_mask

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
    found, less = seg_core.segment_array(image, bundle), seg_core.segment_array(image, bundle, threshold=0.6)
    assert (found.threshold, less.threshold) == (0.4, 0.6)
    assert found.coverage == pytest.approx((found.probability >= np.float32(0.4)).mean())
    assert less.coverage == pytest.approx((found.probability >= np.float32(0.6)).mean())


@pytest.mark.parametrize("threshold", [50, 0, 1, -0.1, float("nan")])
def test_a_threshold_is_a_probability(make_scene: MakeScene, make_bundle: MakeBundle, threshold: float) -> None:
    model = make_bundle()
    for segment in (partial(seg_core.segment_array, noise(20, 30)), partial(seg_core.segment_file, make_scene())):
        with pytest.raises(SegError, match=rf"threshold {threshold}: use a probability between 0 and 1"):
            segment(model, threshold=threshold)


def test_a_precision_that_is_none_is_refused_when_a_model_is_loaded(make_bundle: MakeBundle) -> None:
    with pytest.raises(SegError, match="precision fp32: say one of auto, exact, float32, bfloat16, int8"):
        seg_core.load_model(make_bundle(), precision="fp32")


def test_a_pixel_without_data_has_no_probability(make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    image, bundle = noise(), make_bundle()
    image[:100, :150] = 255
    by_file = seg_core.segment_file(make_scene(pixels=np.moveaxis(image, -1, 0), nodata=255), bundle)
    for found in (by_file, seg_core.segment_array(image, bundle, valid=by_file.valid)):
        assert not found.probability[:100, :150].any()
        assert found.probability[found.valid].all()


def test_a_masked_array_says_which_pixels_hold_data(make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    image, bundle = noise(), make_bundle()
    image[:100, :150] = 255
    image[200, 200, 1] = 255  # a colour, for the other bands hold data
    path = make_scene(pixels=np.moveaxis(image, -1, 0), nodata=255)
    with rasterio.open(path) as file:
        masked = np.moveaxis(file.read(masked=True), 0, -1)
    by_file, by_array = seg_core.segment_file(path, bundle), seg_core.segment_array(masked, bundle)
    assert np.array_equal(by_array.valid, by_file.valid)
    assert np.array_equal(by_array.probability, by_file.probability)
    further = np.ones(by_file.valid.shape, np.bool_)
    further[250:] = False
    both = seg_core.segment_array(masked, bundle, valid=further)
    assert np.array_equal(both.valid, by_file.valid & further)


def test_the_alpha_band_of_a_file_can_be_named(tmp_path: Path, make_bundle: MakeBundle) -> None:
    pixels, bundle = np.moveaxis(noise(64, 80, 4), -1, 0).copy(), make_bundle()
    pixels[3] = 255
    pixels[3, :, :20] = 0
    path = tmp_path / "scene.tif"
    write_raw(path, pixels, photometric="minisblack")
    with pytest.raises(SegError, match="band 4 may be alpha"):
        seg_core.segment_file(path, bundle, bands=(1, 2, 3))
    assert seg_core.segment_file(path, bundle, alpha=4).valid.sum() == 64 * 60
    assert seg_core.segment_file(path, bundle, alpha=0, bands=(1, 2, 3)).valid.all()


def test_paths_may_be_objects(make_scene: MakeScene, make_bundle: MakeBundle, run: Run) -> None:
    path, bundle = Path(make_scene()), Path(make_bundle())
    assert seg_core.segment_file(path, bundle).mask.shape == (100, 120)
    assert seg_core.segment_file(path, seg_core.load_model(bundle)).mask.shape == (100, 120)
    assert seg_core.open_run(Path(run.path)).summary() == run.summary()


def test_a_file_without_a_crs_is_named(
    make_scene: MakeScene, make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_scene(crs=None)
    seg_core.segment_file(path, make_bundle())
    (record,) = caplog.records
    assert (
        record.getMessage() == f"{path}: no CRS: its resolution is assumed to be the model's, and areas are not known"
    )


def test_an_image_that_is_normalized_without_being_asked_for_is_named(
    make_scene: MakeScene, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).normal(200, 15, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    path = make_scene(pixels=np.ascontiguousarray(np.moveaxis(image, -1, 0)))
    calls = {"the image": partial(seg_core.segment_array, image), path: partial(seg_core.segment_file, path)}
    for name, segment in calls.items():
        adapted = segment()
        said = f"{name} looks unlike what the model was trained on: its brightness and contrast are adapted"
        assert [record.getMessage() for record in caplog.records] == [said]
        caplog.clear()
        assert np.array_equal(segment(normalize="region").probability, adapted.probability)
        assert not np.array_equal(segment(normalize="model").probability, adapted.probability)
        assert not caplog.records


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
    with pytest.raises(SegError, match="--bands 1,2: names 2 bands, the model needs 3"):
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


@pytest.mark.usefixtures("without_actors")
def test_a_segmented_file_has_the_values_of_a_run(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, bundle, run = np.moveaxis(noise(), -1, 0).copy(), make_bundle(), str(tmp_path / "run")
    image[:, :100, :150] = 255
    path = make_scene("a.tif", pixels=image, nodata=255)
    seg(capsys, "segment", path, "--model", bundle, "--out", run, *SMALL, "--device", "cpu")
    found = seg_core.segment_file(path, seg_core.load_model(bundle, device="cpu"))
    for row in rows_of(run):
        at = Window.from_row(row).slices(Window(0, 0, HEIGHT, WIDTH))
        assert np.array_equal(found.mask[at], decode_mask(row["mask"], row["height"], row["width"]))
        assert found.valid[at].sum() == row["valid_px"]
    opened = seg_core.open_run(run)
    assert np.array_equal(opened.read_mask("a.tif"), np.where(found.valid, found.mask, 255))
    assert found.building_m2 == pytest.approx(1e6 * opened.summary()["building_km2"], rel=1e-6)
    assert found.coverage == opened.summary()["coverage"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two scenes, of which one holds a block without data, and a part failed."""
    return seg_core.open_run(build_run(tmp_path_factory.mktemp("run"), failed_parts=[1])[0])


@pytest.fixture(scope="module")
def expected(run: Run) -> NDArray[np.uint8]:
    """The mask of the first scene, from the rows and the scene itself."""
    (uri,) = run.query("SELECT uri FROM scenes WHERE scene_id = 'north/a.tif'").column(0).to_pylist()
    valid = read_whole(uri).any(axis=0)
    mask = np.full(valid.shape, 255, np.uint8)
    for row in rows_of(run.path):
        if row["scene_id"] == "north/a.tif" and row["status"] == "done":
            at = Window.from_row(row).slices(Window(0, 0, *mask.shape))
            mask[at] = np.where(valid[at], decode_mask(row["mask"], row["height"], row["width"]), 255)
    return mask


@pytest.mark.parametrize(
    "window", [None, (0, 0, 100, 120), (20, 40, 30, 50), (31, 31, 2, 2), (0, 0, 1, 1), (99, 119, 1, 1)]
)
def test_the_mask_of_a_run_is_read_whole_or_in_a_window(
    run: Run, expected: NDArray[np.uint8], window: tuple[int, int, int, int] | None
) -> None:
    found = run.read_mask("north/a.tif", window)
    row, col, height, width = window or (0, 0, 100, 120)
    assert np.array_equal(found, expected[row : row + height, col : col + width])
    assert set(np.unique(expected)) == {0, 1, 255}


def test_a_mask_that_is_not_there_is_refused_in_a_line(run: Run) -> None:
    with pytest.raises(SegError, match=r"^c.tif: no scene of .*/run: it has north/a.tif, south/b.tif$"):
        run.read_mask("c.tif")
    for window in ((0, 0, 41, 30), (-1, 0, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(
            SegError, match=r"^window \(.*\): not within south/b.tif, which has 40 rows and 30 columns$"
        ):
            run.read_mask("south/b.tif", window)


def test_a_run_answers_questions(run: Run) -> None:
    figures = run.summary()
    assert figures["scenes"] == 2
    assert figures["failed"] > 0
    assert list(run.scenes["scene_id"]) == ["north/a.tif", "south/b.tif"]
    tiles = run.tiles
    assert len(tiles) == figures["tiles"] == figures["planned"] - figures["failed"]
    assert tiles["building_px"].sum() == figures["building_px"]
    assert not {"mask", "probability"} & set(tiles)
    assert {"geometry", "coverage"} <= set(tiles)
    found = run.query("SELECT count(*) AS n FROM tiles WHERE scene_id = 'south/b.tif'").to_pylist()
    assert found == [{"n": 2}]
    with pytest.raises(SegError, match=r"^SQL: .*nothing"):
        run.query("SELECT nothing FROM tiles")
    assert repr(run) == f"Run({run.path!r})"


@pytest.mark.usefixtures("in_this_process")
def test_sums_of_whole_numbers_are_numbers_of_pandas(run: Run) -> None:
    sql = (
        "SELECT scene_id, sum(building_px) AS px, sum(building_px) AS px, 1.5::DECIMAL(4, 1) AS d FROM tiles GROUP BY 1"
    )
    found = run.query(sql)
    assert [str(each) for each in found.schema.types] == ["string", "int64", "int64", "decimal128(4, 1)"]
    frame = found.to_pandas()
    assert (frame["px"] * 0.5).sum() == run.tiles["building_px"].sum() / 2
    assert frame["px"].equals(frame["px_1"])
    with pytest.raises(SegError, match=r"^SQL: .*out of bounds"):
        run.query("SELECT 2::HUGEINT ** 100 AS x, (2::HUGEINT * 9223372036854775807)::HUGEINT AS y FROM tiles")


def test_what_is_missing_from_a_run_is_said(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _ = run.tiles, run.relation(), run.footprints()
    assert not caplog.records
    shutil.copytree(run.path, tmp_path / "run")
    (part, *_), record = sorted((tmp_path / "run" / "tiles").iterdir()), read_record(str(tmp_path / "run"))
    part.unlink()
    record.finished = None
    write_record(str(tmp_path / "run"), record)
    unfinished = seg_core.open_run(tmp_path / "run")
    for _ in (unfinished.tiles, unfinished.relation(), unfinished.footprints(), unfinished.query("FROM tiles")):
        pass
    said = f"{unfinished.path}: 1 parts are not done yet and missing from this result"
    assert [each.getMessage() for each in caplog.records] == [said] * 4
    _ = unfinished.scenes
    assert len(caplog.records) == 4


def test_a_run_is_verified(run: Run) -> None:
    report = run.verify()
    assert report.ok
    assert (report.num_done, report.num_failed) == (run.summary()["tiles"], run.summary()["failed"])


def test_a_saved_mask_holds_what_it_is_given(tmp_path: Path) -> None:
    valid = np.array([[True, True, False]])
    found = Segmentation(np.array([[0.9, 0.1, 0.9]], np.float32), valid, 0.5, UTM, NORTH_UP)
    found.save_mask(str(tmp_path / "mask.tif"))
    assert read_whole(str(tmp_path / "mask.tif")).tolist() == [[[1, 0, 255]]]


def test_the_surface_is_small() -> None:
    public = [
        "MaskWindow",
        "Run",
        "SegError",
        "Segmentation",
        "load_model",
        "open_run",
        "segment_array",
        "segment_file",
    ]
    assert sorted(seg_core.__all__) == public
