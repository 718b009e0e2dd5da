"""Masks of scenes on one grid as one raster, and probabilities as rasters."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import MakeBundle, MakeScene
from numpy.typing import NDArray
from rasterio.enums import MaskFlags
from rio_cogeo.cogeo import cog_validate
from runs import SETTINGS, BuiltRun, build_run, rows_of
from seg_command import SMALL, seg

from seg_core.run.rows import decode_probability, decode_valid

pytestmark = pytest.mark.usefixtures("without_actors")

Capture = pytest.CaptureFixture[str]
KEEPING = replace(SETTINGS, keep_probability=True)


def masked(path: Path) -> NDArray[Any]:
    """The first band of a raster, masked where it is nodata."""
    with rasterio.open(path) as file:
        return file.read(1, masked=True)


def merged(images: Sequence[tuple[NDArray[Any], int, int]], height: int, width: int) -> NDArray[Any]:
    """Masked arrays at their row and column of one array, the first one on top."""
    whole = np.ma.masked_all((height, width), np.uint8)
    for pixels, row, col in reversed(images):
        at = whole[row : row + pixels.shape[0], col : col + pixels.shape[1]]
        at[~np.ma.getmaskarray(pixels)] = pixels[~np.ma.getmaskarray(pixels)]
    return whole


def equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two masked arrays hold the same, where they hold something."""
    return np.array_equal(np.ma.getmaskarray(one), np.ma.getmaskarray(other)) and bool((one == other).all())


@pytest.fixture
def overlapping(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture) -> Path:
    """A run of three scenes on one grid. The first two overlap, and the first lacks data in part of that."""
    pixels = np.random.default_rng(1).integers(0, 250, (3, 150, 200)).astype(np.uint8)
    pixels[:, 40:90, 130:180] = 255
    make_scene("m/a.tif", pixels=pixels, nodata=255, transform=(1.0, 0.0, 400_000.0, 0.0, -1.0, 5_800_000.0))
    make_scene("m/b.tif", 100, 170, seed=2, transform=(1.0, 0.0, 400_121.0, 0.0, -1.0, 5_799_987.0))
    make_scene("m/c.tif", 60, 50, seed=3, transform=(1.0, 0.0, 399_933.0, 0.0, -1.0, 5_800_010.0))
    options = ["--overlap", "count", "--keep-probability", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL]
    seg(capsys, "segment", tmp_path / "m", *options)
    return tmp_path / "run"


PLACES = {"a": (10, 67), "b": (23, 188), "c": (0, 0)}  # row and column of each scene in the mosaic


