"""Compaction: a run says the same before, while and after it is compacted, whenever that ends."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from conftest import UTM
from pyproj import Transformer
from runs import build_run, enter_task, part_rows, replan, rows_of
from seg_command import seg
from shapely import box

import seg_core
from seg_core.errors import CorruptFileError, JobError, SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.run import compact, part_reading, parts, sql, sql_files
from seg_core.run import query as query_module
from seg_core.run import verify as verify_module
from seg_core.run.area_files import make_areas
from seg_core.run.areas import measure_areas
from seg_core.run.compact import compact_run, remove_parts
from seg_core.run.compare import compare_runs
from seg_core.run.export_masks import read_mask
from seg_core.run.fence import Lease
from seg_core.run.lease import acquire_lease
from seg_core.run.part_reading import read_rows, read_versioned
from seg_core.run.parts import find_parts, index_parts
from seg_core.run.plan import Plan
from seg_core.run.query import query, summary
from seg_core.run.resume import open_run, parts_to_do
from seg_core.run.tables import part_path, write_part
from seg_core.run.verify import repair, verify

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("original")
    _, plan = build_run(folder, failed_parts=[2])
    return folder, plan


@pytest.fixture
def plan(original: tuple[Path, Plan]) -> Plan:
    return original[1]


@pytest.fixture
def run(original: tuple[Path, Plan], tmp_path: Path) -> str:
    """A copy of a run of five parts in two scenes; all tiles of the third part failed."""
    return str(shutil.copytree(original[0] / "run", tmp_path / "run"))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    make_files_small(monkeypatch)


def make_files_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of one or two parts, which are read one by one, and files of two row groups."""
    monkeypatch.setattr(compact, "GROUP_ROWS", 6)
    monkeypatch.setattr(part_reading, "GROUPS_AT_ONCE", 1)
    write = compact._write_files
    monkeypatch.setattr(compact, "_write_files", lambda run, chosen, _, store: write(run, chosen, 5, store))


def names(run: str) -> list[str]:
    return sorted(path.name for path in Path(run, "tiles").iterdir())


def answers(run: str) -> dict[str, Any]:
    """What can be asked of a run."""
    square = geopandas.GeoDataFrame(geometry=[box(400_005, 5_799_910, 400_090, 5_799_980)], crs=UTM)
    areas = measure_areas(run, make_areas(square)).drop(columns="geometry")
    order = "ORDER BY scene_id, tile_row, tile_col"
    report = verify(run)
    return {
        "rows": rows_of(run),
        "tiles": query(run, f"SELECT * FROM tiles {order}").to_pylist(),
        "failures": query(run, f"SELECT * EXCLUDE (mask) FROM failures {order}").to_pylist(),
        "verify": (report.problems, report.num_done, report.num_failed, report.num_missing_parts),
        "mask": read_mask(run, "north/a.tif").tolist(),
        "areas": areas.round(6).to_dict("records"),
        "summary": {k: round(v, 9) if isinstance(v, float) else v for k, v in summary(run).items()},
    }


@pytest.mark.usefixtures("small_files")
def test_a_compacted_run_says_the_same(run: str, plan: Plan) -> None:
    before, keys = answers(run), [part.key for part in parts_to_do(run, plan)]
    assert len(keys) == 1  # the one with failed tiles
    found = compact_run(run)
    assert found.parts == found.files_before == 5
    assert found.files_after == len(names(run)) > 2
    assert all(name.startswith("compacted-") for name in names(run))
    assert answers(run) == before
    assert [part.key for part in parts_to_do(run, plan)] == keys


def test_one_file_is_enough_for_a_small_run(run: str) -> None:
    before = answers(run)
    assert compact_run(run).files_after == 1
    assert answers(run) == before
    content = Path(run, "tiles", *names(run)).read_bytes()
    assert compact_run(run).files_after == 1
    assert Path(run, "tiles", *names(run)).read_bytes() == content  # it is left alone


