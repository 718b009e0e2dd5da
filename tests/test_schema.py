"""Tables of older and newer versions: what is missing is null, what is not known is refused, neither is damage."""

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import file_digests, part_digests, part_rows, published_parts, read_part, rows_of
from seg_command import seg

from seg_core.errors import SegError
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.run.export_masks import export_masks
from seg_core.run.plan import Plan, Settings, make_plan
from seg_core.run.query import query, summary
from seg_core.run.relocation import match_run
from seg_core.run.resume import parts_to_do
from seg_core.run.schema import SCENES, TILES, ColumnsError, UnknownColumnError, check_columns, with_columns
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, read_scenes, scenes_path, write_part
from seg_core.run.verify import repair, verify

pytestmark = pytest.mark.usefixtures("in_this_process")

Capture = pytest.CaptureFixture[str]
LATER = TILES.append(pa.field("later", pa.binary()))  # the tiles table of a later version
SMALL = pa.schema([pa.field("a", pa.int32(), nullable=False), pa.field("b", pa.string())])


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder with a copy of the run that an older version made, and its region and bundle."""
    return Path(shutil.copytree(Path(__file__).with_name("older_run"), tmp_path / "older"))


def relocated_plan(folder: Path) -> Plan:
    """The plan of the run in `folder`, whose scene is no longer where the run was made."""
    bundle = read_bundle(str(folder / "bundle"))
    settings = Settings(tile_size=32, part=64, halo=bundle.halo, threshold=bundle.threshold)
    plan, _ = make_plan(read_region([str(folder / "region/a.tif")])[0], bundle, settings)
    return match_run(str(folder / "run"), plan, (("/data/region", str(folder / "region")),))[0]


def remove_first_part(plan: Plan, run: str) -> None:
    Path(part_path(run, next(plan.parts()).key)).unlink()


def add_column(path: str) -> None:
    """Add a column of a later version."""
    table = pq.read_table(path)
    pq.write_table(table.append_column("later", pa.nulls(len(table), pa.int32())), path)


def test_a_run_of_an_older_version_is_sound_and_answers(older: Path, tmp_path: Path) -> None:
    run, before = str(older / "run"), file_digests(str(older / "run"))
    assert verify(run).describe() == "complete: all 6 tiles are done"
    assert repair(run).bad_parts == []
    counts = json.loads((older / "run/run.json").read_text())["counts"]
    assert {name: summary(run)[name] for name in counts} == counts
    assert query(run, "SELECT count(*) AS n, sum(building_px)::INT AS px FROM tiles").to_pylist() == [
        {"n": 6, "px": summary(run)["building_px"]}
    ]
    assert file_digests(run) == before
    assert list(parts_to_do(run, relocated_plan(older))) == []
    assert [problem for _, problem in export_masks(run, str(tmp_path / "masks"))] == [None]


@pytest.mark.usefixtures("without_actors")
def test_seg_segment_goes_on_with_a_run_of_an_older_version(older: Path, capsys: Capture) -> None:
    run = str(older / "run")
    command = ["segment", older / "region/a.tif", "--tile-size", 32, "--part", 64, "--model", older / "bundle"]
    command += ["--relocate", f"/data/region={older}/region", "--out", run]
    keys, before = list(json.loads((older / "run/run.json").read_text())), part_digests(older / "run")
    assert "nothing to do" in seg(capsys, *command)[1]
    remove_first_part(read_plan(run), run)
    seg(capsys, *command)
    seg(capsys, "verify", run)
    first, second = sorted(before)
    assert part_digests(older / "run")[second] == before[second]
    assert first in part_digests(older / "run")
    assert list(json.loads((older / "run/run.json").read_text())) == [*keys, "relocated", "relocated_versions"]


def test_a_column_that_is_added_to_the_schema_is_all_that_a_later_version_needs(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run, plan = str(older / "run"), relocated_plan(older)
    for module in ("tables", "parts", "part_reading", "sql"):
        monkeypatch.setattr(f"seg_core.run.{module}.TILES", LATER)
    assert [row["later"] for row in rows_of(run)] == [None] * 6
    remove_first_part(plan, run)
    (todo,) = parts_to_do(run, plan)
    rows = [{**row, "later": b"png"} for row in part_rows(todo, plan.settings)]
    write_part(run, todo.key, rows, plan.model, todo.version)
    assert list(parts_to_do(run, plan)) == []
    assert verify(run).describe() == "complete: all 6 tiles are done"
    answer = query(run, "SELECT count(*) AS n, count(later) AS later FROM tiles").to_pylist()
    assert answer == [{"n": 6, "later": len(rows)}]
    assert summary(run)["tiles"] == 6
    assert [problem for _, problem in export_masks(run, str(tmp_path / "masks"))] == [None]
    parts = duckdb.sql(f"SELECT count(*), count(later) FROM read_parquet('{run}/tiles/*', union_by_name = true)")
    assert parts.fetchall() == [(6, len(rows))]
    assert seg(capsys, "verify", run)[1] == ""


def test_a_part_of_a_newer_version_is_refused_by_name_and_never_removed(
    older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = str(older / "run"), relocated_plan(older)
    part = next(plan.parts())
    with monkeypatch.context() as patch:
        patch.setattr("seg_core.run.tables.TILES", LATER)
        write_part(run, part.key, part_rows(part, plan.settings), plan.model, part.version)
    path, before = part_path(run, part.key), file_digests(run)
    refused = f"{path}: was written by a newer version: its column later is not known here: update aerial-seg"
    for ask in (
        lambda: verify(run),
        lambda: repair(run),
        lambda: repair(run, [Path(path).name]),
        lambda: parts_to_do(run, plan),
        lambda: summary(run),
        lambda: query(run, "SELECT 1"),
        lambda: read_part(path, ["status"]),
    ):
        with pytest.raises(SegError) as refusal:
            ask()
        assert str(refusal.value) == refused
    assert [str(problem) for _, problem in export_masks(run, str(older / "masks"))] == [refused]
    assert file_digests(run) == before


def test_a_part_that_only_a_newer_version_plans_is_not_removed_either(older: Path) -> None:
    run = str(older / "run")
    foreign = part_path(run, "0123456789abcdef-0000000-0000000")
    shutil.copy(published_parts(run)[0], foreign)
    assert verify(run).bad_parts == [foreign]
    add_column(foreign)
    for ask in (verify, repair):
        with pytest.raises(SegError, match=r"was written by a newer version: its column later is not known here"):
            ask(run)
    assert Path(foreign).exists()


def test_scenes_of_a_newer_version_are_refused_by_name_and_not_rewritten(older: Path) -> None:
    run = str(older / "run")
    relocated_plan(older)
    add_column(scenes_path(run))
    before = file_digests(run)
    for ask in (
        lambda: verify(run),
        lambda: repair(run),
        lambda: read_scenes(run),
        lambda: query(run, "SELECT 1"),
        lambda: relocated_plan(older),
        lambda: read_plan(run),
    ):
        with pytest.raises(SegError, match=r"scenes\.parquet: was written by a newer version: its column later is"):
            ask()
    assert file_digests(run) == before


@pytest.mark.parametrize("table", [TILES, SCENES], ids=["tiles", "scenes"])
def test_only_nullable_columns_may_be_missing(older: Path, table: pa.Schema) -> None:
    run = str(older / "run")
    path = published_parts(run)[0] if table is TILES else scenes_path(run)
    whole = pq.read_schema(path)
    for each in (each for each in table if each.name in whole.names):  # others have come since
        found = whole.remove(whole.get_field_index(each.name))
        if each.nullable:
            check_columns(found, table)
        else:
            with pytest.raises(ColumnsError, match=f"has no column {each.name}"):
                check_columns(found, table)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([("b", pa.string())], "has no column a"),
        ([("a", pa.int64())], "its column a is of type int64, not int32"),
        ([("a", pa.int32()), ("a", pa.int32())], "has two columns of one name"),
        ([("mine", pa.int32())], "has no column a"),
    ],
)
def test_columns_that_no_version_wrote_are_damage(columns: list[tuple[str, pa.DataType]], message: str) -> None:
    with pytest.raises(ColumnsError) as refusal:
        check_columns(pa.schema(columns), SMALL)
    assert str(refusal.value) == message


def test_a_newer_version_may_change_types_and_the_order_too() -> None:
    with pytest.raises(UnknownColumnError, match=r"^c$"):
        check_columns(pa.schema([("c", pa.int8()), ("b", pa.int64()), ("a", pa.int64())]), SMALL)


def test_a_table_is_given_the_columns_that_it_lacks_in_the_order_of_the_schema() -> None:
    table = pa.table({"b": ["x", None], "a": pa.array([1, 2], pa.int32())}, metadata={"of": "the file"})
    assert with_columns(table, SMALL).to_pylist() == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    assert with_columns(table.select(["a"]), SMALL).to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": None}]
    assert with_columns(table, SMALL).schema.metadata == {b"of": b"the file"}
    with pytest.raises(ColumnsError, match="its column a holds a null"):
        with_columns(pa.table({"a": pa.array([None], pa.int32())}), SMALL)


def test_only_columns_that_a_part_lacks_may_be_asked_for(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seg_core.run.tables.TILES", LATER)
    path = published_parts(str(older / "run"))[0]
    assert read_part(path, ["valid"]) == [{"valid": None}] * len(read_part(path))
