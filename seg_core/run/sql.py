"""Query a run in SQL with DuckDB. Queries can read the run's own tables and nothing else."""

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import SegError
from seg_core.run.ledger import COLUMNS as LEDGER_COLUMNS
from seg_core.run.ledger import ledger_folder, read_live_ledger
from seg_core.run.parquet import advised, read_file
from seg_core.run.parts import PartIndex, check_not_empty, index_parts
from seg_core.run.record import read_record
from seg_core.run.schema import BBOX, GEO, SCENES, SPLIT, TILES, check_columns
from seg_core.run.sql_files import SCHEME, RunFiles
from seg_core.run.sql_limit import Limit
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import REPAIR_ADVICE, scenes_path
from seg_core.storage.files import list_files, stat
from seg_core.threads import for_each

# Tiles that touch a rectangle in degrees. Files and row groups that lie elsewhere are not read.
TILES_IN = """
CREATE MACRO tiles_in(west, south, east, north) AS TABLE SELECT * FROM tiles
WHERE bbox.ymin <= north AND bbox.ymax >= south AND bbox.xmin <= east AND bbox.xmax >= west
"""
READING = {"SELECT", "EXPLAIN", "MULTI"}  # types of statements; PIVOT is of the last
EXPLAIN = re.compile(r"\s*explain(\s+analyze)?\b(\s*\(\s*(analyze|format)\b[^()]*\))?", re.IGNORECASE)
# Where parts lie that don't count, in a compacted file.
DEAD_PARTS = pa.schema(
    {"filename": pa.string(), "scene_id": pa.string(), "row_off": pa.int32(), "col_off": pa.int32()},
)
CHANGED_ADVICE = "if the run is being compacted or worked on, ask again"
BATCH = 2**10  # rows of a result that are in memory at once, with their masks


# Used for the columns that a ledger lacks and for nothing else: DuckDB reads it where a query needs one of them.
ROW_NUMBER = "file_row_number"


@dataclass(frozen=True)
class Connection:
    """DuckDB with the tables of a run, and the files that it reads."""

    duckdb: duckdb.DuckDBPyConnection
    files: RunFiles
    row_groups: int  # of all files
    has_pixels: bool  # whether a query may need the columns that a ledger lacks

    def can_answer(self, sql: str) -> bool:
        """Whether the tables have all columns that a query needs. Raises duckdb.Error for a query that is wrong."""
        if self.has_pixels:
            return True
        if self.duckdb.extract_statements(sql)[0].type.name == "EXPLAIN":
            return False
        return ROW_NUMBER not in self.duckdb.execute(f"EXPLAIN (FORMAT json) {sql}").fetchall()[0][1]


def connect(run: str, with_pixels: bool = True) -> Connection:
    """Open a connection with the tables `tiles` (done), `scenes` and `failures`.

    Without pixels, the rows of many parts are read from the ledger at once, and a query of the columns that it lacks
    fails. SQL can neither read nor write any other file, and can't change the settings that forbid it. Raises SegError
    if `run` is not a run, holds no rows yet, or can't be read.
    """
    read_record(run)
    index = index_parts(run)
    check_not_empty(index)
    entered, dead, keys = ({}, {}, set()) if with_pixels else _find_figures(index)
    own = FileSet("own", {each.name: each.path for key, each in index.own.items() if key not in keys}, TILES)
    ledger = FileSet("ledger", entered, TILES, tuple(LEDGER_COLUMNS.names))
    compacted = FileSet("compacted", {file.name: file.path for file in index.compacted}, TILES)
    scenes = FileSet("scenes", {"scenes.parquet": scenes_path(run)}, SCENES)
    sets = [each for each in (own, ledger, compacted, scenes) if each.paths]
    files = RunFiles({f"{each.folder}/{name}": path for each in sets for name, path in each.paths.items()})
    connection = duckdb.connect()
    connection.register_filesystem(files)
    connection.execute("SET enable_geoparquet_conversion = false")  # geometries stay WKB
    # DuckDB lets SQL read and write its folder for temporary files, which is in the current folder.
    connection.execute("SET temp_directory = ''")
    sources = [own.select()] if own.paths else []
    if ledger.paths:
        sources.append(_select_live(connection, run, ledger, dead))
    if compacted.paths:
        sources.append(_select_live(connection, run, compacted, index.dead_parts()))
    for view, status in (("tiles", "done"), ("failures", "failed")):
        selected = " UNION ALL ".join(f"SELECT * FROM ({source}) WHERE status = '{status}'" for source in sources)
        connection.execute(f"CREATE VIEW {view} AS {selected}")
    connection.execute(f"CREATE VIEW scenes AS {scenes.select()}")
    connection.execute(TILES_IN)
    connection.execute(f"SET allowed_directories = ['{SCHEME}://']; SET enable_external_access = false")
    connection.execute("SET python_enable_replacements = false; SET lock_configuration = true")
    row_groups = sum(number for each in sets for _, number in each.footers)
    return Connection(connection, files, row_groups, not ledger.paths)