@pytest.mark.parametrize("suffix", ["", "_probability"])
def test_scenes_on_one_grid_are_joined_and_the_first_that_knows_counts(
    overlapping: Path, tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    seg(capsys, "export", "masks", overlapping, "--probability", "--out", tmp_path / "each")
    out, _ = seg(
        capsys, "export", "masks", overlapping, "--mosaic", "--probability", "--out", tmp_path / "all", "--json"
    )
    assert json.loads(out)["files"] == [str(tmp_path / "all" / f"mosaic{each}.tif") for each in ("", "_probability")]
    found = masked(tmp_path / "all" / f"mosaic{suffix}.tif")
    images = [(masked(tmp_path / "each" / f"{name}{suffix}.tif"), *place) for name, place in PLACES.items()]
    assert equal(found, merged(images, *found.shape))
    assert not equal(found, merged(images[::-1], *found.shape))
    with rasterio.open(tmp_path / "all" / f"mosaic{suffix}.tif") as file:
        assert (file.transform.c, file.transform.f, file.shape) == (399_933, 5_800_010, (160, 358))


def test_a_mosaic_of_abutting_scenes_is_that_of_a_run_with_mosaic(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    bundle = make_bundle()
    for name, left in (("a.tif", 0), ("b.tif", 128)):
        make_scene(f"m/{name}", 100, 128, seed=left, transform=(1.0, 0.0, 400_000.0 + left, 0.0, -1.0, 5_800_000.0))
    for name, options in (("each", []), ("joined", ["--mosaic"])):
        arguments = [*options, "--model", bundle, "--out", tmp_path / name, *SMALL]
        seg(capsys, "segment", tmp_path / "m", *arguments)
    seg(capsys, "export", "masks", tmp_path / "each", "--mosaic", "--out", tmp_path / "one")
    for options in ([], ["--mosaic"]):
        seg(capsys, "export", "masks", tmp_path / "joined", *options, "--out", tmp_path / "other")
        one, other = (masked(tmp_path / folder / "mosaic.tif") for folder in ("one", "other"))
        assert one.shape == other.shape == (100, 256)
        assert (one == other)[:, :100].all()  # farther from the seam than the model looks
        shutil.rmtree(tmp_path / "other")


def test_scenes_that_are_not_on_one_grid_are_refused_with_the_reason(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    for name, left in (("a.tif", 0.0), ("b.tif", 200.5)):
        make_scene(f"m/{name}", 100, 128, transform=(1.0, 0.0, 400_000.0 + left, 0.0, -1.0, 5_800_000.0))
    seg(capsys, "segment", tmp_path / "m", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL)
    _, err = seg(capsys, "export", "masks", tmp_path / "run", "--mosaic", "--out", tmp_path / "masks", code=2)
    assert err == (
        "seg: b.tif: not on the grid of a.tif, which --mosaic requires: it is shifted by 0.50 px: "
        "segment it in a separate run, or leave out --mosaic\n"
    )
    assert not (tmp_path / "masks").exists()


def test_probabilities_are_those_that_the_rows_keep(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING)
    out, _ = seg(capsys, "export", "masks", run, "--probability", "--out", tmp_path / "out", "--json")
    names = ["north/a.tif", "north/a_probability.tif", "south/b.tif", "south/b_probability.tif"]
    assert json.loads(out)["files"] == [str(tmp_path / "out" / name) for name in names]
    for image in plan.images:
        levels = np.ma.masked_all((image.height, image.width), np.uint8)
        for row in (row for row in rows_of(run) if row["scene_id"] == image.scene_id):
            at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
            if row["valid_px"]:
                levels[at] = np.ma.array(decode_probability(row), mask=~decode_valid(row))
        path = tmp_path / "out" / image.scene_id.replace(".tif", "_probability.tif")
        assert equal(masked(path), levels)
        with rasterio.open(path) as file:
            assert (file.nodata, file.scales, file.descriptions) == (None, (1 / 255,), ("probability",))
            assert file.mask_flag_enums == ([MaskFlags.per_dataset],)
        mask = masked(tmp_path / "out" / image.scene_id)
        assert equal(mask == 1, levels >= 128)  # at a threshold of 0.5
        assert 'alphaBand="2"' in path.with_suffix(".qml").read_text()


def test_a_large_raster_of_probabilities_is_cloud_optimised(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    scene = make_scene("a.tif", 600, 700)
    arguments = ["--keep-probability", "--model", make_bundle(), "--out", tmp_path / "run", "--tile-size", 256]
    seg(capsys, "segment", scene, *arguments)
    seg(capsys, "export", "masks", tmp_path / "run", "--probability", "--out", tmp_path / "out")
    for name in ("a.tif", "a_probability.tif"):
        assert cog_validate(tmp_path / "out" / name, strict=True) == (True, [], [])


@pytest.mark.parametrize("mosaic", [[], ["--mosaic"]])
def test_a_probability_that_is_not_known_is_not_0(tmp_path: Path, capsys: Capture, mosaic: list[str]) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING, failed_parts=[4])
    for number in range(4):
        BuiltRun(run, plan).path(number).unlink()
    seg(capsys, "export", "masks", run, "--probability", *mosaic, "--out", tmp_path / "out", code=1)
    for path in (tmp_path / "out").rglob("*.tif"):
        assert masked(path).mask.all()


def test_a_run_without_probabilities_is_refused_in_a_line(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path)
    _, err = seg(capsys, "export", "masks", run, "--probability", "--out", tmp_path / "out", code=2)
    assert err == f"seg: --probability: {run} keeps none: segment with --keep-probability into another folder\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["north/a_probability.tif", "north/a.qml", "south/b_probability.qml"])
def test_no_file_is_replaced(tmp_path: Path, capsys: Capture, name: str) -> None:
    run, _ = build_run(tmp_path, settings=KEEPING)
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.touch()
    _, err = seg(capsys, "export", "masks", run, "--probability", "--out", tmp_path / "out", code=2)
    assert err == f"seg: {path}: already exists: choose another --out\n"
    assert [each for each in (tmp_path / "out").rglob("*") if each.is_file()] == [path]


def test_a_damaged_probability_is_named_and_the_mask_is_written(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING)
    BuiltRun(run, plan).rewrite(lambda rows: [{**row, "probability": b"no"} for row in rows])
    out, err = seg(capsys, "export", "masks", run, "--probability", "--out", tmp_path / "out", "--json", code=1)
    assert "north/a_probability.tif: not written: " in err
    assert len(json.loads(out)["files"]) == 3
