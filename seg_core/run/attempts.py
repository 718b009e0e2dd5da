"""Find the window that kills its process: a segfault in a decoder leaves no exception behind, only a part unfinished.

While a part is at work, from before its first window is read, a small file in the run's folder says so. Whoever takes
up a part whose file is there already knows that a process died over it, and goes on window by window, naming each one
before it is touched. Where the same window is found named by a second dead process, it is the cause, and is
not tried again.

Files of another session are those of an earlier driver, which may have been killed for reasons of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from seg_core.run.fence import PLAIN, Store
from seg_core.storage.files import published, read_bytes

SUFFIX = ".json"
MAX_DEATHS = 2  # of processes over one window, from which on it is given up


@dataclass
class Attempt:
    """What is known of earlier attempts at a part."""

    session: str  # of the driver
    window: str | None = None  # the one at work, named by its place
    deaths: dict[str, int] = field(default_factory=dict)  # by window

    def is_deadly(self, window: str) -> bool:
        """Whether this window has killed so many processes that it is given up."""
        return self.deaths.get(window, 0) >= MAX_DEATHS


def attempts_folder(run: str) -> str:
    """Where the files are."""
    return f"{run}/attempts"


def mark_started(run: str, key: str, session: str, store: Store = PLAIN) -> None:
    """Say that a part is at work."""
    _write(run, key, Attempt(session), store)


def claim_interrupted(run: str, keys: Sequence[str], session: str, store: Store = PLAIN) -> dict[str, Attempt]:
    """Of parts that are to be done, those over which a process of this session died, with what is known of each."""
    begun = {PurePosixPath(path).stem for path in published(attempts_folder(run), SUFFIX)}
    found = {key: _read(run, key) for key in keys if key in begun}
    died = {key: attempt for key, attempt in found.items() if attempt is not None and attempt.session == session}
    for key, attempt in died.items():
        if attempt.window is not None:
            attempt.deaths[attempt.window] = attempt.deaths.get(attempt.window, 0) + 1
            attempt.window = None
        _write(run, key, attempt, store)
    return died


def mark_window(run: str, key: str, attempt: Attempt, window: str | None, store: Store = PLAIN) -> None:
    """Say which window of a part is at work; None: no longer any."""
    attempt.window = window
    _write(run, key, attempt, store)


def mark_done(run: str, key: str, store: Store = PLAIN) -> None:
    """Say that a part is done."""
    store.remove(_path(run, key))


def _path(run: str, key: str) -> str:
    return f"{attempts_folder(run)}/{key}{SUFFIX}"


def _read(run: str, key: str) -> Attempt | None:
    """What is known of the attempts at a part; None where the file is missing or damaged."""
    try:
        attempt = Attempt(**json.loads(read_bytes(_path(run, key)) or b""))
    except (TypeError, ValueError):
        return None
    return attempt if isinstance(attempt.deaths, dict) else None


def _write(run: str, key: str, attempt: Attempt, store: Store) -> None:
    store.publish(_path(run, key), json.dumps(asdict(attempt)).encode())
