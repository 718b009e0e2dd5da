"""One driver at a time holds a run, on disk and in S3; one that is dead holds nothing."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seg_core import lease
from seg_core.errors import JobError, SegError
from seg_core.lease import LEASE, hold
from seg_core.storage import create, make_folder, publish, read_bytes, stat

HOLDER = """
import sys, time
from seg_core.lease import hold
with hold(sys.argv[1]):
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
        with hold(run) as check:
            check()
            assert stat(f"{run}/{LEASE}") is not None
        assert stat(f"{run}/{LEASE}") is None


def test_a_second_driver_is_refused_by_name(run: str, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(SegError, match=rf"another driver is at work on this run \(process {other.pid} on "), hold(run):
        pass
    assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["pid"] == other.pid


def test_the_lease_of_a_killed_driver_is_taken_over_at_once(run: str, other: "subprocess.Popen[str]") -> None:
    other.kill()
    other.wait()
    began = time.monotonic()
    with hold(run):
        assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["pid"] == os.getpid()
    assert time.monotonic() - began < lease.PATIENCE / 2


def test_the_lease_of_a_driver_elsewhere_is_taken_over_when_it_is_no_longer_renewed(
    run: str, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other.kill()
    of_elsewhere(run)
    monkeypatch.setattr(lease, "PATIENCE", 1.5)
    with hold(run):
        pass
    assert "waiting whether its driver on far lives" in capsys.readouterr().err


def test_a_driver_elsewhere_that_renews_its_lease_is_alive(run: str, other: "subprocess.Popen[str]") -> None:
    other.kill()
    of_elsewhere(run)
    timer = threading.Timer(1.0, of_elsewhere, (run,), {"renewals": 1})
    timer.start()
    with pytest.raises(SegError, match="another driver is at work"), hold(run):
        pass
    timer.join()


def lose(run: str) -> None:
    """Hold a run that somebody else takes."""
    with hold(run) as check:
        of_elsewhere(run, owner="somebody")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.1)
            check()


def test_who_lost_the_lease_is_told(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL", 0.2)
    make_folder(run)
    with pytest.raises(JobError, match="another driver has taken this run over"):
        lose(run)
    assert json.loads(read_bytes(f"{run}/{LEASE}") or b"")["owner"] == "somebody"


def test_a_lease_whose_creation_was_answered_by_nobody_is_held(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(run)
    monkeypatch.setattr(lease, "create", lambda path, content: create(path, content) and False)
    with hold(run) as check:
        check()
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
