"""One driver at a time on a run: it holds a lease, a file in the run's folder, and renews it while it lives.

Two drivers would do no harm to the rows, for both publish the same parts under the same names; but all work would be
done twice. A driver that was killed leaves its lease behind. It is taken over at once where its process can be seen to
be gone, and otherwise when it has not been renewed for a while. No clock is compared with another.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seg_core.errors import JobError, SegError
from seg_core.storage import create, publish, read_bytes, remove

LEASE = "driver.json"
RENEWAL = 10.0  # s
PATIENCE = 45.0  # s without a renewal, after which a driver elsewhere is given up for dead


@contextmanager
def hold(run: str) -> Iterator[Callable[[], None]]:
    """Hold the lease of a run. Yields a function that raises JobError where somebody has taken it over.

    Raises SegError where another driver lives.
    """
    path, me = f"{run}/{LEASE}", {**_this_process(), "owner": uuid.uuid4().hex, "renewals": 0}
    _take(path, me)
    lost, done = threading.Event(), threading.Event()

    def check() -> None:
        if lost.is_set():
            raise JobError(f"{run}: another driver has taken this run over")

    renewer = threading.Thread(target=_renew, args=(path, me, lost, done), daemon=True)
    renewer.start()
    try:
        yield check
    finally:
        done.set()
        renewer.join()
        if not lost.is_set():
            remove(path)


def _take(path: str, me: dict[str, Any]) -> None:
    """Create the lease, once that of a dead driver is removed."""
    first, since = None, time.monotonic()
    while not create(path, json.dumps(me).encode()):
        held = read_bytes(path)
        if held is None:
            continue
        holder = _parse(held)
        if holder.get("owner") == me["owner"]:  # it was created, and the answer that said so was lost
            return
        near = holder.get("place") == me["place"]
        if first is None and not near:
            print(f"{path}: waiting whether its driver on {holder.get('host')} lives", file=sys.stderr, flush=True)
        first = first or held
        if (near and _is_gone(holder)) or (held == first and time.monotonic() - since > PATIENCE):
            remove(path)
        elif near or held != first:
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            raise SegError(f"{path}: another driver is at work on this run ({who}): let it finish, or stop it first")
        time.sleep(0.5)


def _renew(path: str, me: dict[str, Any], lost: threading.Event, done: threading.Event) -> None:
    while not done.wait(RENEWAL):
        try:
            held = read_bytes(path)
            if held is not None and _parse(held).get("owner") != me["owner"]:
                lost.set()
                return
            me["renewals"] += 1
            publish(path, json.dumps(me).encode())
        except (OSError, SegError):  # a store that is away now may be back in time
            continue


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "place": _place(), "pid": pid, "started": _started(pid)}


def _place() -> str:
    """What tells whose process numbers these are: the machine since it was started, and the container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(space)}" if boot.exists() and space.exists() else uuid.uuid4().hex


def _started(pid: int) -> str | None:
    """When a process began, in the system's own count: a later process of the same number began at another time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder whose process could be seen from here is dead."""
    return _started(int(holder["pid"])) != holder.get("started")
