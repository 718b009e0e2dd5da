"""Protect a run from windows that crash their process.

If a process dies while it works on a part, the next one segments this part window by window, and writes down each
window before it starts. The files for this are those of `seg_core.run.attempts`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from seg_core.grid import Window, split
from seg_core.run.attempts import Attempt, claim_interrupted, mark_done, mark_started, mark_window
from seg_core.run.fence import Store
from seg_core.run.plan import Part
from seg_core.run.rows import Failure, Row, failed_rows

from .writers import WindowRows

if TYPE_CHECKING:
    from seg_core.model.segmenter import Segmenter


class CrashGuard:
    """Marks the parts that are being worked on, and skips windows that have crashed two processes."""

    def __init__(self, run: str, session: str, tile_size: int, store: Store) -> None:
        self.run, self.session, self.tile_size, self.store = run, session, tile_size, store
        self.started: set[str] = set()  # keys of the parts that are marked
        self.given_up: dict[str, Attempt] = {}  # parts in which a window was skipped, by key

    def claim(self, parts: Sequence[Part]) -> dict[str, Attempt]:
        """Return which of these parts a process died over, by key, with the earlier attempts at each."""
        interrupted = claim_interrupted(self.run, [part.key for part in parts], self.session, self.store)
        self.started |= set(interrupted)
        return interrupted

    def mark_started(self, part: Part) -> None:
        """Mark a part as being worked on, before any of it is read."""
        if part.key not in self.started:  # several threads may do so, each before it reads
            mark_started(self.run, part.key, self.session, self.store)
            self.started.add(part.key)

    def forget(self, part: Part) -> None:
        """Forget a published part, whose mark the writer has removed."""
        self.started.discard(part.key)

    def segment_each(
        self,
        parts: Sequence[Part],
        side: int,
        interrupted: Mapping[str, Attempt],
        segment: Callable[[Part, Window], list[Row]],
    ) -> Iterator[WindowRows]:
        """Segment the windows, of `side` px, of interrupted parts one by one. `segment` returns the rows of one."""
        for part in parts:
            for window in split(part.window, side):
                rows = self.rows(part, window, interrupted[part.key], segment)
                yield WindowRows(part, partial(iter, rows))

    def rows(
        self, part: Part, window: Window, attempt: Attempt, segment: Callable[[Part, Window], list[Row]]
    ) -> list[Row]:
        """Return the rows of a window of an interrupted part: failed ones if the window has crashed two processes."""
        name = f"{window.row_off} {window.col_off}"
        if not attempt.is_deadly(name):
            mark_window(self.run, part.key, attempt, name, self.store)
            return segment(part, window)
        self.given_up[part.key] = attempt
        text = f"{part.scene.uri}: reading or segmenting this window crashed the process"
        failure = Failure("Crash", text, attempt.deaths[name])
        return list(failed_rows(part.scene, window, self.tile_size, failure))

    def end_task(self) -> None:
        """Remove the marks of parts in which a window was skipped.

        They are kept until the end of the task, because a task that is repeated does all of its parts again.
        """
        for key in self.given_up:
            mark_done(self.run, key, self.store)
        self.given_up.clear()


def end_if_lost(segmenter: "Segmenter") -> None:
    """End the process if it has lost its device. A new process resumes its parts, and finds the cause."""
    if segmenter.is_lost():
        os._exit(1)
