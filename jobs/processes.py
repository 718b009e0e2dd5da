"""Tie the processes of a Ray started by this command to it: neither outlives the other."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from .terminal import RayEnded, note

CHECK_INTERVAL = 1.0  # s between two checks of the essential processes
UPDATE_INTERVAL = 5.0  # s between two searches for descendants, which look at all processes of the machine
COMMAND_TIMEOUT = 15.0  # s that the command has to end after an essential process has ended
KILL_TIMEOUT = 5.0  # s to wait until killed processes are gone
ENDED = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
ESSENTIAL_NAMES = {"gcs_server", "raylet"}  # Ray itself takes a minute or more to notice that one has ended


def list_processes() -> dict[psutil.Process, int]:
    """Return all processes of this machine that have not ended, each with the pid of its parent.

    psutil compares processes by pid and start time, so that a later process with the same pid is another one.
    `psutil.process_iter` is not used: since psutil 6 its cache does not notice that a pid was reused.
    """
    parents = {}
    for pid in psutil.pids():
        with suppress(psutil.Error):  # it has ended, or is hidden from this user
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() not in ENDED:
                    parents[process] = process.ppid()
    return parents


def list_children() -> set[psutil.Process]:
    """Return the child processes of this process that have not ended."""
    return {process for process, parent in list_processes().items() if parent == os.getpid()}


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process has not ended."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() not in ENDED
    return False


class RayProcesses:
    """The child processes that start between the constructor and `watch`, and all their descendants."""

    def __init__(self) -> None:
        self.earlier = list_children()
        self.known: set[psutil.Process] = set()
        self.failure: str | None = None  # names the essential process that ended unexpectedly
        self.closing, self.ended = threading.Event(), threading.Event()
        self.lock = threading.Lock()  # held while deciding whether a process was expected to end

    def watch(self) -> None:
        """Record the processes of Ray, and interrupt the main thread when an essential one ends."""
        self.known |= list_children() - self.earlier
        names = {process: _name(process) for process in self.known}
        essential = {process: name for process, name in names.items() if name in ESSENTIAL_NAMES}
        threading.Thread(target=self._watch, args=(essential,), daemon=True).start()

    def close(self) -> bool:
        """Stop expecting Ray to run. Returns whether it has run until now."""
        with self.lock:
            self.closing.set()
            return self.failure is None

    def end(self) -> None:
        """Kill the processes that are still running."""
        if not self.known:  # Ray has not finished starting
            self.known = list_children() - self.earlier
        deadline = time.monotonic() + KILL_TIMEOUT
        while (remaining := self._update()) and time.monotonic() < deadline:
            for process in remaining:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.closing.set()
        self.ended.set()

    def _watch(self, essential: dict[psutil.Process, str]) -> None:
        updated = -math.inf
        while not self.closing.wait(CHECK_INTERVAL):
            if time.monotonic() - updated > UPDATE_INTERVAL:
                self._update()
                updated = time.monotonic()
            if all(is_alive(process) for process in essential):
                continue
            gone = essential.keys() - self._update()
            with self.lock:
                if not gone or self.closing.is_set():
                    continue
                process = min(gone, key=lambda each: each.pid)
                self.failure = f"{essential[process]} of Ray (process {process.pid}) ended unexpectedly"
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self.ended.wait(COMMAND_TIMEOUT):  # the main thread is waiting for Ray itself
                note(f"seg: {self.failure}")
                self.end()
                os._exit(1)

    def _update(self) -> set[psutil.Process]:
        """Add new descendants to the known processes. Returns the known processes that are still running."""
        parents = list_processes()
        while True:
            pids = {process.pid for process in self.known & parents.keys()}
            new = {process for process, parent in parents.items() if parent in pids} - self.known
            if not new:
                return self.known & parents.keys()
            self.known |= new


def _name(process: psutil.Process) -> str:
    """Return the name of a process, or nothing if it has ended."""
    with suppress(psutil.Error):
        return str(process.name())
    return ""


@contextmanager
def own_ray() -> Iterator[RayProcesses]:
    """Kill all processes of the Ray that the block starts when the block ends.

    Raises RayEnded if an essential process ended unexpectedly.
    """
    processes = RayProcesses()
    try:
        yield processes
    except BaseException as error:
        if processes.failure is not None:
            raise RayEnded(processes.failure) from error
        raise
    finally:
        processes.end()
