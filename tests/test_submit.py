"""Commands on a cluster of two nodes, through Ray's job submission API."""

import getpass
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from conftest import MakeBundle, MakeScene, free_port, outside_environment
from proxy import Proxy
from ray._common.utils import get_default_ray_temp_dir
from ray.util.state import list_tasks
from readme import NAMES, commands
from runs import rows_of
from weed import put

from aerial_seg import submit
from aerial_seg.cli.main import main
from aerial_seg.ray_session import AUTHENTICATION_ADVICE
from aerial_seg.submit import follow
from aerial_seg.submitting.dashboard import MIN_PYTHON, connect
from aerial_seg.submitting.jobs import list_jobs
from aerial_seg.submitting.packages import copy_packages
from seg_core.environment import environment
from seg_core.errors import SegError
from seg_core.version import code_version

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Iterator[str]:  # noqa: ARG001 - it inherits the way
    """Address of a two-node cluster that lives as long as this module's tests, and finds the way to S3."""
    with local_cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as address:
        yield address


@contextmanager
def local_cluster(folder: Path, nodes: int, **environment: str) -> Iterator[str]:
    port = free_port()
    with (folder / "log").open("wb") as log:
        cluster = subprocess.Popen(
            [sys.executable, REPOSITORY / "cluster/local.py", *f"--nodes {nodes} --cpus 1 --port {port}".split()],
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env=outside_environment(**environment),
        )
        try:
            assert cluster.stdout is not None
            address = cluster.stdout.readline().decode().strip()
            assert address == f"http://127.0.0.1:{port}", (folder / "log").read_text()
            yield address
        finally:
            cluster.send_signal(signal.SIGINT)
            assert cluster.wait(60) == 0


class Outcome(NamedTuple):
    """What a command wrote."""

    stdout: str
    stderr: str


def seg(*command: object, folder: Path, code: int = 0, **variables: str) -> Outcome:
    """Run `seg` as a user would, from a folder of theirs, in this process: another takes seconds to start."""
    out, err = io.StringIO(), io.StringIO()
    with environment(variables), chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            found = main([str(word) for word in command])
        except SystemExit as exited:  # wrong usage
            found = exited.code
    assert found == code, out.getvalue() + err.getvalue()
    return Outcome(out.getvalue(), err.getvalue())


TINY = "--width 4 --depth 2 --epochs 1 --steps 2 --batch 4 --crop 128"
SMALL = ["--tile-size", "64", "--part", "128"]


