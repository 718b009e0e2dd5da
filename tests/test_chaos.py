"""Runs that are disturbed end with the rows of one that is not: whatever is killed, lost, full or away.

A run that is disturbed is a process of its own, with a Ray of its own, that does not know what will befall it. The one
that goes on after it runs in the test's process and without Ray, which takes seconds to start.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import NORTH_UP, UTM, outside_environment, read_in_this_process, write_untrained
from parts import segment_in_this_process
from proxy import Proxy
from runs import part_digests, published_parts, read_part
from weed import Weed

from aerial_seg.cli.main import main
from seg_core.imagery.geotiff import write_geotiff
from seg_core.run.attempts import attempts_folder
from seg_core.run.fence import LEASE
from seg_core.run.verify import verify
from seg_core.storage.files import publish, read_bytes, sha256, walk

pytestmark = pytest.mark.chaos

HALO = 24
OPTIONS = ["--tile-size", "64", "--part", "256", "--window", "128", "--halo", str(HALO), "--precision", "exact"]
SIDE, WINDOWS, PARTS = 1060, 81, 25

Driver = subprocess.Popen[str]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scene of 81 windows, a fifth of it missing, and a model."""
    folder = tmp_path_factory.mktemp("chaos")
    pixels = np.random.default_rng(0).integers(0, 250, (3, SIDE, SIDE)).astype(np.uint8)
    pixels[:, 200:700, 300:660] = 255
    (folder / "scenes").mkdir()
    write_geotiff(str(folder / "scenes" / "a.tif"), pixels, crs=UTM, transform=NORTH_UP, nodata=255)
    write_untrained(str(folder / "model"), width=2, depth=1)
    for name in ("jobs", "aerial_seg", "seg_core", "numpy", "random", "rasterio/__init__"):  # all commands start here
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} of the current folder')")
    return folder


