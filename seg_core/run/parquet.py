"""Read a Parquet file of a run: damage, a newer version's columns and a store that does not answer are told apart."""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import CorruptFileError, SegError
from seg_core.run.schema import ColumnsError, UnknownColumnError, check_columns, with_columns
from seg_core.storage.files import filesystem, read_bytes

T = TypeVar("T")


def read_file(path: str, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a Parquet file.

    Raises CorruptFileError where it can't, SegError where the file can't be read or a newer version wrote it.
    """
    with named_columns(path):
        return _parse_file(path, parse)


def _parse_file(path: str, parse: Callable[[Any], T]) -> T:
    # Arrow has the same errors for a damaged file and one that is not read: where it fails all of the file is fetched,
    # and parsed again.
    system, inside = filesystem(path)
    try:
        with system.open_input_file(inside) as file:
            return parse(file)
    except pa.ArrowMemoryError as error:
        raise SegError(f"{path}: can't be read: there is too little memory") from error
    except UNREADABLE:
        content = read_bytes(path)
    name = posixpath.basename(path)
    if content is None:
        raise SegError(f"{path}: can't be read: no such file")
    try:
        return parse(pa.BufferReader(content))
    except UNREADABLE as error:
        raise CorruptFileError(f"{name}: can't be read: {' '.join(str(error).split())}") from error


# Text that is not UTF-8 is a ValueError.
UNREADABLE = (OSError, ValueError, pa.ArrowException)


def read_table(
    file: Any,
    expected: pa.Schema,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """The rows of an open file, or of some row groups of it, with all columns of its table, or those of these names.

    `footer` is that of the file, if it was read before. Raises as `check_columns`.
    """
    parquet = pq.ParquetFile(file, metadata=footer)
    check_columns(parquet.schema_arrow, expected)
    wanted = pa.schema([expected.field(name) for name in columns or expected.names])
    there = [name for name in wanted.names if name in parquet.schema_arrow.names]
    table = parquet.read(columns=there) if groups is None else parquet.read_row_groups(groups, columns=there)
    return with_columns(table, wanted)


@contextmanager
def named_columns(path: str) -> Iterator[None]:
    """Raise CorruptFileError for a ColumnsError, SegError for an UnknownColumnError: both name the file."""
    try:
        yield
    except UnknownColumnError as error:
        raise SegError(
            f"{path}: was written by a newer version: its column {error} is not known here: update aerial-seg"
        ) from error
    except ColumnsError as error:
        raise CorruptFileError(f"{posixpath.basename(path)}: {error}") from error


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Add to a CorruptFileError what to do about it."""
    try:
        yield
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}{advice}") from error
