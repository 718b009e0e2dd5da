"""Imagery that has moved, changed or gone since a run was made: nothing is removed for it, and the run goes on."""

import json
import os
import shlex
import shutil
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene
from parts import EXECUTION, RESOURCES
from runs import SETTINGS, build_run, digest_of, part_digests, part_rows, replan, write_light_bundle
from seg_command import seg

from aerial_seg.cli.arguments import parse_relocation
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.errors import SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.region import read_region
from seg_core.inference.recheck import recheck
from seg_core.model.bundle import read_bundle
from seg_core.run.places import relocate
from seg_core.run.plan import Plan, make_plan, pack_parts, unpack_parts
from seg_core.run.record import read_record
from seg_core.run.relocation import match_run
from seg_core.run.resume import open_run, parts_to_do
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, scenes_path, write_part
from seg_core.run.verify import repair, verify

pytestmark = pytest.mark.usefixtures("in_this_process")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A folder with a whole `run`, whose scenes were in `scenes` and are in `archive/2025` now."""
    build_run(tmp_path)
    (tmp_path / "archive").mkdir()
    (tmp_path / "scenes").rename(tmp_path / "archive/2025")
    return tmp_path


def command(folder: Path, *options: object) -> list[object]:
    """The command of the run in `moved`, for its scenes where they are now."""
    settings = ["--tile-size", 32, "--part", 64, "--model", folder / "bundle", "--out", folder / "run"]
    return ["segment", folder / "archive/2025", *settings, *options]


def plan_of(scenes: object, folder: Path) -> Plan:
    return make_plan(read_region([str(scenes)])[0], read_bundle(str(folder / "bundle")), SETTINGS)[0]


def places_of(folder: Path) -> tuple[tuple[str, str], ...]:
    return ((str(folder / "scenes"), str(folder / "archive/2025")),)


def test_the_refusal_of_scenes_that_have_moved_names_the_option_that_goes_on(moved: Path, capsys: Capture) -> None:
    before = part_digests(moved / "run"), digest_of(Path(scenes_path(str(moved / "run"))))
    _, err = seg(capsys, *command(moved), code=2)
    option = err.partition("if it has moved, add ")[2].partition("):")[0]
    assert option == f"--relocate {moved}/scenes={moved}/archive/2025"
    _, err = seg(capsys, *command(moved, *shlex.split(option)))
    assert "nothing to do" in err
    _, err = seg(capsys, *command(moved))  # where they are is noted in the run
    assert "nothing to do" in err
    assert (part_digests(moved / "run"), digest_of(Path(scenes_path(str(moved / "run"))))) == before


def test_a_relocated_run_is_verified_exported_and_scored(moved: Path, capsys: Capture) -> None:
    seg(capsys, *command(moved, "--relocate", f"{moved}/scenes={moved}/archive/2025"))
    seg(capsys, "verify", moved / "run")
    out, _ = seg(capsys, "export", "masks", moved / "run", "--out", moved / "masks", "--json")
    assert len(json.loads(out)["files"]) == 2
    out, _ = seg(capsys, "evaluate", moved / "run", "--labels", moved / "masks", "--json")
    assert json.loads(out)["iou"] == 1.0


def test_what_is_left_of_a_relocated_run_is_read_where_the_scenes_are(moved: Path) -> None:
    run, before = str(moved / "run"), part_digests(moved / "run")
    part = next(read_plan(run).parts())
    Path(part_path(run, part.key)).unlink()
    plan, notes = match_run(run, plan_of(moved / "archive/2025", moved), places_of(moved))
    (todo,) = unpack_parts(pack_parts(parts_to_do(run, plan)))
    assert (todo.key, todo.version, notes) == (part.key, part.version, [])
    write_part(run, todo.key, part_rows(todo, SETTINGS), plan.model, todo.version)
    assert part_digests(moved / "run") == before
    assert verify(run).ok


def test_scenes_that_move_on_and_back_are_followed(moved: Path) -> None:
    run = str(moved / "run")
    match_run(run, plan_of(moved / "archive/2025", moved), places_of(moved))
    (moved / "archive").rename(moved / "attic")
    here, places = moved / "attic/2025", ((str(moved / "archive"), str(moved / "attic")),)
    assert {part.scene.uri for part in read_plan(run, places).parts()} == {
        str(here / name) for name in ("north/a.tif", "south/b.tif")
    }
    plan, _ = match_run(run, plan_of(here, moved), places)
    assert list(parts_to_do(run, plan)) == []
    assert read_plan(run) == plan
    here.rename(moved / "scenes")
    plan, _ = match_run(run, replan(moved))
    assert plan.places == read_plan(run).places == ()
    assert list(parts_to_do(run, plan)) == []


@pytest.mark.parametrize("differs", ["time", "pixels"])
def test_a_copied_scene_is_the_same_by_size_and_header(moved: Path, capsys: Capture, differs: str) -> None:
    path = moved / "archive/2025/south/b.tif"
    if differs == "time":
        os.utime(path, ns=(0, 1))
    else:
        write_geotiff(str(path), np.ones((3, 70, 34), np.uint8), crs=UTM, transform=NORTH_UP, nodata=0)
    plan, notes = match_run(str(moved / "run"), plan_of(moved / "archive/2025", moved), places_of(moved))
    todo = {part.scene.scene_id for part in parts_to_do(str(moved / "run"), plan)}
    assert todo == (set() if differs == "time" else {"south/b.tif"})
    assert len(notes) == (differs == "time")
    if differs == "time":
        assert notes[0].startswith("south/b.tif: same size and header as before the move")
        assert "same size" not in seg(capsys, *command(moved))[1]  # it is said once


def test_a_scene_that_changes_after_its_move_is_done_again(moved: Path) -> None:
    run, places = str(moved / "run"), places_of(moved)
    match_run(run, plan_of(moved / "archive/2025", moved), places)
    os.utime(moved / "archive/2025/south/b.tif", ns=(0, 1))
    for _ in range(2):  # until it is done
        plan, notes = match_run(run, plan_of(moved / "archive/2025", moved))
        assert {part.scene.scene_id for part in parts_to_do(run, plan)} == {"south/b.tif"}
        assert notes == []
    open_run(run, plan, "bundle")
    for part in parts_to_do(run, plan):
        write_part(run, part.key, part_rows(part, SETTINGS), plan.model, part.version)
    plan, _ = match_run(run, plan_of(moved / "archive/2025", moved))
    assert list(parts_to_do(run, plan)) == []


def test_scenes_that_are_copied_twice_are_the_same_by_size_and_header(moved: Path) -> None:
    run, here = str(moved / "run"), moved / "archive/2025"
    for time, there in enumerate((moved / "second", moved / "third"), 1):
        shutil.copytree(here, there)
        for path in there.rglob("*.tif"):
            os.utime(path, ns=(0, time))
        plan, notes = match_run(
            run, plan_of(there, moved), ((str(here if time > 1 else moved / "scenes"), str(there)),)
        )
        assert list(parts_to_do(run, plan)) == []
        assert [note.partition(":")[0] for note in notes] == ["north/a.tif and 1 more"]
        here = there
    os.utime(here / "south/b.tif", ns=(0, 9))
    plan, _ = match_run(run, plan_of(here, moved), ((str(moved / "second"), str(here)),))
    assert {part.scene.scene_id for part in parts_to_do(run, plan)} == {"south/b.tif"}  # it is where it was


def test_files_beside_a_scene_move_with_it(s3: str, tmp_path: Path, make_scene: MakeScene) -> None:
    client, name = boto3.client("s3"), "a.tif"
    path = make_scene(name, 64, 64, crs=None)
    Path(path).with_suffix(".tfw").write_text("1\n0\n0\n-1\n400000\n5800000\n")
    for folder in ("old", "new"):
        for each in (Path(path), Path(path).with_suffix(".tfw")):
            client.upload_file(str(each), "tests", f"beside/{folder}/{each.name}")
    write_light_bundle(tmp_path / "bundle")
    run, old, new = str(tmp_path / "run"), f"{s3}/beside/old", f"{s3}/beside/new"
    open_run(run, plan_of(old, tmp_path), "bundle")
    (known,) = read_plan(run).scenes
    assert known.sidecars == (f"{old}/a.tfw",)
    plan, _ = match_run(run, plan_of(new, tmp_path), ((old, new),))
    assert plan.scenes == (known,)
    (part,) = plan.parts()
    assert (part.scene.uri, part.scene.sidecars) == (f"{new}/a.tif", (f"{new}/a.tfw",))
    assert len(part_rows(part, SETTINGS)) == 4
    plan, _ = match_run(run, plan_of(tmp_path / name, tmp_path), ((old, str(tmp_path)),))
    assert plan.scenes == (known,)
    (part,) = plan.parts()
    assert (part.scene.uri, part.scene.sidecars) == (path, ())
    assert len(part_rows(part, SETTINGS)) == 4


def test_a_second_move_may_be_said_from_the_first_place(moved: Path) -> None:
    run = str(moved / "run")
    match_run(run, plan_of(moved / "archive/2025", moved), places_of(moved))
    (moved / "archive/2025").rename(moved / "attic")
    match_run(run, plan_of(moved / "attic", moved), ((str(moved / "scenes"), str(moved / "attic")),))
    assert {part.scene.uri for part in read_plan(run).parts()} == {
        str(moved / "attic" / name) for name in ("north/a.tif", "south/b.tif")
    }


def test_a_scene_in_s3_is_the_same_by_its_etag(s3: str, tmp_path: Path, make_scene: MakeScene) -> None:
    client, names = boto3.client("s3"), ("a.tif", "b.tif")
    for number, name in enumerate(names):
        path = make_scene(name, 64, 64, seed=number)
        for folder in ("old", "new"):
            client.upload_file(path, "tests", f"relocate/{folder}/{name}")
    write_light_bundle(tmp_path / "bundle")
    run, old, new = str(tmp_path / "run"), f"{s3}/relocate/old", f"{s3}/relocate/new"
    plan = plan_of(old, tmp_path)
    open_run(run, plan, "bundle")
    for part in plan.parts():
        write_part(run, part.key, part_rows(part, SETTINGS), plan.model, part.version)
    assert list(parts_to_do(run, match_run(run, plan_of(new, tmp_path), ((old, new),))[0])) == []
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    client.put_object(Bucket="tests", Key="relocate/new/b.tif", Body=bytes(content))
    plan, notes = match_run(run, plan_of(new, tmp_path), ((old, new),))
    assert {part.scene.scene_id for part in parts_to_do(run, plan)} == {"b.tif"}
    assert notes == []


def test_a_mosaic_is_relocated(tmp_path: Path, make_scene: MakeScene) -> None:
    make_scene("scenes/a.tif", 64, 64)
    make_scene("scenes/b.tif", 64, 64, transform=(1.0, 0.0, 400_064.0, 0.0, -1.0, 5_800_000.0))
    bundle, run = read_bundle(write_light_bundle(tmp_path / "bundle")), str(tmp_path / "run")
    settings = replace(SETTINGS, mosaic=True)
    open_run(run, make_plan(read_region([str(tmp_path / "scenes")])[0], bundle, settings)[0], "bundle")
    versions = [part.version for part in read_plan(run).parts()]
    (tmp_path / "scenes").rename(tmp_path / "moved")
    here = make_plan(read_region([str(tmp_path / "moved")])[0], bundle, settings)[0]
    plan, _ = match_run(
        run, here, tuple((f"{tmp_path}/scenes/{n}", f"{tmp_path}/moved/{n}") for n in ("a.tif", "b.tif"))
    )
    assert [part.version for part in plan.parts()] == versions
    assert {Path(source.uri).parent.name for part in plan.parts() for source in part.sources} == {"moved"}


def test_relocate_is_refused_where_there_is_no_run_and_for_other_scenes(moved: Path, capsys: Capture) -> None:
    places = f"{moved}/elsewhere={moved}/archive/2025"
    assert "is there" not in seg(capsys, *command(moved, "--relocate", places), code=2)[1]
    shutil.rmtree(moved / "run")
    assert "there is no run at" in seg(capsys, *command(moved, "--relocate", places), code=2)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", ("a", "b")),
        ("/a=/b", ("/a", "/b")),
        ("s3://x/year=24=s3://y/year=24", ("s3://x/year=24", "s3://y/year=24")),
        ("year=24=/b", ("year=24", "/b")),
        ("a", None),
        ("=b", None),
        ("a=", None),
        ("a=b=c", None),
    ],
)
def test_what_relocate_takes(text: str, expected: tuple[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(ArgumentTypeError, match=r"expected OLD=NEW"):
            parse_relocation(text)
    else:
        assert parse_relocation(text) == expected


@pytest.mark.parametrize(
    ("uri", "places", "expected"),
    [
        ("/a/b.tif", [("/a", "/x")], "/x/b.tif"),
        ("/a/b.tif", [("/a/b.tif", "/x/c.tif")], "/x/c.tif"),
        ("/ab/c.tif", [("/a", "/x")], "/ab/c.tif"),  # a folder of a longer name
        ("/a/b.tif", [("/", "/x")], "/x/a/b.tif"),
        ("/a/b.tif", [("/a", "/")], "/b.tif"),
        ("/a/b.tif", [("/a", "s3://x/y")], "s3://x/y/b.tif"),
        ("/a/b.tif", [("/b", "/c"), ("/a", "/x"), ("/x", "/y")], "/x/b.tif"),  # the first one that fits, once
    ],
)
def test_where_a_scene_is_now(uri: str, places: list[tuple[str, str]], expected: str) -> None:
    assert relocate(uri, tuple(places)) == expected


@pytest.fixture
def segmented(make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path) -> tuple[Path, Path]:
    """A run that a model made, and its scene."""
    path, model, run = make_scene("region/a.tif", 256, 256), make_bundle(), str(tmp_path / "run")
    settings = replace(SETTINGS, halo=24, part=128)
    plan, _ = make_plan(read_region([path])[0], read_bundle(model), settings)
    open_run(run, plan, model)
    list(PartSegmenter(model, run, settings, 128, RESOURCES, EXECUTION, "s").segment_parts(list(plan.parts())))
    return Path(run), Path(path)


def test_scenes_that_are_gone_are_no_problem_of_the_run(segmented: tuple[Path, Path], capsys: Capture) -> None:
    run, path = segmented
    seg(capsys, "verify", run, "--deep")
    path.parent.rename(path.parents[1] / "moved")
    out, err = seg(capsys, "verify", run, "--deep", code=1)
    assert out.startswith("run            complete: all 64 tiles are done\n")
    assert f"could not be rechecked: {path}: no such file" in out
    assert "4 windows could not be rechecked" in err
    assert "--relocate OLD=NEW" in err
    assert "repair" not in out + err
    figures: dict[str, Any] = json.loads(seg(capsys, "verify", run, "--deep", "--json", code=1)[0])
    assert (figures["complete"], figures["problems"], figures["rechecked"]) == (True, [], 0)
    assert figures["not_rechecked"] == 4 * [f"{path}: no such file"]
    assert repair(str(run)).bad_parts == []
    assert len(part_digests(run)) == 4
    relocated = ["--relocate", f"{path.parent}={path.parents[1]}/moved", "--json"]
    assert json.loads(seg(capsys, "verify", run, "--deep", *relocated)[0])["rechecked"] == 4
    assert read_record(str(run)).relocated is None  # verify changes nothing


def test_a_scene_that_has_changed_is_no_problem_of_the_run(segmented: tuple[Path, Path], make_scene: MakeScene) -> None:
    run, path = segmented
    os.utime(path, ns=(0, 1))
    assert recheck(str(run), 16, "cpu").num_same == 4  # what it says is what was segmented
    make_scene("region/a.tif", 256, 256, seed=1)
    again = recheck(str(run), 16, "cpu")
    assert (again.num_same, again.differing) == (0, {})
    assert again.unread == 4 * [
        f"{path}: has changed since it was segmented: the run's seg segment command does it again"
    ]


def test_pixels_that_differ_after_a_move_are_differences(
    segmented: tuple[Path, Path], make_scene: MakeScene, capsys: Capture
) -> None:
    run, path = segmented
    path.parent.rename(path.parents[1] / "moved")
    make_scene("region/a.tif", 256, 256, seed=1)  # of the same size and header
    path.parent.rename(path.parents[1] / "copied")
    relocated = ["--relocate", f"{path.parent}={path.parents[1]}/copied", "--json"]
    figures = json.loads(seg(capsys, "verify", run, "--deep", *relocated, code=1)[0])
    assert (figures["rechecked"], figures["not_rechecked"], len(figures["problems"]) > 0) == (4, [], True)


def test_a_scene_of_another_name_is_refused(moved: Path) -> None:
    (moved / "archive/2025/south/b.tif").rename(moved / "archive/2025/south/c.tif")
    with pytest.raises(SegError, match=r"scene south/c\.tif is new"):
        match_run(str(moved / "run"), plan_of(moved / "archive/2025", moved), places_of(moved))