def start(folder: Path, run: object, *options: object, scenes: object = "scenes", **environment: str) -> Driver:
    return subprocess.Popen(
        ["seg", "segment", str(scenes), "--model", "model", "--out", str(run), *OPTIONS, *map(str, options)],
        cwd=folder,
        env=outside_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def go_on(folder: Path, run: object, scenes: object = "scenes") -> None:
    """Run the same command in this process, to a good end."""
    command = ["segment", folder / str(scenes), "--model", folder / "model", "--out", run, *OPTIONS]
    assert main([str(word) for word in command]) == 0


def finish(job: Driver, code: int = 0) -> str:
    """What the job wrote to standard error; it must end with that code."""
    _, err = job.communicate(timeout=300)
    assert job.returncode == code, err
    return err


def rows_of(run: object) -> Rows:
    return [row for path in published_parts(str(run)) for row in read_part(path)]


def wait_for_parts(run: object, number: int, job: Driver) -> None:
    """Wait until so many parts are published, or the job has ended."""
    deadline = time.monotonic() + 200
    while len(published_parts(str(run))) < number and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.poll() in {None, 0}, job.communicate()[1]


def processes(job: Driver, title: str) -> list[psutil.Process]:
    """The processes of a job's Ray of that kind."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            found += [process] if title in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def kill(job: Driver) -> None:
    """Kill a driver and its Ray, whose actor would go on with its task for a while."""
    left = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.communicate()


@pytest.fixture(scope="module", autouse=True)
def without_actors() -> Iterator[None]:
    """The test's own process starts none."""
    with pytest.MonkeyPatch.context() as patch:
        read_in_this_process(patch)
        segment_in_this_process(patch)
        yield


@pytest.fixture(scope="module")
def expected(region: Path) -> dict[str, str]:
    """The part files of a run that nobody disturbed."""
    go_on(region, region / "undisturbed")
    found = part_digests(region / "undisturbed")
    assert len(found) == PARTS
    return found


def assert_whole(run: Path, expected: dict[str, str]) -> None:
    assert part_digests(run) == expected
    assert verify(str(run)).ok


def test_a_killed_driver(region: Path, expected: dict[str, str]) -> None:
    run = region / "killed"
    job = start(region, run)
    wait_for_parts(run, 2, job)
    assert job.poll() is None, job.communicate()[1]
    kill(job)
    assert 2 <= len(published_parts(str(run))) < PARTS
    go_on(region, run)
    assert_whole(run, expected)


def test_a_driver_that_is_told_to_end_says_how_to_go_on(region: Path, expected: dict[str, str]) -> None:
    run = region / "told"  # by Ctrl-C: tests/test_session.py has SIGTERM
    job = start(region, run)
    wait_for_parts(run, 1, job)
    below = psutil.Process(job.pid).children(recursive=True)
    while job.poll() is None:  # as somebody does who is impatient
        job.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert finish(job, 130).splitlines()[-1] == "seg: stopped; the same command goes on from here"
    assert_nothing_is_left(run, below)
    there = part_digests(run)
    assert there
    assert there.items() <= expected.items()


def assert_nothing_is_left(run: Path, below: list[psutil.Process]) -> None:
    assert not (run / LEASE).exists()
    psutil.wait_procs(below, timeout=30)
    assert [process for process in below if process.is_running()] == []


def test_a_killed_gcs_ends_the_run_at_once(region: Path, expected: dict[str, str]) -> None:
    run = region / "gcs"
    job = start(region, run)
    wait_for_parts(run, 1, job)
    below = psutil.Process(job.pid).children(recursive=True)
    (gcs,) = processes(job, "gcs/gcs_server")
    gcs.kill()
    last = finish(job, 1).splitlines()[-1]
    assert last == f"seg: gcs_server of Ray (process {gcs.pid}) ended unexpectedly; the same command goes on from here"
    assert_nothing_is_left(run, below)
    assert part_digests(run).items() <= expected.items()


def test_modules_in_the_current_folder_are_not_taken_for_libraries(region: Path, expected: dict[str, str]) -> None:
    # https://github.com/ray-project/ray/issues/43182
    assert (region / "numpy.py").exists()
    assert len(expected) == PARTS


def signal_all(job: Driver, number: int) -> None:
    """Send a signal to a driver and all processes of its Ray."""
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def remote_digests(run: str) -> dict[str, str]:
    """The digest of each object of a run, but for marks of parts in progress.

    A driver frozen on the point of making one still makes it: see `seg_core.run.fence`.
    """
    return {path: sha256(read_bytes(path) or b"") for path in walk(run) if not path.startswith(attempts_folder(run))}


def test_a_frozen_driver_that_has_been_superseded_changes_nothing(
    region: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{s3}/frozen/run"
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    scene = tmp_path / "scenes" / "a.tif"
    shutil.copytree(region / "scenes", scene.parent)
    frozen = start(region, run, scenes=scene.parent, **keys)
    wait_for_parts(run, 2, frozen)
    signal_all(frozen, signal.SIGSTOP)
    try:
        held = json.loads(read_bytes(f"{run}/{LEASE}") or b"")
        publish(f"{run}/{LEASE}", json.dumps({**held, "place": "elsewhere"}).encode())
        pixels = np.random.default_rng(1).integers(0, 250, (3, SIDE, SIDE)).astype(np.uint8)
        write_geotiff(str(scene), pixels, crs=UTM, transform=NORTH_UP)
        monkeypatch.setattr("seg_core.run.lease.LEASE_TIMEOUT", 1.0)
        go_on(region, run, scene.parent)
        before = remote_digests(run)
        assert sum("/ledger/" not in path for path in before) == PARTS + 2
    finally:
        signal_all(frozen, signal.SIGCONT)
    err = finish(frozen, 1)
    assert err.splitlines()[-1] == f"seg: {run}: another driver has taken this run over: this one ends"
    assert "Traceback" not in err
    assert remote_digests(run) == before
    assert verify(run).ok


def test_a_driver_that_was_frozen_goes_on_and_survives_its_actor(region: Path, expected: dict[str, str]) -> None:
    run = region / "slept"
    job = start(region, run)
    wait_for_parts(run, 2, job)
    signal_all(job, signal.SIGSTOP)
    time.sleep(5)
    signal_all(job, signal.SIGCONT)
    actors = processes(job, "MapWorker")
    assert actors
    for actor in actors:
        actor.kill()
    finish(job)
    assert_whole(run, expected)


DEADLY = """
import os, signal
if os.environ.get("DEADLY"):
    import seg_core.imagery.raster as raster
    read = raster.read_chip
    def deadly(scene, at, *rest, **named):
        if f"{at.row_off} {at.col_off}" == os.environ["DEADLY"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(scene, at, *rest, **named)
    raster.read_chip = deadly
"""


def test_a_window_that_kills_its_process(region: Path, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    run, place = region / "deadly", f"{1024 - HALO} {256 - HALO}"
    err = finish(start(region, run, PYTHONPATH=str(tmp_path), DEADLY=place), code=1)
    assert "2 tiles failed" in err
    failed = [row for row in rows_of(run) if row["status"] == "failed"]
    assert {(row["row_off"], row["col_off"]) for row in failed} == {(1024, 256), (1024, 320)}
    assert {row["error_class"] for row in failed} == {"Crash"}
    go_on(region, run)
    assert_whole(run, expected)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(region: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(
            bytes(2**21 - sum(os.path.getsize(path) for path in published_parts(str(region / "undisturbed"))) // 2)
        )
        err = finish(start(region, disk / "run"), code=1)
        last = err.splitlines()[-1]
        assert re.fullmatch(
            rf"seg: {disk}/run: the run stopped: {disk}/run/\S+: can't be written: No space left on device: "
            "the same command goes on from here",
            last,
        )
        assert 0 < len(published_parts(str(disk / "run"))) < PARTS
        assert not [name for name in os.listdir(disk / "run" / "tiles") if name.startswith(".partial")]
        ballast.unlink()
        go_on(region, disk / "run")
        assert_whole(disk / "run", expected)


CLUSTER = """
import signal, sys
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print("lost", flush=True)
sys.stdin.readline()
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node(region: Path, expected: dict[str, str]) -> None:
    run = region / "lost"
    # In the usual folder, each program on this machine that calls `ray.init()` would join the cluster.
    folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=outside_environment(RAY_TMPDIR=folder.name),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        job = start(region, run, "--address", address, "--actors", "2")
        wait_for_parts(run, 6, job)
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline().strip() == "lost"
        finish(job)
    finally:
        cluster.communicate("\n\n", timeout=60)
        folder.cleanup()
    assert_whole(run, expected)


def test_a_store_that_refuses_breaks_off_and_is_away_for_a_while(
    region: Path, expected: dict[str, str], tmp_path: Path, other_environment: pytest.MonkeyPatch
) -> None:
    server, run = Weed(tmp_path), "s3://tests/run"
    server.start()
    try:
        server.client().upload_file(str(region / "scenes" / "a.tif"), "tests", "scenes/a.tif")
        for name, value in server.environment.items():
            other_environment.setenv(name, value)
        with Proxy(int(server.environment["AWS_ENDPOINT_URL"].rpartition(":")[2]), refused=0.3, cut=0.005) as proxy:
            way = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
            job = start(region, run, scenes="s3://tests/scenes", **way)
            wait_for_parts(run, 4, job)
            assert job.poll() is None
            server.stop()
            time.sleep(10)
            server.start()
            finish(job)
            assert proxy.num_refused > 0
        assert verify(run).ok
        assert rows_of(run) == rows_of(region / "undisturbed")
        assert len(published_parts(run)) == len(expected)
    finally:
        server.stop()
