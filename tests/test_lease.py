"""One driver at a time holds a run, on disk and in S3; one that is dead holds nothing."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from seg_core.errors import JobError, SegError
from seg_core.run import lease
from seg_core.run.fence import LEASE, Lease
from seg_core.run.lease import acquire_lease, find_driver
from seg_core.storage import files as storage
from seg_core.storage.files import create, make_folder, publish, read_bytes, stat, walk

HOLDER = """
import sys, time
from seg_core.run.lease import acquire_lease
with acquire_lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def other(run: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def of_elsewhere(run: str, **changes: Any) -> None:
    """Make the lease look like that of a process on another machine."""
    held = json.loads(read_bytes(f"{run}/{LEASE}") or b"")
    publish(f"{run}/{LEASE}", json.dumps({**held, "place": "elsewhere", "host": "far", **changes}).encode())


def test_a_file_is_created_once(run: str) -> None:
    make_folder(run)
    assert create(f"{run}/a", b"one")
    assert not create(f"{run}/a", b"two")
    assert read_bytes(f"{run}/a") == b"one"


def test_a_lease_is_given_back(run: str) -> None:
    for _ in range(2):
        with acquire_lease(run) as held:
            held.check()
            assert stat(f"{run}/{LEASE}") is not None
        assert stat(f"{run}/{LEASE}") is None


def test_who_holds_a_lease_is_found_while_it_lives(run: str, other: "subprocess.Popen[str]") -> None:
    assert (find_driver(run) or "").startswith(f"process {other.pid} on ")
    other.kill()
    other.wait()
    assert find_driver(run) is None
    of_elsewhere(run)
    assert find_driver(run) == f"process {other.pid} on far"  # whether it is alive can't be seen from here
    assert find_driver(f"{run}/nowhere") is None


def test_a_second_driver_is_refused_by_name(run: str, other: "subprocess.Popen[str]") -> None:
    with (
        pytest.raises(SegError, match=rf"another driver is at work on this run \(process {other.pid} on "),
        acquire_lease(run),
    ):
        pass
    assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["pid"] == other.pid


def test_a_second_driver_is_told_the_job_of_the_first(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.JOB_VARIABLE, "raysubmit_a")
    refused = pytest.raises(SegError, match=rf"\(job raysubmit_a, process {os.getpid()} on ")
    with acquire_lease(run), refused, acquire_lease(run):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lease_of_a_killed_driver_is_taken_over_at_once(
    run: str, other: "subprocess.Popen[str]", reaped: bool
) -> None:
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # its parent may not have asked for its exit code yet
    if reaped:
        other.wait()
    began = time.monotonic()
    with acquire_lease(run):
        assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["pid"] == os.getpid()
    assert time.monotonic() - began < lease.LEASE_TIMEOUT / 2


def test_the_lease_of_a_driver_elsewhere_is_taken_over_when_it_is_no_longer_renewed(
    run: str, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other.kill()
    of_elsewhere(run)
    monkeypatch.setattr(lease, "LEASE_TIMEOUT", 1.5)
    with acquire_lease(run):
        pass
    assert "waiting to see if its driver on far is alive" in caplog.text


def test_a_driver_elsewhere_that_renews_its_lease_is_alive(run: str, other: "subprocess.Popen[str]") -> None:
    other.kill()
    of_elsewhere(run)
    timer = threading.Timer(1.0, of_elsewhere, (run,), {"renewals": 1})
    timer.start()
    with pytest.raises(SegError, match="another driver is at work"), acquire_lease(run):
        pass
    timer.join()


def lose(run: str) -> None:
    """Hold a run that somebody else takes."""
    with acquire_lease(run) as held:
        of_elsewhere(run, owner="somebody")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.1)
            held.check()


def test_who_lost_the_lease_is_told(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL", 0.2)
    make_folder(run)
    with pytest.raises(JobError, match="another driver has taken this run over"):
        lose(run)
    assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["owner"] == "somebody"


def test_a_disk_that_is_full_for_a_moment_ends_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, renewed = storage.publish, list[bool]()

    def publish_to_full_disk(path: str, content: bytes, staging: str | None = None) -> None:
        renewed.append(len(renewed) > 0)
        if not renewed[-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, staging)

    monkeypatch.setattr(lease, "RENEWAL_INTERVAL", 0.05)
    with acquire_lease(str(tmp_path)) as held:
        monkeypatch.setattr(storage, "publish", publish_to_full_disk)
        deadline = time.monotonic() + 60
        while not any(renewed):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held.check()


FREEZER = """
import os, signal, sys
from seg_core.storage import files as storage
from seg_core.errors import SegError
from seg_core.run.fence import Lease
from seg_core.run.lease import acquire_lease

run, what = sys.argv[1:]
path, freezing, is_lost = f"{run}/tiles/a", False, Lease.is_lost

def freeze(*_):
    global freezing
    if freezing:
        freezing = False
        os.kill(os.getpid(), signal.SIGSTOP)

def check_and_freeze(lease):
    lost = is_lost(lease)
    freeze()
    return lost

Lease.is_lost = check_and_freeze  # in S3 the last step before the put
os.fsync = freeze  # on disk the last step before the rename
try:
    with acquire_lease(run) as lease:
        if what == "replace":
            lease.publish(path, b"before")
        freezing = True
        if what == "remove":
            freeze()
            lease.remove(path)
        elif what == "renew":
            lease.renew(b'{"owner": "%s"}' % lease.owner.encode())
        else:
            lease.publish(path, b"old")
except SegError as error:
    sys.exit(f"seg: {error}")
"""


@contextmanager
def ended(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Kill a process at the end: a test that fails while it is stopped would wait for it for ever."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize("what", ["write", "replace", "remove", "renew"])
def test_a_driver_frozen_on_the_point_of_a_write_changes_nothing_once_it_has_been_superseded(
    run: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(run)
    make_folder(f"{run}/tiles")
    command = [sys.executable, "-c", FREEZER, run, what]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as frozen, ended(frozen):
        os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
        of_elsewhere(run)
        monkeypatch.setattr(lease, "LEASE_TIMEOUT", 0.5)
        with acquire_lease(run) as held:
            held.publish(f"{run}/tiles/a", b"new")
        frozen.send_signal(signal.SIGCONT)
        _, err = frozen.communicate(timeout=60)
        assert frozen.returncode == 1
        assert err == f"seg: {run}: another driver has taken this run over: this one ends\n"
        assert read_bytes(f"{run}/tiles/a") == b"new"
    assert sorted(walk(run)) == [f"{run}/tiles/a"]


def test_a_driver_frozen_within_a_renewal_leaves_the_lease_to_its_successor(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(run)
    command = [sys.executable, "-c", FREEZER, run, "renew"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as frozen, ended(frozen):
        os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
        of_elsewhere(run)
        monkeypatch.setattr(lease, "LEASE_TIMEOUT", 0.5)
        with acquire_lease(run) as held:
            frozen.send_signal(signal.SIGCONT)
            _, err = frozen.communicate(timeout=60)
            assert frozen.returncode == 1
            assert err == f"seg: {run}: another driver has taken this run over: this one ends\n"
            held.check()


@pytest.mark.parametrize("run", ["local"], indirect=True)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_cannot_be_written_is_named_with_the_reason(
    run: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with acquire_lease(run) as held, monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(JobError) as raised:
            held.publish(f"{run}/a", b"content")
    assert str(raised.value) == f"{run}/a: can't be written: {os.strerror(number)}"
    assert os.listdir(run) == []


def test_a_driver_that_was_frozen_and_not_superseded_goes_on(run: str) -> None:
    make_folder(run)
    make_folder(f"{run}/tiles")
    with subprocess.Popen([sys.executable, "-c", FREEZER, run, "write"]) as frozen, ended(frozen):
        os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
        frozen.send_signal(signal.SIGCONT)
        assert frozen.wait(timeout=60) == 0
    assert read_bytes(f"{run}/tiles/a") == b"old"
    assert stat(f"{run}/{LEASE}") is None


def test_of_drivers_that_begin_at_once_one_gets_the_lease(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(run)
    drivers, together = [Lease(run, str(number)) for number in range(4)], threading.Barrier(4)
    make_staging = Lease._make_staging

    def make_and_wait(driver: Lease) -> None:
        make_staging(driver)
        together.wait(60)  # each is about to look whether the lease is free

    monkeypatch.setattr(Lease, "_make_staging", make_and_wait)
    with ThreadPoolExecutor(len(drivers)) as pool:
        got = list(pool.map(lambda driver: driver.acquire(json.dumps({"owner": driver.owner}).encode()), drivers))
    assert got.count(True) == 1
    assert [driver.is_lost() for driver in drivers] == [not each for each in got]


def test_of_two_successors_of_a_dead_driver_one_gets_the_lease(run: str, other: "subprocess.Popen[str]") -> None:
    other.kill()
    other.wait()
    two = [subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda job: job.stdout.readline(), two))
        assert sorted(outcomes) == ["", "held\n"]
    finally:
        for job in two:
            job.kill()
            job.communicate()


@pytest.mark.parametrize("run", ["local"], indirect=True)
def test_a_lease_of_a_version_without_staging_folders_is_taken_over(
    run: str, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    other.kill()
    other.wait()
    (folder,) = Path(run).glob(".partial-*")
    folder.rmdir()
    monkeypatch.setattr(lease, "STAGING_TIMEOUT", 0.5)
    with acquire_lease(run):
        pass
    assert os.listdir(run) == []


def test_what_killed_drivers_left_in_their_staging_folders_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / ".partial-0" / ".partial-1"
    left.parent.mkdir()
    left.touch()
    with acquire_lease(str(tmp_path)) as held:
        assert sorted(os.listdir(tmp_path)) == sorted([LEASE, os.path.basename(held.staging)])
    assert os.listdir(tmp_path) == []


def test_a_copy_of_a_lease_writes_for_its_owner(run: str) -> None:
    make_folder(run)
    with acquire_lease(run) as held:
        copy.copy(held).publish(f"{run}/a", b"content")
    assert read_bytes(f"{run}/a") == b"content"


def test_a_lease_whose_creation_was_answered_by_nobody_is_held(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(run)
    monkeypatch.setattr(storage, "create", lambda path, content: create(path, content) and False)
    with acquire_lease(run) as held:
        held.check()
    assert stat(f"{run}/{LEASE}") is None


def test_a_disk_without_hard_links_holds_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = str(tmp_path / "a")
    assert create(path, b"one")
    assert not create(path, b"two")
    assert read_bytes(path) == b"one"
    assert os.listdir(tmp_path) == ["a"]
