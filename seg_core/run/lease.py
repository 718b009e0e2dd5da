"""One driver at a time on a run: it has the lease, a file in the run's folder, and renews it while it lives.

A driver that was killed leaves its lease behind. It is taken over at once where its process can be seen to be gone, and
otherwise when it has not been renewed for a while. No clock is compared with another. A driver that was only frozen
then finds that it can no longer change the run: see `fence`.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seg_core.errors import JobError, SegError
from seg_core.run.fence import Lease, parse
from seg_core.storage.files import read_bytes

RENEWAL = 10.0  # s
PATIENCE = 45.0  # s without a renewal, after which a driver elsewhere is given up for dead
GRACE = 5.0  # s after which a lease is taken even if its former owner has no staging folder

log = logging.getLogger(__name__)


@contextmanager
def acquire_lease(run: str) -> Iterator[Lease]:
    """Hold the lease of a run and renew it until the block ends.

    Raises SegError where another driver lives, and JobError where another driver takes the run over meanwhile: what the
    block raises is then only a consequence.
    """
    lease = Lease(run, uuid.uuid4().hex)
    content = {**_this_process(), "owner": lease.owner, "renewals": 0}
    _take(lease, content)
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(lease, content, done), daemon=True)
    renewer.start()
    try:
        try:
            yield lease
        finally:
            done.set()
            renewer.join()
    except BaseException as error:
        if _is_known_to_be_lost(lease):
            raise lease.loss() from error
        raise
    finally:
        lease.release()


def _is_known_to_be_lost(lease: Lease) -> bool:
    with suppress(OSError, SegError):
        return lease.is_lost()
    return False


def _take(lease: Lease, content: dict[str, Any]) -> None:
    """Take the lease, once its owner is dead if it has one."""
    mine, first, since = json.dumps(content).encode(), None, time.monotonic()
    while not lease.acquire(mine):
        held = read_bytes(lease.path)
        if held is None:
            continue
        holder = parse(held)
        near = holder.get("place") == content["place"]
        if first is None and not near:
            log.warning("%s: waiting to see if its driver on %s lives", lease.path, holder.get("host"))
        first, waited = first or held, time.monotonic() - since
        if (near and _is_gone(holder)) or (held == first and waited > PATIENCE):
            if lease.supersede(held, mine, force=waited > GRACE):
                return
        elif near or held != first:
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            raise SegError(
                f"{lease.path}: another driver is at work on this run ({who}): let it finish, or stop it first"
            )
        time.sleep(0.5)


def _renew(lease: Lease, content: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEWAL):
        try:
            lease.check()
            content["renewals"] += 1
            lease.publish(lease.path, json.dumps(content).encode())
        except JobError:
            _interrupt()
            return
        except (OSError, SegError):  # a store that is away now may be back in time
            continue


def _interrupt() -> None:
    """End what the main thread is waiting for, where SIGTERM is handled in Python: else its next write fails."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


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
