"""Training jobs: what they write, what stops them, and what killing their processes costs."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import rasterio
import ray
import torch
from conftest import NORTH_UP, UTM, MakeScene, outside_environment
from rasterio.transform import Affine
from seg_command import seg
from tensorboardX.proto.event_pb2 import Event

import aerial_seg.train
from aerial_seg.benchmarks.training import bench_train
from aerial_seg.ray_session import ray_session
from aerial_seg.train import train
from aerial_seg.training.log import TrainingLog, _drain
from aerial_seg.training.messages import EpochDone, Failed, Resumed
from aerial_seg.training.preparation import decode, describe_data
from aerial_seg.training.readers import BatchShare, choose_readers, iter_batches
from aerial_seg.training.settings import TrainSettings, difference, make_settings
from aerial_seg.training.worker import (
    COMPILE_FROM_PX,
    MEMORY_SHARE,
    _advice_on,
    _validation,
    choose_micro_batch,
    is_compiled,
    make_learner,
)
from seg_core.errors import JobError, SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_whole
from seg_core.model.bundle import Bundle, read_bundle, read_weights
from seg_core.model.loading import load_model
from seg_core.model.networks import training_bytes_per_px
from seg_core.model.unet import UNet
from seg_core.run.lease import acquire_lease
from seg_core.training.crops import Crops
from seg_core.training.dataset import Classes, Pair, Sample, find_pairs, read_classes
from seg_core.training.loop import VALIDATING, step
from seg_core.training.losses import make_loss
from seg_core.training.statistics import Digest

TINY: dict[str, Any] = {"width": 4, "depth": 2, "steps": 6, "batch": 4, "epochs": 4, "crop": 128, "ema": 0.9}
TINY["readers"] = 0  # the workers make the crops: processes for them would take longer to start than there is to do
# A training to disturb: the driver is told of an epoch some seconds late, and must still have others before it.
LONGER = {**TINY, "steps": 30}
FLAGS = [text for name, value in LONGER.items() for text in (f"--{name}", str(value))]


def start(dataset: Path, folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["seg", "train", "--data", str(dataset), "--out", "bundle", *FLAGS, *flags],
        cwd=folder,
        env=outside_environment(OMP_NUM_THREADS="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job: subprocess.Popen[str], *beginnings: str) -> None:
    """Read the job's messages until one begins like one of these."""
    assert job.stderr is not None
    seen = []
    for line in job.stderr:
        seen.append(line)
        if line.startswith(beginnings):
            return
    pytest.fail(f"none of {beginnings} in {seen}")