@pytest.mark.usefixtures("small_files")
def test_files_are_geoparquet_with_statistics_of_each_row_group(run: str) -> None:
    compact_run(run)
    for name in names(run):
        footer = pq.read_metadata(Path(run, "tiles", name))
        geo = json.loads(footer.metadata[b"geo"])
        assert geo["columns"]["geometry"]["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
        for group in range(footer.num_row_groups):
            chunks = [footer.row_group(group).column(at) for at in range(footer.num_columns)]
            known = {each.path_in_schema for each in chunks if each.statistics and each.statistics.has_min_max}
            assert {"bbox.xmin", "scene_id", "tile_row"} <= known
            assert known.isdisjoint({"mask", "valid", "geometry"})
        assert "mask" in footer.schema.names
    tiles = geopandas.read_parquet(Path(run, "tiles"))
    assert tiles.crs == "OGC:CRS84"
    assert len(tiles) == len(rows_of(run))


@pytest.mark.usefixtures("small_files")
def test_neighbours_on_the_ground_are_in_one_file(run: str) -> None:
    compact_run(run)
    scenes = [{entry.key[:16] for entry in file.entries} for file in index_parts(run).compacted]
    assert sum(len(each) > 1 for each in scenes) <= 1  # the scenes lie 10 km apart


class StopError(Exception):
    """The end of a process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the store end the process before it has changed the run for the number-th time."""
    count = iter(range(number))

    def stopping(change: Callable[..., object]) -> Callable[..., object]:
        def call(lease: Lease, path: str, *content: bytes) -> object:
            if "/tiles/" in path and next(count, None) is None:
                raise StopError
            return change(lease, path, *content)

        return call

    monkeypatch.setattr(Lease, "publish", stopping(Lease.publish))
    monkeypatch.setattr(Lease, "remove", stopping(Lease.remove))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("number", range(11))
def test_a_run_is_complete_whenever_compacting_ends(
    run: str, plan: Plan, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An older compacted file holds a part that has been done anew, and is replaced.
    compact_run(run)
    todo = parts_to_do(run, plan)[0]
    write_part(run, todo.key, part_rows(todo, plan.settings), plan.model, todo.version)
    assert list(parts_to_do(run, plan)) == []
    before = answers(run)
    assert before["verify"] == ([], plan.counts["tiles"], 0, 0)
    with monkeypatch.context() as patch:
        stop_after(patch, number)
        try:
            compact_run(run)
            ended = True
        except StopError:
            ended = False
    assert answers(run) == before
    assert list(parts_to_do(run, plan)) == []
    compact_run(run)
    assert answers(run) == before
    assert index_parts(run).dead_parts() == {}
    assert not any(name.startswith("part-") for name in names(run))
    if number in {0, 10}:
        assert ended == (number == 10)  # so that each moment was tried


def test_a_part_that_is_done_anew_counts_from_its_own_file(run: str, plan: Plan) -> None:
    compact_run(run)
    (todo,) = parts_to_do(run, plan)
    rows = part_rows(todo, plan.settings)
    write_part(run, todo.key, rows, plan.model, todo.version)
    assert list(parts_to_do(run, plan)) == []
    assert verify(run).describe() == f"complete: all {plan.counts['tiles']} tiles are done"
    assert summary(run)["failed"] == 0
    assert query(run, "SELECT count(*) AS n FROM tiles").to_pylist() == [{"n": len(rows_of(run))}]
    assert query(run, "SELECT count(*) AS n FROM failures").to_pylist() == [{"n": 0}]
    (dead,) = index_parts(run).dead_parts().values()
    assert dead == {todo.key}


def test_seg_segment_and_seg_compact_refuse_to_work_at_once(run: str, capsys: Capture) -> None:
    with acquire_lease(run):
        _, err = seg(capsys, "compact", run, code=2)
    assert "another driver is at work on this run" in err
    assert sum(name.startswith("part-") for name in names(run)) == 5


@pytest.mark.usefixtures("small_files")
def test_a_reader_that_has_begun_finds_parts_where_they_are_now(run: str) -> None:
    there = find_parts(run)
    expected = {key: read_rows(location) for key, location in there.items()}
    compact_run(run)
    assert {key: read_rows(location) for key, location in there.items()} == expected
    Path(run, "tiles", names(run)[0]).unlink()
    part_reading._find_parts_at.cache_clear()
    gone = there.keys() - find_parts(run).keys()
    assert gone
    for key in gone:
        with pytest.raises(SegError, match="no such file"):
            read_rows(there[key])


def test_a_part_that_moves_into_a_compacted_file_keeps_its_version(run: str, plan: Plan) -> None:
    there = find_parts(run)
    compact_run(run)
    found = {part.key: read_versioned(there[part.key])[1] for part in plan.parts()}
    assert found == {part.key: part.version for part in plan.parts()}


def test_a_run_is_sound_while_it_is_compacted(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, digests = verify(run), verify_module._compare_digests

    def compact_meanwhile(*args: Any) -> Any:
        compact_run(run)
        return digests(*args)

    monkeypatch.setattr(verify_module, "_compare_digests", compact_meanwhile)
    assert verify(run) == before


def test_sql_counts_each_part_once_while_files_of_parts_go_away(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger still lists parts whose files are gone."""
    counts = "SELECT count(*) AS n, sum(building_px) AS px FROM tiles"
    before, index = query(run, counts), sql.index_parts

    def compact_meanwhile(run: str) -> parts.PartIndex:
        with monkeypatch.context() as patch, suppress(StopError):
            stop_after(patch, 4)  # one compacted file, and three files of parts removed
            compact_run(run)
        return index(run)

    monkeypatch.setattr(sql, "index_parts", compact_meanwhile)
    assert query(run, counts) == before


@pytest.mark.parametrize("module", [query_module, sql])
def test_a_part_that_is_done_anew_while_it_is_counted_counts_once(
    run: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    compact_run(run)
    (todo,) = parts_to_do(run, plan)
    ledger = module.read_live_ledger

    def do_anew(run: str) -> Any:
        write_part(run, todo.key, part_rows(todo, plan.settings), plan.model, todo.version)
        enter_task(run, plan, [todo])
        return ledger(run)

    monkeypatch.setattr(module, "read_live_ledger", do_anew)
    counts = "SELECT (SELECT count(*) FROM tiles) AS tiles, (SELECT count(*) FROM failures) AS failed"
    found = summary(run) if module is query_module else query(run, counts).to_pylist()[0]
    assert found["tiles"] + found["failed"] == plan.counts["tiles"]


@pytest.mark.parametrize("is_anew", [False, True])
def test_a_summary_finds_parts_whose_compacted_files_are_merged_meanwhile(
    run: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, is_anew: bool
) -> None:
    with monkeypatch.context() as patch:
        make_files_small(patch)
        compact_run(run)
    if is_anew:
        (todo,) = parts_to_do(run, plan)
        write_part(run, todo.key, part_rows(todo, plan.settings), plan.model, todo.version)
    before, files, ledger = summary(run), names(run), query_module.read_live_ledger

    def merge_meanwhile(run: str) -> Any:
        compact_run(run)
        return ledger(run)

    monkeypatch.setattr(part_reading, "GROUPS_AT_ONCE", 1)
    monkeypatch.setattr(query_module, "read_live_ledger", merge_meanwhile)
    assert summary(run) == pytest.approx(before)
    assert set(files).isdisjoint(names(run))


def test_a_query_that_loses_its_files_says_so_in_a_line(run: str) -> None:
    with sql.run_sql(run, "SELECT mask FROM tiles") as rows:
        rows.read_all()
    connection = sql.connect(run)
    compact_run(run)
    with pytest.raises(SegError, match="ask again") as raised, sql._translated_errors(connection.files):
        connection.duckdb.sql("SELECT mask FROM tiles").fetchall()
    assert "\n" not in str(raised.value)


def test_a_query_whose_files_go_away_before_it_begins_says_so_in_a_line(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_parts(run)
    compact_run(run)
    monkeypatch.setattr(sql, "index_parts", lambda _: index)
    with pytest.raises(SegError, match=r"part-.*: is gone: if the run is being compacted or worked on, ask again"):
        query(run, "SELECT mask FROM tiles")


@pytest.mark.parametrize("lost", ["parts and compacted file", "parts"])
def test_a_list_that_is_made_while_files_go_away_does_not_count(
    run: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A store names `compacted-...` first and `part-...` much later. Meanwhile all can have changed."""
    before = {key: read_rows(location) for key, location in find_parts(run).items()}
    published, calls = parts.published, []

    def slow(folder: str, suffix: str) -> list[str]:
        calls.append(folder)
        if len(calls) != {"parts and compacted file": 1, "parts": 2}[lost]:
            return published(folder, suffix)
        first = [path for path in published(folder, suffix) if "compacted-" in path]
        compact_run(run)
        return [*first, *(path for path in published(folder, suffix) if "part-" in path)]

    monkeypatch.setattr(parts, "published", slow)
    assert {key: read_rows(location) for key, location in find_parts(run).items()} == before


@pytest.mark.usefixtures("small_files")
def test_parts_are_found_after_each_file_that_goes_away(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_parts(run)
    expected = {key: read_rows(location) for key, location in there.items()}
    remove = Lease.remove

    def check(lease: Lease, path: str) -> None:
        remove(lease, path)
        if "/tiles/" in path:
            assert {key: read_rows(location) for key, location in there.items()} == expected

    monkeypatch.setattr(Lease, "remove", check)
    compact_run(run)


def test_threads_that_miss_a_part_list_the_run_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_parts(run)
    compact_run(run)
    part_reading._find_parts_at.cache_clear()
    monkeypatch.setattr(part_reading, "REFRESH", 1e6)
    calls: list[str] = []
    published = parts.published
    monkeypatch.setattr(parts, "published", lambda *args: calls.append(args[0]) or published(*args))
    with ThreadPoolExecutor(5) as pool:
        rows = list(pool.map(read_rows, there.values()))
    assert sum(map(len, rows)) == len(rows_of(run))
    assert len(calls) == 2 + 2  # one list, which is made twice; and that of the line before


def test_a_damaged_compacted_file_is_named_removed_and_made_again(run: str, plan: Plan) -> None:
    compact_run(run)
    path = Path(run, "tiles", names(run)[0])
    lost = [entry.key for file in index_parts(run).compacted if file.path == str(path) for entry in file.entries]
    path.write_bytes(path.read_bytes()[:-20])
    report = verify(run)
    assert any(path.name in problem for problem in report.problems)
    assert report.bad_parts == [str(path)]
    with pytest.raises(CorruptFileError, match="seg repair removes it"):
        find_parts(run)
    assert repair(run).bad_parts == [str(path)]
    assert not path.exists()
    assert {part.key for part in parts_to_do(run, plan)} >= set(lost)


@pytest.mark.usefixtures("small_files")
def test_a_part_can_be_removed_from_a_compacted_file(run: str, plan: Plan) -> None:
    compact_run(run)
    rows = rows_of(run)
    part = next(iter(plan.parts()))
    report = repair(run, [f"part-{part.key}.parquet"])
    assert report.bad_parts == [part_path(run, part.key)]
    assert part.key not in find_parts(run)
    left = [
        row for row in rows if row["scene_id"] != part.scene.scene_id or row["row_off"] >= 64 or row["col_off"] >= 64
    ]
    assert rows_of(run) == left
    write_part(run, part.key, part_rows(part, plan.settings), plan.model, part.version)
    assert verify(run).ok


def test_rows_that_are_wrong_in_a_compacted_file_are_reported_by_part(run: str, plan: Plan) -> None:
    part = next(iter(plan.parts()))
    rows = part_rows(part, plan.settings)
    write_part(run, part.key, [{**rows[0], "building_px": 10**6}, *rows[1:]], plan.model, part.version)
    compact_run(run)
    report = verify(run)
    assert report.bad_parts == [part_path(run, part.key)]
    assert all(f"part-{part.key}.parquet" in problem for problem in report.problems)
    repair(run)
    assert part.key in {each.key for each in parts_to_do(run, plan)}
    assert len(find_parts(run)) == 4


@pytest.mark.usefixtures("small_files")
def test_a_scene_that_has_changed_is_done_anew_and_its_old_parts_go(
    original: tuple[Path, Plan], tmp_path: Path
) -> None:
    shutil.copytree(original[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    plan = replan(folder)
    run = str(folder / "again")
    record = open_run(run, plan, str(folder / "bundle"))
    assert record.finished is None
    for part in plan.parts():
        write_part(run, part.key, part_rows(part, plan.settings), plan.model, part.version)
    compact_run(run)
    make = np.zeros((3, 64, 64), np.uint8) + 9
    write_geotiff(
        str(folder / "scenes/north/a.tif"), make, crs=UTM, transform=(1.0, 0.0, 400_000.0, 0.0, -1.0, 5_800_000.0)
    )
    later = replan(folder)
    open_run(run, later, str(folder / "bundle"))
    planned = {part.key for part in later.parts()}
    assert find_parts(run).keys() <= planned
    assert [part.scene.scene_id for part in parts_to_do(run, later)] == ["north/a.tif"]


def test_other_engines_read_compacted_files_as_they_do_parts(run: str) -> None:
    columns = ["scene_id", "tile_row", "tile_col", "building_px"]

    def read() -> list[dict[str, Any]]:
        table = (
            pyarrow.dataset.dataset(f"{run}/tiles")
            .to_table(columns=columns)
            .sort_by([(c, "ascending") for c in columns[:3]])
        )
        return list(table.to_pylist())

    before = read()
    compact_run(run)
    assert read() == before


@pytest.mark.usefixtures("small_files")
def test_a_statistics_query_reads_no_masks_and_a_bbox_skips_row_groups(run: str) -> None:
    compact_run(run)
    files = sum(path.stat().st_size for path in Path(run, "tiles").iterdir())
    masks = sum(len(row["mask"] or b"") + len(row["valid"] or b"") for row in rows_of(run))
    plain = sql.explain(run, "SELECT sum(building_px), avg(coverage) FROM tiles")
    with_masks = sql.explain(run, "SELECT sum(octet_length(mask)) FROM tiles")
    assert 3 < plain["row_groups_read"] < plain["row_groups"]  # all but those of the scenes, and where all tiles failed
    assert plain["bytes"] >= files
    assert with_masks["bytes_read"] > plain["bytes_read"] or masks < 3000
    edge = query(run, "SELECT max(bbox.xmax) AS x FROM tiles").to_pylist()[0]["x"]
    near = sql.explain(run, f"SELECT count(*), sum(building_px) FROM tiles WHERE bbox.xmax >= {edge!r}")
    assert 0 < near["row_groups_read"] < plain["row_groups_read"]


def test_the_command_says_what_it_has_done(run: str, capsys: Capture) -> None:
    out, err = seg(capsys, "compact", run, "--json")
    found = json.loads(out)
    assert (found["parts"], found["files_before"], found["files_after"]) == (5, 5, 1)
    assert found["bytes_before"] > found["bytes_after"] > 0
    assert err == ""


def test_what_is_no_part_is_not_compacted(run: str) -> None:
    Path(run, "tiles/stranger.parquet").write_bytes(b"")
    with pytest.raises(SegError, match=r"stranger\.parquet: holds what is not a part of this run"):
        compact_run(run)
    assert len(names(run)) == 6


@pytest.mark.usefixtures("small_files")
def test_compacted_runs_are_compared_and_written_again(run: str, tmp_path: Path) -> None:
    other = str(shutil.copytree(run, tmp_path / "other"))
    compact_run(run)
    found = compare_runs(run, other)
    assert (found.pixels["gained"], found.pixels["lost"], found.unknown) == (0, 0, compare_runs(other, other).unknown)


def test_a_run_in_s3_is_compacted(original: tuple[Path, Plan], s3: str, capsys: Capture) -> None:
    from seg_core.storage.files import publish, walk

    run = f"{s3}/compact/run"
    for path in sorted((original[0] / "run").rglob("*")):
        if path.is_file():
            publish(f"{run}/{path.relative_to(original[0] / 'run')}", path.read_bytes())
    before = rows_of(run)
    seg(capsys, "compact", run)
    assert len([path for path in walk(f"{run}/tiles") if path.endswith(".parquet")]) == 1
    assert rows_of(run) == before
    assert seg_core.open_run(run).query("SELECT count(*) AS n FROM tiles").to_pylist()[0]["n"] > 0


def test_a_compacted_file_whose_list_does_not_fit_is_damaged(run: str) -> None:
    compact_run(run)
    (file,) = index_parts(run).compacted
    short = parts.CompactedFile(file.path, [*file.entries[:-1], file.entries[-1]._replace(rows=99)], file.group_rows)
    with pytest.raises(CorruptFileError, match="do not fit"):
        list(short.locations())


def test_parts_that_do_not_count_and_are_not_planned_change_no_answer(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact_run(run)
    (file,) = index_parts(run).compacted
    before = seg_core.open_run(run).query("SELECT count(*) AS n FROM tiles").to_pylist()
    monkeypatch.setattr(parts.PartIndex, "dead_parts", lambda _: {file.name: {"of no plan"}})
    assert seg_core.open_run(run).query("SELECT count(*) AS n FROM tiles").to_pylist() == before


def test_parts_that_are_removed_leave_no_compacted_copy(run: str, plan: Plan) -> None:
    compact_run(run)
    part = next(iter(plan.parts()))
    write_part(run, part.key, part_rows(part, plan.settings), plan.model, part.version)
    with acquire_lease(run) as lease:
        remove_parts(index_parts(run), [part.key], lease)
    assert part.key not in find_parts(run)
    assert len(find_parts(run)) == 4


def test_a_damaged_copy_of_a_part_that_was_done_anew_is_no_obstacle(run: str, plan: Plan) -> None:
    compact_run(run)
    (todo,) = parts_to_do(run, plan)
    write_part(run, todo.key, part_rows(todo, plan.settings), plan.model, todo.version)
    before = rows_of(run)
    with acquire_lease(run) as lease:
        other = next(part for part in plan.parts() if part.key != todo.key)
        remove_parts(index_parts(run), [other.key], lease)
    assert index_parts(run).dead_parts() == {}
    assert len(rows_of(run)) == len(before) - len(part_rows(other, plan.settings))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.usefixtures("small_files")
def test_a_part_is_removed_at_last_whenever_that_ends(
    run: str, plan: Plan, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact_run(run)
    part, others = next(iter(plan.parts())), len(rows_of(run))
    name = f"part-{part.key}.parquet"
    with monkeypatch.context() as patch:
        stop_after(patch, number)
        with suppress(StopError):
            repair(run, [name])
    left = len(rows_of(run))
    assert left in {others, others - len(part_rows(part, plan.settings))}
    if part.key in find_parts(run):
        repair(run, [name])
    assert part.key not in find_parts(run)
    assert len(rows_of(run)) == others - len(part_rows(part, plan.settings))
    assert query(run, "SELECT count(*) AS n FROM tiles").to_pylist()[0]["n"] <= len(rows_of(run))


def test_a_part_without_rows_is_not_compacted(run: str, plan: Plan) -> None:
    part = next(iter(plan.parts()))
    write_part(run, part.key, [], plan.model, part.version)
    with pytest.raises(CorruptFileError, match=rf"part-{part.key}\.parquet: has no rows: seg repair removes it"):
        compact_run(run)
    assert len(find_parts(run)) == 5


@pytest.mark.parametrize("listed", [None, b"[]", b"[[1]]", b"{", b"short"])
def test_a_compacted_file_without_a_list_is_damaged(run: str, listed: bytes | None) -> None:
    compact_run(run)
    (name,) = names(run)
    path = Path(run, "tiles", name)
    table = pq.read_table(path)
    if listed == b"short":
        entries = json.loads(table.schema.metadata[b"parts"])
        listed = json.dumps(entries[:-1]).encode()
    metadata = {b"geo": table.schema.metadata[b"geo"], **({} if listed is None else {b"parts": listed})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    report = verify(run)
    assert report.bad_parts == [str(path)]
    assert report.problems[0].startswith(name)
    repair(run)
    assert verify(run).num_missing_parts == 5


def test_a_driver_that_was_frozen_leaves_no_compacted_file(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In S3 nothing stops the write of a new file; so it is removed again."""
    monkeypatch.setattr(Lease, "is_lost", lambda _: len(names(run)) > 5)
    with pytest.raises(JobError, match="another driver has taken this run over"):
        compact_run(run)
    assert all(name.startswith("part-") for name in names(run))
    assert len(names(run)) == 5


def test_threads_share_a_file_but_not_their_place_in_it(run: str) -> None:
    path = Path(run, "tiles", names(run)[0])
    content = path.read_bytes()
    files = sql_files.RunFiles({"a": str(path)})
    with closing(files.open("run://a")) as file, ThreadPoolExecutor(1) as other:
        file.seek(10)
        other.submit(file.seek, 500).result()
        assert file.read(64) == content[10:74]
        assert other.submit(file.read, 64).result() == content[500:564]
        assert (file.tell(), other.submit(file.tell).result()) == (74, 564)
        file.seek(-8, 2)
        assert file.read() == content[-8:]
    with pytest.raises(PermissionError, match="can only be read"):
        files.open("run://a", "wb")
    with pytest.raises(PermissionError, match="can only be read"):
        files.open("run://../run.json")


def test_a_part_is_found_though_its_compacted_file_was_replaced_after_it_had_been_listed(run: str, plan: Plan) -> None:
    there = find_parts(run)
    compact_run(run)
    part = next(iter(plan.parts()))
    expected = read_rows(there[part.key])  # from now on it is known where the parts are
    (todo,) = parts_to_do(run, plan)
    write_part(run, todo.key, part_rows(todo, plan.settings), plan.model, todo.version)
    compact_run(run)
    part_reading._read_group.cache_clear()
    assert read_rows(there[part.key]) == expected


@pytest.mark.parametrize(("lon", "types"), [(177.0, ["Polygon"]), (180.0, ["MultiPolygon", "Polygon"])])
def test_geometry_types_are_those_of_the_tiles(tmp_path: Path, lon: float, types: list[str]) -> None:
    x, y = Transformer.from_crs("OGC:CRS84", "EPSG:32660", always_xy=True).transform(lon, -17.0)
    run, _ = build_run(tmp_path, crs="EPSG:32660", corner=(round(x) - 60.0, round(y)))
    compact_run(run)
    geo = json.loads(pq.read_metadata(Path(run, "tiles", *names(run))).metadata[b"geo"])
    assert geo["columns"]["geometry"]["geometry_types"] == types
