"""What the actors of a run were busy with, which stage limited the run, and what to change.

    an actor's device       │ segment │ segment │ segment │     wait     │ segment │ ...
    its reading threads     │ read  │ read  │ read  │  read   │     idle      │ read  │ ...
    its GPU's JPEG engine           │ decode │   │ decode │  decode │             │ ...
    its writers                       │ write │   │ write │   │ write │   idle          │ ...

An actor's wall time runs from its first receipt's start to its last one's end.
"""

from dataclasses import asdict
from typing import Any

from .receipts import Receipt
from .stopwatch import StageTimes

STAGES = ("reading", "decoding", "model", "writing")
# If no stage was busy for this share of the time, the actors waited for tasks to start, or for single long reads.
IDLE = 0.5
# If a GPU that limits the run was busy for less than this, it often waited for the one process that feeds it.
STARVED_BELOW = 0.8
ADVICE = {
    "reading": "use nodes with more CPUs for each device, read on other nodes as well (--readers), or use scenes that "
    "decode faster (tiled JPEG or ZSTD GeoTIFFs)",
    "decoding": "add devices (--actors on a larger cluster), or let CPUs decode (--decode cpu, in a run of its own)",
    "model": "add devices (--actors on a larger cluster), or use a narrower model",
    "process": "let two of them share each GPU (--gpus-per-actor 0.5)",
    "writing": "add actors (--actors), or leave out --keep-probability",
    "waiting": "give each actor more to do: larger parts (--part), more scenes in one run, or fewer actors",
}


Spans = dict[str, tuple[float, float]]  # start and end of each actor's work, in s since 1970


def widen(spans: Spans, receipt: Receipt) -> None:
    """Extend an actor's span by one of its receipts."""
    began, ended = spans.get(receipt.actor, (receipt.started, receipt.ended))
    spans[receipt.actor] = min(began, receipt.started), max(ended, receipt.ended)


class BottleneckReport:
    """Adds up the receipts of a run."""

    def __init__(self) -> None:
        self.times = StageTimes()
        self.readers = 0
        self.spans: Spans = {}

    def add(self, receipt: Receipt) -> None:
        """Add a receipt."""
        self.times += receipt.times
        self.readers = max(self.readers, receipt.readers)
        widen(self.spans, receipt)

    def figures(self, writers: int, gpus: float, cores: int) -> dict[str, Any]:
        """Return the share of time that each stage was busy, which one limited the run, and a sentence of advice.

        The numbers are those of one actor. Reading counts as busy as its threads or as the cores that compute for it,
        whichever is more: threads beyond the number of cores do not speed up decoding.
        """
        wall = max(sum(ended - began for began, ended in self.spans.values()), 1e-9)
        room = {"reading": wall * self.readers, "decoding": wall, "model": wall, "writing": wall * writers}
        times = asdict(self.times)
        spent = {stage: times[stage] / room[stage] for stage in STAGES}
        spent["reading"] = max(spent["reading"], self.times.reading_cpu / (wall * cores))
        shares = {stage: min(1.0, round(share, 3)) for stage, share in spent.items()}
        most = max(STAGES, key=lambda stage: shares[stage])
        limit = most if shares[most] >= IDLE else "waiting"
        if gpus >= 1 and limit == "model" and shares[most] < STARVED_BELOW:
            limit = "process"
        named = [stage for stage in STAGES if stage != "decoding" or shares[stage]]
        found = ", ".join(f"{stage} {shares[stage]:.0%}" for stage in named)
        return {**shares, "limit": limit, "advice": f"{limit} limits (busy: {found}): {ADVICE[limit]}"}
