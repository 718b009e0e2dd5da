"""The lease of a run, which lets only one driver change it: a file in the run's folder that the driver keeps renewing.

A driver that was killed leaves its lease behind. Another driver takes the lease over at once if it can see that the
process is gone, and otherwise if the lease has not been renewed for LEASE_TIMEOUT. Clocks of different machines are
never compared. A driver that was only frozen can no longer change the run afterwards: see `fence`.
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
from seg_core.run.fence import Lease, parse_lease
from seg_core.storage.files import read_bytes

RENEWAL_INTERVAL = 10.0  # s
LEASE_TIMEOUT = 45.0  # s without a renewal, after which a driver on another machine is taken for dead
STAGING_TIMEOUT = 5.0  # s of waiting, after which a lease is taken over even if its owner has no staging folder

JOB_VARIABLE = "AERIAL_SEG_JOB"  # environment variable with the id of the job that this process runs, on a cluster

log = logging.getLogger(__name__)


@contextmanager
def acquire_lease(run: str) -> Iterator[Lease]:
    """Hold the lease of a run and renew it until the block ends.

    Raises SegError if another driver holds the lease and is alive. Raises JobError if another driver takes the run over
    during the block, instead of the error in the block that this has caused.
    """
    lease = Lease(run, uuid.uuid4().hex)
    content = {**_this_process(), "owner": lease.owner, "renewals": 0}
    _acquire(lease, content)
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
            raise lease.lost_error() from error
        raise
    finally:
        lease.release()


def find_driver(run: str) -> str | None:
    """Return which driver holds the lease of a run, in a few words; None if none does, or its process has ended.

    Whether a process on another machine is alive is not known.
    """
    held = read_bytes(Lease(run, "").path)
    if held is None:
        return None
    holder = parse_lease(held)
    return None if holder.get("place") == _pid_scope() and _is_dead(holder) else _describe(holder)


def _is_known_to_be_lost(lease: Lease) -> bool:
    with suppress(OSError, SegError):
        return lease.is_lost()
    return False


def _acquire(lease: Lease, content: dict[str, Any]) -> None:
    """Acquire the lease, or take it over from a dead owner. Raises SegError if the owner is alive."""
    own, first, since = json.dumps(content).encode(), None, time.monotonic()
    while not lease.acquire(own):
        held = read_bytes(lease.path)
        if held is None:
            continue
        holder = parse_lease(held)
        same_place = holder.get("place") == content["place"]
        if first is None and not same_place:
            log.warning("%s: waiting to see if its driver on %s is alive", lease.path, holder.get("host"))
        first, waited = first or held, time.monotonic() - since
        if (same_place and _is_dead(holder)) or (held == first and waited > LEASE_TIMEOUT):
            if lease.supersede(held, own, force=waited > STAGING_TIMEOUT):
                return
        elif same_place or held != first:
            raise SegError(
                f"{lease.path}: another driver is at work on this run ({_describe(holder)}): let it finish, or stop it "
                "first"
            )
        time.sleep(0.5)


def _renew(lease: Lease, content: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEWAL_INTERVAL):
        try:
            content["renewals"] += 1
            lease.renew(json.dumps(content).encode())
        except JobError:
            _interrupt()
            return
        except (OSError, SegError):  # a store that is unavailable or a disk that is full now may be back in time
            continue


def _interrupt() -> None:
    """Interrupt the main thread if Python handles SIGTERM. Otherwise its next write will fail."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _describe(holder: dict[str, Any]) -> str:
    """Return who holds a lease: the job, where it is one of a cluster, and the process."""
    process = f"process {holder.get('pid')} on {holder.get('host')}"
    return f"job {holder['job']}, {process}" if holder.get("job") else process


def _this_process() -> dict[str, Any]:
    pid, job = os.getpid(), os.environ.get(JOB_VARIABLE)
    process = {"host": socket.gethostname(), "place": _pid_scope(), "pid": pid, "started": _start_time(pid)}
    return {**process, "job": job} if job else process


def _pid_scope() -> str:
    """Return an identifier of the boot of the machine and of the container, within which a pid means one process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.exists():
        return uuid.uuid4().hex
    return f"{boot.read_text().strip()} {os.readlink(namespace)}"


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot, or None if it has ended.

    A process that has ended stays in the list while its parent has not asked for its exit code (state Z or X).
    The time tells the process from a later one with the same pid. It does not come from psutil, which gives it on the
    wall clock: if that was set in the meantime, a process that is alive would be taken for another one.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if status[0] in {"Z", "X"} else status[19]


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of a holder on this machine, in this container, has ended."""
    return _start_time(int(holder["pid"])) != holder.get("started")
