"""Start batches on the device, and wait for their results."""

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
    """Windows of one size that the device segments together."""

    windows: Sequence[LoadedWindow]
    pending: "Pending | Exception"  # the batch on the device, or why it could not be started
    retried: bool  # whether it is a single window that is tried again


class BatchRunner:
    """Starts batches on the device, and measures their time."""

    def __init__(self, settings: Settings, segmenter: "Segmenter", clock: Stopwatch) -> None:
        self.settings, self.segmenter, self.clock = settings, segmenter, clock
        self.decoded_on_cpu = 0  # windows since the last receipt that the device has not decoded

    def start(self, windows: Sequence[LoadedWindow], may_compile: bool, retried: bool = False) -> StartedBatch:
        """Start segmenting windows of one size together. If the device can't, the result holds the error."""
        chips, window = [each.chip for each in windows], windows[0].task.window
        try:
            pending = start_windows(chips, window, self.settings, self.segmenter, may_compile)
        except (RuntimeError, MemoryError) as error:  # those of torch are RuntimeErrors
            # Without the traceback, whose frames keep tensors on the device alive.
            return StartedBatch(windows, error.with_traceback(None), retried)
        if pending.compiled:  # reading was far enough ahead, and paused during compilation
            self.clock.pause_laps()
        return StartedBatch(windows, pending, retried)

    def wait_for(self, batch: StartedBatch) -> "list[WindowResult] | Exception":
        """Return the results of a batch, one for each window, or the error."""
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
        """Return the number of windows since the last call that the device has not decoded."""
        taken, self.decoded_on_cpu = self.decoded_on_cpu, 0
        return taken


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the device or the host ran out of memory."""
    return "memory" in str(error).lower() or isinstance(error, MemoryError)