def _find_figures(index: PartIndex) -> tuple[dict[str, str], dict[str, set[str]], set[str]]:
    """Find the files of a ledger that hold rows: their paths by name, and the parts in them that don't count.

    Also returns the keys of the parts that do. Only those with files of their own do: a part that got one since the
    index was made counts from where it was.
    """
    folder = ledger_folder(index.run)
    sizes = {name: state.size for name, state in list_files(folder)}
    paths: dict[str, str] = {}
    dead: dict[str, set[str]] = {}
    keys: set[str] = set()
    for file, entries in read_live_ledger(index.run):
        live = {entry.key for entry in entries if entry.key in index.own}
        if not live or sizes.get(file.figures) != file.size or file.figures in paths:
            continue
        paths[file.figures] = f"{folder}/{file.figures}"
        keys |= live
        if gone := {entry.key for entry in file.entries} - live:
            dead[file.figures] = gone
    return paths, dead, keys


@dataclass(frozen=True)
class FileSet:
    """Files that together hold the rows of a table."""

    folder: str
    paths: Mapping[str, str]  # by name
    schema: pa.Schema
    columns: tuple[str, ...] = ()  # that all of the files have, in one row group: their footers need not be read

    @cached_property
    def footers(self) -> list[tuple[tuple[str, ...], int]]:
        """Columns and number of row groups of each file.

        Raises SegError for a file that is damaged or gone, or that a newer version wrote.
        """
        if self.columns:
            return [(self.columns, 1)] * len(self.paths)
        with advised(REPAIR_ADVICE):
            return list(for_each(self._read_footer, self.paths.values()))

    def _read_footer(self, path: str) -> tuple[tuple[str, ...], int]:
        def parse(file: Any) -> tuple[tuple[str, ...], int]:
            parquet = pq.ParquetFile(file)
            check_columns(parquet.schema_arrow, self.schema)
            return tuple(parquet.schema_arrow.names), parquet.num_row_groups

        try:
            return read_file(path, parse)
        except SegError as error:
            if stat(path):
                raise
            raise SegError(f"{path}: is gone: {CHANGED_ADVICE}") from error

    def select(self, with_filename: bool = False) -> str:
        """Return a query of all columns of the table, null where a file lacks them, and perhaps of the file's name."""
        names = {columns for columns, _ in self.footers}
        there = set().union(*names)
        absent = f"error('the ledger has no pixels of row ' || {ROW_NUMBER})" if self.columns else "NULL"
        columns = [
            each.name if each.name in there else f"{absent}::{_sql_type(each.type)} AS {each.name}"
            for each in self.schema
        ]
        options = {"union_by_name": len(names) > 1, "hive_partitioning": False, "filename": with_filename}
        options |= {ROW_NUMBER: True} if self.columns else {}
        arguments = ", ".join(f"{name} = {str(value).lower()}" for name, value in options.items())
        selected = ", ".join([*columns, *(["filename"] if with_filename else [])])
        return f"SELECT {selected} FROM read_parquet('{SCHEME}://{self.folder}/*', {arguments})"


