"""The model that comes with the package: small, described, and at work without being asked for."""

import json
from pathlib import Path

import pytest
from seg_command import seg

from seg_core.model.bundle import BUILT_IN, read_bundle, read_weights


def test_it_is_small_and_says_how_it_was_trained() -> None:
    assert sum(path.stat().st_size for path in Path(BUILT_IN).iterdir()) <= 8_000_000
    bundle = read_bundle(BUILT_IN)
    assert read_weights(BUILT_IN, bundle)
    assert bundle.gsd_m == 1.0
    assert bundle.context_px is not None
    assert bundle.context_px <= bundle.halo  # so that windows leave no seams
    provenance = bundle.provenance
    assert provenance["settings"]["augment"] == "light"  # turned every way: it must not matter where the sun stood
    assert provenance["settings"]["epochs"] >= provenance["epoch"] > 0
    assert provenance["images"] == {"train": 106, "val": 9}
    assert len(provenance["data_fingerprint"]) == 64


@pytest.mark.usefixtures("ray_cluster")
def test_a_region_it_has_never_seen_is_segmented_without_naming_it(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, brookline = tmp_path / "run", shared / "brookline"
    seg(capsys, "segment", brookline / "region.tif", "--out", run)
    seg(capsys, "verify", run)
    found = json.loads(seg(capsys, "evaluate", run, "--labels", brookline / "region_label.tif", "--json")[0])
    assert found["iou"] > 0.5
