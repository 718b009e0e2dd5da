"""SQL over a run, with DuckDB. It reads the run's own tables and nothing else."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import SegError
from seg_core.results import published_parts, scenes_path
from seg_core.run import read_record

SUMMARY = """
    SELECT (SELECT count(*) FROM scenes) AS scenes,
           (SELECT count(*) FROM tiles) AS tiles,
           (SELECT count(*) FROM failures) AS failed,
           sum(valid_px)::BIGINT AS valid_px,
           sum(building_px)::BIGINT AS building_px,
           sum(building_px) / nullif(sum(valid_px), 0) AS coverage,
           sum(area_m2) / 1e6 AS area_km2,
           sum(building_m2) / 1e6 AS building_km2
    FROM tiles
"""


def connect(run: str) -> duckdb.DuckDBPyConnection:
    """A connection with the views `tiles` (done), `scenes` and `failures`. Raises SegError where `run` is no run.

    It can read the run's files only, and write nothing: the settings that hold it to that are locked.
    """
    read_record(run)
    if next(published_parts(run), None) is None:
        raise SegError(f"{run}: holds no rows yet: run seg segment to the end first")
    folder = Path(run).absolute()
    parts = _quote(str(folder / "tiles" / "part-*.parquet"))
    connection = duckdb.connect()
    connection.execute(f"SET allowed_directories = [{_quote(str(folder))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute(f"CREATE VIEW scenes AS SELECT * FROM read_parquet({_quote(str(scenes_path(run).absolute()))})")
    for view, status in (("tiles", "done"), ("failures", "failed")):
        connection.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet({parts}) WHERE status = '{status}'")
    connection.execute("SET lock_configuration = true")
    return connection


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def query(run: str, sql: str) -> pa.Table:
    """The answer to a question. Raises SegError with DuckDB's first line where the SQL is wrong."""
    with connect(run) as connection:
        try:
            answer = connection.sql(sql)
            if answer is None:
                raise SegError(f"SQL: {sql}: is no question: say SELECT ...")
            return answer.to_arrow_table()
        except duckdb.Error as error:
            raise SegError(f"SQL: {str(error).splitlines()[0]}") from error


def summary(run: str) -> dict[str, Any]:
    """Counts, coverage and areas of the whole run."""
    return dict(query(run, SUMMARY).to_pylist()[0])


def write_answer(answer: pa.Table, form: str, stream: BinaryIO, most: int) -> None:
    """Write an answer as `table` (its first `most` rows), `csv`, `json` (a list of objects) or `parquet`."""
    if form == "parquet":
        pq.write_table(answer, stream)
    elif form == "json":
        stream.write(
            json.dumps([{k: _plain(v) for k, v in row.items()} for row in answer.to_pylist()]).encode() + b"\n"
        )
    else:
        rows, plain = (answer, _plain) if form == "csv" else (answer.slice(0, most), _brief)
        columns = {name: map(plain, rows.column(i).to_pylist()) for i, name in enumerate(rows.column_names)}
        frame = pd.DataFrame({name: list(values) for name, values in columns.items()}, dtype=object)
        text = frame.to_csv(index=False) if form == "csv" else frame.to_string(index=False) + "\n"
        stream.write(text.encode())
        if len(rows) < len(answer):
            stream.write(f"... {len(answer) - len(rows):,} more rows: --format csv has them all\n".encode())


def _plain(value: object) -> object:
    """A value that text can hold: bytes become hexadecimal, DuckDB's wide sums numbers, dates ISO 8601."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if isinstance(value, str | int | float | bool | dict | list | None) else str(value)


def _brief(value: object) -> object:
    """A value for a table to look at."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else _plain(value)
