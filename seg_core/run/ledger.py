"""A ledger beside the parts of a run: what is known of them without reading their files.

    ledger/<digest>.json     what each part of a task is: its file's state and digest, and the sums of its rows
    ledger/<digest>.parquet  the rows of the same parts, without their PIXELS

It is written after the parts that it lists, and the files of these stay the truth. An entry counts only while the file
of its part is in the state in which it was entered. A part without such an entry is read. So a ledger that is lost,
damaged, copied from elsewhere, or of another version, costs time and nothing else.

Only parts whose rows were checked are entered, and only if all their tiles are done. The names are digests of the
content. So a file that was cut short, or has changed, is found by its name.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from seg_core.run.check import Expected, check_part
from seg_core.run.fence import PLAIN, Store
from seg_core.run.parquet import read_table
from seg_core.run.plan import Part
from seg_core.run.schema import TILES
from seg_core.run.sums import SUMS, sum_table
from seg_core.run.tables import encode_table, part_name, part_path, version_of
from seg_core.storage.files import list_files, read_bytes, sha256, stat
from seg_core.threads import NUM_FILE_THREADS, for_each, prefetch

FORMAT = "aerial-seg ledger"
VERSION = 2  # also of the checks that a part has passed
NAME_DIGITS = 16  # of a digest
ENTRIES, FIGURES = ".json", ".parquet"  # how the names of the two files end
FILES_AT_ONCE = 8  # that a thread reads: to ask it for each one takes longer than to read one on disk
PIXELS = ("mask", "valid", "probability")  # columns that the rows of a ledger lack
COLUMNS = pa.schema([each for each in TILES if each.name not in PIXELS])


class LedgerEntry(NamedTuple):
    """What is known of a part, all tiles of which are done."""

    key: str
    state: str  # of its file: see `seg_core.storage.store.Stat.version`
    digest: str  # SHA-256 of its file
    version: str  # see `Part.version`
    sums: Sequence[float | None]  # of its rows, in the order of SUMS

    @property
    def figures(self) -> dict[str, Any]:
        """What `sum_table` returns for its rows."""
        return dict(zip(SUMS, self.sums, strict=True))


class EnteredPart(NamedTuple):
    """A part that is to be entered."""

    entry: LedgerEntry
    rows: pa.Table  # with COLUMNS


@dataclass(frozen=True)
class LedgerFile:
    """The parts of a task."""

    path: str
    expected: Expected  # what their rows were checked against
    entries: Sequence[LedgerEntry]
    figures: str  # name of the file of their rows
    size: int  # bytes of that


def ledger_folder(run: str) -> str:
    """Return the path of the folder that holds the files."""
    return f"{run}/ledger"


def describe_part(run: str, part: Part, content: bytes, expected: Expected) -> EnteredPart | None:
    """Check the content of a file that was published for a part, and return what is to be entered.

    None if a tile has failed, a row is wrong, or the file is no longer that one.
    """
    table = read_table(pa.BufferReader(content), TILES)
    found, state = check_part(table, version_of(table.schema.metadata), part, expected), stat(part_path(run, part.key))
    if found.problems or found.num_failed or state is None or state.size != len(content):
        return None
    sums = sum_table(table)
    figures = [sums[name] for name in SUMS]
    entry = LedgerEntry(part.key, state.version, sha256(content), part.version, figures)
    return EnteredPart(entry, table.select(COLUMNS.names).replace_schema_metadata(None))


def write_ledger(run: str, parts: Sequence[EnteredPart], expected: Expected, store: Store = PLAIN) -> None:
    """Enter parts that are published."""
    if not parts:
        return
    rows = encode_table(pa.concat_tables([part.rows for part in parts]))
    figures = f"{sha256(rows)[:NAME_DIGITS]}{FIGURES}"
    content = {
        "format": FORMAT,
        "version": VERSION,
        "expected": expected,
        "columns": COLUMNS.names,
        "sums": SUMS,
        "figures": figures,
        "size": len(rows),
        "parts": [part.entry for part in parts],
    }
    encoded = json.dumps(content).encode()
    store.publish(f"{ledger_folder(run)}/{figures}", rows)
    store.publish(f"{ledger_folder(run)}/{sha256(encoded)[:NAME_DIGITS]}{ENTRIES}", encoded)


def read_ledger(run: str) -> Iterator[LedgerFile]:
    """Yield what was entered, whether it still counts or not. Raises SegError if the store is unavailable."""
    names = sorted(name for name, _ in list_files(ledger_folder(run)) if name.endswith(ENTRIES))
    batches = [names[first : first + FILES_AT_ONCE] for first in range(0, len(names), FILES_AT_ONCE)]
    read = partial(_read_entries, ledger_folder(run))
    with ThreadPoolExecutor(NUM_FILE_THREADS) as pool:
        for files in prefetch(pool, lambda batch: list(map(read, batch)), batches, NUM_FILE_THREADS):
            yield from (file for file in files if file is not None)


def _read_entries(folder: str, name: str) -> LedgerFile | None:
    """Read a file of entries. Returns None if it is damaged, or was written by another version."""
    content = read_bytes(f"{folder}/{name}") or b""
    if f"{sha256(content)[:NAME_DIGITS]}{ENTRIES}" != name:
        return None
    try:
        known = json.loads(content)
        kind = known["format"], known["version"], known["columns"], known["sums"]
        if kind != (FORMAT, VERSION, COLUMNS.names, list(SUMS)):
            return None
        entries = [LedgerEntry(*each) for each in known["parts"]]
        return LedgerFile(f"{folder}/{name}", Expected(*known["expected"]), entries, known["figures"], known["size"])
    except (KeyError, TypeError, ValueError):
        return None


def read_live_ledger(run: str) -> Iterator[tuple[LedgerFile, list[LedgerEntry]]]:
    """Yield the files of a ledger that count, each with those of its entries that do. No part is in two of them."""
    states: dict[str, str] | None = None  # without sizes: a region may have millions of parts
    for file in read_ledger(run):
        if states is None:
            states = {name: state.version for name, state in list_files(f"{run}/tiles")}
        live = [each for each in file.entries if states.get(part_name(each.key)) == each.state]
        for entry in live:
            del states[part_name(entry.key)]
        if live:
            yield file, live


def find_damaged_figures(run: str) -> list[str]:
    """Return the paths of files of rows whose content is not the one that they are named for."""
    folder = ledger_folder(run)

    def is_damaged(name: str) -> bool:
        content = read_bytes(f"{folder}/{name}")
        return content is not None and f"{sha256(content)[:NAME_DIGITS]}{FIGURES}" != name

    names = sorted(name for name, _ in list_files(folder) if name.endswith(FIGURES))
    return [f"{folder}/{name}" for name, damaged in zip(names, for_each(is_damaged, names), strict=True) if damaged]
