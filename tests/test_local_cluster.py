"""Clusters on this machine: their sizes, their token, where they listen, and what is said where they can't start."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import boto3
import psutil
import pytest
import ray
from conftest import TOKEN, MakeBundle, MakeScene, free_port, outside_environment
from local_cluster import SCRIPT, LocalCluster, listening, local_cluster
from ray.job_submission import JobSubmissionClient
from weed import FINDABLE, put

LOOPBACK = {"127.0.0.1"}
SIZES = """
import json, ray
ray.init(log_to_driver=False)
claim = ray.remote(num_gpus=2)(ray.util.get_node_ip_address).remote()  # more than one node has left to another
ray.get(claim)
sizes = [{key: node["Resources"].get(key, 0) for key in ("CPU", "GPU", "memory")} for node in ray.nodes()]
print("sizes", json.dumps(sizes), flush=True)
import time
time.sleep(600)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets, in which nothing is."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    yield made
    assert list(made.iterdir()) == [made / "log"]  # the cluster has left nothing else
    shutil.rmtree(made)


KEYS = {"AWS_ACCESS_KEY_ID": "another", "AWS_SECRET_ACCESS_KEY": FINDABLE}


@pytest.fixture(scope="module")
def cluster(folder: Path, s3: str) -> Iterator[LocalCluster]:  # noqa: ARG001 - its processes inherit the way to S3
    """A cluster whose nodes have keys to S3 and a token that can be found wherever they are written."""
    sizes = ["--nodes", "2", "--head-cpus", "0", "--gpus", "3", "--memory", "2"]
    with local_cluster(folder, *sizes, RAY_TMPDIR=str(folder), **KEYS) as started:
        yield started


def run_until(cluster: LocalCluster, entrypoint: str, pattern: str) -> str:
    """Run a job until it has written what fits a pattern, of which the group is returned."""
    client = JobSubmissionClient(cluster.address)
    job = client.submit_job(entrypoint=entrypoint)
    for _ in range(1200):
        found = re.search(pattern, client.get_job_logs(job))
        if found:
            return found[1]
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.1)
    pytest.fail(client.get_job_logs(job))


