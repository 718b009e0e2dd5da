"""What the actors of a run were busy with, which of it limited the run, and what to change.

    an actor's device       │ segment │ segment │ segment │     wait     │ segment │ ...
    its reading threads     │ read  │ read  │ read  │  read   │     idle      │ read  │ ...
    its GPU's JPEG engine           │ decode │   │ decode │  decode │             │ ...
    its writers                       │ write │   │ write │   │ write │   idle          │ ...

An actor's wall time runs from its first receipt's start to its last one's end.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STAGES = ("reading", "decoding", "model", "writing")  # decoding: by a GPU's JPEG engine
TIMES = (*STAGES, "reading_cpu")  # what of reading was computed
# Nothing was busy for that share of the time: the actors waited for the start of tasks, or for single long reads.
IDLE = 0.5
# The most that a GPU is busy for where it waits, again and again, for the one process that reads and starts for it.
STARVED_BELOW = 0.8
ADVICE = {
    "reading": "use nodes with more CPUs for each device, or scenes that decode faster (tiled JPEG or ZSTD GeoTIFFs)",
    "decoding": "add devices (--actors on a larger cluster), or let CPUs decode (--decode cpu, in a run of its own)",
    "model": "add devices (--actors on a larger cluster), or use a narrower model",
    "process": "let two of them share each GPU (--gpus-per-actor 0.5)",
    "writing": "add actors (--actors), or leave out --keep-probability",
    "waiting": "give each actor more to do: larger parts (--part), more scenes in one run, or fewer actors",
}


Spans = dict[str, tuple[float, float]]  # of each actor: when it began and ended


def widen(spans: Spans, receipt: Mapping[str, Any]) -> None:
    """Let an actor's span take in a receipt of it."""
    began, ended = spans.get(receipt["actor"], (receipt["started"], receipt["ended"]))
    spans[receipt["actor"]] = min(began, receipt["started"]), max(ended, receipt["ended"])


class Stopwatch:
    """Seconds that the threads of an actor spent, by stage; and, as `STAGE_cpu`, how much of it they computed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.told: dict[str, float] = defaultdict(float)  # of them, what was taken
        self.lapped: dict[str, tuple[float, int]] = {}  # of the present lap: seconds, and windows
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

    def new_lap(self) -> None:
        """Leave out what was counted since the last lap."""
        with self.lock:
            self.lapped.clear()

    def lap(self, windows: int) -> dict[str, float] | None:
        """Seconds a window of reading and the model since the last lap; None where that was fewer windows ago."""
        with self.lock:
            lapped = {stage: self.lapped.get(stage, (0.0, 0)) for stage in ("reading", "reading_cpu", "model")}
            if min(done for _, done in lapped.values()) < windows:
                return None
            self.lapped.clear()
        return {stage: spent / done for stage, (spent, done) in lapped.items()}

    def take(self) -> dict[str, float]:
        """The seconds counted since they were last taken."""
        with self.lock:
            taken = {name: self.seconds[name] - self.told[name] for name in TIMES}
            self.told.update(self.seconds)
        return taken


class BottleneckReport:
    """The receipts of a run, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.readers = 0
        self.spans: Spans = {}

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Count a receipt."""
        for name in TIMES:
            self.seconds[name] += receipt[name]
        self.readers = max(self.readers, receipt["readers"])
        widen(self.spans, receipt)

    def figures(self, writers: int, gpus: float, cores: int) -> dict[str, Any]:
        """The share of time that each stage was busy, which one limited, and what to change, in a sentence.

        Of an actor that has so many writers, GPUs and cores. Reading is as busy as its threads are, or as the cores are
        with it: more threads than cores are no help to what computes.
        """
        wall = max(sum(ended - began for began, ended in self.spans.values()), 1e-9)
        room = {"reading": wall * self.readers, "decoding": wall, "model": wall, "writing": wall * writers}
        spent = {stage: self.seconds[stage] / room[stage] for stage in STAGES}
        spent["reading"] = max(spent["reading"], self.seconds["reading_cpu"] / (wall * cores))
        shares = {stage: min(1.0, round(share, 3)) for stage, share in spent.items()}
        most = max(STAGES, key=lambda stage: shares[stage])
        limit = most if shares[most] >= IDLE else "waiting"
        if gpus >= 1 and limit == "model" and shares[most] < STARVED_BELOW:
            limit = "process"
        named = [stage for stage in STAGES if stage != "decoding" or shares[stage]]
        found = ", ".join(f"{stage} {shares[stage]:.0%}" for stage in named)
        return {**shares, "limit": limit, "advice": f"{limit} limits (busy: {found}): {ADVICE[limit]}"}
