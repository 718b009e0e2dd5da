"""What a run says: its summary, and results of queries in the formats that people ask for."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import SegError
from seg_core.run.ledger import read_live_ledger
from seg_core.run.part_reading import map_live_tables
from seg_core.run.parts import check_not_empty, index_parts
from seg_core.run.record import read_record
from seg_core.run.sums import COLUMNS, add_sums, sum_table
from seg_core.run.tables import read_scenes
from seg_core.training.class_names import is_building

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT = 300  # characters of a value on a page
LARGEST_EXACT = 2**53  # beyond which JavaScript rounds


def query(run: str, sql: str) -> pa.Table:
    """Run a query, and return all rows of its result. Raises SegError as `run_sql` does."""
    from seg_core.run.sql import run_sql  # here, because a summary does without DuckDB

    with run_sql(run, sql) as result:
        return result.read_all()


def summary(run: str) -> dict[str, Any]:
    """Return counts, coverage and areas (km2) of the whole run. A figure is None if no tile has it.

    The class is named unless it is building, of which the columns are named.

    Areas are also None if any tile with valid pixels has no area, such as one without a CRS. Otherwise areas and
    coverage would be about different ground. This does not use SQL, which would keep the footers of all parts in memory
    at once. Raises SegError as `connect` does.
    """
    record, index = read_record(run), index_parts(run)
    check_not_empty(index)
    known: set[str] = set()

    def known_sums() -> Iterator[Mapping[str, Any]]:
        for _, entries in read_live_ledger(run):
            live = [entry for entry in entries if entry.key in index.own]  # else it counts from a compacted file too
            known.update(entry.key for entry in live)
            yield from (entry.figures for entry in live)

    found = add_sums(chain(known_sums(), map_live_tables(sum_table, index, COLUMNS, known)))
    area_m2, building_m2 = found.pop("area_m2"), found.pop("building_m2")
    counts = {name: found.pop(name) for name in ("tiles", "failed")}
    name = record.class_name
    return {
        **({} if name is None or is_building(name) else {"class": name}),
        "scenes": sum(not scene.is_mosaic for scene in read_scenes(run)),
        "planned": record.plan.tiles,
        **counts,
        "missing": max(0, record.plan.tiles - sum(counts.values())),
        **found,
        "area_km2": None if area_m2 is None else area_m2 / 1e6,
        "building_km2": None if building_m2 is None else building_m2 / 1e6,
    }


def describe(figures: Mapping[str, Any]) -> str:
    """Return the state of a run in a few words, from its summary. A complete run may still contain failed tiles."""
    planned, failed, missing = (figures[name] for name in ("planned", "failed", "missing"))
    failures = f"{failed:,} of {planned:,} tiles failed" if failed else ""
    if missing:
        return f"not finished: {missing:,} of {planned:,} tiles are not done yet" + (f", {failures}" if failed else "")
    return f"complete, but {failures}" if failed else f"complete: all {planned:,} tiles are done"


def to_table(figures: Mapping[str, Any]) -> pa.Table:
    """Return figures as a table of one row."""
    return pa.Table.from_pylist([dict(figures)])


def write_result(result: pa.RecordBatchReader, form: str, stream: BinaryIO, most: int) -> None:
    """Write a result as `table` (its first `most` rows), `csv`, `json` (a list of objects) or `parquet`.

    Only one batch of the result is in memory at once. Raises SegError for a column that Parquet can't hold.
    """
    if form == "parquet":
        _check_types(result.schema)
        with pq.ParquetWriter(stream, result.schema) as file:
            for batch in result:
                file.write_batch(batch)
    elif form == "json":
        between = b"["
        for row in chain.from_iterable(zip(*map(_values, batch.columns), strict=True) for batch in result):
            named = dict(zip(result.schema.names, map(_plain, row), strict=True))
            stream.write(between + json.dumps(named).encode())
            between = b", "
        stream.write(b"]\n" if between == b", " else b"[]\n")
    elif form == "csv":
        stream.write(_frame(result.schema.empty_table(), _text).to_csv(index=False).encode())
        for batch in result:
            stream.write(_frame(batch, _text).to_csv(index=False, header=False).encode())
    else:
        shown, number = result.schema.empty_table(), 0
        for batch in result:
            number += len(batch)
            if len(shown) < most:
                shown = pa.concat_tables([shown, pa.Table.from_batches([batch.slice(0, most - len(shown))])])
        text = _frame(shown, _brief).to_string(index=False) if number else "  ".join(result.schema.names)
        stream.write(f"{text}\n".encode())
        if len(shown) < number:
            stream.write(f"... {number - len(shown):,} more rows: --format csv has them all\n".encode())


def _check_types(schema: pa.Schema) -> None:
    """Raise SegError for a column of a type that Parquet lacks."""
    for each in schema:
        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([each])).close()
        except pa.ArrowNotImplementedError as error:
            cast = f'CAST("{each.name}" AS VARCHAR)'
            raise SegError(f"SQL: column {each.name}: Parquet has no type {each.type}: say {cast}") from error


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of a column, as text if they are spans of time, or one is a time that Python does not know."""
    if not pa.types.is_interval(column.type):
        with suppress(OverflowError):  # a time such as infinity
            values: list[Any] = column.to_pylist()
            return values
    import duckdb  # here, because a summary does without

    with duckdb.connect() as connection:
        text = connection.from_arrow(pa.table({"x": column})).project("x::VARCHAR AS x")
        return list(text.to_arrow_table()["x"].to_pylist())


def first_rows(result: pa.RecordBatchReader, most: int) -> tuple[list[list[object]], bool]:
    """Return the first `most` rows of a result for a page, and whether there are more. The rest is not computed.

    A value is a number, a text of MAX_TEXT characters at most, or None.
    """
    rows: list[list[object]] = []
    for batch in result:
        values = map(_values, batch.slice(0, most + 1 - len(rows)).columns)
        rows += [list(map(_short, row)) for row in zip(*values, strict=True)]
        if len(rows) > most:
            return rows[:most], True
    return rows, False


def _short(value: object) -> object:
    brief = _brief(value)
    if brief is None or isinstance(brief, float) or (isinstance(brief, int) and abs(brief) <= LARGEST_EXACT):
        return brief
    text = json.dumps(brief) if isinstance(brief, dict | list) else str(brief)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def _frame(rows: pa.Table | pa.RecordBatch, plain: Callable[[object], object]) -> "pd.DataFrame":
    """Convert rows to a data frame, each value by the function `plain`."""
    import pandas as pd  # here, because a summary does without

    return pd.DataFrame(
        {each: list(map(plain, _values(rows.column(each)))) for each in rows.schema.names}, dtype=object
    )


def _plain(value: object) -> object:
    """Convert a value to what JSON can hold: bytes to hexadecimal, decimals to numbers, NaN to null, dates to text."""
    match value:
        case bytes():
            plain: object = value.hex()
        case Decimal():
            plain = int(value) if value == value.to_integral_value() else float(value)
        case float():
            plain = value if math.isfinite(value) else None
        case dict():
            plain = {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            plain = [_plain(v) for v in value]
        case str() | int() | None:
            plain = value
        case _:
            plain = str(value)
    return plain


def _text(value: object) -> object:
    """Convert a value for a table of text, which can say that a number is infinite, or none."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else _plain(value)


def _brief(value: object) -> object:
    """Convert a value for a printed table."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else _text(value)
