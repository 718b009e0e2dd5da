"""Find the window that kills its process: a segfault in a decoder raises no exception, but leaves a part unfinished.

A small file in the run's folder marks a part as in progress, from before its first window is read. A process that
starts a part and finds its file knows that an earlier process died on it. It then goes window by window, and names each
window in the file before reading it. A window that is named by two dead processes is the cause, and is not tried again.

Files of other sessions are ignored: they are from an earlier driver, which may have been killed for another reason.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from seg_core.run.fence import PLAIN, Store
from seg_core.storage.files import published, read_bytes

SUFFIX = ".json"
MAX_DEATHS = 2  # processes that may die on a window before it is given up


@dataclass
class Attempt:
    """The record of earlier attempts at a part."""

    session: str  # of the driver
    window: str | None = None  # the name of the window in progress, made of its row and column
    deaths: dict[str, int] = field(default_factory=dict)  # number of processes that died, by window

    def is_deadly(self, window: str) -> bool:
        """Whether a window has killed MAX_DEATHS processes, so that it is given up."""
        return self.deaths.get(window, 0) >= MAX_DEATHS


def attempts_folder(run: str) -> str:
    """Return the path of the folder that holds the files."""
    return f"{run}/attempts"


def mark_started(run: str, key: str, session: str, store: Store = PLAIN) -> None:
    """Mark a part as in progress."""
    _write(run, key, Attempt(session), store)


def claim_interrupted(run: str, keys: Sequence[str], session: str, store: Store = PLAIN) -> dict[str, Attempt]:
    """Return the attempts at parts on which a process of this session died, by the keys of the parts.

    A window that was in progress counts as one more death, which is written to the part's file.
    """
    started = {PurePosixPath(path).stem for path in published(attempts_folder(run), SUFFIX)}
    attempts = {key: _read(run, key) for key in keys if key in started}
    died = {key: each for key, each in attempts.items() if each is not None and each.session == session}
    for key, attempt in died.items():
        if attempt.window is not None:
            attempt.deaths[attempt.window] = attempt.deaths.get(attempt.window, 0) + 1
            attempt.window = None
        _write(run, key, attempt, store)
    return died


def mark_window(run: str, key: str, attempt: Attempt, window: str | None, store: Store = PLAIN) -> None:
    """Record which window of a part is in progress; None: no window."""
    attempt.window = window
    _write(run, key, attempt, store)


def mark_done(run: str, key: str, store: Store = PLAIN) -> None:
    """Remove the mark of a part that is done."""
    store.remove(_path(run, key))


def _path(run: str, key: str) -> str:
    return f"{attempts_folder(run)}/{key}{SUFFIX}"


def _read(run: str, key: str) -> Attempt | None:
    """Read the attempts at a part. Returns None if the file is missing or damaged."""
    try:
        attempt = Attempt(**json.loads(read_bytes(_path(run, key)) or b""))
    except (TypeError, ValueError):
        return None
    return attempt if isinstance(attempt.deaths, dict) else None


def _write(run: str, key: str, attempt: Attempt, store: Store) -> None:
    store.publish(_path(run, key), json.dumps(asdict(attempt)).encode())
