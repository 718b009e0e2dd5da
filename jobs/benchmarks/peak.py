"""The most memory that this process and all below it have held, and the device, sampled now and then."""

import subprocess
import threading
from itertools import count
from types import TracebackType
from typing import Self

import psutil

INTERVAL = 0.5  # s
DEVICE_EVERY = 10  # samples; to ask for a GPU's memory starts a process, and takes locks of its driver's
DEVICE = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


class Peak:
    """Peaks over the time of a `with` block. The host's is of memory that no other process shares, of a process tree.

    Ray's processes are below the driver where it has started them; those of other machines are not counted.
    """

    def __init__(self) -> None:
        self.host_mb = 0
        self.device_mb: int | None = None
        self.samples = count()
        self.process = psutil.Process()
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
        tree = [self.process, *self.process.children(recursive=True)]
        self.host_mb = max(self.host_mb, sum(map(_private_bytes, tree)) // 2**20)
        used = _device_mb() if next(self.samples) % DEVICE_EVERY == 0 else None
        if used is not None:
            self.device_mb = max(self.device_mb or 0, used)


def _private_bytes(process: psutil.Process) -> int:
    """What a process holds that is no file's and not shared: its resident memory without the shared part.

    Not psutil's `uss` (unique set size) or `pss`: they add up smaps, to read which stops the process. Shared memory is
    known on Linux alone; elsewhere all resident memory counts.
    """
    try:
        memory = process.memory_info()
    except psutil.Error:  # it has ended
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def _device_mb() -> int | None:
    """Memory in use on all GPUs of this machine, by whomever."""
    try:
        done = subprocess.run(DEVICE, capture_output=True, text=True, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(int(line) for line in done.stdout.split() if line.isdigit())
