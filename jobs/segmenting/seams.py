"""How well windows fit their neighbours is looked at beside the segmentation, at one border of some parts."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from seg_core.inference.windows import compare_across_border
from seg_core.run.plan import Part, Settings, WindowTask

if TYPE_CHECKING:
    from seg_core.model.segmenter import Segmenter
    from seg_core.model.window_results import WindowResult


class SeamChecker:
    """Compares the first window of each watched part with its neighbour, in threads."""

    def __init__(self, watched: frozenset[str], settings: Settings, segmenter: "Segmenter", threads: int) -> None:
        self.watched, self.settings, self.segmenter = watched, settings, segmenter  # parts by their keys
        self.pool = ThreadPoolExecutor(threads)
        self.running: dict[str, Future[tuple[int, int]]] = {}  # by part

    def skip(self, parts: Sequence[Part]) -> None:
        """Watch these parts no more."""
        self.watched -= {part.key for part in parts}

    def check(self, task: WindowTask, result: "WindowResult") -> None:
        """Compare a window that is the first one of a watched part with its neighbour; a GPU goes on meanwhile."""
        part, window = task.part, task.window
        if part.key not in self.watched or window.origin != part.window.origin:
            return
        found = self.pool.submit(compare_across_border, part, window, result, self.settings, self.segmenter)
        self.running[part.key] = found
        if not self.segmenter.on_gpu:
            wait([found])

    def take(self, part: Part) -> tuple[int, int]:
        """Pixels of a part that were compared, and those that differ.

        Both are 0 where none were, or the neighbour can't be read: its own rows will say so.
        """
        found = self.running.pop(part.key, None)
        return (0, 0) if found is None or found.exception() else found.result()
