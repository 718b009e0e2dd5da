"""The masks of a run as rasters: each pixel is what its row says, and nothing is made up."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, outside_environment
from rasterio.enums import ColorInterp
from runs import published_parts, read_part, rows_of
from seg_command import SMALL, seg

from seg_core.imagery.geotiff import Bands, write_cog
from seg_core.imagery.headers import read_scene
from seg_core.run.rows import decode_mask
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, write_part

pytestmark = pytest.mark.usefixtures("without_actors")

# In a process of its own, which may write no file larger than that.
FULL = """
import resource, signal, sys
import numpy as np
from seg_core.imagery.geotiff import Bands, write_cog
from seg_core.imagery.headers import read_scene

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
scene = read_scene("{uri}", "scene.tif")
noise = np.random.default_rng(0).integers(0, 2, (2048, 2048)).astype(np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
write_cog(sys.argv[2], scene, [(scene.window, noise)], Bands(nodata=255))
"""

Capture = pytest.CaptureFixture[str]


def read(path: Path) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    with rasterio.open(path) as dataset:
        return dataset.read(1), {**dataset.profile, **dataset.tags(ns="IMAGE_STRUCTURE")}


def test_each_pixel_is_what_the_rows_say(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out, err = seg(capsys, "export", "masks", run, "--out", tmp_path / "masks", "--json")
    assert json.loads(out) == {
        "files": [str(tmp_path / "masks" / name) for name in ("north.tif", "south/scene.tif")],
        "failed": 0,
        "missing": 0,
    }
    assert err.splitlines() == json.loads(out)["files"]
    found = {name: read(tmp_path / "masks" / name) for name in ("north.tif", "south/scene.tif")}
    (pixels, profile), (small, _) = found.values()
    assert (profile["crs"], profile["transform"][:6], profile["nodata"]) == (UTM, NORTH_UP, 255)
    assert profile["LAYOUT"] == "COG"
    assert (pixels.shape, small.shape) == ((300, 420), (130, 200))
    missing = np.zeros(pixels.shape, np.bool_)
    missing[:100, :150] = True  # as the scene has it
    assert np.array_equal(pixels == 255, missing)
    assert not (small == 255).any()
    for row in rows_of(run):
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        mask = decode_mask(row["mask"], row["height"], row["width"])
        assert np.array_equal(found[row["scene_id"]][0][at] == 1, mask)
    assert 0 < (pixels == 1).sum() < (~missing).sum()
    assert list((tmp_path / "masks").glob("**/.partial-*")) == []
    _, err = seg(capsys, "export", "masks", run, "--out", tmp_path / "masks", code=2)
    assert err == f"seg: {tmp_path}/masks/north.tif: already exists: choose another --out\n"


def test_what_is_not_known_is_nodata(run: Path, tmp_path: Path, capsys: Capture) -> None:
    plan = read_plan(str(run))
    north = [part for part in plan.parts() if part.scene.scene_id == "north.tif"]
    failed, lost = (str(run / "tiles" / f"part-{part.key}.parquet") for part in (north[-1], north[1]))
    figures = ("valid_px", "building_px", "coverage", "area_m2", "building_m2", "mean_probability", "mask")
    broken = {"status": "failed", "error_class": "ReadError", "error": "no", "attempts": 1, **dict.fromkeys(figures)}
    rows = [{**row, **broken} for row in read_part(failed)]
    write_part(str(run), north[-1].key, rows, plan.model, north[-1].version)
    missing = len(read_part(lost))
    Path(lost).unlink()
    out, err = seg(capsys, "export", "masks", run, "--out", tmp_path / "masks", "--json", code=1)
    assert (json.loads(out)["failed"], json.loads(out)["missing"]) == (len(rows), missing)
    assert f"{len(rows) + missing} tiles failed or are not done yet: they are nodata in the masks" in err
    pixels, _ = read(tmp_path / "masks" / "north.tif")
    for part in north:
        there = pixels[part.window.slices(part.scene.window)]
        assert (there == 255).all() == (part in (north[-1], north[1]))
    assert len(published_parts(str(run))) == plan.counts["parts"] - 1


def forget_valid_pixels(run: Path) -> None:
    """Make a run as older versions did, which did not write which pixels of a tile are valid."""
    plan = read_plan(str(run))
    for part in plan.parts():
        rows = read_part(part_path(str(run), part.key))
        write_part(str(run), part.key, [{**row, "valid": None} for row in rows], plan.model, part.version)


def test_masks_of_a_run_whose_scenes_are_gone_are_those_that_older_versions_read_them_for(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    run, older = tmp_path / "run", tmp_path / "older"
    seg(capsys, "segment", region, "--model", make_bundle(), "--out", run, *SMALL)
    shutil.copytree(run, older)
    forget_valid_pixels(older)
    seg(capsys, "export", "masks", older, "--out", tmp_path / "expected")
    shutil.rmtree(region)
    seg(capsys, "export", "masks", run, "--out", tmp_path / "masks")
    for name in ("north.tif", "south/scene.tif"):
        found, expected = (read(tmp_path / folder / name)[0] for folder in ("masks", "expected"))
        assert np.array_equal(found, expected)
    assert (read(tmp_path / "masks/north.tif")[0] == 255).sum() == 100 * 150
    _, err = seg(capsys, "export", "masks", older, "--out", tmp_path / "none", code=1)
    assert f"{tmp_path}/none/north.tif: not written: " in err


def test_a_scene_that_is_not_as_it_was_is_named_where_a_run_of_an_older_version_needs_it(
    region: str, make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    seg(capsys, "segment", region, "--model", make_bundle(), "--out", run, *SMALL)
    forget_valid_pixels(run)
    pixels = np.random.default_rng(1).integers(0, 250, (3, 300, 420)).astype(np.uint8)
    pixels[:, 100:200, :150] = 255  # as much as there was, and elsewhere
    make_scene("region/north.tif", pixels=pixels, nodata=255)
    out, err = seg(capsys, "export", "masks", run, "--out", tmp_path / "masks", "--json", code=1)
    assert f"{tmp_path}/masks/north.tif: not written: north.tif: has changed since it was segmented" in err
    assert json.loads(out)["files"] == [str(tmp_path / "masks" / "south" / "scene.tif")]
    assert sorted(path.name for path in (tmp_path / "masks").rglob("*")) == ["scene.qml", "scene.tif", "south"]


def test_a_disk_that_is_full_leaves_no_part_of_a_file(tmp_path: Path, make_scene: MakeScene) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (2048, 2048)).astype(np.uint8)
    scene = read_scene(make_scene(height=2048, width=2048), "scene.tif")
    write_cog(str(tmp_path / "whole.tif"), scene, [(scene.window, noise)], Bands(nodata=255))
    size = (tmp_path / "whole.tif").stat().st_size
    script = FULL.format(uri=scene.uri)
    for room in (size - 80, size - 20_000, size // 2):
        command = [sys.executable, "-c", script, str(room), str(tmp_path / "part.tif")]
        done = subprocess.run(command, env=outside_environment(), capture_output=True, text=True, check=False)
        assert "SegError: " in done.stderr
        assert "part.tif: can't be written: " in done.stderr
        assert not (tmp_path / "part.tif").exists()


def test_two_scenes_do_not_share_a_file(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    make_scene("twins/a.png.tif", 64, 64)
    cv2.imwrite(str(tmp_path / "twins" / "a.png"), np.zeros((64, 64, 3), np.uint8))
    seg(capsys, "segment", tmp_path / "twins", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL)
    _, err = seg(capsys, "export", "masks", tmp_path / "run", "--out", tmp_path / "masks", code=2)
    assert (
        err
        == f"seg: {tmp_path}/masks/a.png.tif: two scenes would be exported to this file: rename one, and segment it\n"
    )


def test_a_mosaic_is_one_raster(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    opacity = np.full((1, 200, 200), 255, np.uint8)
    opacity[:, :50] = 0
    left = make_scene("tiles/a.png.tif", pixels=np.concatenate([np.full((3, 200, 200), 90, np.uint8), opacity]))
    with rasterio.open(left, "r+") as dataset:
        dataset.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    make_scene("tiles/b.tif", 200, 200, transform=(1.0, 0.0, 400_200.0, 0.0, -1.0, 5_800_000.0))
    arguments = ["--model", make_bundle(), "--out", tmp_path / "run", "--mosaic", *SMALL]
    seg(capsys, "segment", tmp_path / "tiles", *arguments)
    seg(capsys, "export", "masks", tmp_path / "run", "--out", tmp_path / "masks")
    pixels, _ = read(tmp_path / "masks" / "mosaic.tif")
    assert pixels.shape == (200, 400)
    assert np.array_equal(pixels == 255, np.pad(np.ones((50, 200), np.bool_), ((0, 150), (0, 200))))
