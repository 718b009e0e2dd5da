"""Every command on every record of a run that is damaged: it is named with the way out, or made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from conftest import UTM
from runs import build_run, file_digests
from seg_command import seg

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.region import find_images
from seg_core.run import attempts, lease
from seg_core.run.part_reading import read_versioned
from seg_core.run.parts import Location
from seg_core.run.record import read_record
from seg_core.run.stored_plan import read_plan

pytestmark = pytest.mark.usefixtures("in_this_process")

Capture = pytest.CaptureFixture[str]
PartialFailure = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, and labels for it."""
    folder = tmp_path_factory.mktemp("original")
    build_run(folder)
    for name, height, width in (("north/a.tif", 100, 120), ("south/b.tif", 40, 30)):
        (folder / "labels" / name).parent.mkdir(parents=True)
        with rasterio.open(folder / "scenes" / name) as scene:
            place = tuple(scene.transform)[:6]
        write_geotiff(str(folder / "labels" / name), np.ones((1, height, width), np.uint8), crs=UTM, transform=place)
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose scenes stay where they are."""
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


def commands(original: Path, run: Path) -> dict[str, list[object]]:
    settings = ["--tile-size", 32, "--part", 64, "--model", original / "bundle"]
    return {
        "segment": ["segment", original / "scenes", *settings, "--out", run],
        "verify": ["verify", run],
        "repair": ["repair", run],
        "query": ["query", run],
        "sql": ["query", run, "SELECT count(*) FROM tiles"],
        "masks": ["export", "masks", run, "--out", run.parent / "masks"],
        "evaluate": ["evaluate", run, "--labels", original / "labels"],
    }


def change(**fields: Any) -> PartialFailure:
    """Set fields of run.json, whose names may be of several words; None takes them away."""

    def damage(path: Path) -> None:
        record = json.loads(path.read_text())
        for name, value in fields.items():
            *above, last = name.split("__")
            within = record
            for word in above:
                within = within[word]
            del within[last]
            within |= {} if value is None else {last: value}
        path.write_text(json.dumps(record))

    return damage


def to_table(**columns: list[Any]) -> PartialFailure:
    return lambda path: pq.write_table(pa.table(columns), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def add_column(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.append_column("later", pa.nulls(len(table), pa.int32())), path)


def drop_row(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


RECORDS = {
    "empty": (lambda path: path.write_bytes(b""), "run.json is no JSON"),
    "truncated": (truncate, "run.json is no JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "run.json is no JSON"),
    "a list": (lambda path: path.write_text("[]"), "not a run: run.json"),
    "no settings": (change(settings=None), "settings in run.json is null"),
    "no halo": (change(settings__halo=None), "settings.halo in run.json is null"),
    "text for a halo": (change(settings__halo="16"), 'settings.halo in run.json is "16"'),
    "settings from later": (
        lambda path: path.write_text(path.read_text().replace('"halo"', '"later": 1, "halo"')),
        "its setting later is not known here: update aerial-seg",
    ),
    "no model": (change(model=None), "model in run.json is null"),
    "no hash": (change(model__hash=None), "model.hash in run.json is null"),
    "no place of the model": (change(model__uri=None), "model.uri in run.json is null"),
    "no fingerprint": (change(plan__fingerprint=None), "plan.fingerprint in run.json is null"),
    "no number of tiles": (change(plan__tiles=None), "plan.tiles in run.json is null"),
    "text for a plan": (change(plan="a plan"), 'plan in run.json is "a plan"'),
    "text for a size": (change(settings__tile_size="32"), 'settings.tile_size in run.json is "32"'),
    "three numbers for a scale": (change(settings__scale=[0, 1, 2]), "settings.scale in run.json is [0, 1, 2]"),
    "no version": (change(version=None), "version in run.json is null"),
    "a number for the end": (change(finished=True), "finished in run.json is true"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_run_json_is_named_by_every_command(original: Path, run: Path, capsys: Capture, kind: str) -> None:
    damage, named = RECORDS[kind]
    damage(run / "run.json")
    before = file_digests(run)
    for command in commands(original, run).values():
        out, err = seg(capsys, *command, code=2)
        assert out == ""
        assert err.startswith(f"seg: {run}: ")
        assert named in err
        assert err.count("\n") == 1
    assert file_digests(run) == before


NEWER = {
    "run.json": (change(version=3), "run.json", "of version 3"),
    "scenes": (add_column, "scenes/scenes.parquet", "its column later is not known here"),
    "tiles": (add_column, "tiles/*.parquet", "its column later is not known here"),
}


@pytest.mark.parametrize("kind", NEWER)
def test_files_of_a_newer_version_are_named_by_every_command_and_left_alone(
    original: Path, run: Path, capsys: Capture, kind: str
) -> None:
    change_file, name, named = NEWER[kind]
    change_file(min(run.glob(name)))
    before = file_digests(run)
    for command in commands(original, run).values():
        out, err = seg(capsys, *command, code=2)
        assert out == ""
        assert err.startswith(f"seg: {run}")
        assert named in err
        assert err.endswith("update aerial-seg\n")
        assert err.count("\n") == 1
        assert "damaged" not in err
    assert file_digests(run) == before


SCENES: dict[str, PartialFailure] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of other columns": to_table(mine=[1]),
    "of too few columns": lambda path: pq.write_table(pq.read_table(path).drop_columns(["crs"]), path),
    "of fewer scenes": drop_row,
}


@pytest.mark.parametrize("kind", SCENES)
def test_damaged_scenes_are_named_by_every_command_and_made_again_by_seg_segment(
    original: Path, run: Path, capsys: Capture, kind: str
) -> None:
    path = run / "scenes/scenes.parquet"
    SCENES[kind](path)
    segment, *others = commands(original, run).values()
    for command in others:
        out, err = seg(capsys, *command, code=2)
        assert out == ""
        assert err.startswith(f"seg: {run}")
        assert "scenes.parquet" in err
        assert "seg segment command of the run rewrites" in err
        assert err.count("\n") == 1
    _, err = seg(capsys, *segment)
    assert f"{path}: was damaged or missing: rewritten from the plan" in err
    assert path.read_bytes() == (original / "run/scenes/scenes.parquet").read_bytes()
    for command in others:
        seg(capsys, *command)


@pytest.mark.parametrize("kind", ["empty", "of other columns"])
def test_damaged_scenes_are_not_made_again_of_other_scenes(
    original: Path, run: Path, capsys: Capture, kind: str
) -> None:
    SCENES[kind](run / "scenes/scenes.parquet")
    command = commands(original, run)["segment"]
    command[1] = original / "scenes/north"
    _, err = seg(capsys, *command, code=2)
    assert err.startswith(f"seg: {run}/scenes/scenes.parquet: damaged, and can't be rewritten")


@pytest.mark.parametrize("counts", [None, {}, {"failed": "none"}])
def test_counts_that_are_damaged_are_made_again(original: Path, run: Path, capsys: Capture, counts: object) -> None:
    expected = read_record(str(run)).counts
    change(counts=counts)(run / "run.json")
    for command in reversed(commands(original, run).values()):
        seg(capsys, *command)
    assert read_record(str(run)).counts == expected


def test_settings_that_were_changed_are_named_by_seg_segment_too(original: Path, run: Path, capsys: Capture) -> None:
    change(settings__threshold=0.25)(run / "run.json")
    every = commands(original, run)
    _, err = seg(capsys, *every.pop("segment"), code=2)
    assert "threshold 0.25 there, 0.5 now" in err
    for command in every.values():
        assert "run.json or scenes/scenes.parquet was changed" in seg(capsys, *command, code=2)[1]


DAMAGED = [b"", b"{", b"\xff", b"[]", b"5", b'{"session": 5}', b'{"deaths": [], "session": "s"}', b'{"pid": "x"}']


@pytest.mark.parametrize("content", DAMAGED)
def test_records_of_what_is_at_work_are_no_obstacle(
    original: Path, run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(lease, "LEASE_TIMEOUT", 0.1)
    monkeypatch.setattr(lease, "STAGING_TIMEOUT", 0.1)
    key = next(read_plan(str(run)).parts()).key
    (run / "attempts" / f"{key}.json").write_bytes(content)
    for name, command in commands(original, run).items():
        (run / "driver.json").write_bytes(content)
        seg(capsys, *command)
        assert (run / "driver.json").exists() == (name != "repair")  # which takes the lease
    assert attempts.claim_interrupted(str(run), [key], "s") == {}
    attempts.mark_started(str(run), key, "s")
    assert attempts.claim_interrupted(str(run), [key], "s") == {key: attempts.Attempt("s")}


def parquet_of(values: list[bytes]) -> bytes:
    """A Parquet file whose texts are these bytes, UTF-8 or not."""
    stream, binary = pa.BufferOutputStream(), pa.array(values)
    pq.write_table(pa.table({"uri": pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())}), stream)
    return bytes(stream.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "/data/ü.tif".encode("latin-1")),
        ("a.csv", "uri\n/data/ü.tif".encode("latin-1")),
        ("a.csv", "uri\n/data/a.tif".encode("utf-16")),
        ("a.parquet", parquet_of([b"/data/\xff.tif"])),
    ],
)
def test_a_manifest_that_is_not_utf_8_is_named(tmp_path: Path, capsys: Capture, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    _, err = seg(capsys, "plan", tmp_path / name, code=2)
    assert err == f"seg: {tmp_path / name}: this manifest is not UTF-8: save it as UTF-8\n"


def test_a_manifest_may_hold_names_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tif").touch()
    pq.write_table(pa.table({"uri": [b"a.tif"]}), tmp_path / "a.parquet")
    assert find_images(str(tmp_path / "a.parquet")).images == [str(tmp_path / "a.tif")]


def test_a_part_that_is_gone_meanwhile_is_not_taken_for_damaged(run: Path) -> None:
    with pytest.raises(SegError, match="no such file") as refusal:
        read_versioned(Location(f"{run}/tiles/part-gone.parquet"))
    assert not isinstance(refusal.value, CorruptFileError)
