"""How long the threads of an actor spend on each stage of their work."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StageTimes:
    """Seconds that were spent on each stage, summed over threads."""

    reading: float = 0.0
    reading_cpu: float = 0.0  # those of reading in which a core computed
    decoding: float = 0.0  # by a GPU's JPEG engine
    model: float = 0.0
    writing: float = 0.0

    def __add__(self, other: "StageTimes") -> "StageTimes":
        more = asdict(other)
        return StageTimes(**{name: seconds + more[name] for name, seconds in asdict(self).items()})


class Stopwatch:
    """Seconds that the threads of an actor spent, by stage; and, as `STAGE_cpu`, how much of it they computed.

    What was counted since the last receipt is taken for the next one. Apart from that it goes in laps, from which the
    seconds a window are known.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.taken: dict[str, float] = defaultdict(float)  # of them, what is in a receipt
        self.lapped: dict[str, tuple[float, int]] = {}  # of the present lap: seconds, and windows
        self.paused = False  # laps are
        self.lock = threading.Lock()

    @contextmanager
    def on(self, stage: str, windows: int = 0) -> Iterator[None]:
        """Count the time that the block takes, over so many windows."""
        started, computed = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(f"{stage}_cpu", time.thread_time() - computed, windows)
            self.add(stage, time.perf_counter() - started, windows)

    def add(self, stage: str, seconds: float, windows: int = 0) -> None:
        """Count time that was measured elsewhere."""
        with self.lock:
            self.seconds[stage] += seconds
            spent, done = self.lapped.get(stage, (0.0, 0))
            self.lapped[stage] = spent + seconds, done + windows

    def pause_laps(self) -> None:
        """Let no lap end before a new one is begun."""
        self.paused = True

    def new_lap(self) -> None:
        """Leave out what was counted since the last lap."""
        with self.lock:
            self.lapped.clear()
        self.paused = False

    def lap(self, windows: int) -> StageTimes | None:
        """Seconds a window of reading and the model since the last lap; None where that was fewer windows ago."""
        with self.lock:
            lapped = {stage: self.lapped.get(stage, (0.0, 0)) for stage in ("reading", "reading_cpu", "model")}
            if self.paused or min(done for _, done in lapped.values()) < windows:
                return None
            self.lapped.clear()
        return StageTimes(**{stage: spent / done for stage, (spent, done) in lapped.items()})

    def take(self) -> StageTimes:
        """The seconds counted since they were last taken."""
        with self.lock:
            times = StageTimes(**{name: self.seconds[name] - self.taken[name] for name in asdict(StageTimes())})
            self.taken.update(self.seconds)
        return times