def epochs_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(work: Path, other: Path) -> None:
    """The epochs of two runs have the same figures, but for the order in which processes add up."""
    found, expected = epochs_of(work), epochs_of(other)
    assert [e["epoch"] for e in found] == [e["epoch"] for e in expected] == [1, 2, 3, 4]
    for one, two in zip(found, expected, strict=True):
        for name in ("loss", "val_iou", "lr"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), (name, one["epoch"])


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """The folder of a run of two workers that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = make_settings("small", None, [LONGER, {"workers": 2}])  # as the command line chooses
    train(settings, str(dataset), str(folder / "bundle"), str(folder / "work"))
    return folder / "work"


def test_a_run_that_loses_a_worker_and_is_stopped_goes_on_in_its_bucket(
    dataset: Path, tmp_path: Path, undisturbed: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from seg_core.storage.files import read_bytes

    work, keys = f"{s3}/training", {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    job = start(dataset, tmp_path, "--workers", "2", "--work", work, **keys)
    wait_for(job, "epoch 1")
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) >= 2
    workers[-1].send_signal(signal.SIGKILL)
    # The driver learns of an epoch after its workers, which on a busy machine may have trained all of them by then.
    wait_for(job, "going on with epoch", "epoch 1", "all 4 epochs are trained")
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=200)
    assert err.splitlines()[-1] == "seg: stopped; the same command goes on from here"
    assert job.returncode == 130
    assert read_bytes(f"{work}/driver.json") is None
    assert not (tmp_path / "bundle").exists()
    command = ["train", "--data", dataset, "--out", tmp_path / "bundle", *FLAGS, "--workers", "2", "--work", work]
    _, err = seg(capsys, *command)
    assert re.search("going on with epoch [234] of 4|all 4 epochs are trained", err)
    assert "epoch 1 of 4" not in err
    (tmp_path / "metrics.jsonl").write_bytes(read_bytes(f"{work}/metrics.jsonl") or b"")
    assert_same_training(tmp_path, undisturbed)
    for picture in ("curves.png", "samples.png"):
        assert read_png(read_bytes(f"{work}/{picture}")).std() > 1
    assert read_bundle(str(tmp_path / "bundle")).metrics["val_iou"] is not None
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["model.json", "weights.safetensors"]
    assert not list(tmp_path.glob("bundle.train"))


def read_png(png: bytes | None) -> np.ndarray[Any, Any]:
    assert png is not None
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


def settings_of(**changes: Any) -> TrainSettings:
    tiny = {name: value for name, value in TINY.items() if "model" not in changes or name not in {"width", "depth"}}
    return make_settings("large", None, [tiny, changes])


def run(dataset: Path, folder: Path, **changes: Any) -> Bundle:
    return train(settings_of(**changes), str(dataset), str(folder / "bundle"), str(folder / "work"))


@pytest.mark.usefixtures("without_workers")
def test_a_run_leaves_a_bundle_figures_and_pictures(dataset: Path, tmp_path: Path) -> None:
    bundle = run(dataset, tmp_path, epochs=2, weights="float16")
    assert bundle == read_bundle(str(tmp_path / "bundle"))
    weights = read_weights(str(tmp_path / "bundle"), bundle)
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {np.dtype(np.float16)}
    assert {w.dtype for w in weights.values() if w.ndim == 1} == {np.dtype(np.float32)}
    assert load_model(bundle, weights)(torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    lines = epochs_of(tmp_path / "work")
    assert [line["epoch"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: line["val_iou"])
    assert (bundle.metrics["val_iou"], bundle.threshold) == (best["val_iou"], best["threshold"])
    assert bundle.temperature == best["temperature"] != 1
    assert 0 < bundle.threshold < 1
    for picture in ("curves.png", "samples.png"):
        assert read_png((tmp_path / "work" / picture).read_bytes()).std() > 1
    values = events(tmp_path / "work" / "tensorboard")
    assert values["val_iou"] == pytest.approx([line["val_iou"] for line in lines])
    with pytest.raises(SegError, match="already exists"):
        run(dataset, tmp_path, epochs=2, weights="float16")
    with pytest.raises(SegError, match=r"other settings .*lr 0\.001 there, 0\.1 now"):
        train(settings_of(epochs=2, weights="float16", lr=0.1), str(dataset), str(tmp_path / "b"), f"{tmp_path}/work")


def events(folder: Path) -> dict[str, list[float]]:
    """Scalars of TensorBoard's event files, in the TFRecord format: length, its checksum, data, its checksum."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            for value in Event.FromString(content[12 : 12 + length]).summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
            content = content[16 + length :]
    return found


