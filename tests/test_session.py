"""Actors are sized to the cluster: how many, and what each has of its node. Its processes keep their memory."""

import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
import ray
from conftest import outside_environment
from parts import RESOURCES
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
from ray._private.utils import validate_socket_filepath
from ray.data import DataContext
from ray.experimental.internal_kv import _internal_kv_get

import seg_core
from aerial_seg.capacity import wait_for_cpu
from aerial_seg.processes import ESSENTIAL_NAMES
from aerial_seg.ray_session import (
    AUTHENTICATION_ADVICE,
    WORKER_ENVIRONMENT,
    check_temporary_folder,
    data_threads,
    drop_errors_of_ray,
    ray_session,
    wait_for_data,
)
from aerial_seg.resources import MOST_ACTORS, ActorResources, ExecutionOptions, size_actors
from aerial_seg.segment import size_pool
from aerial_seg.train import _wait_for_room as wait_for_room
from aerial_seg.training.settings import TrainSettings
from seg_core.errors import JobError, SegError

GIB = 2**30


def node(cpus: int, gpus: int = 0, memory: int = 64 * GIB) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": memory, **({"GPU": gpus} if gpus else {})}
    return {"NodeID": secrets.token_hex(), "Alive": True, "Resources": resources}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Nodes as Ray lists them, for a cluster of GPUs can't be had here."""
    nodes: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    return nodes


def size(actors: tuple[int, int] | None = None, gpus_per_actor: float = 1.0, **options: Any) -> ActorResources:
    return size_actors(ExecutionOptions(actors=actors, gpus_per_actor=gpus_per_actor, **options))


def test_on_two_cores_one_actor_has_two_threads_and_two_readers(cluster: list[dict[str, Any]]) -> None:
    cluster.append(node(2, memory=16 * GIB))
    resources = size()
    assert (resources.min_actors, resources.max_actors, resources.num_cpus, resources.num_gpus) == (1, 1, 1, 0)
    assert (resources.threads, resources.readers, resources.memory) == (2, 2, 16 * GIB)
    assert (resources.initial_readers("device"), resources.window_memory) == (2, 16 * GIB)


def test_cores_of_a_large_node_serve_several_actors(cluster: list[dict[str, Any]]) -> None:
    cluster += [node(16), node(16)]
    resources = size(device="cpu")
    assert (resources.max_actors, resources.num_cpus, resources.threads, resources.readers) == (8, 3, 4, 2)
    assert resources.memory == 16 * GIB


def test_beside_a_gpu_all_cores_of_its_share_read(cluster: list[dict[str, Any]]) -> None:
    cluster += [node(2, memory=GIB), node(32, gpus=2)]  # a small node without a GPU counts for nothing
    resources = size()
    assert (resources.max_actors, resources.num_gpus, resources.num_cpus, resources.readers) == (2, 1.0, 15, 16)
    assert resources.memory == 32 * GIB
    readers = [resources.initial_readers(decode) for decode in ("cpu", "device")]
    assert readers == [16, 4]  # few threads feed a GPU's JPEG engine
    assert resources.window_memory == math.inf  # its own is what counts
    shared = size(None, 0.5, device="cuda")
    assert (shared.max_actors, shared.num_gpus, shared.num_cpus, shared.readers) == (4, 0.5, 7, 8)


def test_more_than_the_cluster_has_is_refused(cluster: list[dict[str, Any]]) -> None:
    cluster.append(node(2))
    with pytest.raises(SegError, match="--actors 3: the cluster has room for 2: use --actors 2:3"):
        size((3, 3))
    with pytest.raises(SegError, match="--device cuda: no node of the cluster has a GPU"):
        size(device="cuda")
    cluster.clear()
    with pytest.raises(SegError, match="no node"):
        size()


def test_a_cluster_may_get_nodes_for_further_actors(cluster: list[dict[str, Any]]) -> None:
    cluster += [node(2, memory=16 * GIB), node(2, memory=16 * GIB)]
    alone = size((1, 8))
    assert (alone.min_actors, alone.max_actors, alone.num_cpus) == (2, 2, 1)  # a Ray of this process gets none
    joined = size((1, 8), address="10.0.0.1:6379")
    assert (joined.min_actors, joined.max_actors) == (2, 8)
    assert (joined.num_cpus, joined.memory) == (2, 16 * GIB)  # a node holds no more than it has memory for
    assert size((4, 8), address="10.0.0.1:6379").memory == 8 * GIB
    assert size(address="10.0.0.1:6379") == size()
    reading = size((1, 8), address="10.0.0.1:6379", readers=1)
    assert (reading.num_cpus, reading.reading_tasks) == (1, 1)  # of each node a CPU is left for tasks that read
    cluster[0]["Labels"] = {"ray.io/node-group": "workers"}
    assert size(address="10.0.0.1:6379").max_actors == MOST_ACTORS