def _sql_type(kind: pa.DataType) -> str:
    """Return the type that DuckDB has for a column."""
    return str(duckdb.from_arrow(pa.table({"x": pa.nulls(0, kind)})).types[0])


def _select_live(
    connection: duckdb.DuckDBPyConnection, run: str, files: FileSet, dead: Mapping[str, Collection[str]]
) -> str:
    """Return a query of files that hold many parts, without the rows that don't count: `dead` has keys by file."""
    if not dead:
        return files.select()
    plan = read_plan(run)
    parts = {part.key: part for part in plan.parts()}
    rows = [
        {"filename": f"{SCHEME}://{files.folder}/{name}", "scene_id": part.scene.scene_id, **part.window._asdict()}
        for name, keys in dead.items()
        for part in (parts[key] for key in parts.keys() & keys)
    ]
    # Not a table of DuckDB, which SQL could delete from.
    table = f"dead_parts_{files.folder}"
    connection.register(table, pa.Table.from_pylist(rows, DEAD_PARTS))
    size = plan.settings.part
    return (
        f"SELECT tile.* EXCLUDE (filename) FROM ({files.select(with_filename=True)}) AS tile "
        f"ANTI JOIN {table} AS dead ON tile.filename = dead.filename AND tile.scene_id = dead.scene_id "
        f"AND tile.row_off // {size} * {size} = dead.row_off AND tile.col_off // {size} * {size} = dead.col_off"
    )


@contextmanager
def run_sql(run: str, sql: str, limit: Limit | None = None) -> Iterator[pa.RecordBatchReader]:
    """Run a query, and yield its result batch by batch. Columns with the name of an earlier one get a number.

    Raises SegError with DuckDB's or Arrow's message, in one line, if the SQL is wrong or the run can't be read, and if
    the query is interrupted by a limit.
    """
    connection = _connect_for(run, sql)
    with connection.duckdb, limit.applied(connection.duckdb) if limit else nullcontext():
        with _translated_errors(connection.files):
            result = connection.duckdb.sql(sql)
            if result is None:
                raise SegError(f"SQL: {sql}: has no result: say SELECT ...")
            whole = {number for number, kind in enumerate(result.types) if str(kind) == "HUGEINT"}
            reader = result.to_arrow_reader(BATCH)
        yield _tidy_columns(reader, whole, connection.files)


def _connect_for(run: str, sql: str, explained: bool = False) -> Connection:
    """Open a connection that can answer a query, without reading the files of all parts if the ledger is enough."""
    for with_pixels in (False, True):
        with _translated_errors():
            connection = connect(run, with_pixels)
        with _translated_errors(connection.files):
            _check_query(connection, sql, explained)
            if connection.can_answer(sql):
                break
        connection.duckdb.close()
    return connection


def _check_query(connection: Connection, sql: str, explained: bool = False) -> None:
    """Raise SegError for what is not a single query, or would change something.

    `explained` is whether the query is to be explained.
    """
    statements = connection.duckdb.extract_statements(sql)
    if not statements:
        raise SegError("SQL: is empty: say SELECT ...")
    if len(statements) > 1:
        raise SegError(f"SQL: {sql}: holds several queries: say one of them")
    kind = statements[0].type.name
    if kind == "EXPLAIN":
        if explained:
            raise SegError(f"SQL: {sql}: leave out EXPLAIN: --explain says it")
        _check_query(connection, EXPLAIN.sub("", statements[0].query, count=1))
    elif kind not in READING:
        raise SegError(f"SQL: {kind}: a run is only read: say SELECT ..., and write its result by --format csv > FILE")