@pytest.mark.usefixtures("without_workers")
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoints(dataset: Path, tmp_path: Path) -> None:
    # The decay multiplies all weights by -6 a step, so that within some steps what ten layers make is no float32.
    with pytest.raises(JobError, match=r"is not finite: begin anew") as failure:
        run(dataset, tmp_path, steps=1, epochs=20, lr=1.0, weight_decay=7.0, schedule="constant", max_norm=0.0)
    failed = int(str(failure.value).split()[1].strip(",:"))
    assert failed > 1
    assert [line["epoch"] for line in epochs_of(tmp_path / "work")] == list(range(1, failed))
    folders = sorted(path.name for path in (tmp_path / "work" / "epochs").glob("epoch_*"))
    assert folders[-1] == f"epoch_{failed - 1:04d}"
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("without_workers")
def test_a_run_stops_when_it_no_longer_gets_better(dataset: Path, tmp_path: Path) -> None:
    constant = {"lr": 1e-20, "schedule": "constant", "ema": 0.0, "width": 2}
    run(dataset, tmp_path, steps=1, epochs=9, patience=2, min_workers=1, **constant)
    assert 3 <= len(epochs_of(tmp_path / "work")) < 9


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_of_a_split_without_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in dataset.iterdir():
        (data / folder.name).parent.mkdir(exist_ok=True)
        (data / folder.name).symlink_to(folder)
    for name in ("val", "val_labels"):
        (data / name).unlink()
        (data / name).mkdir()
        cv2.imwrite(str(data / name / "a.png"), np.zeros((64, 64, 4), np.uint8))
    with pytest.raises(SegError, match="split val: no image holds"):
        run(data, tmp_path)
    for name in ("val", "val_labels"):
        cv2.imwrite(str(data / name / "a.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(SegError, match="split val: no label of its 1 images holds a pixel of the class building"):
        run(data, tmp_path)


def described(*, num_positive: int = 5, gsd_m: float = 1.0) -> dict[str, Any]:
    """The fields of a bundle from images of 256 valid pixels each."""
    digests = [(None, Digest(f"{name}.tif", name, 256, num_positive, ((1,) * 256,) * 3, gsd_m)) for name in "ab"]
    splits: Any = {"train": digests[:1], "val": digests[1:]}
    return describe_data(splits, settings_of(), Classes(("background", "building"), ((0, 0, 0), (1, 1, 1))), None)


def test_a_split_of_the_class_alone_is_refused_for_it_would_score_1() -> None:
    with pytest.raises(SegError, match=r"^split train: every labelled pixel of its 1 images is of the class building"):
        described(num_positive=256)
    assert described(num_positive=255)


@pytest.mark.parametrize("gsd_m", [0.0044, 0.0254, 0.3048])
def test_a_bundle_has_the_resolution_of_its_images_to_the_last_digit(gsd_m: float) -> None:
    assert described(gsd_m=gsd_m)["gsd_m"] == gsd_m


@pytest.mark.usefixtures("ray_cluster")
def test_labels_in_other_frames_are_the_same_data_and_named(
    make_scene: MakeScene, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = np.random.default_rng(0).integers(0, 2, (1, 84, 84), dtype=np.uint8) * np.uint8(255)
    classes = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
    contents = []
    for margin in (0, 10):
        label = np.ascontiguousarray(truth[:, 10 - margin : 74 + margin, 10 - margin : 74 + margin])
        transform = (1.0, 0.0, 400_000.0 - margin, 0.0, -1.0, 5_800_000.0 + margin)
        pairs = [
            Pair(
                make_scene(f"{margin}/train/{name}.tiff", 64, 64),
                make_scene(f"{margin}/train_labels/{name}.tif", pixels=label, transform=transform),
            )
            for name in "abcde"
        ]
        contents.append([digest.content for _, digest in decode(pairs, classes)])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (4 if margin else 0)
        assert all("/10/train_labels/" in line and "10.0 px off" in line for line in lines[:3])
    assert lines[3] == "and 2 more labels were warped"
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("without_workers")
def test_a_run_does_not_go_on_with_other_data(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(steps=1, epochs=1)
    problems = iter([SegError("there is no paper"), KeyboardInterrupt()])

    def broken(*_: Any) -> None:
        raise next(problems)

    with monkeypatch.context() as patch:
        patch.setattr(aerial_seg.train, "write_samples", broken)
        made = train(settings, str(dataset), str(tmp_path / "a"), str(tmp_path / "work"))
    assert "samples.png is not drawn: there is no paper" in capsys.readouterr().err  # and yet there is a model
    (tmp_path / "work" / "metrics.jsonl").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(aerial_seg.train, "write_samples", broken)
        again = train(settings, str(dataset), str(tmp_path / "again"), str(tmp_path / "work"))
    said = capsys.readouterr().err
    assert "all 1 epochs are trained: the best one is published" in said
    assert "samples.png is not drawn: KeyboardInterrupt" in said
    assert again.hash == made.hash
    assert [line["epoch"] for line in epochs_of(tmp_path / "work")] == [1]
    for change in ("one less", "moved", "twice"):
        data = tmp_path / change
        shutil.copytree(dataset, data)
        name = next((data / "val").iterdir()).name
        for kind in ("", "_labels"):
            image = next((data / f"val{kind}").glob(f"{Path(name).stem}.*"))
            moved = data / f"train{kind}" / f"moved{image.suffix}"
            if change == "one less":
                image.unlink()
            else:
                (shutil.move if change == "moved" else shutil.copy)(image, moved)
        with pytest.raises(SegError, match="other data: choose another --work"):
            train(settings, str(data), str(tmp_path / "b"), str(tmp_path / "work"))
        told = f"moved{Path(name).suffix} of train is {name} of val" in capsys.readouterr().err
        assert told == (change == "twice")
    assert not (tmp_path / "b").exists()


def test_checkpoints_do_not_lie_where_the_bundle_is_to_be(dataset: Path, tmp_path: Path) -> None:
    for work in ("bundle", "bundle/work"):
        with pytest.raises(SegError, match=rf"--work .*/{work}: lies in --out .*/bundle, .*: choose another folder"):
            train(settings_of(), str(dataset), str(tmp_path / "bundle"), str(tmp_path / work))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "reason"), [("{", "is damaged"), ("[1]", "is not a training run's")])
def test_settings_that_are_none_are_refused(dataset: Path, tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_text(content)
    with pytest.raises(SegError, match=rf"/work/settings\.json: {reason}"):
        run(dataset, tmp_path)


@pytest.mark.usefixtures("ray_cluster")
def test_one_driver_trains_at_a_time(dataset: Path, tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    os.mkdir(work)
    with (
        acquire_lease(work),
        pytest.raises(SegError, match=r"work/driver\.json: another driver is at work on this run"),
    ):
        run(dataset, tmp_path)
    assert os.listdir(work) == []


@pytest.fixture(scope="module")
def corners(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images, of which a corner is left."""
    data = tmp_path_factory.mktemp("corners")
    (data / "label_class_dict.csv").symlink_to(dataset / "label_class_dict.csv")
    for path in dataset.glob("*/*"):
        (data / path.parent.name).mkdir(exist_ok=True)
        write_geotiff(
            str(data / path.relative_to(dataset)), np.ascontiguousarray(read_whole(str(path))[:, -256:, -256:])
        )
    return data


@pytest.mark.usefixtures("without_workers")
def test_a_network_with_layers_that_nothing_uses_trains_with_two_workers(corners: Path, tmp_path: Path) -> None:
    model = "smp:PSPNet/resnet18"
    bundle = run(corners, tmp_path, model=model, steps=2, crop=64, epochs=1, workers=2, min_valid=0.0)
    assert bundle.architecture["name"] == model


@pytest.mark.usefixtures("ray_cluster")
def test_what_one_worker_lacks_ends_the_run_at_once(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SegError, match="batch = 64, accumulate = 1: 32 crops at once"):
        run(dataset, tmp_path, width=32, crop=1024, batch=64, accumulate=1, workers=2)


@pytest.mark.usefixtures("ray_cluster")
def test_sync_batchnorm_is_refused_without_a_gpu(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SegError, match="sync_batchnorm = true: torch"):
        run(dataset, tmp_path, sync_batchnorm=True)


CLASSES = {"background": 0, "building": 90, "road": 255}  # and their grey values in labels


def write_scene(path: Path, pixels: np.ndarray[Any, Any], row: int = 0) -> Path:
    """Write an image of 1 m a pixel, `row` rows south of the others, of which no band is labelled alpha."""
    count, height, width = pixels.shape
    photometric = "rgb" if count in {3, 4} else "minisblack"
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype="uint8", crs=UTM,
        transform=Affine(1.0, 0.0, NORTH_UP[2], 0.0, -1.0, NORTH_UP[5] - row),
        photometric=photometric, alpha="unspecified",
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    return path


def write_streets(data: Path, names: Sequence[str], bands: int) -> np.ndarray[Any, Any]:
    """A dataset of noise crossed by a road that only the last band shows, and the road of its image of val."""
    rng, road = np.random.default_rng(0), np.zeros((96, 96), np.bool_)
    for split, number in (("train", 2), ("val", 1)):
        for i in range(number):
            image, at = rng.integers(90, 120, (bands, 96, 96), dtype=np.uint8), 20 * i + 30
            road = np.zeros((96, 96), np.bool_)
            road[at : at + 24] = True
            image[-1, road] += 100
            label = np.where(road, CLASSES["road"], CLASSES["background"]).astype(np.uint8)
            label[:8] = CLASSES["building"] if "building" in names else label[:8]
            write_scene(data / split / f"{i}.tif", image)
            write_scene(data / f"{split}_labels" / f"{i}.tif", label[None])
    table = "".join(f"{name},{3 * f'{CLASSES[name]},'}".rstrip(",") + "\n" for name in names)
    (data / "label_class_dict.csv").write_text(f"name,r,g,b\n{table}")
    return road


@pytest.mark.usefixtures("without_workers", "without_actors")
@pytest.mark.parametrize(
    ("names", "bands"),
    [(("road", "background"), 4), (("background", "building", "road"), 1)],
)
def test_a_model_of_roads_is_trained_and_used_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], bands: int
) -> None:
    road = write_streets(tmp_path / "data", names, bands)
    data, bundle, run = (tmp_path / name for name in ("data", "bundle", "run"))
    tiny = {"width": 4, "depth": 1, "patch": 1, "crop": 64, "batch": 4, "steps": 40, "epochs": 2, "readers": 0}
    flags = [text for name, value in {**tiny, "lr": 0.02}.items() for text in (f"--{name}", value)]
    _, err = seg(capsys, "train", "--data", data, "--out", bundle, "--class", "road", "--preset", "large", *flags)
    assert "epoch 2 of 2: loss " in err
    assert ", road IoU " in err
    told = (
        f"finds the class road alone{', and building counts as background' if 'building' in names else ''}: building_px"
    )
    assert f"the model {told}" in err
    shown = json.loads(seg(capsys, "models", "show", bundle, "--json")[0])
    assert (shown["class"], shown["classes"], shown["bands"]) == ("road", list(names), bands)
    assert (shown["architecture"]["in_channels"], len(shown["mean"])) == (bands, bands)
    assert shown["provenance"]["settings"]["class_name"] == "road"
    assert (tmp_path / "bundle.train" / "samples.png").exists()
    scored = json.loads(seg(capsys, "evaluate", bundle, "--data", data, "--json")[0])
    assert scored["tp"] + scored["fn"] == road.sum()
    assert scored["iou"] > 0.7  # it has learnt: so the class, and each band, is the one that is meant
    scene = data / "val" / "0.tif"
    out, err = seg(capsys, "segment", scene, "--model", bundle, "--out", run, "--json")
    assert f"{bundle}: {told}" in err
    assert json.loads(out)["class"] == "road"
    seg(capsys, "verify", run)
    (found,) = json.loads(seg(capsys, "query", run, "SELECT sum(building_px)::BIGINT AS px FROM tiles", "--json")[0])
    seg(capsys, "export", "masks", run, "--out", tmp_path / "masks")
    (mask,) = (read_whole(str(path))[0] for path in (tmp_path / "masks").glob("*.tif"))
    assert found["px"] == (mask == 1).sum() == scored["tp"] + scored["fp"]
    assert ((mask == 1) & road).sum() == scored["tp"]
    labels = ["evaluate", run, "--labels", data / "val_labels" / "0.tif", "--data", data, "--json"]
    assert json.loads(seg(capsys, *labels)[0])["iou"] == pytest.approx(scored["iou"])


@pytest.mark.usefixtures("ray_cluster")
def test_images_of_different_numbers_of_bands_are_refused(tmp_path: Path) -> None:
    write_streets(tmp_path, ("background", "road"), 3)
    odd = write_scene(tmp_path / "val" / "0.tif", np.full((4, 96, 96), np.arange(96), np.uint8))
    with pytest.raises(SegError, match=rf"^{odd}: 4 bands besides alpha, where {tmp_path}/train/0\.tif has 3: "):
        train(settings_of(**{"class": "road"}), str(tmp_path), str(tmp_path / "bundle"), str(tmp_path / "work"))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("readers", [0, 2])
def test_training_is_measured_against_steps_that_need_no_data(
    monkeypatch: pytest.MonkeyPatch, dataset: Path, readers: int
) -> None:
    before = set(threading.enumerate())
    left: list[threading.Thread] = []

    @contextmanager
    def session(address: str | None) -> Iterator[None]:
        with ray_session(address):
            yield
            left.extend(thread for thread in set(threading.enumerate()) - before if "Executor" in thread.name)

    monkeypatch.setattr("aerial_seg.benchmarks.training.ray_session", session)
    figures = bench_train(settings_of(crop=64, readers=readers), str(dataset), num_steps=3)
    assert not left  # when Ray ends, threads that wait for batches would wait for ever
    assert min(figures[f"{name}_mpx_s"] for name in ("resident", "fed", "crops")) > 0
    assert figures["fed_to_resident"] == pytest.approx(figures["fed_mpx_s"] / figures["resident_mpx_s"], rel=0.1)
    assert (figures["readers"], figures["device"], figures["steps"]) == (readers, "cpu", 6)


@pytest.mark.usefixtures("ray_cluster")
def test_readers_make_the_batches_that_crops_would_in_order(dataset: Path) -> None:
    settings = settings_of(crop=64)
    refs = [ref for ref, _ in decode(find_pairs(str(dataset), "train"), read_classes(str(dataset)))]
    crops = Crops(
        samples=[Sample(*pair) for pair in ray.get(refs)],
        size=64,
        batch=settings.batch,
        min_valid=settings.min_valid,
        augment="strong",
        seed=0,
    )
    expected = [crops(1 + number // 3, number % 3, 1, 2) for number in range(2, 8)]
    for readers in (0, 2):
        found = list(iter_batches(BatchShare(settings, 3, 1, 2), refs, range(2, 8), readers, torch.device("cpu")))
        assert len(found) == len(expected)
        for (image, label), sample in zip(found, expected, strict=True):
            assert np.array_equal(image.numpy(), sample.image)
            assert np.array_equal(label.numpy(), sample.label)


def test_networks_of_smp_validate_on_nothing_smaller_than_a_crop() -> None:
    small = Sample(np.zeros((40, 50, 3), np.uint8), np.ones((40, 50), np.uint8))
    for model, size in (("unet", (48, 64)), ("smp:PAN/resnet18", (128, 128))):
        settings = (
            settings_of(model=model)
            if model == "unet"
            else make_settings("large", None, [{"model": model, "crop": 128}])
        )
        ((image, label),) = _validation([small], settings, {"stride": 16, "halo": 128})
        assert image.shape == (1, *size, 3)
        assert int((label == 1).sum()) == 40 * 50


def test_a_unet_is_trained_whatever_its_stride() -> None:
    header = {"bands": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "building": 1}
    network = UNet(width=2, depth=2, patch=3)
    learner = make_learner(settings_of(crop=24, compile="no"), header, network, torch.device("cpu"), 1, 2)
    assert learner.micro_batch == 2
    assert step(learner, (torch.zeros(2, 24, 24, 3), torch.ones(2, 24, 24))) > 0


def test_in_a_container_a_worker_takes_the_crops_that_its_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = {"bands": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "building": 1}
    network, limit = UNet(width=2, depth=1), tmp_path / "memory.max"
    each = training_bytes_per_px(network, 3, 2) * 128**2
    limit.write_text(f"{int(4.5 * each / MEMORY_SHARE) * 2}\n")
    monkeypatch.setattr("seg_core.threads.MEMORY_LIMIT", limit)
    settings = settings_of(crop=128, precision="float32", compile="no")
    assert make_learner(settings, header, network, torch.device("cpu"), 1, 8).micro_batch == 4


def test_the_loss_is_the_one_of_the_settings() -> None:
    header = {"bands": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "building": 1}
    settings = settings_of(loss="bce+lovasz", label_smoothing=0.1, edge_weight=2.0, compile="no")
    learner = make_learner(settings, header, UNet(width=2, depth=1), torch.device("cpu"), 1, 1)
    logits, labels = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    assert torch.equal(learner.loss(logits, labels), make_loss("bce+lovasz", 0.1, 2.0)(logits, labels))


def test_only_long_training_on_a_gpu_is_compiled_unless_told() -> None:
    auto, cpu, gpu = settings_of(epochs=8, batch=2, crop=256), torch.device("cpu"), torch.device("cuda")
    long = -(-COMPILE_FROM_PX // (8 * 2 * 256**2))  # steps of each epoch
    short = long - 1
    assert [is_compiled(auto, device, steps) for device in (cpu, gpu) for steps in (short, long)] == [0, 0, 0, 1]
    assert not is_compiled(replace(auto, sync_batchnorm=True), gpu, long)
    assert is_compiled(replace(auto, compile="yes"), cpu, short)
    assert not is_compiled(replace(auto, compile="no"), gpu, long)


def test_a_batch_is_cut_into_even_pieces_that_fit() -> None:
    settings = settings_of(batch=32)
    assert choose_micro_batch(settings, 32, memory=1000, each=10) == 32
    assert choose_micro_batch(settings, 32, memory=200, each=10) == 16
    assert choose_micro_batch(settings, 32, memory=150, each=10) == 11
    assert choose_micro_batch(settings_of(batch=32, accumulate=4), 32, memory=1000, each=10) == 8


def test_a_batch_or_a_crop_that_cannot_fit_is_refused() -> None:
    with pytest.raises(
        SegError, match=r"batch = 32, accumulate = 1: 32 crops at once .* that fits is 20; accumulate = 0"
    ):
        choose_micro_batch(settings_of(batch=32, accumulate=1), 32, memory=200, each=10)
    with pytest.raises(SegError, match="crop = 128: training on one crop takes"):
        choose_micro_batch(settings_of(batch=32), 32, memory=9, each=10)


def test_each_worker_is_left_a_core() -> None:
    assert choose_readers(3, 1) == 3
    assert choose_readers(0, 1) == 0
    assert choose_readers(-1, os.cpu_count() or 1) == 0


def figures_of(epoch: int, iou: float | None) -> dict[str, Any]:
    scores = dict.fromkeys(("val_f1", "val_precision", "val_recall", "val_accuracy"), 0.5)
    return {
        "epoch": epoch,
        "loss": 1.0 / epoch,
        "val_iou": iou,
        **scores,
        "lr": 0.1,
        "train_mpx_s": 1.0,
        "seconds": 2.0,
    }


def test_an_epoch_done_again_replaces_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = str(tmp_path)
    first = TrainingLog(work, settings_of())
    first.take(figures_of(1, None))
    first.take(figures_of(2, 0.25))
    first.close()
    again = TrainingLog(work, settings_of())
    again.take(figures_of(2, 0.5))
    again.close()
    assert [(line["epoch"], line["val_iou"]) for line in epochs_of(tmp_path)] == [(1, None), (2, 0.5)]
    err = capsys.readouterr().err
    assert "epoch 1 of 4: loss 1.0000, building IoU undefined, 1.00 Mpx/s, 0:06 left" in err
    assert "epoch 2 of 4: loss 0.5000, building IoU 0.5000" in err


def test_an_error_that_a_run_has_outlived_is_forgotten(tmp_path: Path) -> None:
    log = TrainingLog(str(tmp_path), settings_of())
    _drain([Failed(JobError("4 crops are too many")), EpochDone(figures_of(1, 0.5))], log)
    assert log.error is None
    _drain([Resumed([figures_of(1, 0.5), figures_of(2, 0.5)]), Failed(JobError("the end"))], log)
    assert str(log.error) == "the end"
    log.close()
    assert [line["epoch"] for line in epochs_of(tmp_path)] == [1, 2]  # what a checkpoint told is written down too


def test_of_errors_of_torch_the_way_out_is_named() -> None:
    learner: Any = SimpleNamespace(micro_batch=4, device="cuda")
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert _advice_on(memory, learner, 16) == "4 crops at once are too many for cuda: say accumulate = 8"
    memory.add_note(VALIDATING)
    assert "validation, in windows of 2048 px, takes more memory" in str(_advice_on(memory, learner, 16))
    with pytest.raises(ValueError, match="value per channel") as alone:
        torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    assert "say a larger batch" in str(_advice_on(alone.value, learner, 1))
    assert _advice_on(ValueError("something else"), learner, 1) is None


def test_what_only_a_unet_has_is_refused_for_other_models() -> None:
    with pytest.raises(SegError, match=r"^width = 7: is the U-Net's, and model = smp:Unet/resnet18$"):
        make_settings("large", None, [{"model": "smp:Unet/resnet18"}, {"width": 7}])
    assert make_settings("small", None, [{"model": "smp:Unet/resnet18"}]).width == 32  # nobody asked for it


def test_figures_reach_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    log = TrainingLog(str(tmp_path / "work"), settings_of(lr=0.25))
    with ThreadPoolExecutor(1) as pool:  # messages are taken in a thread, and MLflow's active run belongs to that one
        pool.submit(log.take, figures_of(1, 0.5)).result()
    log.close()
    import mlflow

    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.params["lr"] == "0.25"
    assert run.data.metrics["val_iou"] == 0.5
    assert run.info.run_name == "work"
    assert run.info.status == "FINISHED"


def test_a_tracking_server_that_is_away_does_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrainingLog(str(tmp_path), settings_of())
    (tensorboard,) = (writer for writer in log.writers if writer.name == "TensorBoard")
    tensorboard.close()
    tensorboard.writer.add_scalar = None  # type: ignore[union-attr,method-assign] # whatever breaks it
    log.take(figures_of(1, 0.5))
    log.take(figures_of(2, 0.5))
    assert len(epochs_of(tmp_path)) == 2
    assert capsys.readouterr().err.count("TensorBoard is written no more") == 1


def test_a_setting_that_is_newer_than_the_run_had_its_default_then() -> None:
    assert difference({}, TrainSettings()) == ""
    assert (
        difference({"lr": 0.5}, TrainSettings(edge_weight=2.0))
        == "edge_weight 0.0 there, 2.0 now, lr 0.5 there, 0.001 now"
    )
