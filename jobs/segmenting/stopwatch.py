"""Measure how long the threads of an actor spend on each stage of their work."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StageTimes:
    """Seconds spent on each stage, summed over threads."""

    reading: float = 0.0
    reading_cpu: float = 0.0  # CPU time of reading
    decoding: float = 0.0  # by a GPU's JPEG engine
    model: float = 0.0
    writing: float = 0.0

    def __add__(self, other: "StageTimes") -> "StageTimes":
        more = asdict(other)
        return StageTimes(**{name: seconds + more[name] for name, seconds in asdict(self).items()})


class Stopwatch:
    """Adds up the seconds that the threads of an actor spend on each stage, and their CPU time as `STAGE_cpu`.

    `take` returns the seconds since the last receipt. Independently, `lap` measures the seconds per window.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.taken: dict[str, float] = defaultdict(float)  # those that are in earlier receipts
        self.lapped: dict[str, tuple[float, int]] = {}  # seconds and windows of the current lap
        self.paused = False  # whether laps are
        self.lock = threading.Lock()

    @contextmanager
    def on(self, stage: str, windows: int = 0) -> Iterator[None]:
        """Measure the block's time, which it spends on this number of windows."""
        started, computed = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(f"{stage}_cpu", time.thread_time() - computed, windows)
            self.add(stage, time.perf_counter() - started, windows)

    def add(self, stage: str, seconds: float, windows: int = 0) -> None:
        """Add time that was measured elsewhere."""
        with self.lock:
            self.seconds[stage] += seconds
            spent, done = self.lapped.get(stage, (0.0, 0))
            self.lapped[stage] = spent + seconds, done + windows

    def pause_laps(self) -> None:
        """End no lap until `new_lap` is called."""
        self.paused = True

    def new_lap(self) -> None:
        """Start a new lap, without the times since the last one."""
        with self.lock:
            self.lapped.clear()
        self.paused = False

    def lap(self, windows: int) -> StageTimes | None:
        """End the lap if each stage has done this number of windows. Returns the seconds per window, or None.

        Only reading and the model are measured.
        """
        with self.lock:
            lapped = {stage: self.lapped.get(stage, (0.0, 0)) for stage in ("reading", "reading_cpu", "model")}
            if self.paused or min(done for _, done in lapped.values()) < windows:
                return None
            self.lapped.clear()
        return StageTimes(**{stage: spent / done for stage, (spent, done) in lapped.items()})

    def take(self) -> StageTimes:
        """Return the seconds since the last call."""
        with self.lock:
            times = StageTimes(**{name: self.seconds[name] - self.taken[name] for name in asdict(StageTimes())})
            self.taken.update(self.seconds)
        return times
