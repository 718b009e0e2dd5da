"""What the actors of a run were busy with, which of it limited the run, and what to change.

    an actor's device       │ segment │ segment │ segment │     wait     │ segment │ ...
    its reading threads     │ read  │ read  │ read  │  read   │     idle      │ read  │ ...
    its writing threads               │ write │   │ write │   │ write │   idle          │ ...

An actor's wall time runs from its first receipt's start to its last one's end.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STAGES = ("reading", "model", "writing")
# Nothing was busy for that share of the time: the actors waited for the start of tasks, or for single long reads.
IDLE = 0.5
ADVICE = {
    "reading": "use nodes with more CPUs for each device, or scenes that decode faster (tiled JPEG or ZSTD GeoTIFFs)",
    "model": "add devices (--actors on a larger cluster), or use a narrower model",
    "writing": "add actors (--actors), or leave out --keep-probability",
    "waiting": "give each actor more to do: larger parts (--part), more scenes in one run, or fewer actors",
}


Spans = dict[str, tuple[float, float]]  # of each actor: when it began and ended


def widen(spans: Spans, receipt: Mapping[str, Any]) -> None:
    """Let an actor's span take in a receipt of it."""
    began, ended = spans.get(receipt["actor"], (receipt["started"], receipt["ended"]))
    spans[receipt["actor"]] = min(began, receipt["started"]), max(ended, receipt["ended"])


class Stopwatch:
    """Seconds that the threads of an actor spent, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.lock = threading.Lock()

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Count the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        with self.lock:
            self.seconds[stage] += seconds

    def take(self) -> dict[str, float]:
        """The seconds counted since they were last taken."""
        with self.lock:
            taken = {stage: self.seconds[stage] for stage in STAGES}
            self.seconds.clear()
        return taken


class Busy:
    """The receipts of a run, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.spans: Spans = {}

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Count a receipt."""
        for stage in STAGES:
            self.seconds[stage] += receipt[stage]
        widen(self.spans, receipt)

    def figures(self, readers: int, writers: int) -> dict[str, Any]:
        """The share of time that each stage was busy, which one limited, and what to change, in a sentence."""
        wall = max(sum(ended - began for began, ended in self.spans.values()), 1e-9)
        room = {"reading": wall * readers, "model": wall, "writing": wall * writers}
        shares = {stage: min(1.0, round(self.seconds[stage] / room[stage], 3)) for stage in STAGES}
        most = max(STAGES, key=lambda stage: shares[stage])
        limit = most if shares[most] >= IDLE else "waiting"
        found = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
        return {**shares, "limit": limit, "advice": f"{limit} limits (busy: {found}): {ADVICE[limit]}"}
