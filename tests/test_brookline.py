"""The whole way on real imagery: train on Massachusetts images, segment a part of Brookline, verify, ask, score."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import MakeScene, cut
from rasterio.windows import Window
from runs import rows_of
from seg_command import seg

from seg_core.run.rows import decode_mask
from seg_core.training.metrics import count, scores

pytestmark = pytest.mark.usefixtures("ray_cluster")

SQUARE = Window(430, 0, 1280, 1280)  # where there are many buildings
TINY = {"width": 8, "depth": 3, "epochs": 2, "steps": 20, "batch": 8, "crop": 192, "lr": 5e-3, "readers": 0}
NARROW = ["--preset", "large", *(text for name, value in TINY.items() for text in (f"--{name}", str(value)))]


@pytest.mark.usefixtures("without_workers")
def test_train_segment_verify_query_and_score(
    dataset: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, run = tmp_path / "bundle", tmp_path / "run"
    out, err = seg(capsys, "train", "--data", dataset, "--out", bundle, *NARROW, "--json")
    assert "epoch 2 of 2: loss" in err
    trained = json.loads(out)
    assert 0.05 < trained["val_iou"] < 1
    lines = (tmp_path / "bundle.train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert max(json.loads(line)["val_iou"] for line in lines) == trained["val_iou"]

    scored = json.loads(seg(capsys, "evaluate", bundle, "--data", dataset, "--json")[0])
    assert scored["images"] == 2
    assert scored["iou"] == pytest.approx(trained["val_iou"], abs=0.02)  # halo instead of padding, float32

    region, label = tmp_path / "region.tif", tmp_path / "label.tif"
    for name, target in (("region.tif", region), ("region_label.tif", label)):
        cut(shared / "brookline" / name, target, SQUARE)
    seg(capsys, "segment", region, "--model", bundle, "--out", run)
    seg(capsys, "verify", run)
    summary = json.loads(seg(capsys, "query", run, "--format", "json")[0])
    with rasterio.open(region) as file:
        valid = (file.read() != 255).any(axis=0)
    assert summary["tiles"] == 9
    assert summary["valid_px"] == valid.sum()
    assert summary["area_km2"] == pytest.approx(valid.sum() / 1e6, rel=1e-3)

    scored = json.loads(seg(capsys, "evaluate", run, "--labels", label, "--json")[0])
    mask = np.zeros(valid.shape, np.bool_)
    for row in rows_of(run):
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        mask[at] = decode_mask(row["mask"], row["height"], row["width"])
    with rasterio.open(label) as file:
        truth = file.read(1)
    counts = count(mask, truth == 1, valid & (truth != 255))
    assert {name: scored[name] for name in counts._asdict()} == counts._asdict()
    assert scored["iou"] == scores(counts)["iou"]
    assert scored["iou"] > 0.1  # a few seconds of training; everything called building scores 0.09


def test_a_trained_bundle_is_not_overwritten_and_other_settings_do_not_mix(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    _, err = seg(capsys, "train", "--data", dataset, "--out", tmp_path / "there", *NARROW, code=2)
    assert "already exists" in err
    (tmp_path / "new.train").mkdir()
    (tmp_path / "new.train" / "settings.json").write_text(json.dumps({"lr": 1.0}))
    _, err = seg(capsys, "train", "--data", dataset, "--out", tmp_path / "new", *NARROW, code=2)
    assert "lr 1.0 there, 0.005 now" in err


@pytest.mark.parametrize(
    ("height", "colour", "message"),
    [
        (63, 255, "b.tif: this label measures 64 x 63 px, its image 64 x 64"),
        (64, 7, "b.tif: colour (7, 7, 7) at row 0"),
    ],
)
def test_a_label_that_does_not_fit_is_named_and_nothing_is_written(
    make_scene: MakeScene, tmp_path: Path, capsys: pytest.CaptureFixture[str], height: int, colour: int, message: str
) -> None:
    for split in ("train", "val"):
        for name in "ab":
            make_scene(f"data/{split}/{name}.tiff", 64, 64)
            make_scene(f"data/{split}_labels/{name}.tif", pixels=np.full((3, 64, 64), 255, np.uint8))
    make_scene("data/val_labels/b.tif", pixels=np.full((3, height, 64), colour, np.uint8), crs=None)
    (tmp_path / "data" / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,255,255,255\n")
    _, err = seg(capsys, "train", "--data", tmp_path / "data", "--out", tmp_path / "bundle", *NARROW, code=2)
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
