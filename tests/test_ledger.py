"""The ledger: it makes answers quick, and where it disagrees with the files of parts, these count."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import MakeBundle, MakeScene
from parts import open_plan, work
from parts import rows_of as rows_in_order
from runs import SETTINGS, BuiltRun, build_run, enter_parts, part_rows

from seg_core.run import ledger
from seg_core.run.check import Expected, PartCheck
from seg_core.run.compact import compact_run
from seg_core.run.ledger import describe_part, ledger_folder, read_ledger, read_live_ledger, write_ledger
from seg_core.run.parts import find_parts
from seg_core.run.query import query, summary
from seg_core.run.resume import parts_to_do
from seg_core.run.sql import connect, explain
from seg_core.run.tables import write_part
from seg_core.run.verify import repair, verify
from seg_core.storage.files import sha256

pytestmark = pytest.mark.usefixtures("in_this_process")
FAILED = 2  # the number of a part whose tiles failed


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return BuiltRun(*build_run(tmp_path_factory.mktemp("original"), failed_parts=[FAILED]))


@pytest.fixture
def made(original: BuiltRun, tmp_path: Path) -> BuiltRun:
    """A run of five parts, one of them failed, with a ledger of three files."""
    return BuiltRun(str(shutil.copytree(original.run, tmp_path / "run")), original.plan)


def entries_of(made: BuiltRun) -> list[Path]:
    return sorted(Path(ledger_folder(made.run)).glob("*.json"))


def figures_of(made: BuiltRun) -> list[Path]:
    return sorted(Path(ledger_folder(made.run)).glob("*.parquet"))


def live_keys(made: BuiltRun) -> set[str]:
    return {entry.key for _, entries in read_live_ledger(made.run) for entry in entries}


ORDER = "ORDER BY scene_id, tile_row, tile_col"
QUERIES = (
    "SELECT count(*) AS n, sum(building_px) AS px, round(sum(building_m2), 6) AS m2 FROM tiles",
    f"SELECT * EXCLUDE (mask, valid, probability) FROM tiles {ORDER}",
    f"SELECT * FROM tiles {ORDER}",
    "SELECT count(*) AS n FROM failures",
    "SELECT count(*) AS n FROM tiles_in(-180, -90, 180, 90)",
)


def answers(made: BuiltRun) -> dict[str, Any]:
    """What can be asked of a run, or the error."""
    report = verify(made.run)
    said: dict[str, Any] = {sql: query(made.run, sql).to_pylist() for sql in QUERIES}
    return said | {
        "summary": summary(made.run),
        "to do": [part.key for part in parts_to_do(made.run, made.plan)],
        "verify": (report.problems, report.num_done, report.num_failed, report.num_missing_parts),
    }


def test_a_run_says_the_same_with_and_without_a_ledger(made: BuiltRun) -> None:
    assert live_keys(made) == {part.key for part in made.parts} - {made.parts[FAILED].key}
    before = answers(made)
    shutil.rmtree(ledger_folder(made.run))
    assert answers(made) == before


def test_what_is_in_the_ledger_is_not_read_again_but_its_proof_reads_each_file(made: BuiltRun) -> None:
    before, times = answers(made), os.stat(made.path())
    made.path().write_bytes(bytes(times.st_size))
    os.utime(made.path(), ns=(times.st_atime_ns, times.st_mtime_ns))
    assert summary(made.run) == before["summary"]
    assert query(made.run, QUERIES[0]).to_pylist() == before[QUERIES[0]]
    assert [part.key for part in parts_to_do(made.run, made.plan)] == before["to do"]
    assert made.path().name in made.problems()
    assert repair(made.run).bad_parts == [str(made.path())]
    assert made.parts[0] in parts_to_do(made.run, made.plan)


def lose_a_part(made: BuiltRun) -> None:
    made.path().unlink()


def cut_a_part(made: BuiltRun) -> None:
    made.path().write_bytes(made.path().read_bytes()[:-10])


def do_a_part_again(made: BuiltRun) -> None:
    part = made.parts[0]
    write_part(made.run, part.key, part_rows(part, SETTINGS, seed=1), made.plan.model, part.version)


def touch_a_part(made: BuiltRun) -> None:
    made.path().touch()


def do_the_failed_part(made: BuiltRun) -> None:
    part = made.parts[FAILED]
    write_part(made.run, part.key, part_rows(part, SETTINGS), made.plan.model, part.version)


def write_an_older_state(made: BuiltRun) -> None:
    part = made.parts[0]
    write_part(made.run, part.key, part_rows(part, SETTINGS), made.plan.model, "older")
    enter_parts(made.run, made.plan)


def cut_the_entries(made: BuiltRun) -> None:
    entries_of(made)[0].write_bytes(entries_of(made)[0].read_bytes()[:-10])


def change_a_sum(made: BuiltRun) -> None:
    path = entries_of(made)[0]
    content = json.loads(path.read_text())
    content["parts"][0][-1][0] += 1
    path.write_text(json.dumps(content))


def lose_the_rows(made: BuiltRun) -> None:
    figures_of(made)[0].unlink()


def cut_the_rows(made: BuiltRun) -> None:
    figures_of(made)[0].write_bytes(figures_of(made)[0].read_bytes()[:-10])


def enter_again(made: BuiltRun) -> None:
    enter_parts(made.run, made.plan, 3)


def rewrite(made: BuiltRun, **changes: Any) -> None:
    """Change the entries, as another version might, and the number of tiles with them."""
    for path in entries_of(made):
        content = {**json.loads(path.read_text()), **changes}
        for *_, sums in content["parts"]:
            sums[0] += 1
        encoded = json.dumps(content).encode()
        path.unlink()
        path.with_name(f"{sha256(encoded)[: ledger.NAME_DIGITS]}.json").write_bytes(encoded)


def write_another_version(made: BuiltRun) -> None:
    rewrite(made, version=0)


def write_other_columns(made: BuiltRun) -> None:
    rewrite(made, columns=["status"])


def write_nonsense(made: BuiltRun) -> None:
    rewrite(made, parts=[["a", [1]]])


def check_against_another_model(made: BuiltRun) -> None:
    part, expected = made.parts[0], Expected.of(made.plan)._replace(model="another")
    content = write_part(made.run, part.key, part_rows(part, SETTINGS), expected.model, part.version)
    found = describe_part(made.run, part, content, expected)
    assert found is not None
    write_ledger(made.run, [found], expected)


def take_the_ledger_of_another_run(made: BuiltRun) -> None:
    folder = Path(made.run).parent / "other"
    other = BuiltRun(*build_run(folder, seed=5))
    shutil.rmtree(ledger_folder(made.run))
    shutil.copytree(ledger_folder(other.run), ledger_folder(made.run))


@pytest.mark.parametrize(
    "disturb",
    [
        lose_a_part,
        cut_a_part,
        do_a_part_again,
        touch_a_part,
        do_the_failed_part,
        write_an_older_state,
        cut_the_entries,
        change_a_sum,
        lose_the_rows,
        enter_again,
        write_another_version,
        write_other_columns,
        write_nonsense,
        check_against_another_model,
        take_the_ledger_of_another_run,
    ],
)
def test_a_ledger_that_disagrees_with_the_files_loses(made: BuiltRun, disturb: Callable[[BuiltRun], None]) -> None:
    disturb(made)
    with_ledger = answers_or_errors(made)
    shutil.rmtree(ledger_folder(made.run))
    assert with_ledger == answers_or_errors(made)


def answers_or_errors(made: BuiltRun) -> dict[str, Any]:
    """What is said of a run that may hold a damaged part, which queries and sums refuse."""
    if verify(made.run).problems and made.path().exists():
        return {"to do": list(parts_to_do(made.run, made.plan)), "verify": verify(made.run)}
    return answers(made)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_rows_of_a_ledger_that_have_changed_are_named_and_removed(made: BuiltRun, damage: str) -> None:
    before, path = answers(made), figures_of(made)[0]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-10:]
    content[10] ^= 1
    path.write_bytes(content)
    assert verify(made.run).problems == [f"ledger/{path.name}: its content has changed"]
    assert repair(made.run).bad_parts == [str(path)]
    assert answers(made) == before


def test_rows_of_a_ledger_that_were_cut_are_not_queried(made: BuiltRun) -> None:
    before = answers(made)
    cut_the_rows(made)
    assert {sql: query(made.run, sql).to_pylist() for sql in QUERIES} == {sql: before[sql] for sql in QUERIES}


def test_a_deep_check_looks_at_rows_again(made: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the ledger says that they were checked, as one by a program that does not check them would."""
    monkeypatch.setattr(ledger, "check_part", lambda *_: PartCheck(1, 0, []))
    made.rewrite(lambda rows: [{**row, "building_px": 0} for row in rows])
    enter_parts(made.run, made.plan)
    assert verify(made.run).ok
    assert made.path().name in "\n".join(verify(made.run, again=True).problems)