@pytest.mark.parametrize("cpus", range(1, 33))
def test_a_node_holds_no_more_actors_than_it_was_divided_for(cluster: list[dict[str, Any]], cpus: int) -> None:
    cluster.append(node(cpus))
    sized = size((1, 100), address="10.0.0.1:6379")
    assert sized.min_actors == -(-cpus // 4)
    assert sized.num_cpus * sized.min_actors <= cpus < sized.num_cpus * (sized.min_actors + 1)


def test_more_processes_wait_for_nodes_than_there_is_room_for_if_they_have_enough_to_do() -> None:
    resources = replace(RESOURCES, min_actors=2, max_actors=50)
    assert [size_pool(resources, True, number) for number in (1, 30, 1000)] == [1, 30, 50]
    assert [size_pool(resources, False, number) for number in (1, 30, 1000)] == [1, 7, 50]


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_train_need_a_cpu_each_and_a_gpu_where_they_are_asked_to() -> None:
    wait_for_room(TrainSettings(workers=4, min_workers=2), None)
    with pytest.raises(SegError, match=r"^workers = 3: the cluster has 2 CPUs, each worker takes one: use fewer$"):
        wait_for_room(TrainSettings(workers=3), None)
    lack = "workers = 1: the cluster has 0 GPUs, each worker takes one"
    with pytest.raises(SegError, match=f"{lack}: use fewer, or --device cpu$"):
        wait_for_room(TrainSettings(device="cuda"), None)
    with pytest.raises(SegError, match=f"{lack}, after 0:01 of waiting for nodes"):
        wait_for_room(TrainSettings(device="cuda", node_timeout=1), "10.0.0.1:6379")


def test_tasks_need_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"CPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    wait_for_cpu(None)
    resources.clear()
    with pytest.raises(SegError, match=r"^the cluster has no node with a CPU for workers: start one$"):
        wait_for_cpu(None)


def test_ray_lets_an_actor_be_ahead_of_the_driver_where_it_is_asked_to() -> None:
    assert DataContext()._max_num_blocks_in_streaming_gen_buffer is not None


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_does_not_fetch_memory_anew_that_it_has_freed() -> None:
    @ray.remote
    def count_faults() -> int:
        import torch

        torch.zeros(2**24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.zeros(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert ray.get(count_faults.remote()) < 1000  # of 160,000 pages


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_inside_a_command_starts_no_process_that_only_a_cluster_needs() -> None:
    programs = {name for process in psutil.Process().children(recursive=True) for name in program(process)}
    assert programs >= ESSENTIAL_NAMES
    assert not programs & {"dashboard.py", "monitor.py", "log_monitor.py"}


@pytest.mark.usefixtures("ray_cluster")
def test_agents_find_an_address_though_there_is_no_dashboard() -> None:
    """They would ask for it each second, and write an error to their log."""
    assert _internal_kv_get(DASHBOARD_ADDRESS, namespace=KV_NAMESPACE_DASHBOARD)


def program(process: psutil.Process) -> list[str]:
    """The names of the files in the command of a process; none if it has ended."""
    with suppress(psutil.Error):
        return [os.path.basename(argument) for argument in process.cmdline()]
    return []


ASK = """
from aerial_seg.cli.main import main
assert main(["models", "show", "built-in"]) == 0
import ray
try:
    ray.put(1)
except Exception as error:
    print(f"{type(error).__name__}: {ray.is_initialized()}")
"""


def test_who_asks_ray_for_something_after_its_end_starts_no_other_one() -> None:
    said = subprocess.check_output([sys.executable, "-c", ASK], env=outside_environment(), text=True)
    assert said.splitlines()[-1] == "RaySystemError: False"


@pytest.mark.usefixtures("ray_cluster")
def test_threads_of_ray_data_do_not_outlive_a_session() -> None:
    rows = iter(ray.data.range(100, override_num_blocks=10).iter_rows())
    next(rows)
    assert data_threads()
    lock = threading.Lock()
    lock.acquire()
    threading.Thread(target=lock.acquire, daemon=True).start()  # of no module
    rows.close()
    wait_for_data()
    assert data_threads() == []
    lock.release()


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that is not connected yet, though this one may be."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "1")  # set while connecting, and taken back here


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("127.0.0.1:99999", "Port out of range"),
        ("nobody.invalid:6379", "not known|name resolution"),
        ("http://127.0.0.1:8265", "Invalid Ray address"),
    ],
)
def test_an_address_where_no_cluster_answers_is_named_at_once(address: str, reason: str) -> None:
    with (
        pytest.raises(SegError, match=f"--address {address}: no Ray cluster answers there .*({reason})"),
        ray_session(address),
    ):
        pass


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_asks_for_a_token_is_one_line_with_the_way_in() -> None:
    address = ray.get_runtime_context().gcs_address
    connect = f"from aerial_seg.ray_session import ray_session\nwith ray_session({address!r}): pass"
    for key in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef"}):
        command = [sys.executable, "-c", connect]
        found = subprocess.run(command, env=outside_environment(**key), capture_output=True, text=True, check=False)
        assert f"SegError: --address {address}: {AUTHENTICATION_ADVICE}" in found.stderr


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("address", "named"), [(None, "RAY_ADDRESS=auto"), ("auto", "--address auto")])
def test_the_line_of_a_cluster_that_turns_away_says_where_its_address_came_from_and_gives_its_reason(
    address: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn_away(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("Failed to connect") from RuntimeError("Traceback\n  line\nGCS cannot find the node\n")

    monkeypatch.setattr(ray, "init", turn_away)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with (
        pytest.raises(SegError, match=rf"^{named}: no Ray cluster answers there \(GCS cannot find the node\)"),
        ray_session(address),
    ):
        pass


SESSION = """
import sys, time
from aerial_seg.ray_session import ray_session
from aerial_seg.terminal import stoppable

with stoppable():
    try:
        with ray_session(None):
            print("ready", flush=True)
            time.sleep(300)
    except KeyboardInterrupt as stop:
        print(type(stop).__name__, stop, flush=True)
"""


@pytest.fixture
def session() -> Iterator["subprocess.Popen[str]"]:
    """A process that starts a Ray, says `ready`, and then how it was ended."""
    command = [sys.executable, "-c", SESSION]
    with subprocess.Popen(command, env=outside_environment(), stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def essential(process: "subprocess.Popen[str]") -> dict[str, psutil.Process]:
    return {child.name(): child for child in psutil.Process(process.pid).children() if child.name() in ESSENTIAL_NAMES}


def test_sigterm_while_ray_starts_is_taken_for_what_it_is(session: "subprocess.Popen[str]") -> None:
    while session.poll() is None and not essential(session):
        time.sleep(0.01)
    below = psutil.Process(session.pid).children(recursive=True)
    session.send_signal(signal.SIGTERM)
    assert session.stdout is not None
    assert session.stdout.readline() == "Terminated \n"
    psutil.wait_procs(below, timeout=30)
    assert [process for process in below if process.is_running()] == []


@pytest.mark.usefixtures("ray_cluster")
def test_workers_and_what_they_start_do_not_import_from_the_current_folder() -> None:
    @ray.remote
    def path() -> tuple[str, list[str], str]:
        command = [sys.executable, "-c", "import sys; print(sys.path[0])"]
        return os.getcwd(), sys.path, subprocess.run(command, stdout=-1, check=True, text=True).stdout.strip()

    folder, own, below = ray.get(path.remote())
    assert not {"", os.path.dirname(sys.argv[0])} & set(own)
    assert folder not in own or folder == os.path.dirname(os.path.dirname(seg_core.__file__))
    assert below not in {"", folder}


@pytest.mark.usefixtures("ray_cluster")
def test_what_workers_are_given_does_not_stay_in_the_environment_of_whoever_started_ray() -> None:
    given = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert WORKER_ENVIRONMENT.items() <= given.items()
    assert "PYTHONSAFEPATH" not in os.environ
    assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_cannot_serve_is_named_before_ray_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 60)
    long.mkdir()
    for folder, reason in ((long, r"longer than the \d\d bytes that Ray has room for"), ("/no", "no folder")):
        monkeypatch.setenv(name, str(folder))
        with pytest.raises(SegError, match=rf"^{name}={folder}: {reason}.*: set RAY_TMPDIR to "), ray_session(None):
            pass


def test_the_longest_temporary_folder_that_is_let_through_has_room_for_a_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TemporaryDirectory(dir="/tmp") as short:
        for length in range(20, 70):
            folder = f"{short}/{'x' * length}"
            os.mkdir(folder)
            monkeypatch.setenv("RAY_TMPDIR", folder)
            try:
                check_temporary_folder()
            except SegError:
                break
            name = f"{folder}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
            validate_socket_filepath(name)  # Ray's own
        else:
            pytest.fail("none was too long")


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(SegError, match=r"^RAY_TMPDIR=/: has 1 MB free, Ray needs 50: set RAY_TMPDIR to another"):
        check_temporary_folder()


@pytest.mark.usefixtures("without_ray")
def test_a_start_of_ray_that_takes_too_long_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_: Any, **__: Any) -> NoReturn:
        # https://github.com/ray-project/ray/blob/master/python/ray/_private/node.py
        raise Exception("The current node timed out during startup. Some of the raylet failed")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", time_out)
    line = r"^Ray has not started in time: \d+ CPUs under a load of \d+: try again$"
    with pytest.raises(JobError, match=line), ray_session(None):
        pass


def test_what_rays_threads_raise_once_a_command_fails_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(str(args.exc_value)))
    drop_errors_of_ray()
    for module in ("ray.data._internal.execution", "rayleigh"):
        fail = eval("lambda: 1 / 0", {"__name__": module})  # noqa: S307 - raised in a module of that name
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert seen == ["division by zero"]  # that of the other module
