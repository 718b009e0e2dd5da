"""What is served of a run: its page, made anew when the run has changed, and answers to SQL."""

from collections.abc import Callable
from threading import Lock
from typing import Any

from seg_core.errors import SegError
from seg_core.report.page import make_page
from seg_core.run.parts import index_parts
from seg_core.run.places import Places
from seg_core.run.query import first_rows
from seg_core.run.sql import run_sql
from seg_core.run.sql_limit import Limit
from seg_core.storage.files import stat
from seg_core.storage.store import Stat
from seg_core.threads import for_each

MAX_ROWS = 1000  # of an answer
SECONDS = 60.0  # that a query may take

Report = Callable[[str], None]
State = tuple[tuple[str, Stat | None], ...]


class RunSite:
    """The page of a run, and its answers. Any thread may ask; one query is answered at a time."""

    def __init__(self, run: str, given: Places = (), seconds: float = SECONDS) -> None:
        self.run, self.given, self.seconds = run, given, seconds
        self._made: tuple[State, str] | None = None
        self._making, self._asking = Lock(), Lock()
        self._limit: Limit | None = None
        self._is_closed = False

    def page(self, report: Report = lambda _: None) -> str:
        """Return the page of the run as it is now. It is made anew only if a file of the run has changed.

        `report` is called with a text for each step. Raises SegError as `make_page` does.
        """

        def report_unless_closed(text: str) -> None:
            if self._is_closed:
                raise SegError(f"{self.run}: is not served any more")
            report(text)

        with self._making:
            state = read_state(self.run)
            if self._made is None or self._made[0] != state:
                self._made = state, make_page(self.run, self.given, report_unless_closed, has_sql=True).html
            return self._made[1]

    def ask(self, sql: str) -> dict[str, Any]:
        """Return the answer to a query: `columns`, `rows` and a `note` on rows that are left out, or an `error`."""
        with self._asking:
            limit = self._limit = Limit(self.seconds)
            if self._is_closed:
                limit.stop()
            try:
                with run_sql(self.run, sql, limit) as result:
                    columns = result.schema.names
                    rows, has_more = first_rows(result, MAX_ROWS)
            except SegError as error:
                late = f"SQL: took longer than {self.seconds:g} s: seg query takes the time that it needs"
                return {"error": late if limit.is_passed else str(error)}
        left_out = f"These are the first {MAX_ROWS:,} rows: seg query RUN SQL --format csv has them all."
        return {"columns": columns, "rows": rows, "note": left_out if has_more else ""}

    def close(self) -> None:
        """Interrupt the work for requests, and wait for its end. Later requests wait for ever."""
        self._is_closed = True
        if self._limit is not None:
            self._limit.stop()
        self._asking.acquire()
        self._making.acquire()


def read_state(run: str) -> State:
    """Return the size and the version of each file that holds rows of a run, and of its record, by path."""
    index = index_parts(run)
    own, compacted = (location.path for location in index.own.values()), (file.path for file in index.compacted)
    paths = [f"{run}/run.json", *own, *compacted]
    return tuple(zip(paths, for_each(stat, paths), strict=True))