def explain(run: str, sql: str) -> dict[str, Any]:
    """Run a query, and return what it has read instead of its result.

    That is files and bytes, of all that there are, and DuckDB's plan with the row groups and rows of each step. Raises
    SegError as `run_sql` does.
    """
    connection = _connect_for(run, sql, explained=True)
    files = connection.files
    with connection.duckdb, _translated_errors(files):
        before = time.perf_counter()
        plan = connection.duckdb.execute(f"EXPLAIN ANALYZE {sql}").fetchall()[0][1]
        seconds = time.perf_counter() - before
        read = dict(files.bytes_read)
        groups = [int(each) for each in re.findall(r"Row Groups Scanned: (\d+) /", plan)]
        total = {name: int(files.info(name)["size"]) for name in files.paths}
    return {
        "files": len(total),
        "files_opened": len(read),
        "row_groups": connection.row_groups,
        "row_groups_read": sum(groups),
        "bytes": sum(total.values()),
        "bytes_read": sum(read.values()),
        "seconds": seconds,
        "plan": plan,
    }


@contextmanager
def _translated_errors(files: RunFiles | None = None) -> Iterator[None]:
    """Raise SegError, with one line, for errors of DuckDB, Arrow and files."""
    try:
        yield
    except duckdb.BinderException as error:  # mostly a name that is none
        text = " ".join(line for line in str(error).partition("\n\n")[0].splitlines() if line)
        raise SegError(f"SQL: {text}: seg query RUN --schema lists the columns") from error
    except duckdb.CatalogException as error:
        text = " ".join(str(error).partition("\n\n")[0].splitlines())
        if " exists in the " in text:
            text = f"{text.partition(', but')[0]}: its extension is not loaded here: use geo_tiles of seg_core.open_run"
        elif "Table with name" in text:
            text += ": the tables are tiles, scenes and failures"
        raise SegError(f"SQL: {text}") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        if files is not None and files.error is not None:
            raise SegError(f"{str(files.error).splitlines()[0]}: {CHANGED_ADVICE}") from error
        lines = [line for line in str(error).partition("\nLINE ")[0].splitlines() if line.strip()]
        # An error of Python within DuckDB has its own words in the last line.
        line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        is_of_query = isinstance(error, duckdb.ProgrammingError | duckdb.DataError | duckdb.PermissionException)
        advice = "" if is_of_query or files is None else ": if a file of the run is damaged, seg verify names it"
        raise SegError(f"SQL: {''.join(filter(str.isprintable, line))}{advice}") from error


def _tidy_columns(result: pa.RecordBatchReader, whole: Collection[int], files: RunFiles) -> pa.RecordBatchReader:
    """Add a number to the names of columns that an earlier column has too, and make the columns `whole` int64.

    These are sums of whole numbers, for which Arrow has a decimal type alone, with which pandas does not compute.
    """
    taken, fields = set(result.schema.names), dict[str, pa.Field]()
    for position, each in enumerate(result.schema):
        numbered = (f"{each.name}_{number}" for number in count(1))
        name = next(name for name in numbered if name not in taken) if each.name in fields else each.name
        taken.add(name)
        fields[name] = each.with_name(name).with_type(pa.int64() if position in whole else each.type)
    schema = pa.schema(fields.values(), _geo(fields))

    def batches() -> Iterator[pa.RecordBatch]:
        with _translated_errors(files):
            for batch in result:
                columns = [column.cast(kind) for column, kind in zip(batch.columns, schema.types, strict=True)]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _geo(fields: Mapping[str, pa.Field]) -> dict[str, str] | None:
    """Return the metadata that makes a table GeoParquet if it has the geometry column, else None."""
    types = {name: each.type for name, each in fields.items()}
    if types.get("geometry") != pa.binary():
        return None
    column = dict(SPLIT)
    if types.get("bbox") != BBOX:
        del column["covering"]
    return {"geo": json.dumps({**GEO, "columns": {"geometry": column}})}
