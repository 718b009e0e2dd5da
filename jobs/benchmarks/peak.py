"""The most memory that this process and all below it have held, and the device, sampled now and then."""

import os
import subprocess
import threading
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.5  # s
DEVICE_EVERY = 10  # samples; to ask for a GPU's memory starts a process, and takes locks of its driver's
PAGE = os.sysconf("SC_PAGE_SIZE")
DEVICE = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


class Peak:
    """Peaks over the time of a `with` block. The host's is of memory that no other process shares, of a process tree.

    Ray's processes are below the driver where it has started them; those of other machines are not counted.
    """

    def __init__(self) -> None:
        self.host_mb = 0
        self.device_mb: int | None = None
        self.samples = count()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.host_mb = max(self.host_mb, sum(map(_private_kb, process_tree(os.getpid()))) // 1024)
        used = _device_mb() if next(self.samples) % DEVICE_EVERY == 0 else None
        if used is not None:
            self.device_mb = max(self.device_mb or 0, used)


def process_tree(root: int) -> set[int]:
    """The ids of a process and of all below it."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    tree = {root}
    while below := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= below
    return tree


def _parent(path: Path) -> int:
    try:  # the name, in parentheses, may hold anything
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0  # it has ended


def _private_kb(pid: int) -> int:
    """What a process holds that is no file's and not shared; not from smaps, to read which stops the process."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except OSError:
        return 0
    return (resident - shared) * PAGE // 1024


def _device_mb() -> int | None:
    """Memory in use on all GPUs of this machine, by whomever."""
    try:
        done = subprocess.run(DEVICE, capture_output=True, text=True, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(int(line) for line in done.stdout.split() if line.isdigit())
