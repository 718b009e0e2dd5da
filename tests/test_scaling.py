"""A cluster grows with its work: from no node at all, by nodes that come late, and back to none."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
from conftest import NORTH_UP, UTM, outside_environment, read_in_this_process, write_untrained
from growing_cluster import GROUP, TOKEN, GrowingCluster, growing_cluster
from parts import segment_in_this_process
from PIL import Image
from runs import part_digests, published_parts

from aerial_seg.cli.main import main
from aerial_seg.resources import NODE_GROUP_LABEL
from seg_core.imagery.geotiff import write_geotiff

pytestmark = pytest.mark.chaos

SIZES = ["--tile-size", "64", "--part", "128", "--window", "128", "--halo", "24", "--precision", "exact"]
PATIENCE = 200.0  # s


@pytest.fixture(scope="module")
def cluster() -> Iterator[GrowingCluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with growing_cluster(folder) as started:
        yield started
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scene of 64 parts, a model, and a training dataset of two images a split."""
    made = tmp_path_factory.mktemp("scaling")
    random = np.random.default_rng(0)
    (made / "scenes").mkdir()
    pixels = random.integers(0, 250, (3, 1000, 1000)).astype(np.uint8)
    write_geotiff(str(made / "scenes/a.tif"), pixels, crs=UTM, transform=NORTH_UP)
    write_untrained(str(made / "model"), width=2, depth=1)
    for split in ("train", "val"):
        for kind, values in ((split, np.arange(250)), (f"{split}_labels", np.array([0, 255]))):
            (made / "data" / kind).mkdir(parents=True)
            for name in ("a.png", "b.png"):
                colours = random.choice(values.astype(np.uint8), (128, 128, 1)).repeat(3, axis=2)
                Image.fromarray(colours).save(made / "data" / kind / name)
    (made / "data/label_class_dict.csv").write_text("name,r,g,b\nground,0,0,0\nbuilding,255,255,255\n")
    return made


def start(folder: Path, log: IO[str], *command: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-P", "-m", "aerial_seg.cli.main", *command]
    return subprocess.Popen(words, cwd=folder, env=outside_environment(**TOKEN), stderr=log, stdout=subprocess.DEVNULL)


def wait_until(true: Callable[[], object], log: Path, job: subprocess.Popen[bytes], pause: float = 0.25) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        assert job.poll() is None, log.read_text()
        time.sleep(pause)


def test_what_never_comes_is_refused_in_one_line_after_the_wait_that_was_asked_for(
    cluster: GrowingCluster, folder: Path
) -> None:
    log = folder / "never.log"
    words = [
        "segment",
        "scenes",
        "--model",
        "model",
        "--out",
        "never",
        "--address",
        cluster.address,
        "--device",
        "cuda",
    ]
    with log.open("w") as stream:
        assert start(folder, stream, *words, "--node-timeout", "1").wait(PATIENCE) == 2
    *_, first, last = log.read_text().splitlines()
    lack = "--device cuda: no node of the cluster has a GPU"
    assert first == f"{lack}: waiting for nodes, at most 0:01 (--node-timeout)"
    way_out = "use --device cpu, or see why none comes: ray status, on the head"
    assert last == f"seg: {lack}, after 0:01 of waiting for nodes: {way_out}"
    assert not (folder / "never").exists()


def test_a_run_begins_without_a_node_grows_with_nodes_and_leaves_none(cluster: GrowingCluster, folder: Path) -> None:
    """The process on the first node is halted until the one on a late node has published parts."""
    run, log = str(folder / "run"), folder / "run.log"
    words = ["segment", "scenes", "--model", "model", "--out", run, *SIZES, "--address", cluster.address]
    with log.open("w") as stream:
        job = start(folder, stream, *words, "--actors", "1:4")
        wait_until(lambda: cluster.processes("ray::MapWorker"), log, job)
        (first,) = cluster.processes("ray::MapWorker")
        wait_until(lambda: published_parts(run), log, job, pause=0.01)
        first.send_signal(signal.SIGSTOP)
        before = len(published_parts(run))
        cluster.add_node()
        wait_until(lambda: len(published_parts(run)) > before, log, job)
        first.send_signal(signal.SIGCONT)
        assert job.wait(PATIENCE) == 0, log.read_text()
    said = log.read_text()
    lack = "the cluster has no node with a CPU for workers, nor a GPU (--device cuda waits for one)"
    assert f"{lack}: waiting for nodes, at most 15:00 (--node-timeout)\n" in said
    assert len(re.findall(r"^new node .*2 CPU\)", said, re.MULTILINE)) == 2
    assert "another process has begun to segment: 2 until now" in said
    with pytest.MonkeyPatch.context() as patch:
        read_in_this_process(patch)
        segment_in_this_process(patch)
        command = ["segment", folder / "scenes", "--model", folder / "model", "--out", folder / "local", *SIZES]
        assert main([str(word) for word in command]) == 0
    assert part_digests(run) == part_digests(folder / "local")
    deadline = time.monotonic() + PATIENCE
    while len(raylets(cluster)) > 2:  # the head and the node that was added here
        assert time.monotonic() < deadline
        time.sleep(0.2)


def raylets(cluster: GrowingCluster) -> list[psutil.Process]:
    return [each for each in cluster.processes("") if "raylet/raylet" in (each.cmdline() or [""])[0]]


def count_added(cluster: GrowingCluster) -> int:
    """Count the nodes that were added by hand, by the label from which a job knows that a cluster may grow."""
    return [labels.get(NODE_GROUP_LABEL) for labels in cluster.labels()].count(GROUP)


def test_workers_that_train_are_spread_over_nodes_and_one_goes_on_if_the_other_is_lost(
    cluster: GrowingCluster, folder: Path
) -> None:
    """Each node has two CPUs, so that both workers could be on one."""
    for _ in range(count_added(cluster), 2):
        cluster.add_node()
    assert count_added(cluster) == 2
    log, nodes = folder / "train.log", dict[int, int]()

    def find_nodes() -> bool:
        for worker in cluster.processes("ray::RayTrainWorker"):
            with suppress(psutil.NoSuchProcess):
                nodes[worker.pid] = worker.ppid()
        return len(nodes) == 2

    def said(text: str) -> Callable[[], bool]:
        return lambda: text in log.read_text()

    sizes = ["--width=4", "--depth=2", "--batch=2", "--crop=64", "--readers=0", "--epochs=99", "--steps=9"]
    words = ["train", "--data", "data", "--out", "trained", "--preset", "small", "--address", cluster.address, *sizes]
    with log.open("w") as stream:
        job = start(folder, stream, *words, "--workers", "2", "--min-workers", "1")
        wait_until(find_nodes, log, job)
        assert len(set(nodes.values())) == 2
        wait_until(said("\nepoch 1 of 99: "), log, job)
        psutil.Process(min(nodes.values())).kill()
        wait_until(said("\nlost node "), log, job)
        wait_until(said("\ngoing on with epoch "), log, job)
        before = log.read_text().count("\nepoch ")
        wait_until(lambda: log.read_text().count("\nepoch ") > before, log, job)
        job.terminate()
        assert job.wait(PATIENCE)
