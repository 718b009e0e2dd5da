"""The processes of a Ray that was started here: none outlives the command, and the command does not outlive them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .terminal import RayEnded, note

INTERVAL = 1.0  # s between looks
PATIENCE = 15.0  # s that a command is given to end once Ray has
KILLING = 5.0  # s that killed processes are waited for
ESSENTIAL = {"gcs_server", "raylet"}  # Ray itself notices the end of one after a minute or more


class Process(NamedTuple):
    """A running process; no later one of the same number began at the same time."""

    pid: int
    started: str
    parent: int
    name: str


def running() -> dict[int, Process]:
    """All processes of this machine that have not ended."""
    found = {}
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit():
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                head, _, tail = text.rpartition(")")
                fields = tail.split()
                if fields[0] not in "ZX":
                    found[int(entry)] = Process(int(entry), fields[19], int(fields[1]), head.partition("(")[2])
    return found


class RayProcesses:
    """The processes that this one starts from now on until `watch` is called, and all that they start in turn."""

    def __init__(self) -> None:
        self.others = self._children(running())
        self.known: set[Process] = set()
        self.lost: str | None = None  # the essential process that has ended
        self.closing, self.ended = threading.Event(), threading.Event()
        self.deciding = threading.Lock()  # whether what has ended was expected to

    def watch(self) -> None:
        """Note the processes of Ray, and interrupt the main thread when an essential one ends."""
        self.known |= self._children(running()) - self.others
        essential = {process for process in self.known if process.name in ESSENTIAL}
        threading.Thread(target=self._watch, args=(essential,), daemon=True).start()

    def close(self) -> bool:
        """No longer expect Ray to run. Returns whether it did until now."""
        with self.deciding:
            self.closing.set()
            return self.lost is None

    def end(self) -> None:
        """Kill what is left of them."""
        if not self.known:  # Ray has not started
            self.known = self._children(running()) - self.others
        deadline = time.monotonic() + KILLING
        while (left := self._left()) and time.monotonic() < deadline:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        self.closing.set()
        self.ended.set()

    def _watch(self, essential: set[Process]) -> None:
        while not self.closing.wait(INTERVAL):
            gone = essential - self._left()
            with self.deciding:
                if not gone or self.closing.is_set():
                    continue
                process = min(gone)
                self.lost = f"{process.name} of Ray (process {process.pid}) ended unexpectedly"
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self.ended.wait(PATIENCE):  # the main thread is waiting for Ray itself
                note(f"seg: {self.lost}")
                self.end()
                os._exit(1)

    def _left(self) -> set[Process]:
        """Those of the known processes that run, after a look for new ones among their children."""
        now = running()
        while new := {process for process in now.values() if now.get(process.parent) in self.known} - self.known:
            self.known |= new
        return self.known & set(now.values())

    @staticmethod
    def _children(processes: dict[int, Process]) -> set[Process]:
        return {process for process in processes.values() if process.parent == os.getpid()}


@contextmanager
def own_ray() -> Iterator[RayProcesses]:
    """Look after the processes of a Ray that is started within. Raises RayEnded where an essential one ends."""
    processes = RayProcesses()
    try:
        yield processes
    except BaseException as error:
        if processes.lost is not None:
            raise RayEnded(processes.lost) from error
        raise
    finally:
        processes.end()
