"""Query a run in SQL with DuckDB. Queries can read the run's own tables and nothing else."""

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
from seg_core.training.dataset import is_building

BATCH = 2**10  # rows of a result that are in memory at once, with their masks
SUMMED_COLUMNS = ("valid_px", "building_px", "area_m2", "building_m2")


def connect(run: str) -> duckdb.DuckDBPyConnection:
    """Open a connection with the tables `tiles` (done), `scenes` and `failures`.

    SQL in it can neither read nor write any file, and can't change the settings that forbid it. Raises SegError if
    `run` is not a run, holds no rows yet, or can't be read.
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
def run_sql(run: str, sql: str) -> Iterator[pa.RecordBatchReader]:
    """Run a query, and yield its result batch by batch. Columns with the name of an earlier one get a number.

    Raises SegError with DuckDB's or Arrow's message, in one line, if the SQL is wrong or the run can't be read.
    """
    with _translated_errors():
        connection = connect(run)
    with connection:
        with _translated_errors():
            result = connection.sql(sql)
            if result is None:
                raise SegError(f"SQL: {sql}: has no result: say SELECT ...")
            reader = result.to_arrow_reader(BATCH)
        yield _number_names(reader)


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Raise SegError, with one line, for errors of DuckDB, Arrow and files."""
    try:
        yield
    except duckdb.BinderException as error:  # mostly a name that is none
        text = " ".join(line for line in str(error).partition("\n\n")[0].splitlines() if line)
        raise SegError(f"SQL: {text}: seg query RUN --schema lists the columns") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise SegError(f"SQL: {str(error).splitlines()[0]}") from error


def query(run: str, sql: str) -> pa.Table:
    """Run a query, and return all rows of its result. Raises SegError as `run_sql` does."""
    with run_sql(run, sql) as result:
        return result.read_all()


def _number_names(result: pa.RecordBatchReader) -> pa.RecordBatchReader:
    """Add a number to the names of columns that an earlier column has too."""
    seen: Counter[str] = Counter()
    fields = []
    for each in result.schema:
        fields.append(each.with_name(f"{each.name}_{seen[each.name]}") if seen[each.name] else each)
        seen[each.name] += 1
    schema = pa.schema(fields, _geo(fields))

    def batches() -> Iterator[pa.RecordBatch]:
        with _translated_errors():
            for batch in result:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _geo(fields: Sequence[pa.Field]) -> dict[str, str] | None:
    """Return the metadata that makes a table GeoParquet if it has the geometry column, else None."""
    types = {each.name: each.type for each in fields}
    if types.get("geometry") != pa.binary():
        return None
    column = dict(SPLIT)
    if types.get("bbox") != BBOX:
        del column["covering"]
    return {"geo": json.dumps({**GEO, "columns": {"geometry": column}})}


def summary(run: str) -> dict[str, Any]:
    """Return counts, coverage and areas (km2) of the whole run. A figure is None if no tile has it.

    The class is named unless it is building, of which the columns are named.

    Areas are also None if any tile with valid pixels has no area, such as one without a CRS. Otherwise areas and
    coverage would be about different ground. This does not use SQL, which would keep the footers of all parts in memory
    at once. Raises SegError as `connect` does.
    """
    record = read_record(run)
    each = list(for_each(_sum_up, _parts(run)))
    found = {name: sum(part[name] for part in each) for name in ("tiles", "failed")}
    total = {name: [part[name] for part in each if part[name] is not None] for name in SUMMED_COLUMNS}
    valid_px, building_px = (sum(total[name]) if total[name] else None for name in SUMMED_COLUMNS[:2])
    without_area = sum(part["without_area"] for part in each)
    area_m2, building_m2 = (
        math.fsum(total[name]) if total[name] and not without_area else None for name in SUMMED_COLUMNS[2:]
    )
    name = record.class_name
    probability_px = [part["probability_px"] for part in each if part["valid_px"]]
    return {
        **({} if name is None or is_building(name) else {"class": name}),
        "scenes": sum(not scene.is_mosaic for scene in read_scenes(run)),
        "planned": record.plan.tiles,
        **found,
        "missing": max(0, record.plan.tiles - sum(found.values())),
        "valid_px": valid_px,
        "building_px": building_px,
        "coverage": building_px / valid_px if valid_px and building_px is not None else None,
        "mean_probability": math.fsum(probability_px) / valid_px if valid_px else None,
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


def _sum_up(path: str) -> dict[str, Any]:
    """Add up the tiles of a part that are done, and count those that are done and those that failed."""
    rows = read_part(path, ["status", "mean_probability", *SUMMED_COLUMNS])
    done = [row for row in rows if row["status"] == "done"]
    without_area = sum(row["area_m2"] is None and row["valid_px"] > 0 for row in done)
    sums: dict[str, Any] = {"tiles": len(done), "failed": len(rows) - len(done), "without_area": without_area}
    sums["probability_px"] = math.fsum(row["mean_probability"] * row["valid_px"] for row in done if row["valid_px"])
    for name in SUMMED_COLUMNS:
        values = [row[name] for row in done if row[name] is not None]
        add = math.fsum if name.endswith("_m2") else sum  # fsum does not depend on the order of floats
        sums[name] = add(values) if values else None
    return sums


def write_result(result: pa.RecordBatchReader, form: str, stream: BinaryIO, most: int) -> None:
    """Write a result as `table` (its first `most` rows), `csv`, `json` (a list of objects) or `parquet`.

    Only one batch of the result is in memory at once.
    """
    if form == "parquet":
        with pq.ParquetWriter(stream, result.schema) as file:
            for batch in result:
                file.write_batch(batch)
    elif form == "json":
        between = b"["
        for row in chain.from_iterable(batch.to_pylist() for batch in result):
            stream.write(between + json.dumps({k: _plain(v) for k, v in row.items()}).encode())
            between = b", "
        stream.write(b"]\n" if between == b", " else b"[]\n")
    elif form == "csv":
        stream.write(_frame(result.schema.empty_table(), _plain).to_csv(index=False).encode())
        for batch in result:
            stream.write(_frame(batch, _plain).to_csv(index=False, header=False).encode())
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


def _frame(rows: pa.Table | pa.RecordBatch, plain: Callable[[object], object]) -> pd.DataFrame:
    """Convert rows to a data frame, each value by the function `plain`."""
    return pd.DataFrame(
        {each: list(map(plain, rows.column(each).to_pylist())) for each in rows.schema.names}, dtype=object
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


def _brief(value: object) -> object:
    """Convert a value for a printed table."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else _plain(value)