def test_a_part_whose_rows_are_wrong_is_not_entered(made: BuiltRun) -> None:
    shutil.rmtree(ledger_folder(made.run))
    made.rewrite(lambda rows: [{**row, "building_px": 0} for row in rows])
    made.rewrite(lambda rows: rows[1:], part=1)
    Path(ledger_folder(made.run)).mkdir()
    enter_parts(made.run, made.plan)
    assert live_keys(made) == {part.key for part in made.parts[FAILED + 1 :]}


PIXEL_QUERIES = (
    "FROM tiles",
    "SELECT tiles FROM tiles",
    "SELECT count(mask) FROM tiles",
    "SELECT max(octet_length(valid)) FROM tiles",
    "SELECT scene_id FROM tiles WHERE mask IS NULL ORDER BY ALL",
    "SELECT CASE WHEN tile_row > 1 THEN octet_length(mask) END AS a FROM tiles ORDER BY ALL",
    "SELECT count(*) FROM tiles AS a JOIN tiles AS b ON a.mask = b.mask",
    "WITH big AS (SELECT * FROM tiles) SELECT octet_length(any_value(probability)) FROM big",
    "SUMMARIZE SELECT mask FROM tiles",
)


@pytest.mark.parametrize("sql", PIXEL_QUERIES)
def test_queries_of_pixels_read_the_files_of_parts(made: BuiltRun, sql: str) -> None:
    assert not connect(made.run, with_pixels=False).can_answer(sql)
    with pytest.raises(duckdb.InvalidInputException, match="the ledger has no pixels"):
        connect(made.run, with_pixels=False).duckdb.sql(sql).fetchall()
    said = query(made.run, sql).to_pylist()
    shutil.rmtree(ledger_folder(made.run))
    assert query(made.run, sql).to_pylist() == said


