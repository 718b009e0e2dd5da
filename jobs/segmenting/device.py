"""Batches on the device: what is given to it, and the wait for what comes back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from seg_core.inference.windows import start_windows
from seg_core.run.plan import Settings

from .reading import LoadedWindow
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from seg_core.model.segmenter import Pending, Segmenter
    from seg_core.model.window_results import WindowResult


class StartedBatch(NamedTuple):
    """Windows of one size that were given to the device together."""

    windows: Sequence[LoadedWindow]
    pending: "Pending | Exception"  # what it is at work on, or why it could not begin
    retried: bool  # whether it is a single window that did not fit beside others


class BatchRunner:
    """Starts batches on the device, and counts what they took."""

    def __init__(self, settings: Settings, segmenter: "Segmenter", clock: Stopwatch) -> None:
        self.settings, self.segmenter, self.clock = settings, segmenter, clock
        self.decoded_on_cpu = 0  # windows that the device has not decoded, since the last receipt

    def start(self, windows: Sequence[LoadedWindow], may_compile: bool, retried: bool = False) -> StartedBatch:
        """Begin to segment windows of one size together."""
        chips, window = [each.chip for each in windows], windows[0].task.window
        try:
            pending = start_windows(chips, window, self.settings, self.segmenter, may_compile)
        except (RuntimeError, MemoryError) as error:  # torch's, of memory too, are RuntimeErrors
            return StartedBatch(windows, error.with_traceback(None), retried)  # its frames hold what the device held
        if pending.compiled:  # reading stood still meanwhile, for it was far enough ahead
            self.clock.pause_laps()
        return StartedBatch(windows, pending, retried)

    def wait_for(self, batch: StartedBatch) -> "list[WindowResult] | Exception":
        """The results of a batch, one a window, or why there are none."""
        pending = batch.pending
        if isinstance(pending, Exception):
            return pending
        if pending.compiled:
            self.clock.new_lap()
        try:
            results = pending.result()
        except RuntimeError as error:
            return error.with_traceback(None)
        self.clock.add("model", pending.seconds, len(batch.windows))
        self.decoded_on_cpu += sum(not window.chip.decoded for window in batch.windows)
        return results

    def take_decoded_on_cpu(self) -> int:
        """How many windows the device has not decoded since this was last asked for."""
        taken, self.decoded_on_cpu = self.decoded_on_cpu, 0
        return taken


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out, of the device or the host."""
    return "memory" in str(error).lower() or isinstance(error, MemoryError)
