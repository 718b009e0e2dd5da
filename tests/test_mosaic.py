"""Several scenes as one image: the rows of the scenes merged into one file, no seam, nothing counted twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.merge
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene
from runs import part_digests, rows_of
from seg_command import SMALL, Json, seg

from seg_core.grid import Window, chip_window
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.mosaic import make_mosaic, place_on_grid
from seg_core.imagery.raster import read_chip, read_image
from seg_core.imagery.region import read_region
from seg_core.inference.windows import read_pixels
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import Settings, make_plan
from seg_core.run.record import read_record
from seg_core.run.stored_plan import read_plan

# rasterio.merge's own, with affine 3
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

HEIGHT, WIDTH = 300, 420
MISSING = np.s_[:, 210:, :130]  # no piece holds any of it
# The image below in pieces, some of which overlap; each window is on its grid.
PIECES = {
    "a.tif": Window(0, 0, 210, 170),
    "b.tif": Window(0, 150, 190, 270),
    "c.tif": Window(180, 130, 120, 290),
}


def moved(row: int, col: int, by: float = 0.0) -> tuple[float, ...]:
    a, b, c, d, e, f = NORTH_UP
    return (a, b, c + col + by, d, e, f - row)


@pytest.fixture
def image() -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(3).integers(0, 250, (3, HEIGHT, WIDTH)).astype(np.uint8)
    pixels[MISSING] = 255
    return pixels


@pytest.fixture
def region(make_scene: MakeScene, image: np.ndarray[Any, Any]) -> str:
    """The pieces. Where two overlap, the one that comes later by name holds other pixels."""
    seen = np.zeros((HEIGHT, WIDTH), np.bool_)
    for name, at in PIECES.items():
        rows, cols = at.slices(Window(0, 0, HEIGHT, WIDTH))
        pixels = image[:, rows, cols].copy()
        pixels[:, seen[rows, cols]] = 7
        seen[rows, cols] = True
        path = make_scene(f"region/{name}", pixels=pixels, transform=moved(at.row_off, at.col_off), nodata=255)
    return str(Path(path).parent)


def without_id(rows: list[Json]) -> list[Json]:
    return [{key: value for key, value in row.items() if key != "scene_id"} for row in rows]


@pytest.mark.usefixtures("without_actors")
def test_a_mosaic_has_the_rows_of_the_image_in_one_file(
    region: str,
    image: np.ndarray[Any, Any],
    make_scene: MakeScene,
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, whole = make_bundle(), make_scene("whole.tif", pixels=image, nodata=255)
    options = ["--model", model, *SMALL, "--keep-probability", "--json"]
    out, _ = seg(capsys, "segment", region, "--out", tmp_path / "mosaic", "--mosaic", *options)
    found = json.loads(out)
    expected = json.loads(seg(capsys, "segment", whole, "--out", tmp_path / "one", *options)[0])
    assert without_id(rows_of(tmp_path / "mosaic")) == without_id(rows_of(tmp_path / "one"))
    assert found["seam_disagreement"] == expected["seam_disagreement"] == 0.0
    for counts, scenes in ((found, 3), (expected, 1)):
        assert counts["scenes"] == scenes
        assert counts["valid_px"] == HEIGHT * WIDTH - 90 * 130
    seg(capsys, "verify", tmp_path / "mosaic", "--deep")
    placed = "SELECT count(*) AS n, any_value(crs) AS crs FROM tiles JOIN scenes USING (scene_id)"
    answer = json.loads(seg(capsys, "query", tmp_path / "mosaic", placed, "--format", "json")[0])
    assert answer == [{"n": found["tiles"], "crs": UTM}]


@pytest.mark.usefixtures("without_actors")
def test_a_changed_scene_of_a_mosaic_costs_the_parts_that_see_it(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Parts see 512 px and the halo beyond themselves, so that those far off must be farther away than that.
    at = Window(0, 1200, 100, 100)
    pixels = np.random.default_rng(4).integers(0, 250, (3, at.height, at.width)).astype(np.uint8)
    far = Path(region) / "far.tif"
    write_geotiff(str(far), pixels, crs=UTM, transform=moved(at.row_off, at.col_off))  # type: ignore[arg-type]
    command = ["segment", region, "--mosaic", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    seg(capsys, *command)
    before = part_digests(tmp_path / "run")
    assert len(before) == 4 + 2  # none where no scene is; two of them hold the far one
    seg(capsys, "verify", tmp_path / "run")
    write_geotiff(str(far), pixels[::-1], crs=UTM, transform=moved(at.row_off, at.col_off))  # type: ignore[arg-type]
    _, err = seg(capsys, *command)
    assert "far.tif has changed since" in err
    assert "count twice" not in err
    after = part_digests(tmp_path / "run")
    assert {name[-12:-8] for name in after if after[name] != before[name]} == {"1024", "1280"}
    far.unlink()
    _, err = seg(capsys, *command, code=2)
    assert "scene far.tif is there, not here" in err


def test_a_part_of_a_mosaic_reads_the_scenes_around_it(
    region: str, image: np.ndarray[Any, Any], make_scene: MakeScene, make_bundle: MakeBundle
) -> None:
    whole = read_scene(make_scene("whole.tif", pixels=image, nodata=255), "whole.tif")
    settings = Settings(tile_size=64, part=64, halo=24, threshold=0.5, mosaic=True)
    plan, _ = make_plan(read_region([region])[0], read_bundle(make_bundle()), settings)
    parts = list(plan.parts())
    assert len(parts) == 35 - 2  # two hold nothing of any piece
    for part in parts:
        chip = chip_window(part.window, settings.halo, 8, min_chip=160)
        pixels, valid = read_pixels(part, chip, settings)
        expected, is_valid = read_chip(whole, chip)
        assert np.array_equal(valid, is_valid), part.window
        assert np.array_equal(pixels[:, valid], expected[:, valid]), part.window


@pytest.mark.parametrize(("order", "value"), [(["one", "two"], 1), (["two", "one"], 2)])
def test_an_overlap_belongs_to_the_first_that_holds_data(make_scene: MakeScene, order: list[str], value: int) -> None:
    for number, name in enumerate(("one", "two"), 1):
        pixels = np.full((3, 50, 60), number, np.uint8)
        pixels[:, :10] = 255
        make_scene(f"{name}.tif", pixels=pixels, transform=moved(20 * number, 0), nodata=255)
    folder = Path(make_scene("region.tif", 9, 9)).parent
    scenes, _ = read_region([str(folder / f"{name}.tif") for name in order], as_given=True)
    whole, pieces, refused = make_mosaic(scenes)
    assert (whole.height, whole.width, refused) == (70, 60, [])
    assert [scene.is_mosaic for scene in (whole, *pieces)] == [True, False, False]
    assert whole.transform == moved(20, 0)
    assert [place_on_grid(piece, whole).row_off for piece in pieces] == [
        20 * ["one", "two"].index(name) for name in order
    ]
    pixels, valid = read_image(whole, pieces, whole.window)
    assert valid.all(axis=1).tolist() == [False] * 10 + [True] * 60
    assert pixels[0, 10:, 0].tolist() == [1] * 20 + [value] * 20 + [2] * 20 if value == 2 else [1] * 40 + [2] * 20


def test_scenes_off_the_grid_are_refused_with_the_reason(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(make_scene("region/a.tif")).parent
    a, b, c, d, e, f = NORTH_UP
    make_scene("region/beside.tif", transform=moved(0, 200, by=0.5))
    make_scene("region/coarse.tif", transform=(1.05 * a, b, c, d, 1.05 * e, f))
    make_scene("region/elsewhere.tif", crs="EPSG:32634")
    make_scene("region/near.tif", transform=moved(0, 120, by=1e-5))
    make_scene("region/nowhere.tif", crs=None)
    out, _ = seg(capsys, "plan", folder, "--mosaic", "--model", make_bundle(), "--json", code=2)
    plan = json.loads(out)
    assert (plan["scenes"], plan["pixels"]) == (2, 100 * 240)
    wrong = {line.split(":")[0]: line for line in plan["refused"]}
    assert set(wrong) == {"beside.tif", "coarse.tif", "elsewhere.tif", "nowhere.tif"}
    assert "it is shifted by 0.50 px" in wrong["beside.tif"]
    assert "its pixels are 1.05 wide in the CRS, not 1" in wrong["coarse.tif"]
    assert "its CRS is EPSG:32634, not EPSG:32633: segment it in a separate run" in wrong["elsewhere.tif"]
    assert "no CRS" in wrong["nowhere.tif"]


@pytest.mark.usefixtures("without_actors")
def test_neighbours_disagree_where_there_is_no_halo(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", make_scene("a.tif", 300, 300), "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    out, _ = seg(capsys, *command, "--halo", "0", "--json")
    assert 0.001 < json.loads(out)["seam_disagreement"] < 0.5
    worst = read_record(str(tmp_path / "run")).seams.worst  # type: ignore[union-attr]
    assert worst.keys() <= {part.key for part in read_plan(str(tmp_path / "run")).parts()}
    assert sorted(worst.values(), reverse=True) == list(worst.values()) != []
    out, _ = seg(capsys, "segment", make_scene("b.tif", 60, 60), *command[2:4], "--out", tmp_path / "small", "--json")
    assert json.loads(out)["seam_disagreement"] is None  # one window, no neighbour


@pytest.mark.usefixtures("without_actors")
def test_real_scenes_that_abut_have_no_seam(
    shared: Path, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = sorted((shared / "joplin").glob("*.tif"))
    pixels, transform = rasterio.merge.merge(pieces)
    write_geotiff(str(tmp_path / "whole.tif"), pixels, crs="EPSG:26915", transform=tuple(transform)[:6])  # type: ignore[arg-type]
    model = make_bundle(gsd_m=0.6)
    for name, scenes, more in (("one", "whole.tif", []), ("mosaic", shared / "joplin", ["--mosaic"])):
        command = ["segment", tmp_path / scenes, "--model", model, "--out", tmp_path / name, *more]
        seg(capsys, *command, "--part", "1024", "--window", "512")
    found, expected = (rows_of(tmp_path / name) for name in ("mosaic", "one"))
    places = ("row_off", "col_off", "valid_px", "building_px", "mean_probability", "mask")
    assert [[row[k] for k in places] for row in found] == [[row[k] for k in places] for row in expected]
    # The origins of the two images differ by what their files' decimals leave.
    assert [row["area_m2"] for row in found] == pytest.approx([row["area_m2"] for row in expected])


def test_a_resampled_mosaic_reads_as_the_merged_image_but_for_a_line(shared: Path, tmp_path: Path) -> None:
    from seg_core.imagery.scene import resample_grid

    pieces = sorted((shared / "joplin").glob("*.tif"))
    pixels, transform = rasterio.merge.merge(pieces)
    write_geotiff(str(tmp_path / "whole.tif"), pixels, crs="EPSG:26915", transform=tuple(transform)[:6])  # type: ignore[arg-type]
    scenes, _ = read_region([str(shared / "joplin")])
    whole = resample_grid(make_mosaic(scenes)[0], 1.0)
    one = resample_grid(read_scene(str(tmp_path / "whole.tif"), "whole.tif"), 1.0)
    assert (one.height, one.width, one.transform) == (whole.height, whole.width, pytest.approx(whole.transform))
    window = Window(-40, -40, one.height + 80, one.width + 80)
    expected, _ = read_chip(one, window)
    found, valid = read_image(whole, scenes, window)
    assert valid.all()
    differs = (found != expected).any(axis=0)
    assert differs.mean() < 0.01
    assert np.abs(found.astype(int) - expected)[:, differs].mean() < 40


@pytest.mark.usefixtures("without_actors")
def test_a_mosaic_is_segmented_at_the_model_s_resolution(
    shared: Path, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", shared / "joplin", "--mosaic", "--resample", "--model", make_bundle(), "--out"]
    seg(capsys, *command, tmp_path / "run")
    plan = read_plan(str(tmp_path / "run"))
    (image,) = plan.images
    assert image.gsd_m == pytest.approx(1.0)
    assert (len(plan.scenes), plan.counts["scenes"]) == (5, 4)
    seg(capsys, "verify", tmp_path / "run")
    assert sum(row["valid_px"] for row in rows_of(tmp_path / "run")) == image.height * image.width
