"""Tie the processes of a Ray started by this command to it: neither outlives the other."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .terminal import RayEnded, note

CHECK_INTERVAL = 1.0  # s between two checks of the processes
COMMAND_TIMEOUT = 15.0  # s that the command has to end after an essential process has ended
KILL_TIMEOUT = 5.0  # s to wait until killed processes are gone
ESSENTIAL_NAMES = {"gcs_server", "raylet"}  # Ray itself takes a minute or more to notice that one has ended


class Process(NamedTuple):
    """A running process. The start time tells it from a later process with the same pid."""

    pid: int
    started: str  # clock ticks since the machine was started
    parent: int  # pid
    name: str


def list_processes() -> dict[int, Process]:
    """Return all processes of this machine that have not ended, by pid."""
    processes = {}
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit():
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                head, _, tail = text.rpartition(")")
                fields = tail.split()
                if fields[0] not in "ZX":
                    processes[int(entry)] = Process(int(entry), fields[19], int(fields[1]), head.partition("(")[2])
    return processes


class RayProcesses:
    """The child processes that start between the constructor and `watch`, and all their descendants."""

    def __init__(self) -> None:
        self.earlier = self._children(list_processes())
        self.known: set[Process] = set()
        self.failure: str | None = None  # names the essential process that ended unexpectedly
        self.closing, self.ended = threading.Event(), threading.Event()
        self.lock = threading.Lock()  # held while deciding whether a process was expected to end

    def watch(self) -> None:
        """Record the processes of Ray, and interrupt the main thread when an essential one ends."""
        self.known |= self._children(list_processes()) - self.earlier
        essential = {process for process in self.known if process.name in ESSENTIAL_NAMES}
        threading.Thread(target=self._watch, args=(essential,), daemon=True).start()

    def close(self) -> bool:
        """Stop expecting Ray to run. Returns whether it has run until now."""
        with self.lock:
            self.closing.set()
            return self.failure is None

    def end(self) -> None:
        """Kill the processes that are still running."""
        if not self.known:  # Ray has not finished starting
            self.known = self._children(list_processes()) - self.earlier
        deadline = time.monotonic() + KILL_TIMEOUT
        while (remaining := self._update()) and time.monotonic() < deadline:
            for process in remaining:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        self.closing.set()
        self.ended.set()

    def _watch(self, essential: set[Process]) -> None:
        while not self.closing.wait(CHECK_INTERVAL):
            gone = essential - self._update()
            with self.lock:
                if not gone or self.closing.is_set():
                    continue
                process = min(gone)
                self.failure = f"{process.name} of Ray (process {process.pid}) ended unexpectedly"
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self.ended.wait(COMMAND_TIMEOUT):  # the main thread is waiting for Ray itself
                note(f"seg: {self.failure}")
                self.end()
                os._exit(1)

    def _update(self) -> set[Process]:
        """Add new descendants to the known processes. Returns the known processes that are still running."""
        current = list_processes()
        while new := {each for each in current.values() if current.get(each.parent) in self.known} - self.known:
            self.known |= new
        return self.known & set(current.values())

    @staticmethod
    def _children(processes: dict[int, Process]) -> set[Process]:
        return {process for process in processes.values() if process.parent == os.getpid()}


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