@pytest.mark.parametrize("sql", [*QUERIES[:2], "SELECT avg(coverage) FROM tiles GROUP BY scene_id"])
def test_queries_of_figures_read_a_file_for_many_parts(made: BuiltRun, sql: str) -> None:
    assert connect(made.run, with_pixels=False).can_answer(sql)
    assert explain(made.run, sql)["files"] == 3 + 2  # those of the ledger; the part that failed, and the scenes
    assert query(made.run, "EXPLAIN SELECT mask FROM tiles").num_rows


def test_compacting_removes_the_ledger(made: BuiltRun) -> None:
    before = answers(made)
    compact_run(made.run)
    assert list(Path(ledger_folder(made.run)).iterdir()) == []
    assert {**answers(made), "summary": None} == {**before, "summary": None}  # sums are of other groups
    assert summary(made.run)["building_px"] == before["summary"]["building_px"]


def test_an_actor_enters_its_parts_and_a_crash_before_that_costs_nothing(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_plan(make_scene("region/a.tif", 512, 700), make_bundle(), str(tmp_path / "run"))
    plan, _, run = made
    with monkeypatch.context() as patch:
        patch.setattr("aerial_seg.segmenting.publishing.write_ledger", stop)
        with pytest.raises(StopError):
            work(made)
    assert list(read_ledger(run)) == []
    assert list(parts_to_do(run, plan)) == []
    assert verify(run).ok
    rows, counts = rows_in_order(made), summary(run)
    for session in ("again", "and again"):  # a task that is repeated does all of its parts again
        assert work(made, session) == rows
        assert {entry.key for _, entries in read_live_ledger(run) for entry in entries} == find_parts(run).keys()
        assert summary(run) == counts
        assert verify(run).ok
        assert query(run, "SELECT count(*) AS n FROM tiles").to_pylist() == [{"n": len(rows)}]


class StopError(Exception):
    """The end of a process."""


def stop(*_: Any) -> None:
    raise StopError