def test_nodes_have_the_size_that_is_asked_for_and_listen_on_loopback_alone(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """While a job, its driver and a worker run, on both nodes."""
    (tmp_path / "sizes.py").write_text(SIZES)
    sizes = json.loads(run_until(cluster, f"{sys.executable} {tmp_path}/sizes.py", r"sizes (\[.*\])"))
    assert sorted(node["CPU"] for node in sizes) == [0, 1]
    assert [(node["GPU"], node["memory"]) for node in sizes] == [(3, 2**31)] * 2
    found = listening(cluster.process.pid)
    assert set(found) == LOOPBACK, found
    assert {"gcs_server", "raylet"} <= found["127.0.0.1"]
    assert any(name.startswith("python") for name in found["127.0.0.1"])  # the job's driver
    assert len(found["127.0.0.1"]) > 3  # agents and workers have names of their own


def test_a_cluster_asks_for_the_token_of_its_user(cluster: LocalCluster) -> None:
    def code(**headers: str) -> int:
        try:
            asked = urllib.request.Request(f"{cluster.address}/api/jobs/", headers=headers)  # noqa: S310 - http
            return int(urllib.request.urlopen(asked).status)  # noqa: S310
        except HTTPError as error:
            return int(error.code)

    assert code() == 401
    assert code(Authorization="Bearer 0123456789abcdef") == 403
    assert code(Authorization=f"Bearer {TOKEN.read_text().strip()}") == 200
    assert "authentication: token" in cluster.log.read_text()


def test_no_node_sends_usage_statistics(cluster: LocalCluster) -> None:
    nodes = [each for each in psutil.Process(cluster.process.pid).children() if each.name() in {"gcs_server", "raylet"}]
    assert {each.name() for each in nodes} == {"gcs_server", "raylet"}
    assert {each.environ().get("RAY_USAGE_STATS_ENABLED") for each in nodes} == {"0"}


def test_seg_sends_that_token_by_itself(cluster: LocalCluster) -> None:
    command = ["seg", "jobs", "--address", cluster.address, "--json"]
    listed = subprocess.check_output(command, env=outside_environment(), text=True)
    assert "jobs" in json.loads(listed)


def test_a_token_is_made_once_and_for_its_user_alone(tmp_path: Path) -> None:
    code = (
        "import importlib.util, os, pathlib, sys, time\n"
        "spec = importlib.util.spec_from_file_location('local', sys.argv[1])\n"
        "local = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(local)\n"
        "local.require_token()\n"
        "print(os.environ['RAY_AUTH_MODE'], (pathlib.Path.home() / '.ray/auth_token').read_text())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, SCRIPT], env=outside_environment(HOME=str(tmp_path)), stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    said = {each.communicate()[0] for each in started}
    assert len(said) == 1
    assert re.fullmatch(rb"token [0-9a-f]{64}\n", said.pop())
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def places_of(secrets: list[str], folder: Path, root: int) -> list[str]:
    """The files below a folder, and the arguments of the processes below one, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            arguments = " ".join(process.cmdline())
            found += [arguments] if any(secret in arguments for secret in secrets) else []
    return found


def test_secrets_are_in_no_arguments_metadata_or_logs(
    cluster: LocalCluster, folder: Path, s3: str, make_scene: MakeScene, make_bundle: MakeBundle
) -> None:
    """Not of a job that reads and writes with them and tells all it can, nor in its run."""
    put(make_scene("scene.tif", 64, 64), f"{s3}/secrets/scene.tif")
    environment = outside_environment(**KEYS, RAY_API_SERVER_ADDRESS=cluster.address)
    secrets = [FINDABLE, TOKEN.read_text().strip()]
    model = ["--model", make_bundle(), "--device", "cpu", "--tile-size", "64", "--window", "64", "--out"]
    command = ["seg", "submit", "--", "segment", f"{s3}/secrets/", *model, f"{s3}/secret-run", "--debug"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    said += subprocess.check_output(["seg", "jobs", "--json"], env=environment, text=True)
    jobs = JobSubmissionClient(cluster.address).list_jobs()
    assert any("secrets/" in str(job) for job in jobs)
    assert not any(secret in said + str(jobs) for secret in secrets)
    assert places_of(["secret-run"], folder, cluster.process.pid)  # what is searched is what jobs write to
    assert places_of(secrets, folder, cluster.process.pid) == []
    names = [
        each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket="tests", Prefix="secret-run/")["Contents"]
    ]
    assert "secret-run/run.json" in names
    for name in names:
        held = boto3.client("s3").get_object(Bucket="tests", Key=name)["Body"].read()
        assert not any(secret.encode() in held for secret in secrets)


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_inside_a_command_listens_on_loopback_alone() -> None:
    assert ray.get(ray.remote(ray.util.get_node_ip_address).remote()) == "127.0.0.1"
    found = listening(os.getpid())
    assert set(found) == LOOPBACK, found
    assert {"gcs_server", "raylet"} <= found["127.0.0.1"]


def test_addresses_of_other_machines_would_be_seen() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))  # noqa: S104 - what is to be found
        server.listen()
        assert psutil.Process().name() in listening(os.getpid())["0.0.0.0"]  # noqa: S104


def refused(*options: object, **variables: str) -> str:
    """The one line with which a cluster does not start."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    done = subprocess.run(
        command, env=outside_environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("local.py: ").rstrip()


def test_a_port_that_is_taken_is_one_line_with_the_option() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        server.listen()
        port = server.getsockname()[1]
        why = "the dashboard can't listen there (Address already in use)"
        assert refused("--port", port) == f"--port {port}: {why}: choose another --port"


def test_a_folder_that_is_of_no_use_is_one_line_with_the_variable(tmp_path: Path) -> None:
    absent, long = str(tmp_path / "absent"), tmp_path / ("long" * 20)
    long.mkdir()
    assert refused(RAY_TMPDIR=absent).startswith(f"RAY_TMPDIR={absent}: no folder that can be written to: set")
    assert refused(RAY_TMPDIR=str(long)).startswith(f"RAY_TMPDIR={long}: longer than the 23 bytes that Ray has room")


@pytest.mark.parametrize(
    "options", [("--nodes", 0), ("--cpus", -1), ("--head-cpus", -2), ("--gpus", -1), ("--port", 0)]
)
def test_a_number_that_is_of_no_use_is_one_line_with_the_option(options: tuple[str, int]) -> None:
    assert refused(*options).startswith(f"{options[0]} {options[1]}: ")
