"""Find the window that kills its process: a segfault in a decoder leaves no exception behind, only a part unfinished.

While a part is at work, a small file in the run's folder says so. Whoever takes up a part whose file is there already
knows that a process died over it, and goes on carefully: window by window, naming each one before it is touched. Where
the same window is found named by a second dead process, it is the cause, and is not tried again.

Files of another session are those of an earlier driver, which may have been killed for reasons of its own.
"""

import json
from dataclasses import asdict, dataclass, field

from seg_core.errors import SegError
from seg_core.storage import publish, read_bytes, remove

DEATHS = 2  # of processes over one window, from which on it is given up


@dataclass
class Attempt:
    """What is known of earlier attempts at a part."""

    session: str  # of the driver
    window: str | None = None  # the one at work, named by its place
    deaths: dict[str, int] = field(default_factory=dict)  # by window

    def is_deadly(self, window: str) -> bool:
        """Whether this window has killed so many processes that it is given up."""
        return self.deaths.get(window, 0) >= DEATHS


def attempts_folder(run: str) -> str:
    """Where the files are."""
    return f"{run}/attempts"


def begin(run: str, key: str, session: str) -> Attempt | None:
    """Say that a part is at work. Returns what is known of it, if a process of this session died over it."""
    before = _read(run, key)
    if before is None or before.session != session:
        _write(run, key, Attempt(session))
        return None
    if before.window is not None:
        before.deaths[before.window] = before.deaths.get(before.window, 0) + 1
        before.window = None
    _write(run, key, before)
    return before


def touch(run: str, key: str, attempt: Attempt, window: str) -> None:
    """Say which window of a part is at work."""
    attempt.window = window
    _write(run, key, attempt)


def end(run: str, key: str) -> None:
    """Say that a part is done."""
    remove(_path(run, key))


def _path(run: str, key: str) -> str:
    return f"{attempts_folder(run)}/{key}.json"


def _read(run: str, key: str) -> Attempt | None:
    content = read_bytes(_path(run, key))
    try:
        return None if content is None else Attempt(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise SegError(f"{_path(run, key)}: damaged: delete it") from error


def _write(run: str, key: str, attempt: Attempt) -> None:
    publish(_path(run, key), json.dumps(asdict(attempt)).encode())
