"""The model that comes with the package: small, described, and at work without being asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import cut
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom
from rasterio.windows import Window
from seg_command import seg

import seg_core
from seg_core.model.bundle import BUILT_IN, read_bundle, read_weights
from seg_core.run.imagery_fit import LIKE


def test_it_is_small_and_says_how_it_was_trained() -> None:
    assert sum(path.stat().st_size for path in Path(BUILT_IN).iterdir()) <= 12_000_000
    bundle = read_bundle(BUILT_IN)
    assert read_weights(BUILT_IN, bundle)
    assert bundle.gsd_m == 1.0
    assert bundle.context_px is not None
    assert bundle.context_px <= bundle.halo  # so that windows leave no seams
    provenance = bundle.provenance
    assert provenance["settings"]["equivariant"]  # it must not matter where the sun stood
    assert provenance["settings"]["epochs"] >= provenance["epoch"] > 0
    assert provenance["images"] == {"train": 106, "val": 9}
    assert len(provenance["data_fingerprint"]) == 64
    assert np.sum(bundle.levels, axis=1) == pytest.approx(np.ones(3), abs=1e-3)
    assert np.sum(bundle.confidence) == pytest.approx(1, abs=1e-3)
    assert bundle.spread is not None
    assert 0 < bundle.spread < LIKE


@pytest.mark.usefixtures("without_actors")
def test_a_region_it_has_never_seen_is_segmented_without_naming_it(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("region", "region_label"):
        cut(shared / f"brookline/{name}.tif", tmp_path / f"{name}.tif", Window(1200, 900, 1500, 1500))
    run = tmp_path / "run"
    seg(capsys, "segment", tmp_path / "region.tif", "--out", run)
    seg(capsys, "verify", run)
    found = json.loads(seg(capsys, "evaluate", run, "--labels", tmp_path / "region_label.tif", "--json")[0])
    assert found["iou"] > 0.52


def test_its_answer_turns_with_the_image(shared: Path) -> None:
    with rasterio.open(shared / "brookline/region.tif") as file:
        image = np.moveaxis(file.read(window=Window(900, 300, 512, 512)), 0, -1)
    mask, turned = (seg_core.segment_array(each, normalize="model").mask for each in (image, np.rot90(image)))
    assert mask.any()
    assert (np.rot90(mask) != turned).mean() < 1e-3  # rounding moves some pixels over the threshold


def test_joplin_which_is_brighter_is_segmented_as_well_as_it_can_be_by_default(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its IoU is 0.33, by its own mean and deviation as by those of the training. Its truth is incomplete."""
    planned = json.loads(seg(capsys, "plan", shared / "joplin", "--mosaic", "--resample", "--json")[0])
    assert (planned["settings"]["normalize"], planned["imagery_is_unlike"]) == ("region", True)
    found = seg_core.segment_file(str(shared / "joplin/tile_337-9136.tif"), resample=True)
    with rasterio.open(shared / "joplin/tile_337-9136.tif") as file:
        transform = file.transform @ Affine.scale(file.width / found.mask.shape[1], file.height / found.mask.shape[0])
    polygons = json.loads((shared / "joplin/buildings.geojson").read_text())["features"]
    shapes = transform_geom("EPSG:4326", found.crs, [polygon["geometry"] for polygon in polygons])
    truth = rasterize(shapes, found.mask.shape, transform=transform).astype(bool)
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.25
