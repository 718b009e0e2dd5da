"""SQL over a run, with DuckDB. It reads the run's own tables and nothing else."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from typing import Any, BinaryIO

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import field

from seg_core.errors import SegError
from seg_core.run.record import read_record
from seg_core.run.schema import BBOX, GEO, SPLIT
from seg_core.run.tables import open_scenes, open_tiles, published_parts, read_part, read_scenes
from seg_core.threads import for_each

BATCH = 2**10  # rows of an answer that are in memory at once, with their masks
SUMMED_COLUMNS = ("valid_px", "building_px", "area_m2", "building_m2")


def connect(run: str) -> duckdb.DuckDBPyConnection:
    """A connection with the views `tiles` (done), `scenes` and `failures`. Raises SegError where `run` is no run.

    It reaches these tables and no file at all, to read or to write, and the settings that hold it to that are locked.
    """
    read_record(run)
    rows, scenes = open_tiles(run, _parts(run)), open_scenes(run)
    connection = duckdb.connect()
    connection.register("tiles", rows.filter(field("status") == "done"))
    connection.register("failures", rows.filter(field("status") == "failed"))
    connection.register("scenes", scenes)
    connection.execute("SET enable_external_access = false; SET python_enable_replacements = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _parts(run: str) -> list[str]:
    parts = published_parts(run)
    if not parts:
        raise SegError(f"{run}: holds no rows yet: run seg segment to the end first")
    return parts


@contextmanager
def ask(run: str, sql: str) -> Iterator[pa.RecordBatchReader]:
    """The answer to a question, as it comes; of columns of one name, the later ones are numbered.

    Raises SegError with the first line of what is wrong with the SQL, or with the run's files.
    """
    with _in_a_line():
        connection = connect(run)
    with connection:
        with _in_a_line():
            answer = connection.sql(sql)
            if answer is None:
                raise SegError(f"SQL: {sql}: is no question: say SELECT ...")
            reader = answer.to_arrow_reader(BATCH)
        yield _number_names(reader)


@contextmanager
def _in_a_line() -> Iterator[None]:
    """Raise SegError for what is wrong with the SQL or with the run's files."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise SegError(f"SQL: {str(error).splitlines()[0]}") from error


def query(run: str, sql: str) -> pa.Table:
    """All rows of an answer at once, in memory."""
    with ask(run, sql) as answer:
        return answer.read_all()


def _number_names(answer: pa.RecordBatchReader) -> pa.RecordBatchReader:
    seen: Counter[str] = Counter()
    fields = []
    for each in answer.schema:
        fields.append(each.with_name(f"{each.name}_{seen[each.name]}") if seen[each.name] else each)
        seen[each.name] += 1
    schema = pa.schema(fields, _geo(fields))

    def batches() -> Iterator[pa.RecordBatch]:
        with _in_a_line():
            for batch in answer:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _geo(fields: Sequence[pa.Field]) -> dict[str, str] | None:
    """What makes a table GeoParquet, where an answer has the column of geometries; as in `schema`."""
    types = {each.name: each.type for each in fields}
    if types.get("geometry") != pa.binary():
        return None
    column = dict(SPLIT)
    if types.get("bbox") != BBOX:
        del column["covering"]
    return {"geo": json.dumps({**GEO, "columns": {"geometry": column}})}


def summary(run: str) -> dict[str, Any]:
    """Counts, coverage and areas of the whole run; null where no tile has them. Raises SegError as `connect` does.

    Areas are null, too, where tiles with valid pixels have none, as those without a CRS: else their ratio would be that
    of another ground than coverage is of.

    Not in SQL: that would keep the footers of all parts in memory at once.
    """
    planned = read_record(run).plan.tiles
    each = list(for_each(_sum_up, _parts(run)))
    found = {name: sum(part[name] for part in each) for name in ("tiles", "failed")}
    total = {name: [part[name] for part in each if part[name] is not None] for name in SUMMED_COLUMNS}
    valid_px, building_px = (sum(total[name]) if total[name] else None for name in SUMMED_COLUMNS[:2])
    without_area = sum(part["without_area"] for part in each)
    area_m2, building_m2 = (
        math.fsum(total[name]) if total[name] and not without_area else None for name in SUMMED_COLUMNS[2:]
    )
    return {
        "scenes": sum(not scene.is_mosaic for scene in read_scenes(run)),
        "planned": planned,
        **found,
        "missing": max(0, planned - sum(found.values())),
        "valid_px": valid_px,
        "building_px": building_px,
        "coverage": building_px / valid_px if valid_px and building_px is not None else None,
        "area_km2": None if area_m2 is None else area_m2 / 1e6,
        "building_km2": None if building_m2 is None else building_m2 / 1e6,
    }