@pytest.mark.usefixtures("without_actors")
def test_a_submitted_job_gives_the_rows_of_a_local_run(
    dashboard: str, make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scene("region/scene.tif", 200, 300)
    bundle = make_bundle("model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ["segment", "../region", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(submit, "copy_packages", copy_and_move(tmp_path / "model", tmp_path / "kept"))
        words = [*command, "--model", "../model", "--out", "remote"]
        followed = seg("submit", "--address", dashboard, "--name", "a test", "--", *words, folder=elsewhere)
    assert "of 6 windows" in followed.stdout
    assert "INFO" not in followed.stderr
    seg(*command, "--model", "../kept", "--out", "local", folder=elsewhere)
    parts = {path.name: path.read_bytes() for path in (elsewhere / "local" / "tiles").iterdir()}
    assert len(parts) == 6
    assert {path.name: path.read_bytes() for path in (elsewhere / "remote" / "tiles").iterdir()} == parts
    recorded = json.loads((elsewhere / "remote/run.json").read_text())
    assert recorded["model"]["uri"] == bundle  # and not the copy that went with the job

    listed = json.loads(seg("jobs", "--address", dashboard, "--json", folder=elsewhere).stdout)["jobs"][0]
    assert (listed["status"], listed["exit_code"]) == ("SUCCEEDED", 0)
    assert listed["command"].startswith("segment ../region")
    assert (listed["name"], listed["progress"], listed["line"]) == ("a test", None, None)
    assert listed["user"] == f"{getpass.getuser()}@{socket.gethostname()}"
    assert (listed["run"], listed["bundle"]) == (str(elsewhere / "remote"), recorded["model"]["hash"])
    assert listed["code"] == code_version()
    started = datetime.fromisoformat(listed["started"])
    assert 0 < (datetime.now(UTC) - started).total_seconds() < 600
    shown = seg("jobs", "--address", dashboard, folder=elsewhere).stdout
    assert re.search(rf"SUCCEEDED .* s  \S+@\S+  a test: segment .*\n    since .*Z, run {elsewhere}/remote, ", shown)
    again = seg("logs", listed["id"], "--address", dashboard, folder=elsewhere)
    assert "of 6 windows" in again.stdout
    assert again.stdout == "".join(line for line in followed.stdout.splitlines(keepends=True) if line.strip())


def copy_and_move(bundle: Path, target: Path) -> Callable[[str, str | None], list[str]]:
    """As `copy_packages`; then the bundle is moved away, so that a job finds only what was sent with it."""

    def copy(folder: str, sent: str | None) -> list[str]:
        copies = copy_packages(folder, sent)
        bundle.rename(target)
        return copies

    return copy


CLIENT = """
import contextlib, io, sys
from aerial_seg.cli.main import main
address, s3, *options = sys.argv[1:]
ids = []
for name in ("north", "south"):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command = ["segment", f"{s3}/two/{name}", "--model", "model", "--out", f"{s3}/two/runs/{name}", *options]
        assert main(["submit", "--address", address, "--no-follow", "--name", name, "--", *command]) == 0
    ids.append(said.getvalue().strip())
for job in ids:
    assert main(["logs", job, "--follow", "--address", address]) == 0
"""


@pytest.mark.usefixtures("without_actors")
def test_two_jobs_of_a_client_that_shares_no_disk_with_the_cluster_both_finish(
    dashboard: str, s3: str, make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """The client's folder and its bundle are in a file system that no other process sees."""
    for name in ("north", "south"):
        put(make_scene(f"region/{name}.tif", 200, 200), f"{s3}/two/{name}/scene.tif")
    bundle, client = make_bundle("model"), tmp_path / "client"
    client.mkdir()
    mount = f"mount -t tmpfs tmpfs {client} && cd {client} && cp -r {bundle} model && touch seen"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    words = [sys.executable, "-c", CLIENT, dashboard, s3, *SMALL]
    command = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {shlex.join(words)}"]
    done = subprocess.run(command, env=outside_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of 4 windows") >= 2
    assert list(client.iterdir()) == []
    for name in ("north", "south"):
        local = seg("segment", f"{s3}/two/{name}", "--model", bundle, "--out", name, *SMALL, folder=tmp_path)
        assert rows_of(f"{s3}/two/runs/{name}") == rows_of(tmp_path / name), local.stderr


def test_a_place_that_the_cluster_lacks_ends_the_job_with_code_2(
    dashboard: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    make_bundle("model")
    command = ["segment", "nowhere.tif", "--model", "model", "--out", "run"]
    found = seg("submit", "--address", dashboard, "--json", "--", *command, folder=tmp_path, code=2)
    line = f"seg: {tmp_path}/nowhere.tif: no such file or folder for node {socket.gethostname()} of the cluster: "
    assert line in found.stderr
    told = json.loads(found.stdout)
    assert (told["status"], told["exit_code"]) == ("FAILED", 2)
    assert told["line"].startswith(line)


def test_wrong_use_shows_before_anything_is_submitted(dashboard: str, tmp_path: Path) -> None:
    before = [job["id"] for job in list_jobs(connect(dashboard))]
    found = seg("submit", "--address", dashboard, "--", "segment", "--nonsense", folder=tmp_path, code=2)
    assert "usage: seg segment" in found.stderr
    other = ["segment", "a.tif", "--out", "run", "--address", "10.0.0.1:6379"]
    refused = {"seg jobs is for this machine": ["jobs"], "--address 10.0.0.1:6379: a job runs on": other}
    for line, command in refused.items():
        assert line in seg("submit", "--address", dashboard, "--", *command, folder=tmp_path, code=2).stderr
    assert [job["id"] for job in list_jobs(connect(dashboard))] == before


def test_a_cluster_of_another_ray_or_with_an_older_python_is_refused_before_anything_is_submitted(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["submit", "--address", dashboard, "--", "plan", "a.tif"]
    monkeypatch.setattr("aerial_seg.submitting.dashboard.MIN_PYTHON", (9, 0))
    here = ".".join(map(str, sys.version_info[:2]))
    refusal = f"the cluster runs Python {here}: this program needs 9.0 or later on each node"
    assert refusal in seg(*command, folder=tmp_path, code=2).stderr
    there = ray.__version__
    monkeypatch.setattr(ray, "__version__", "1.9.0")
    refusal = f"the cluster runs Ray {there}, this machine has Ray 1.9.0: install the same"
    assert refusal in seg(*command, folder=tmp_path, code=2).stderr


def test_the_least_python_of_a_cluster_is_that_of_the_package() -> None:
    assert f'requires-python = ">={".".join(map(str, MIN_PYTHON))}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_a_job_is_stopped_and_resumed_under_its_name(dashboard: str, shared: Path, tmp_path: Path) -> None:
    data = shared / "massachusetts-buildings"
    command = ["train", "--data", data, "--out", "bundle", "--width", "4", "--depth", "2", "--steps", "100"]
    options = ["--address", dashboard, "--no-follow"]
    job = seg("submit", *options, "--name", "long", "--", *command, folder=tmp_path).stdout.strip()
    wait_for_progress(dashboard, job)
    early = seg("resume", job, *options, folder=tmp_path, code=2)
    assert f"{job}: is RUNNING: seg logs {job} --follow" in early.stderr
    stopped = seg("stop", job, "--address", dashboard, folder=tmp_path)
    assert stopped.stderr == f"{job}: STOPPED: what is done stays: seg resume {job} --address {dashboard} goes on\n"
    assert "seg: stopped; the same command goes on" in seg("logs", job, "--address", dashboard, folder=tmp_path).stdout
    assert not (tmp_path / "bundle").exists()

    again = json.loads(seg("resume", job, *options, "--json", folder=tmp_path.parent).stdout)
    assert (again["name"], again["run"]) == ("long", f"{tmp_path}/bundle")
    assert again["command"] == shlex.join(map(str, command))
    assert again["id"] != job
    stopped = seg("stop", again["id"], "--address", dashboard, "--json", folder=tmp_path)
    assert json.loads(stopped.stdout)["status"] == "STOPPED"


def test_a_submitted_training_job_leaves_a_bundle(dashboard: str, dataset: Path, tmp_path: Path) -> None:
    for path in dataset.iterdir():
        (tmp_path / path.name).symlink_to(path)
    command = ["train", "--data", ".", "--out", "b", *shlex.split(TINY)]
    found = seg("submit", "--address", dashboard, "--", *command, folder=tmp_path)
    assert "epoch 1 of 1" in found.stdout
    assert (tmp_path / "b" / "model.json").is_file()
    assert (tmp_path / "b.train" / "samples.png").stat().st_size > 10_000
    assert "is not drawn" not in found.stdout
    deadline = time.monotonic() + 60  # Ray knows of tasks a while later
    while not list_tasks(address=dashboard, filters=[("name", "=", "_draw_samples"), ("state", "=", "FINISHED")]):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_runs_on_the_cluster_that_it_was_given_to_beside_another_ray(dashboard: str, tmp_path: Path) -> None:
    def told(address: str) -> str:
        client = connect(address)
        job = client.submit_job(entrypoint="echo told $RAY_ADDRESS")
        return re.findall(r"^told (\S+:\d+)$", "".join(follow(client, job)), re.MULTILINE)[0]

    with local_cluster(tmp_path, nodes=1) as other:
        addresses = {told(dashboard), told(other)}
        assert len(addresses) == 2
        # Here `ray.init()` finds the cluster that it joins.
        shared = Path(get_default_ray_temp_dir(), "ray_current_cluster")
        assert not shared.exists() or shared.read_text() not in addresses


def test_a_cluster_that_asks_for_a_token_is_one_line_with_the_way_in(tmp_path: Path) -> None:
    key = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef"}
    with local_cluster(tmp_path, nodes=1, **key) as address:
        # Each in a process of its own, for Ray reads the token once.
        listing = ["seg", "jobs", "--address", address, "--json"]
        for wrong in ({}, {**key, "RAY_AUTH_TOKEN": "fedcba9876543210"}):
            found = subprocess.run(
                listing, env=outside_environment(**wrong), capture_output=True, text=True, check=False
            )
            assert (found.returncode, found.stderr) == (2, f"seg: --address {address}: {AUTHENTICATION_ADVICE}\n")
        listed = subprocess.check_output(listing, env=outside_environment(**key), text=True)
        assert json.loads(listed) == {"jobs": []}


def wait_for_progress(dashboard: str, job: str) -> str | None:
    """What `seg jobs` says of a job that runs."""
    for _ in range(600):
        found = next(each for each in list_jobs(connect(dashboard)) if each["id"] == job)
        if found["line"]:
            return str(found["line"])
        time.sleep(0.1)
    return None


def test_a_job_that_finds_no_room_says_what_it_waits_for(
    dashboard: str, make_scene: MakeScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "PENDING_TIMEOUT", 1.0)
    command = ["--address", dashboard, "--no-follow", "--num-gpus", "1", "--", "plan", make_scene()]
    job = seg("submit", *command, folder=tmp_path).stdout.strip()
    found = seg("stop", job, "--address", dashboard, folder=tmp_path, code=1)
    assert f"{job}: waits for the cluster to start it (on a node with --num-gpus 1 free), and can't" in found.stderr


def start_to_follow(job: str, address: str) -> "subprocess.Popen[str]":
    """Follow a job in a process of its own, until it has said `begun`, and nothing of Ray's before it."""
    command = ["seg", "logs", job, "-f", "--address", address]
    following = subprocess.Popen(
        command, env=outside_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert following.stdout is not None
    assert following.stdout.readline() == "begun\n"
    return following


def test_whoever_stops_following_or_loses_the_cluster_is_told_how_to_go_on(dashboard: str, tmp_path: Path) -> None:
    job = connect(dashboard).submit_job(entrypoint="echo begun; while sleep 1; do echo more; done")
    assert wait_for_progress(dashboard, job) in {"begun", "more"}
    following = start_to_follow(job, dashboard)
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    where = f"--address {dashboard}"
    back, end = f"seg logs {job} --follow {where} shows it again", f"seg stop {job} {where} ends it"
    assert err == f"seg: the job goes on: {back}, {end}\n"
    assert following.returncode == 130

    with Proxy(int(dashboard.rpartition(":")[2])) as proxy:
        following = start_to_follow(job, f"127.0.0.1:{proxy.port}")
        proxy.cut = 1.0
        _, err = following.communicate(timeout=60)
    assert re.fullmatch(rf"seg: {job}: the cluster no longer answers \(.*\): what is done stays: submit .*\n", err)
    assert following.returncode == 1
    seg("stop", job, "--address", dashboard, folder=tmp_path)


def test_the_address_that_is_named_counts_before_the_environment(dashboard: str, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        nowhere = f"http://127.0.0.1:{free_port()}"
        found = seg("jobs", "--address", nowhere, folder=tmp_path, code=2, **{name: dashboard})
        assert f"--address {nowhere}: no Ray dashboard answers there" in found.stderr
    seg("jobs", "--address", dashboard, folder=tmp_path, RAY_API_SERVER_ADDRESS=nowhere)
    seg("jobs", folder=tmp_path, RAY_API_SERVER_ADDRESS=dashboard)


def test_the_address_of_a_dashboard_needs_no_scheme(dashboard: str) -> None:
    assert connect(dashboard.removeprefix("http://")).get_version()
    with pytest.raises(SegError, match=r"^--address ray://127.0.0.1:10001: not a Ray dashboard: use http://HOST:8265"):
        connect("ray://127.0.0.1:10001")


def test_an_address_where_nothing_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerial_seg.submitting.dashboard.ANSWER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (free_port(), silent.getsockname()[1]):
            found = seg("jobs", "--address", f"http://127.0.0.1:{port}", folder=tmp_path, code=2)
            assert "no Ray dashboard answers there: name the one" in found.stderr
            assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if commands(name, on_cluster=True)])
def test_the_cluster_commands_of_the_readmes_run(
    dashboard: str, name: str, make_scene: MakeScene, tmp_path: Path
) -> None:
    make_scene("imagery/scene.tif", 64, 64)
    start, *others = commands(name, on_cluster=True)
    assert start.startswith("python cluster/local.py")  # the fixture has started it
    for command in others:
        words = shlex.split(command)[1:]
        if "ID" in words:
            listed = seg("jobs", "--address", dashboard, "--json", folder=tmp_path).stdout
            words[words.index("ID")] = json.loads(listed)["jobs"][0]["id"]
        seg(*words, folder=tmp_path, RAY_API_SERVER_ADDRESS=dashboard)
