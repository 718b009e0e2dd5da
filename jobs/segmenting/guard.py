"""Windows that end their process: a part over which one died is segmented window by window, each named beforehand.

The files that outlive the process are those of `seg_core.run.attempts`.
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
    """Marks the parts of a run that are at work, and leaves out windows that have ended two processes."""

    def __init__(self, run: str, session: str, tile_size: int, store: Store) -> None:
        self.run, self.session, self.tile_size, self.store = run, session, tile_size, store
        self.started: set[str] = set()  # keys of the parts that are marked
        self.given_up: dict[str, Attempt] = {}  # by key, those in which a window was left out

    def claim(self, parts: Sequence[Part]) -> dict[str, Attempt]:
        """Of parts that are to be done, those over which a process died, by key, with what is known of each."""
        interrupted = claim_interrupted(self.run, [part.key for part in parts], self.session, self.store)
        self.started |= set(interrupted)
        return interrupted

    def mark_started(self, part: Part) -> None:
        """Mark a part as being at work, before any of it is read."""
        if part.key not in self.started:  # several threads may mark it, each before it reads
            mark_started(self.run, part.key, self.session, self.store)
            self.started.add(part.key)

    def forget(self, part: Part) -> None:
        """Take note that a part is published: whoever publishes it has removed its mark."""
        self.started.discard(part.key)

    def segment_each(
        self,
        parts: Sequence[Part],
        side: int,
        interrupted: Mapping[str, Attempt],
        segment: Callable[[Part, Window], list[Row]],
    ) -> Iterator[WindowRows]:
        """The windows of interrupted parts, of `side` px, one after the other, by a function that gives one's rows."""
        for part in parts:
            for window in split(part.window, side):
                rows = self.rows(part, window, interrupted[part.key], segment)
                yield WindowRows(part, partial(iter, rows))

    def rows(
        self, part: Part, window: Window, attempt: Attempt, segment: Callable[[Part, Window], list[Row]]
    ) -> list[Row]:
        """The rows of a window of an interrupted part: failed ones where it is the window that ended processes."""
        name = f"{window.row_off} {window.col_off}"
        if not attempt.is_deadly(name):
            mark_window(self.run, part.key, attempt, name, self.store)
            return segment(part, window)
        self.given_up[part.key] = attempt
        text = f"{part.scene.uri}: to read or segment this window ended the process"
        failure = Failure("Crash", text, attempt.deaths[name])
        return list(failed_rows(part.scene, window, self.tile_size, failure))

    def end_task(self) -> None:
        """Remove the marks of parts in which a window was left out.

        Until the task is done, which does all of its parts again if it must, they stay.
        """
        for key in self.given_up:
            mark_done(self.run, key, self.store)
        self.given_up.clear()


def end_if_lost(segmenter: "Segmenter") -> None:
    """End the process where it has lost its device: a new one takes its parts up, and finds the cause."""
    if segmenter.is_lost():
        os._exit(1)
