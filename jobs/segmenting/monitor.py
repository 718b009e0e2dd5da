"""What the driver of a run shows while its actors work: progress, metrics, and one line for each event."""

from functools import partial
from types import TracebackType
from typing import Any, Self

from ..metrics import JobMetrics
from ..node_watch import NodeWatch, watch_nodes
from ..progress import Progress
from ..resources import ActorResources
from ..terminal import logs_json
from .bottleneck import STAGES, BottleneckReport
from .receipts import Receipt


class RunMonitor:
    """Shows what receipts say, from the beginning to the end of a `with` block."""

    def __init__(self, run: str, windows: int, resources: ActorResources) -> None:
        self.resources, self.busy, self.metrics = resources, BottleneckReport(), JobMetrics(run)
        self.num_actors = 0
        self.progress = Progress(windows)
        self.watching = watch_nodes(self.progress.status.note, self.metrics)

    def __enter__(self) -> Self:
        """Begin to watch the nodes."""
        self.progress.missing = partial(describe_lack, self.watching.__enter__(), self.resources)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching the nodes, and keep the last line of progress."""
        self.watching.__exit__(kind, error, trace)
        self.progress.end()

    def take(self, receipt: Receipt) -> None:
        """Show what a receipt says."""
        self.busy.add(receipt)
        self.progress.update(receipt.windows, receipt.pixels, receipt.started, receipt.failed)
        self._note_new_actor()
        if receipt.failed and logs_json():
            place = {"scene": receipt.scene, "window": list(receipt.window), "part": receipt.part}
            self.progress.status.note(f"{receipt.failed} tiles failed", level="warning", **place)
        shares = self.bottleneck()
        busy = {f"busy_{stage}": shares[stage] for stage in STAGES}
        self.metrics.publish({**self.progress.figures(), **busy})

    def _note_new_actor(self) -> None:
        """Say when a receipt comes from an actor beyond those that there was room for at the start."""
        before, self.num_actors = self.num_actors, len(self.busy.spans)
        if before < self.num_actors > self.resources.max_actors:
            self.progress.status.note("a process that segments has ended, and a new one has taken its place")
        elif before < self.num_actors > self.resources.min_actors:
            self.progress.status.note(f"another process has begun to segment: {self.num_actors} until now")

    def bottleneck(self) -> dict[str, Any]:
        """Return what has limited the run so far: see `BottleneckReport.figures`."""
        return self.busy.figures(self.resources.writers, self.resources.num_gpus, self.resources.cores)


def describe_lack(nodes: NodeWatch, resources: ActorResources) -> str:
    """Return what the cluster lacks for a process that segments. Empty if a node is large enough, or none known."""
    wanted = {kind: number for kind, number in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)) if number}
    if not nodes.nodes or nodes.has_node(wanted):
        return ""
    return f"a process that segments takes {' and '.join(f'{n:g} {kind}' for kind, n in wanted.items())}"