def describe(figures: Mapping[str, Any]) -> str:
    """The state of a run in a few words, from its summary. A complete run may still hold failed tiles."""
    planned, failed, missing = (figures[name] for name in ("planned", "failed", "missing"))
    failures = f"{failed:,} of {planned:,} tiles failed" if failed else ""
    if missing:
        return f"not finished: {missing:,} of {planned:,} tiles are not done yet" + (f", {failures}" if failed else "")
    return f"complete, but {failures}" if failed else f"complete: all {planned:,} tiles are done"


def to_table(figures: Mapping[str, Any]) -> pa.Table:
    """Figures as a table of one row."""
    return pa.Table.from_pylist([dict(figures)])


def _sum_up(path: str) -> dict[str, Any]:
    """The sums of a part's tiles that are done, and how many are and are not."""
    rows = read_part(path, ["status", *SUMMED_COLUMNS])
    done = [row for row in rows if row["status"] == "done"]
    without_area = sum(row["area_m2"] is None and row["valid_px"] > 0 for row in done)
    sums: dict[str, Any] = {"tiles": len(done), "failed": len(rows) - len(done), "without_area": without_area}
    for name in SUMMED_COLUMNS:
        held = [row[name] for row in done if row[name] is not None]
        add = math.fsum if name.endswith("_m2") else sum  # of floats in whatever order the same
        sums[name] = add(held) if held else None
    return sums


def write_answer(answer: pa.RecordBatchReader, form: str, stream: BinaryIO, most: int) -> None:
    """Write an answer as `table` (its first `most` rows), `csv`, `json` (a list of objects) or `parquet`.

    Batch by batch: of a large answer no more than one is in memory.
    """
    if form == "parquet":
        with pq.ParquetWriter(stream, answer.schema) as file:
            for batch in answer:
                file.write_batch(batch)
    elif form == "json":
        between = b"["
        for row in chain.from_iterable(batch.to_pylist() for batch in answer):
            stream.write(between + json.dumps({k: _plain(v) for k, v in row.items()}).encode())
            between = b", "
        stream.write(b"]\n" if between == b", " else b"[]\n")
    elif form == "csv":
        stream.write(_frame(answer.schema.empty_table(), _plain).to_csv(index=False).encode())
        for batch in answer:
            stream.write(_frame(batch, _plain).to_csv(index=False, header=False).encode())
    else:
        shown, number = answer.schema.empty_table(), 0
        for batch in answer:
            number += len(batch)
            if len(shown) < most:
                shown = pa.concat_tables([shown, pa.Table.from_batches([batch.slice(0, most - len(shown))])])
        text = _frame(shown, _brief).to_string(index=False) if number else "  ".join(answer.schema.names)
        stream.write(f"{text}\n".encode())
        if len(shown) < number:
            stream.write(f"... {number - len(shown):,} more rows: --format csv has them all\n".encode())


def _frame(rows: pa.Table | pa.RecordBatch, plain: Callable[[object], object]) -> pd.DataFrame:
    return pd.DataFrame(
        {each: list(map(plain, rows.column(each).to_pylist())) for each in rows.schema.names}, dtype=object
    )


def _plain(value: object) -> object:
    """A value that JSON can hold: bytes become hexadecimal, wide sums numbers, NaN null, dates ISO 8601."""
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


def _brief(value: object) -> object:
    """A value for a table to look at."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else _plain(value)
