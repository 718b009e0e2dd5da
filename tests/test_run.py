"""A run's plan, its folder and what of it is left to do; and a hand-built run that other tests use too."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import NORTH_UP, UTM, MakeScene
from runs import (
    SETTINGS,
    build_run,
    file_digests,
    part_rows,
    published_parts,
    read_part,
    replan,
    write_light_bundle,
    write_region,
)

from seg_core.errors import SegError
from seg_core.grid import Window, bounding_window, split
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.region import read_region
from seg_core.imagery.scene import ADDED_FIELDS
from seg_core.model.bundle import Bundle, read_bundle
from seg_core.run.ledger import read_ledger
from seg_core.run.plan import (
    Part,
    Plan,
    Settings,
    make_plan,
    pack_parts,
    unpack_parts,
)
from seg_core.run.record import read_record
from seg_core.run.resume import changed_scenes, find_run, open_run, parts_to_do, with_choices_of_run
from seg_core.run.rows import Failure, failed_rows
from seg_core.run.sizing import READ_SIDE, choose_depth, choose_read_blocks, choose_window, read_blocks
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, read_scenes, scenes_path, write_part
from seg_core.run.verify import verify

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    build_run(folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_light_bundle(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": 30}, "--tile-size 30: the model's stride is 4: use a multiple of it"),
        ({"tile_size": 0}, "--tile-size 0: the model's stride is 4: use a multiple of it"),
        ({"tile_size": -32}, "--tile-size -32: the model's stride is 4: use a multiple of it"),
        ({"halo": 10}, "--halo 10: the model's stride is 4: use a multiple of it"),
        ({"halo": -4}, "--halo -4: the model's stride is 4: use a multiple of it"),
        ({"part": 0}, "--part 0: use a multiple of the tile size, 32"),
        ({"part": 16}, "--part 16: use a multiple of the tile size, 32"),
        ({"part": 80}, "--part 80: use a multiple of the tile size, 32"),
        ({"threshold": 0.0}, "--threshold 0.0: use a probability between 0 and 1"),
        ({"threshold": 1.0}, "--threshold 1.0: use a probability between 0 and 1"),
        ({"threshold": float("nan")}, "--threshold nan: use a probability between 0 and 1"),
        ({"scale": (5.0, 5.0)}, "--scale 5 5: MIN must be less than MAX"),
        ({"scale": (9.0, 5.0)}, "--scale 9 5: MIN must be less than MAX"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_value_and_way_out(
    bundle: Bundle, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SegError) as refusal:
        make_plan([], bundle, replace(SETTINGS, **changes))
    assert str(refusal.value) == message


@pytest.mark.parametrize("scale", [(float("nan"), 5.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_a_scale_that_is_no_pair_of_numbers_is_refused(bundle: Bundle, scale: tuple[float, float]) -> None:
    with pytest.raises(SegError, match="--scale"):
        make_plan([], bundle, replace(SETTINGS, scale=scale))


def test_least_settings_are_accepted(bundle: Bundle) -> None:
    settings = Settings(tile_size=4, part=4, halo=0, threshold=1e-6, scale=(0.0, 0.1))
    settings.check(bundle.stride)


def test_a_plan_serves_what_it_can_and_says_why_not_the_rest(make_scene: MakeScene, bundle: Bundle) -> None:
    make_scene("region/good.tif")
    make_scene("region/grey.tif", bands=1)
    make_scene("region/wide.tif", dtype="uint16")
    scenes, _ = read_region([str(Path(make_scene("region/other.tif", crs=None)).parent)])
    plan, refused = make_plan(scenes, bundle, SETTINGS)
    assert [s.scene_id for s in plan.scenes] == ["good.tif", "other.tif"]
    assert len(refused) == 2
    assert refused[0].startswith("grey.tif: 1 bands")
    assert refused[1].startswith("wide.tif: its pixels are uint16")


def test_counts_of_a_plan_are_those_of_its_parts_and_tiles(tmp_path: Path, bundle: Bundle) -> None:
    scenes, _ = read_region([write_region(tmp_path / "scenes")])
    plan, _ = make_plan(scenes, bundle, SETTINGS)
    parts = list(plan.parts())
    tiles = [tile for part in parts for tile in split(part.window, 32)]
    assert plan.counts == {"scenes": 2, "parts": 5, "tiles": 18, "pixels": 100 * 120 + 40 * 30}
    assert len(parts) == plan.counts["parts"]
    assert len({part.key for part in parts}) == len(parts)
    assert len(tiles) == plan.counts["tiles"]
    assert sum(t.height * t.width for t in tiles) == plan.counts["pixels"]
    assert plan.num_windows(32) == 18
    assert plan.num_windows(64) == 5


@pytest.mark.parametrize("mosaic", [False, True])
def test_parts_travel_as_plain_values_and_come_back_the_same(tmp_path: Path, bundle: Bundle, mosaic: bool) -> None:
    scenes, _ = read_region([write_region(tmp_path / "scenes")])
    plan, _ = make_plan(scenes, bundle, replace(SETTINGS, mosaic=mosaic))
    parts = list(replace(plan, places=((str(tmp_path), "/elsewhere"),)).parts())
    packed = pack_parts(parts)
    assert all(isinstance(value, str | bytes) for group in packed for value in group.values())
    assert unpack_parts(packed) == parts
    assert len(pack_parts(part for part in parts for _ in range(100))) == len(packed)  # a scene travels once
    assert len(packed) == 2


def test_part_keys_do_not_depend_on_the_other_scenes(make_scene: MakeScene, bundle: Bundle) -> None:
    paths = [make_scene(name) for name in ("a.tif", "b.tif")]
    both = make_plan(read_region(paths)[0], bundle, SETTINGS)[0]
    one = make_plan(read_region(paths[1:])[0], bundle, SETTINGS)[0]
    assert {part.key for part in one.parts()} < {part.key for part in both.parts()}


@pytest.mark.parametrize(
    ("wanted", "memory", "expected"),
    [
        (32, 0, 32),  # as asked for, whatever the memory
        (64, 0, 64),
        (96, 0, 64),  # never beyond a part
        (None, 0, 32),  # a tile is the least
        (None, 2 * (64 + 32) ** 2 * 100, 64),  # window and halo, 100 bytes a pixel, in half the memory
        (None, 2 * (64 + 32) ** 2 * 100 - 2, 32),
        (None, 2**40, 64),
    ],
)
def test_a_window_is_as_asked_or_as_large_as_half_the_memory_allows(
    bundle: Bundle, wanted: int | None, memory: int, expected: int
) -> None:
    assert choose_window(wanted, SETTINGS, bundle, memory) == expected


@pytest.mark.parametrize(
    ("readers", "squares_in_memory", "expected"),
    [
        (2, 2**20, 4),  # two for each thread that reads
        (16, 2**20, 32),
        (16, 8 * 5, 5),  # as many as an eighth of the memory holds
        (2, 0, 1),  # never none
    ],
)
def test_squares_that_wait_are_bounded_by_readers_and_memory(
    bundle: Bundle, readers: int, squares_in_memory: int, expected: int
) -> None:
    memory = squares_in_memory * (64 + 32) ** 2 * (bundle.bands + 1)
    assert choose_depth(64, SETTINGS, bundle, memory, readers) == expected
    assert choose_depth(READ_SIDE, SETTINGS, bundle, memory, readers) == expected  # a part has 64 px
    assert choose_depth(64, replace(SETTINGS, scale=(0.0, 1.0)), bundle, memory, readers) <= expected


@pytest.mark.parametrize("side", [32, 64, 96, 128, 1000])
def test_squares_hold_each_window_once(make_scene: MakeScene, side: int) -> None:
    scene = read_scene(make_scene(height=200, width=320), "a.tif")
    part = Part("a", scene, scene.window)
    found = read_blocks([part, part], 32, side)
    assert sorted(window for block in found for window in block.windows) == sorted([*split(part.window, 32)] * 2)
    for block in found:
        whole = bounding_window(block.windows)
        assert max(whole.height, whole.width) <= side
        assert whole.num_pixels == block.num_pixels


@pytest.mark.parametrize(
    ("parts", "window", "readers", "memory", "batch", "expected"),
    [
        (8, 512, 2, 2**40, 1, (4096, 4)),  # as large as can be, two for each thread that reads
        (8, 2048, 2, 2**40, 1, (4096, 4)),
        (8, 1536, 2, 2**40, 1, (3072, 4)),  # whole windows
        (8, 4096, 2, 2**40, 1, (4096, 4)),
        (2, 512, 2, 2**40, 1, (2048, 4)),  # two squares would be fewer than two for each
        (1, 512, 4, 2**40, 1, (1024, 8)),
        (1, 2048, 16, 2**40, 1, (2048, 32)),  # windows are the least
        (8, 512, 2, 8 * 3 * 4288**2 * 4, 1, (4096, 3)),  # by an eighth of the memory
        (8, 512, 2, 8 * 3 * 2240**2 * 4, 1, (2048, 3)),
        (8, 512, 2, 0, 1, (512, 1)),
        (8, 512, 2, 2**40, 64, (4096, 4)),  # a square is a batch
        (8, 2048, 2, 2**40, 64, (4096, 32)),
    ],
)
def test_squares_are_as_large_as_leaves_enough_of_them_and_memory_holds(
    make_scene: MakeScene,
    bundle: Bundle,
    parts: int,
    window: int,
    readers: int,
    memory: int,
    batch: int,
    expected: tuple[int, int],
) -> None:
    settings = Settings(tile_size=512, part=4096, halo=96, threshold=0.5)
    some = [Part("a", read_scene(make_scene(), "a.tif"), Window(0, 0, 4096, 4096))] * parts
    found, depth = choose_read_blocks(some, window, settings, bundle, memory, readers, batch)
    assert (bounding_window(found[0].windows).width, depth) == expected


@pytest.mark.parametrize("wanted", [0, -32, 31, 33, 48])
def test_a_window_that_is_no_multiple_of_the_tile_is_refused(bundle: Bundle, wanted: int) -> None:
    with pytest.raises(SegError, match=f"--window {wanted}: use a multiple of the tile size, 32"):
        make_plan([], bundle, SETTINGS, wanted)


def test_a_window_never_exceeds_2048_px(bundle: Bundle) -> None:
    settings = Settings(tile_size=512, part=8192, halo=16, threshold=0.5)
    assert choose_window(None, settings, bundle, 2**60) == 2048
    seeing_far = replace(bundle, context_px=None)
    assert make_plan([], seeing_far, settings)[0].settings.window == 2048


@pytest.mark.parametrize(
    ("context_px", "halo", "window", "expected"),
    [
        (12, 16, 64, None),  # the halo covers the context: the window changes nothing
        (16, 16, 64, None),
        (17, 16, 64, 64),
        (None, 16, 64, 64),
        (None, 16, None, 64),  # the largest that a part holds
    ],
)
def test_the_window_is_a_setting_only_where_it_changes_the_rows(
    tmp_path: Path, context_px: int | None, halo: int, window: int | None, expected: int | None
) -> None:
    bundle = read_bundle(write_light_bundle(tmp_path / "bundle", context_px=context_px))
    plan, _ = make_plan([], bundle, replace(SETTINGS, halo=halo), window)
    assert plan.settings.window == expected
    assert plan.settings.context_exceeds_halo == (expected is not None)


def test_run_json_has_these_fields_and_no_others(whole: Path) -> None:
    run, plan = str(whole / "run"), replan(whole)
    record = json.loads(Path(run, "run.json").read_text())
    assert list(record) == [
        "format",
        "version",
        "code_version",
        "model",
        "settings",
        "plan",
        "created",
        "finished",
        "class_name",
        "software",
        "counts",
    ]
    assert list(record["plan"]) == ["fingerprint", "scenes", "parts", "tiles", "pixels"]
    assert list(record["settings"]) == [field.name for field in fields(Settings)]
    assert (record["format"], record["version"]) == ("aerial-seg run", 2)
    assert record["model"] == {"hash": plan.model, "uri": str(whole / "bundle")}
    assert record["settings"] == {
        "tile_size": 32,
        "part": 64,
        "halo": 16,
        "threshold": 0.5,
        "resample": False,
        "scale": None,
        "bands": None,
        "keep_probability": False,
        "precision": "auto",
        "decode": "cpu",
        "mosaic": False,
        "window": None,
        "alpha": None,
        "normalize": "model",
        "normalize_mean": None,
        "normalize_std": None,
    }
    assert record["plan"] == {"fingerprint": plan.fingerprint, **plan.counts}
    assert record["created"] <= record["finished"]


def test_a_run_holds_its_record_scenes_and_tiles_and_nothing_else(whole: Path) -> None:
    run, plan = str(whole / "run"), replan(whole)
    files = {str(p.relative_to(run)) for p in Path(run).rglob("*") if p.is_file()}
    entered = [(Path(file.path).name, file.figures) for file in read_ledger(run)]
    assert len(entered) == 3
    assert files == {
        "run.json",
        "scenes/scenes.parquet",
        *(f"tiles/part-{part.key}.parquet" for part in plan.parts()),
        *(f"ledger/{name}" for names in entered for name in names),
    }


def test_the_plan_comes_back_from_the_runs_own_files(tmp_path: Path) -> None:
    settings = replace(SETTINGS, bands=(3, 2, 1), scale=(0.0, 250.0))
    run, plan = build_run(tmp_path, settings=settings)
    assert read_plan(run) == plan
    assert read_plan(run).fingerprint == plan.fingerprint


def test_the_same_plan_opens_the_same_run_again(whole: Path) -> None:
    run = str(whole / "run")
    before = file_digests(run)
    assert open_run(run, replan(whole), "elsewhere/bundle") == read_record(run)
    assert file_digests(run) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tile_size": 16}, "tile_size 32 there, 16 now"),
        ({"part": 128}, "part 64 there, 128 now"),
        ({"halo": 20}, "halo 16 there, 20 now"),
        ({"threshold": 0.25}, "threshold 0.5 there, 0.25 now"),
        ({"resample": True}, "resample False there, True now"),
        ({"scale": (0.0, 9.0)}, "scale None there, [0.0, 9.0] now"),
        ({"bands": (3, 2, 1)}, "bands None there, [3, 2, 1] now"),
        ({"keep_probability": True}, "keep_probability False there, True now"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_the_setting_named(
    whole: Path, changes: dict[str, Any], named: str
) -> None:
    run = str(whole / "run")
    assert refusal_of(run, replan(whole, **changes)) == (
        f"{run}: is a run with other settings ({named}): choose another folder"
    )


def test_a_run_with_another_model_is_refused(tmp_path: Path, whole: Path) -> None:
    run, plan = str(whole / "run"), replan(whole)
    other = read_bundle(write_light_bundle(tmp_path / "other", seed=1))
    message = refusal_of(run, make_plan(read_region([str(whole / "scenes")])[0], other, SETTINGS)[0])
    assert f"model {plan.model[:8]} there, {other.hash[:8]} now" in message


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 1))


def rewrite(path: Path) -> None:
    """Other pixels, on fewer rows, of the same age."""
    stamp = path.stat().st_mtime_ns
    write_geotiff(str(path), np.ones((3, 70, 34), np.uint8), crs=UTM, transform=NORTH_UP, nodata=0)
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("change", [touch, rewrite])
def test_a_scene_that_has_changed_since_is_done_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    run, before = build_run(tmp_path)
    change(tmp_path / "scenes/south/b.tif")
    plan = replan(tmp_path)
    assert [scene.scene_id for scene in changed_scenes(run, plan)] == ["south/b.tif"]
    todo = list(parts_to_do(run, plan))
    assert {part.scene.scene_id for part in todo} == {"south/b.tif"}
    open_run(run, plan, "bundle")
    assert read_plan(run) == plan != before
    assert changed_scenes(run, plan) == []
    assert list(parts_to_do(run, plan)) == todo  # though the run is opened, until they are done
    assert not verify(run).ok
    for part in todo:
        write_part(run, part.key, part_rows(part, SETTINGS), plan.model, part.version)
    assert list(parts_to_do(run, plan)) == []
    assert verify(run).problems == []


def test_a_changed_scene_that_became_smaller_leaves_no_parts_behind(tmp_path: Path, make_scene: MakeScene) -> None:
    path = make_scene("scenes/a.tif", 150, 70)
    bundle = read_bundle(write_light_bundle(tmp_path / "bundle"))
    run = str(tmp_path / "run")
    plan = make_plan(read_region([path])[0], bundle, SETTINGS)[0]
    open_run(run, plan, "bundle")
    for part in plan.parts():
        write_part(run, part.key, part_rows(part, SETTINGS), plan.model, part.version)
    write_geotiff(path, np.ones((3, 20, 20), np.uint8), crs=UTM, transform=NORTH_UP)
    plan = make_plan(read_region([path])[0], bundle, SETTINGS)[0]
    open_run(run, plan, "bundle")
    assert len(published_parts(run)) == plan.counts["parts"] == 1


def test_a_new_scene_is_refused_by_name(tmp_path: Path, make_scene: MakeScene) -> None:
    run, _ = build_run(tmp_path)
    make_scene("scenes/south/c.tif")
    assert "(scene south/c.tif is new)" in refusal_of(run, replan(tmp_path))


def test_a_scene_that_is_gone_is_refused_by_name(tmp_path: Path, make_scene: MakeScene) -> None:
    gone = make_scene("scenes/south/c.tif", 20, 20)
    run, _ = build_run(tmp_path)
    Path(gone).unlink()
    assert "(scene south/c.tif is there, not here)" in refusal_of(run, replan(tmp_path))


def test_the_changed_scene_is_found_though_anothers_nodata_is_nan(tmp_path: Path, make_scene: MakeScene) -> None:
    paths = [make_scene(n, dtype="float32", nodata=float("nan")) for n in ("a.tif", "b.tif")]
    bundle = read_bundle(write_light_bundle(tmp_path / "bundle"))
    settings = replace(SETTINGS, scale=(0.0, 4000.0))
    run = str(tmp_path / "run")
    open_run(run, make_plan(read_region(paths)[0], bundle, settings)[0], "bundle")
    os.utime(paths[1], ns=(0, 1))
    plan = make_plan(read_region(paths)[0], bundle, settings)[0]
    assert [scene.scene_id for scene in changed_scenes(run, plan)] == ["b.tif"]


def refusal_of(run: str, plan: Plan) -> str:
    """What `open_run` says; it must leave the folder as it was."""
    before = file_digests(run)
    with pytest.raises(SegError) as refusal:
        open_run(run, plan, "bundle")
    assert file_digests(run) == before
    return str(refusal.value)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, bundle: Bundle) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.txt").write_text("meow")
    plan = make_plan([], bundle, SETTINGS)[0]
    assert refusal_of(str(folder), plan) == f"{folder}: exists and is not a run: choose another folder"
    assert [p.name for p in folder.iterdir()] == ["cat.txt"]


def test_a_file_in_the_place_of_a_run_is_refused_and_left_alone(tmp_path: Path, bundle: Bundle) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    plan = make_plan([], bundle, SETTINGS)[0]
    assert refusal_of(str(file), plan) == f"{file}: exists and is not a run: choose another folder"
    assert file.read_text() == "mine"


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run, plan = build_run(tmp_path)
    assert read_record(run).plan.fingerprint == plan.fingerprint


def test_a_run_can_be_opened_though_its_maker_was_killed_before_run_json(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial-0123456789abcdef").write_bytes(b'{"format": "aer')
    run, plan = build_run(tmp_path)
    assert read_record(run).plan.fingerprint == plan.fingerprint


def test_a_run_can_be_opened_though_its_maker_was_killed_after_run_json(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    for path in sorted(Path(run).rglob("*"), reverse=True):
        if path.name != "run.json":
            path.rmdir() if path.is_dir() else path.unlink()
    open_run(run, plan, "bundle")
    assert read_scenes(run) == list(plan.scenes)
    assert list(parts_to_do(run, plan)) == list(plan.parts())


def test_a_run_in_a_place_that_cannot_be_written_is_refused(bundle: Bundle) -> None:
    with pytest.raises(SegError, match=r"^/proc/no/such/run: can't be written to \(.+\): choose another folder$"):
        open_run("/proc/no/such/run", make_plan([], bundle, SETTINGS)[0], "bundle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run: it holds no run.json"),
        (b"", "damaged: run.json is no JSON"),
        (b"\xff\xfe", "damaged: run.json is no JSON"),
        (b"[]", "not a run: run.json does not say format 'aerial-seg run'"),
        (b'{"format": "aerial-seg bundle", "version": 1}', "not a run: run.json does not say format"),
        (
            b'{"format": "aerial-seg run", "version": 1}',
            "of version 1, this aerial-seg reads 2: use the aerial-seg that",
        ),
        (b'{"format": "aerial-seg run", "version": 2}', "damaged"),
    ],
)
def test_a_run_json_that_is_none_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(SegError) as refusal:
        read_plan(str(tmp_path))
    assert str(refusal.value).startswith(f"{tmp_path}: {message}")
    assert "\n" not in str(refusal.value)


def test_nothing_is_left_to_do_in_a_whole_run(whole: Path) -> None:
    run, plan = str(whole / "run"), replan(whole)
    assert list(parts_to_do(run, plan)) == []


def test_a_part_that_is_not_published_is_to_do(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    part = list(plan.parts())[2]
    published = Path(part_path(run, part.key))
    published.rename(published.with_name(".partial-0123456789abcdef"))  # as a killed process leaves it
    assert list(parts_to_do(run, plan)) == [part]


def test_a_part_with_one_failed_row_is_to_do_and_then_done(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    part = list(plan.parts())[1]
    rows = part_rows(part, SETTINGS)
    broken = list(failed_rows(part.scene, part.window, SETTINGS.tile_size, Failure("ReadError", "the disk said no")))
    write_part(run, part.key, [*rows[:-1], broken[-1]], plan.model, part.version)
    assert list(parts_to_do(run, plan)) == [part]
    write_part(run, part.key, rows, plan.model, part.version)
    assert list(parts_to_do(run, plan)) == []


def test_parts_of_failed_rows_alone_are_to_do(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path, failed_parts={0, 4})
    parts = list(plan.parts())
    assert list(parts_to_do(run, plan)) == [parts[0], parts[4]]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b""])
def test_a_part_whose_file_is_damaged_is_to_do(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    run, plan = build_run(tmp_path)
    part = list(plan.parts())[3]
    path = Path(part_path(run, part.key))
    path.write_bytes(damage(path.read_bytes()))
    assert list(parts_to_do(run, plan)) == [part]


def test_a_foreign_table_among_the_parts_is_not_looked_into(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    pq.write_table(pa.table({"mine": [1]}), f"{run}/tiles/foreign.parquet")
    assert list(parts_to_do(run, plan)) == []


def test_the_hand_built_run_has_what_its_tests_count_on(whole: Path) -> None:
    run, plan = str(whole / "run"), replan(whole)
    rows = [row for path in published_parts(run) for row in read_part(path)]
    assert len(rows) == plan.counts["tiles"]
    assert any(row["valid_px"] == 0 for row in rows)
    assert any(0 < row["valid_px"] < row["height"] * row["width"] for row in rows)
    assert any(row["height"] * row["width"] < 32 * 32 for row in rows)
    assert len({row["building_px"] for row in rows}) > len(rows) // 2
    assert {asdict(s)["crs"] for s in plan.scenes} == {UTM}
    assert Window(0, 0, 64, 64) in {part.window for part in plan.parts()}


def test_a_run_from_before_there_was_a_setting_goes_on(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    path = Path(run) / "run.json"
    record = json.loads(path.read_text())
    for name in ("decode", "precision", "mosaic"):
        del record["settings"][name]
    path.write_text(json.dumps(record))
    assert read_plan(run).fingerprint == record["plan"]["fingerprint"]
    assert find_run(run, plan) is not None
    with pytest.raises(SegError, match="decode cpu there, device now"):
        find_run(run, replace(plan, settings=replace(plan.settings, decode="device")))


def test_a_run_from_before_scenes_had_a_column_goes_on(tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    path = scenes_path(run)
    table = pq.read_table(path)
    pq.write_table(table.select([name for name in table.schema.names if name not in ADDED_FIELDS]), path)
    assert read_scenes(run) == list(plan.scenes)
    assert read_plan(run).fingerprint == plan.fingerprint
    assert list(parts_to_do(run, plan)) == []
    assert verify(run).ok


def test_decoder_and_precision_are_chosen_when_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = build_run(tmp_path)  # decoded by the CPU, and of a version that recorded precision auto
    chosen = replace(plan, settings=replace(plan.settings, precision="float32"))
    assert chosen.for_device(on_gpu=True) == chosen
    left_open = replace(plan, settings=replace(plan.settings, decode="auto"))
    new = str(tmp_path / "new")
    assert with_choices_of_run(new, left_open) == left_open
    for on_gpu, native, expected in (
        (True, False, ("device", "bfloat16")),
        (False, True, ("cpu", "bfloat16")),
        (False, False, ("cpu", "float32")),
    ):
        monkeypatch.setattr("seg_core.processor.computes_bfloat16", lambda native=native: native)
        settings = left_open.for_device(on_gpu).settings
        assert (settings.decode, settings.precision) == expected
    open_run(new, left_open.for_device(on_gpu=True), "model")
    settings = with_choices_of_run(new, left_open).settings
    assert (settings.decode, settings.precision) == ("device", "bfloat16")
    assert with_choices_of_run(run, left_open) == plan
    assert with_choices_of_run(new, chosen) == chosen  # which is then refused
