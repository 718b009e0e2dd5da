"""SQL over a run: the summary, the views, the formats, and what SQL must not reach."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import UTM, MakeBundle, MakeScene
from runs import build_run, file_digests, published_parts, read_part

from aerial_seg.cli.main import main
from seg_core.errors import SegError
from seg_core.run.ledger import read_ledger
from seg_core.run.plan import Plan
from seg_core.run.query import query, summary
from seg_core.run.rows import Row
from seg_core.run.schema import SCENES, TILES
from seg_core.run.sql import run_sql
from seg_core.run.tables import part_path, scenes_path

Ask = Callable[..., tuple[int, bytes, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Plan]:
    """A run of two scenes, of which the second failed."""
    return build_run(tmp_path_factory.mktemp("original"), failed_parts={4})


@pytest.fixture(scope="module")
def run(made: tuple[str, Plan]) -> str:
    """Its path, for tests that leave it as it is."""
    return made[0]


@pytest.fixture(scope="module")
def rows(run: str) -> list[Row]:
    return [row for path in published_parts(run) for row in read_part(path)]


@pytest.fixture
def ask(run: str, capsysbinary: pytest.CaptureFixture[bytes]) -> Ask:
    """Call `seg query RUN ...`; returns exit code, standard output, standard error."""

    def call(*args: str, run: str = run) -> tuple[int, bytes, str]:
        code = main(["query", run, *args])
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return call


def refused(answer: tuple[int, bytes, str]) -> str:
    """The one line that an answer with exit code 2 consists of."""
    code, out, err = answer
    assert (code, out) == (2, b"")
    assert err.startswith("seg: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.strip()


@pytest.mark.parametrize("command", ["query", "verify"])
def test_what_a_run_says_of_itself_needs_no_gdal_pandas_or_duckdb(tmp_path: Path, command: str) -> None:
    run, _ = build_run(tmp_path)
    code = "import sys; from aerial_seg.cli.main import main; print(main(sys.argv[1:])); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, command, run], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "pyarrow" in loaded
    assert not loaded & {"rasterio", "boto3", "pandas", "duckdb", "geopandas", "torch", "ray"}


def recomputed(rows: list[Row]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "done"]
    valid, building = (sum(row[k] for row in done) for k in ("valid_px", "building_px"))
    return {
        "scenes": 2,
        "planned": 18,
        "tiles": len(done),
        "failed": len(rows) - len(done),
        "missing": 18 - len(rows),
        "valid_px": valid,
        "building_px": building,
        "coverage": pytest.approx(building / valid),
        "mean_probability": pytest.approx(
            math.fsum(row["mean_probability"] * row["valid_px"] for row in done if row["valid_px"]) / valid
        ),
        "area_km2": pytest.approx(math.fsum(row["area_m2"] for row in done) / 1e6),
        "building_km2": pytest.approx(math.fsum(row["building_m2"] for row in done) / 1e6),
    }


# What is said of the imagery of a run that was made by hand, or before it was compared with that of the training.
FIT = {"threshold": 0.5, "normalize": "model", "imagery_distance": None, "imagery_is_unlike": None}


def test_the_summary_is_what_the_rows_add_up_to(ask: Ask, run: str, rows: list[Row]) -> None:
    assert recomputed(rows)["tiles"] == 16
    assert summary(run) == recomputed(rows)
    code, out, err = ask("--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {**recomputed(rows), **FIT}
    (line,) = csv.DictReader(io.StringIO(ask("--format", "csv")[1].decode()))
    assert {k: float(v) for k, v in line.items()} == recomputed(rows)
    assert pq.read_table(io.BytesIO(ask("--format", "parquet")[1])).to_pylist() == [recomputed(rows)]


def test_the_summary_names_the_class_unless_it_is_building(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    assert "class" not in summary(run)
    stored = tmp_path / "run/run.json"
    record = json.loads(stored.read_text())
    assert record["class_name"] == "building"
    stored.write_text(json.dumps({**record, "class_name": "road"}))
    assert next(iter(summary(run).items())) == ("class", "road")
    stored.write_text(json.dumps({name: value for name, value in record.items() if name != "class_name"}))
    assert "class" not in summary(run)


def test_the_summary_for_the_terminal_has_a_line_for_each_figure(ask: Ask, rows: list[Row]) -> None:
    code, out, _ = ask()
    lines = dict(line.split(maxsplit=1) for line in out.decode().splitlines())
    assert code == 0
    assert list(lines) == ["run", *recomputed(rows), *FIT]
    assert lines["valid_px"] == f"{recomputed(rows)['valid_px']:,}"


def test_the_summary_of_a_run_where_all_failed_has_counts_and_no_coverage(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path, failed_parts=range(5))
    assert summary(run) == {
        "scenes": 2,
        "planned": 18,
        "tiles": 0,
        "failed": 18,
        "missing": 0,
        "valid_px": None,
        "building_px": None,
        "coverage": None,
        "mean_probability": None,
        "area_km2": None,
        "building_km2": None,
    }


@pytest.mark.usefixtures("without_actors")
def test_areas_of_a_run_are_of_the_ground_that_coverage_is_of(
    tmp_path: Path, make_scene: MakeScene, make_bundle: MakeBundle
) -> None:
    # Where some scenes have no CRS, the sums of areas were those of the others, and their ratio was not the coverage.
    make_scene("r/a.tif", 96, 96)
    model = make_bundle()
    for name, crs, known in (("with", UTM, True), ("without", None, False)):
        make_scene("r/b.tif", 64, 64, crs=crs, seed=1)
        run = str(tmp_path / name)
        command = ["segment", str(tmp_path / "r"), "--model", model, "--tile-size", "64", "--halo", "16"]
        assert main([*command, "--part", "64", "--out", run]) == 0
        found = summary(run)
        assert found["coverage"] is not None
        assert (found["area_km2"] is not None, found["building_km2"] is not None) == (known, known)
        if known:
            assert found["building_km2"] / found["area_km2"] == pytest.approx(found["coverage"], rel=1e-3)


def test_the_view_tiles_holds_the_rows_that_are_done(run: str, rows: list[Row]) -> None:
    found = query(run, "SELECT * FROM tiles")
    assert found.column_names == TILES.names
    expected = [row for row in rows if row["status"] == "done"]
    assert sorted(found.to_pylist(), key=place) == sorted(expected, key=place)


def test_the_view_failures_holds_the_rows_that_failed(run: str, rows: list[Row]) -> None:
    found = query(run, "SELECT * FROM failures")
    assert found.column_names == TILES.names
    expected = [row for row in rows if row["status"] == "failed"]
    assert sorted(found.to_pylist(), key=place) == sorted(expected, key=place)
    assert set(found.column("error").to_pylist()) == {"the disk said no"}


def test_the_view_scenes_holds_the_scenes(run: str) -> None:
    found = query(run, "SELECT * FROM scenes ORDER BY scene_id")
    assert found.to_pylist() == pq.read_table(Path(scenes_path(run))).to_pylist()
    assert found.column("scene_id").to_pylist() == ["north/a.tif", "south/b.tif"]


def place(row: Row) -> tuple[str, int, int]:
    return row["scene_id"], row["row_off"], row["col_off"]


def test_there_are_these_views_and_no_others(run: str) -> None:
    found = query(run, "SELECT table_name FROM information_schema.tables ORDER BY table_name")
    assert found.column(0).to_pylist() == ["failures", "scenes", "tiles"]


def test_a_join_of_tiles_and_scenes(run: str, rows: list[Row]) -> None:
    sql = "SELECT scene_id, sum(t.valid_px) AS valid FROM tiles t JOIN scenes s USING (scene_id) GROUP BY scene_id"
    expected = sum(row["valid_px"] for row in rows if row["scene_id"] == "north/a.tif" and row["status"] == "done")
    assert query(run, sql).to_pylist() == [{"scene_id": "north/a.tif", "valid": expected}]


def test_a_bbox_can_be_asked_for(run: str, rows: list[Row]) -> None:
    west = min(row["bbox"]["xmin"] for row in rows)
    found = query(run, f"SELECT tile_col FROM tiles WHERE bbox.xmin = {west!r}")
    assert found.column(0).to_pylist() == [0]


def test_what_is_not_published_is_not_seen(run: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    Path(copy, "tiles", ".partial-0123456789abcdef").write_bytes(b"PAR1")
    assert query(copy, "SELECT count(*) AS n FROM tiles").to_pylist() == [{"n": 16}]


@pytest.mark.parametrize("name", ["it's", "sp ace", "a?b", "*", "run[1]", "run[!x]", "Ünicode", "a;b", 'q"q', "100%"])
def test_a_run_may_have_any_name(run: str, tmp_path: Path, name: str) -> None:
    copy = str(shutil.copytree(run, tmp_path / name))
    assert query(copy, "SELECT count(*) AS n FROM tiles").to_pylist() == [{"n": 16}]


def test_a_run_is_found_by_a_relative_path_and_through_a_link(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert json.loads(ask("--json", run="link")[1])["tiles"] == 16
    assert json.loads(ask("--json", run="./link/../link")[1])["tiles"] == 16


SQL = "SELECT tile_row, coverage, scene_id, mask, bbox FROM tiles ORDER BY scene_id, tile_row, tile_col"


def test_a_table_is_one_to_look_at(ask: Ask, rows: list[Row]) -> None:
    code, out, err = ask(SQL)
    lines = out.decode().splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["tile_row", "coverage", "scene_id", "mask", "bbox"]
    assert len(lines) == 17
    first = min((row for row in rows if row["status"] == "done"), key=place)
    assert f"<{len(first['mask']):,} bytes>" in lines[1]


def test_a_table_shows_its_first_100_rows_and_says_how_many_more_there_are(ask: Ask) -> None:
    _, out, _ = ask("SELECT range AS n FROM range(1250)")
    lines = out.decode().splitlines()
    assert len(lines) == 1 + 100 + 1
    assert lines[-2].strip() == "99"
    assert lines[-1] == "... 1,150 more rows: --format csv has them all"
    assert len(ask("SELECT range AS n FROM range(1250)", "--format", "csv")[1].splitlines()) == 1251


def test_csv_holds_all_values_as_text(ask: Ask, rows: list[Row]) -> None:
    code, out, err = ask(SQL, "--format", "csv")
    found = list(csv.DictReader(io.StringIO(out.decode())))
    done = [row for row in rows if row["status"] == "done"]
    expected = sorted(done, key=lambda row: (row["scene_id"], row["tile_row"], row["tile_col"]))
    assert (code, err) == (0, "")
    assert [line["tile_row"] for line in found] == [str(row["tile_row"]) for row in expected]
    for line, row in zip(found, expected, strict=True):
        assert line["coverage"] == ("" if row["coverage"] is None else line["coverage"])
        assert row["coverage"] is None or float(line["coverage"]) == row["coverage"]
        assert bytes.fromhex(line["mask"]) == (row["mask"] or b"")


def test_csv_keeps_whole_numbers_whole_where_some_are_null(ask: Ask) -> None:
    _, out, _ = ask("SELECT * FROM (VALUES (1, 'a,b'), (NULL, NULL), (3, 'x\"y')) t(n, s)", "--format", "csv")
    assert list(csv.reader(io.StringIO(out.decode()))) == [["n", "s"], ["1", "a,b"], ["", ""], ["3", 'x"y']]


@pytest.mark.parametrize("flags", [("--json",), ("--format", "json")])
def test_json_is_a_list_of_objects(ask: Ask, rows: list[Row], flags: tuple[str, ...]) -> None:
    code, out, err = ask(SQL, *flags)
    found = json.loads(out)
    done = sorted((row for row in rows if row["status"] == "done"), key=place)
    assert (code, err) == (0, "")
    assert found == [
        {
            "tile_row": row["tile_row"],
            "coverage": row["coverage"],
            "scene_id": row["scene_id"],
            "mask": row["mask"].hex() if row["mask"] else None,
            "bbox": row["bbox"],
        }
        for row in done
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("(SELECT sum(tile_row) FROM tiles)", 24),
        ("(SELECT avg(tile_row) FROM tiles)", 1.5),
        ("DATE '2024-02-29'", "2024-02-29"),
        ("true", True),
        ("NULL", None),
        ("[1, 2]", [1, 2]),
        ("[1.5::DECIMAL(4, 2)]", [1.5]),
        ("['ab'::BLOB]", ["6162"]),
        ("{'m': 'ab'::BLOB, 'd': 0.25::DECIMAL(4, 2)}", {"m": "6162", "d": 0.25}),
        ("'nan'::DOUBLE", None),
        ("'ü'", "ü"),
        ("TIMESTAMP 'infinity'", "infinity"),
        ("DATE '-infinity'", "-infinity"),
        ("DATE '0044-03-15 (BC)'", "0044-03-15 (BC)"),
        ("TIMESTAMP '290000-01-01'", "290000-01-01 00:00:00"),
        ("[DATE 'infinity']", "[infinity]"),
        ("TIMESTAMP '2024-03-01 10:30:00' - TIMESTAMP '2022-01-01'", "790 days 10:30:00"),
        ("INTERVAL 1 MONTH", "1 month"),
        ("1::DOUBLE / 0", None),
    ],
)
def test_json_can_say_what_sql_can(ask: Ask, value: str, expected: object) -> None:
    code, out, _ = ask(f"SELECT {value} AS v", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON")) == [{"v": expected}]


@pytest.mark.parametrize("form", ["table", "csv"])
def test_text_tells_infinity_and_no_number_from_nothing(ask: Ask, form: str) -> None:
    sql = "SELECT unnest(['inf'::DOUBLE, '-inf', 'nan', NULL]) AS v, unnest([INTERVAL 3 DAY, NULL, NULL, NULL]) AS w"
    code, out, _ = ask(sql, "--format", form)
    assert code == 0
    nothing = {"table": "None", "csv": ""}[form]
    rows = [line.replace(",", " ") for line in out.decode().splitlines()[1:]]
    expected = [("inf", "3 days"), ("-inf", nothing), ("nan", nothing), (nothing, nothing)]
    assert [row.split() for row in rows] == [" ".join(pair).split() for pair in expected]


@pytest.mark.parametrize("form", ["table", "csv"])
def test_times_that_python_does_not_know_are_text(ask: Ask, form: str) -> None:
    code, out, _ = ask("SELECT unnest([TIMESTAMP '2020-01-02 03:04:05', 'infinity', NULL]) AS v", "--format", form)
    assert code == 0
    lines = out.decode().replace('"', "").split("\n")
    assert [line.strip() for line in lines[:3]] == ["v", "2020-01-02 03:04:05", "infinity"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "a", "a"], ["a", "a_1", "a_2"]),
        (["a", "a", "a_1"], ["a", "a_2", "a_1"]),
        (["a_1", "a", "a", "a_1"], ["a_1", "a", "a_2", "a_1_1"]),
    ],
)
def test_columns_of_one_name_get_numbers_that_no_other_column_has(
    ask: Ask, names: list[str], expected: list[str]
) -> None:
    code, out, _ = ask(f"SELECT {', '.join(f'{at} AS {name}' for at, name in enumerate(names))}", "--format", "csv")
    assert (code, out.decode().split()) == (0, [",".join(expected), ",".join(map(str, range(len(names))))])


@pytest.mark.parametrize("value", ["INTERVAL 1 DAY", "union_value(k := 1)", "[INTERVAL 1 DAY]"])
def test_a_column_that_parquet_can_not_hold_is_named_with_the_way_out(ask: Ask, value: str) -> None:
    error = refused(ask(f"SELECT 1 AS a, {value} AS v", "--format", "parquet"))
    assert error.startswith("seg: SQL: column v: Parquet has no type ")
    assert error.endswith(': say CAST("v" AS VARCHAR)')
    assert ask(f'SELECT CAST("v" AS VARCHAR) AS v FROM (SELECT {value} AS v)', "--format", "parquet")[0] == 0


@pytest.mark.parametrize(
    ("sql", "covering"),
    [("SELECT * FROM tiles", True), ("SELECT tile_row, geometry FROM tiles", False), ("SELECT 1 AS geometry", None)],
)
def test_an_answer_with_geometries_is_geoparquet(ask: Ask, sql: str, covering: bool | None) -> None:
    found = io.BytesIO(ask(sql, "--format", "parquet")[1])
    metadata = pq.read_schema(found).metadata or {}
    assert (b"geo" in metadata) == (covering is not None)
    if covering is not None:
        geo = json.loads(metadata[b"geo"])
        assert ("covering" in geo["columns"]["geometry"]) == covering
        shapes = geopandas.read_parquet(found)
        assert (len(shapes), shapes.crs.to_string()) == (16, "OGC:CRS84")
        assert shapes.geometry.is_valid.all()


def test_parquet_is_the_answer_itself(ask: Ask, run: str) -> None:
    code, out, err = ask(SQL, "--format", "parquet")
    assert (code, err) == (0, "")
    assert pq.read_table(io.BytesIO(out)).equals(query(run, SQL))


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_an_answer_without_rows_is_written_in_any_format(ask: Ask, form: str) -> None:
    code, out, err = ask("SELECT tile_row, mask FROM tiles WHERE false", "--format", form)
    assert (code, err) == (0, "")
    if form == "json":
        assert json.loads(out) == []
    elif form == "csv":
        assert out == b"tile_row,mask\n"
    elif form == "parquet":
        assert pq.read_table(io.BytesIO(out)).schema.names == ["tile_row", "mask"]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_two_columns_of_one_name_do_not_become_one(ask: Ask, form: str) -> None:
    code, out, _ = ask(
        "SELECT t.height, s.height FROM tiles t JOIN scenes s USING (scene_id) LIMIT 1", "--format", form
    )
    values = list(json.loads(out)[0].values()) if form == "json" else out.decode().splitlines()[1].split(",")
    assert code == 0
    assert [int(v) for v in values] == [32, 100]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_json('{secret}')",
        "SELECT * FROM read_parquet('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_text('{run}/../secret.csv')",
        "SELECT * FROM read_text('{run}-secret.csv')",
        "CREATE TABLE t AS FROM read_csv('{secret}')",
        "COPY t FROM '{secret}'",
        "ATTACH '{folder}/other.db'",
        "ATTACH '{secret}' AS s (READ_ONLY)",
        "IMPORT DATABASE '{folder}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM read_text('https://example.com/')",
    ],
)
def test_sql_reads_no_file_outside_the_run(run: str, tmp_path: Path, ask: Ask, sql: str) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    secret = tmp_path / "secret.csv"
    for path in (secret, tmp_path / "run-secret.csv"):
        path.write_text("name,word\nroot,hunter2\n")
    line = refused(ask(sql.format(secret=secret, folder=tmp_path, run=copy), "--json", run=copy))
    assert line.startswith("seg: SQL: ")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{outside}/x.csv'",
        "COPY (SELECT 1) TO '{run}/x.csv'",
        "COPY (SELECT 1) TO '{run}/run.json'",
        "COPY (SELECT * FROM tiles LIMIT 1) TO '{part}'",
        "COPY tiles TO '{run}/tiles' (FORMAT parquet, PARTITION_BY (scene_id))",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{run}/x.csv'",
        "SELECT 1; COPY (SELECT 1) TO '{run}/x.csv'",
        "COPY (SELECT 1) TO '{run}/x.csv'; SELECT 1",
        "ATTACH '{run}/x.db'",
        "ATTACH '{outside}/x.db'",
        "EXPORT DATABASE '{run}/export'",
        "EXPORT DATABASE '{outside}/export'",
        "EXPORT DATABASE '{run}/../.tmp'",
        "COPY (SELECT 1) TO '{run}/../.tmp/x.csv'",
        "COPY (SELECT 1) TO 'run://own/x.csv'",
        "COPY (SELECT 1) TO 'run://scenes/scenes.parquet'",
    ],
)
def test_sql_writes_no_file_anywhere(
    run: str, tmp_path: Path, ask: Ask, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(tmp_path)  # DuckDB's own folder for temporary files would be below it
    (tmp_path / ".tmp").mkdir()
    before = file_digests(tmp_path)
    part = Path(published_parts(copy)[0])
    line = refused(ask(sql.format(outside=outside, run=copy, part=part), run=copy))
    assert line.startswith("seg: SQL: ")
    assert "Traceback" not in line
    assert file_digests(tmp_path) == before
    assert os.listdir(outside) == []


@pytest.mark.parametrize(
    "sql",
    [
        "SET enable_external_access = true",
        "RESET enable_external_access",
        "SET GLOBAL allowed_directories = ['/']",
        "SET lock_configuration = false",
        "RESET lock_configuration",
        "SET memory_limit = '1GB'",
        "PRAGMA threads = 1",
        "SET temp_directory = '/tmp'",
        "SET enable_external_access = true; SELECT * FROM read_text('/etc/hostname')",
    ],
)
def test_sql_changes_no_setting(ask: Ask, sql: str) -> None:
    assert refused(ask(sql)).startswith("seg: SQL: ")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("DROP VIEW tiles", "DROP: a run is only read: say SELECT"),
        ("CREATE TABLE x AS SELECT 1", "CREATE: a run is only read: say SELECT"),
        ("INSERT INTO tiles SELECT * FROM tiles", "INSERT: a run is only read: say SELECT"),
        (
            "COPY tiles TO 'x.csv'",
            "COPY: a run is only read: say SELECT ..., and write its result by --format csv > FILE",
        ),
        ("SET threads = 1", "SET: a run is only read"),
        ("CHECKPOINT", "a run is only read"),
        ("SELECT 1; SELECT 2", "SELECT 1; SELECT 2: holds several queries: say one of them"),
        ("CREATE TABLE x AS SELECT 1; SELECT * FROM x", "holds several queries"),
        ("", "is empty: say SELECT ..."),
        (" ; ", "is empty: say SELECT ..."),
        ("-- nothing", "is empty: say SELECT ..."),
        ("SELECT * FROM tile", "tile does not exist"),
        ("SELECT * FROM tile", ": the tables are tiles, scenes and failures"),
        ("SELECT ST_Area(geometry) FROM tiles", "its extension is not loaded here: use geo_tiles of seg_core.open_run"),
    ],
)
def test_what_is_no_query_of_the_tables_is_refused_with_the_way_out(ask: Ask, sql: str, message: str) -> None:
    for options in ([], ["--explain"]):
        error = refused(ask(sql, *options))
        assert error.startswith("seg: SQL: ")
        assert message in error
        assert error.count("\n") <= 1


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("EXPLAIN ANALYZE DROP VIEW tiles", "DROP: a run is only read"),
        ("explain CREATE TABLE x AS SELECT 1", "CREATE: a run is only read"),
        ("SELECT nonsense(1)", "nonsense does not exist"),
        ("SELECT * FROM my_extension", "my_extension does not exist"),
    ],
)
def test_what_is_refused_is_named(ask: Ask, sql: str, message: str) -> None:
    error = refused(ask(sql))
    assert message in error
    assert ("the tables are" in error) == ("my_extension" in sql)
    assert "is not loaded here" not in error


def test_only_a_query_is_explained(ask: Ask) -> None:
    for options in ("", "(FORMAT json)", "(ANALYZE, FORMAT json)", "ANALYZE (FORMAT json)"):
        error = refused(ask(f"EXPLAIN {options} SELECT 1", "--explain"))
        assert "leave out EXPLAIN: --explain says it" in error
    assert "DROP: a run is only read" in refused(ask("EXPLAIN (FORMAT json) DROP VIEW tiles"))


@pytest.mark.parametrize(
    "sql",
    [
        "FROM tiles SELECT count(*)",
        "WITH a AS (SELECT * FROM tiles) SELECT count(*) FROM a",
        "DESCRIBE tiles",
        "SHOW TABLES",
        "SUMMARIZE SELECT coverage FROM tiles",
        "EXPLAIN SELECT * FROM tiles",
        "EXPLAIN (FORMAT json) SELECT * FROM tiles",
        "EXPLAIN (SELECT 1)",
        "PIVOT (SELECT scene_id, status FROM tiles) ON status",
        "VALUES (1), (2)",
        "SELECT 1;",
        "EXPLAIN ANALYZE SELECT count(*) FROM tiles",
    ],
)
def test_all_kinds_of_queries_are_answered(ask: Ask, sql: str) -> None:
    code, out, err = ask(sql, "--format", "csv")
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("SELEKT 1", "SELEKT"),
        ("SELECT * FROM houses", "houses"),
        ("SELECT covrage FROM tiles", "covrage"),
        ("SELECT 1 +", "SQL: "),
        ("SELECT error::INTEGER FROM failures", "the disk said no"),
        ("-- nothing", "SQL: "),
        ("INSERT INTO tiles SELECT * FROM tiles", "SQL: "),
        ("DELETE FROM tiles", "SQL: "),
    ],
)
def test_bad_sql_gives_one_line_and_exit_code_2(ask: Ask, sql: str, named: str) -> None:
    assert named in refused(ask(sql, "--json"))


def test_an_unknown_format_is_refused(ask: Ask, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with pytest.raises(SystemExit) as refusal:
        ask("--format", "xml")
    assert refusal.value.code == 2
    assert b"--format" in capsysbinary.readouterr().err


def test_what_is_no_run_is_refused(ask: Ask, tmp_path: Path) -> None:
    assert "not a run" in refused(ask(run=str(tmp_path)))
    assert "nowhere: no such run" in refused(ask(run=str(tmp_path / "nowhere")))


def test_a_run_without_rows_is_refused(run: str, tmp_path: Path, ask: Ask) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(Path(copy, "tiles"))
    assert "holds no rows yet" in refused(ask(run=copy))


def test_an_answer_of_a_part_of_a_run_says_so(made: tuple[str, Plan], tmp_path: Path, ask: Ask) -> None:
    copy = str(shutil.copytree(made[0], tmp_path / "run"))
    note = f"{copy}: 1 parts are not done yet and missing from this result (seg verify lists them)\n"
    assert ask("SELECT 1", run=copy)[2] == ""
    lost = Path(part_path(copy, next(made[1].parts()).key))
    rows = len(read_part(str(lost)))
    lost.unlink()
    code, out, err = ask("--json", run=copy)
    assert (code, err) == (0, note)
    found = json.loads(out)
    assert found["missing"] == rows
    assert found["tiles"] + found["failed"] == 18 - rows
    assert ask("SELECT 1", run=copy)[2] == note


def test_an_answer_without_rows_has_its_header(ask: Ask) -> None:
    assert ask("SELECT tile_row, tile_col FROM tiles WHERE tile_row < 0")[1] == b"tile_row  tile_col\n"


@pytest.mark.parametrize("name", ["scenes", "tiles"])
def test_a_damaged_table_is_refused_by_name(made: tuple[str, Plan], tmp_path: Path, ask: Ask, name: str) -> None:
    copy = str(shutil.copytree(made[0], tmp_path / "run"))
    first = Path(part_path(copy, min(part.key for part in made[1].parts())))
    path = Path(scenes_path(copy)) if name == "scenes" else first
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in refused(ask(run=copy))


def test_a_missing_scenes_table_is_refused_by_name(run: str, tmp_path: Path, ask: Ask) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    Path(scenes_path(copy)).unlink()
    assert "scenes.parquet" in refused(ask(run=copy))


def test_the_library_raises_one_line(run: str) -> None:
    with pytest.raises(SegError) as refusal:
        query(run, "SELECT 1,\n  houses\nFROM tiles")
    assert "\n" not in str(refusal.value)


def test_an_answer_is_an_arrow_table(run: str) -> None:
    answer = query(run, "SELECT coverage FROM tiles")
    assert isinstance(answer, pa.Table)
    assert isinstance(answer.to_pandas(), pd.DataFrame)


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_an_answer_in_batches_is_the_one_that_comes_at_once(
    ask: Ask, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = "SELECT * FROM tiles ORDER BY scene_id, tile_row, tile_col"
    monkeypatch.setattr("aerial_seg.cli.run_commands.TABLE_ROWS", 5)
    _, at_once, _ = ask(sql, "--format", form)
    monkeypatch.setattr("seg_core.run.sql.BATCH", 3)
    _, in_batches, _ = ask(sql, "--format", form)
    if form == "parquet":
        assert pq.read_table(io.BytesIO(in_batches)).equals(pq.read_table(io.BytesIO(at_once)))
    else:
        assert in_batches == at_once


def test_an_answer_comes_in_batches(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seg_core.run.sql.BATCH", 3)
    sql = "SELECT tile_row FROM tiles"
    with run_sql(run, sql) as answer:
        sizes = [len(batch) for batch in answer]
    assert sum(sizes) == len(query(run, sql)) > 3
    assert max(sizes) == 3


def test_each_column_is_described_with_its_type(ask: Ask) -> None:
    code, out, _ = ask("--schema", "--json")
    found = json.loads(out)
    assert code == 0
    assert [each["column"] for each in found if each["table"] == "tiles, failures"] == TILES.names
    assert [each["column"] for each in found if each["table"] == "scenes"] == SCENES.names
    for each in found:
        schema = SCENES if each["table"] == "scenes" else TILES
        assert each["type"] == str(schema.field(each["column"]).type)
        assert each["description"]
    assert "m2: geodesic ground area of the building pixels" in ask("--schema")[1].decode()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["SELECT 1", "--schema"], "--schema: takes no SQL, no areas and no --explain"),
        (["--schema", "--h3", "9"], "--schema: takes no SQL, no areas and no --explain"),
        (["--schema", "--out", "a.csv"], "--out: is for --areas"),
        (["--explain", "--grid", "50"], "take no SQL"),
        (["SELECT 1", "--grid", "50"], "take no SQL"),
        (["SELECT 1", "--explain", "--format", "csv"], "--format csv: --explain prints text"),
        (["SELECT 1", "--explain", "--address", "auto"], "--address: is for --areas"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(ask: Ask, args: list[str], line: str) -> None:
    assert line in refused(ask(*args))


def test_sql_is_read_from_standard_input(run: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT count(*) AS n\nFROM tiles"))
    assert json.loads(ask("-", "--json")[1]) == [{"n": len(query(run, "SELECT 1 FROM tiles"))}]


def test_a_column_that_is_none_is_named_with_those_that_may_be_meant(run: str) -> None:
    with pytest.raises(SegError) as found:
        query(run, "SELECT building_pix FROM tiles")
    text = str(found.value)
    assert text.startswith('SQL: Binder Error: Referenced column "building_pix" not found')
    assert "building_px" in text
    assert text.endswith(": seg query RUN --schema lists the columns")
    assert "\n" not in text


def test_sql_may_come_after_options(run: str, ask: Ask) -> None:
    expected = ask("SELECT count(*) AS n FROM tiles", "--json")
    assert ask("--json", "SELECT count(*) AS n FROM tiles")[1] == expected[1]
    for args in (["--json", "SELECT 1", "SELECT 2"], ["--json", "--jso"]):
        with pytest.raises(SystemExit):
            main(["query", run, *args])


def test_a_query_is_explained_by_what_it_reads(run: str, ask: Ask) -> None:
    code, out, _ = ask("SELECT sum(building_px) FROM tiles", "--explain", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bytes_read"] > 0 < found["bytes"]
    assert 0 < found["row_groups_read"] <= found["row_groups"] == found["files"]
    assert found["files"] == len(list(read_ledger(run))) + 2  # the part that failed, and the scenes
    assert "READ_PARQUET" in found["plan"]
    code, out, _ = ask("SELECT 1 AS x", "--explain")
    assert code == 0
    assert out.splitlines()[0].split() == [b"files", str(found["files"]).encode()]
    assert "holds several queries" in refused(ask("SELECT 1; SELECT 2", "--explain"))
    assert "needs a query" in refused(ask("--explain"))


def test_tiles_of_a_rectangle_are_a_table(run: str) -> None:
    (edge,) = query(run, "SELECT min(bbox.xmin) AS west, max(bbox.xmax) AS east FROM tiles").to_pylist()
    sql = "SELECT count(*) AS n FROM tiles_in({west}, -90, {east}, 90)"
    everything = query(run, sql.format(**edge)).to_pylist()[0]["n"]
    assert everything == query(run, "SELECT count(*) AS n FROM tiles").to_pylist()[0]["n"]
    middle = (edge["west"] + edge["east"]) / 2
    assert 0 < query(run, sql.format(west=edge["west"], east=middle)).to_pylist()[0]["n"] < everything


def test_damage_within_a_file_gives_a_line_with_a_way_out(made: tuple[str, Plan], tmp_path: Path, ask: Ask) -> None:
    copy = Path(shutil.copytree(made[0], tmp_path / "run"))
    for path in map(Path, published_parts(str(copy))):
        content, columns = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
        for at in range(columns.num_columns):
            place = columns.column(at).data_page_offset
            content[place : place + 12] = b"\x0f" * 12
        path.write_bytes(content)
    line = refused(ask("SELECT * FROM tiles", "--json", run=str(copy)))
    assert line.endswith("if a file of the run is damaged, seg verify names it")
    assert line.isprintable()
