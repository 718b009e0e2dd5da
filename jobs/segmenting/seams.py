"""Measure how much neighbouring windows disagree, at one border of some parts, during the segmentation."""

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
        self.watched, self.settings, self.segmenter = watched, settings, segmenter  # watched: keys of parts
        self.pool = ThreadPoolExecutor(threads)
        self.running: dict[str, Future[tuple[int, int]]] = {}  # by key of the part

    def skip(self, parts: Sequence[Part]) -> None:
        """Stop watching these parts."""
        self.watched -= {part.key for part in parts}

    def check(self, task: WindowTask, result: "WindowResult") -> None:
        """If a window is the first one of a watched part, compare it with its neighbour. A GPU continues meanwhile."""
        part, window = task.part, task.window
        if part.key not in self.watched or window.origin != part.window.origin:
            return
        found = self.pool.submit(compare_across_border, part, window, result, self.settings, self.segmenter)
        self.running[part.key] = found
        if not self.segmenter.on_gpu:
            wait([found])

    def take(self, part: Part) -> tuple[int, int]:
        """Return how many pixels of a part were compared, and how many differ. Wait for the result if necessary.

        Both are 0 if nothing was compared, or if the neighbour can't be read, which its own rows will say.
        """
        found = self.running.pop(part.key, None)
        return (0, 0) if found is None or found.exception() else found.result()
