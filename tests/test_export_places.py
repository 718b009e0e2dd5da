"""Masks that are exported straight to S3, and by the tasks of a Ray cluster: the files are the same anywhere."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pystac
import pytest
import rasterio
from conftest import MakeBundle, cut
from proxy import Proxy
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate
from runs import SETTINGS, BuiltRun, build_run
from seg_command import seg
from weed import BUCKET

from aerial_seg import spread
from seg_core.storage import files as storage
from seg_core.storage import retries

Capture = pytest.CaptureFixture[str]
KEEPING = replace(SETTINGS, keep_probability=True)
EVERYTHING = ["--probability", "--stac", "--json"]


def contents(folder: str | Path) -> dict[str, bytes | None]:
    """The content of each file below a folder or prefix, by its path in it."""
    return {path.removeprefix(f"{folder}/"): storage.read_bytes(path) for path in storage.walk(str(folder))}


def lines(text: str, place: object) -> list[str]:
    """Messages without the place that they name."""
    return text.replace(str(place), "HERE").splitlines()


@pytest.fixture
def prefix(s3: str, tmp_path: Path) -> str:
    """A prefix of one's own."""
    return f"{s3}/{tmp_path.name}/masks"


def test_files_in_a_bucket_are_those_on_disk(prefix: str, tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path, settings=KEEPING)
    here, said_here = seg(capsys, "export", "masks", run, *EVERYTHING, "--out", tmp_path / "out")
    there, said_there = seg(capsys, "export", "masks", run, *EVERYTHING, "--out", f"{prefix}/")
    found = contents(prefix)
    assert found == contents(tmp_path / "out")
    assert len(found) == 12
    assert lines(there, prefix) == lines(here, tmp_path / "out")
    assert lines(said_there, prefix) == lines(said_here, tmp_path / "out")


@pytest.mark.parametrize("name", ["north/a_probability.tif", "north/a.qml", "south/b.json", "collection.json"])
def test_no_object_is_replaced(prefix: str, tmp_path: Path, capsys: Capture, name: str) -> None:
    run, _ = build_run(tmp_path, settings=KEEPING)
    storage.publish(f"{prefix}/{name}", b"mine")
    storage.publish(f"{prefix}/of-somebody-else.tif", b"other")
    _, err = seg(capsys, "export", "masks", run, *EVERYTHING, "--out", prefix, code=2)
    assert err == f"seg: {prefix}/{name}: already exists: choose another --out\n"
    assert contents(prefix) == {name: b"mine", "of-somebody-else.tif": b"other"}


def test_a_bucket_that_is_not_there_is_named(s3: str, tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path)
    out = s3.replace(BUCKET, "nowhere") + "/masks"
    _, err = seg(capsys, "export", "masks", run, "--out", out, code=2)
    assert err == f"seg: {out}: no such bucket\n"


def test_a_folder_that_cannot_be_made_is_refused_before_any_scene(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "masks"
    _, err = seg(capsys, "export", "masks", run, "--out", out, code=2)
    assert err == f"seg: {out}: can't be written to (Not a directory): choose another folder\n"


def test_a_scene_that_fails_leaves_nothing_in_the_bucket_and_the_others_are_written(
    prefix: str, tmp_path: Path, capsys: Capture
) -> None:
    run, plan = build_run(tmp_path)
    BuiltRun(run, plan).rewrite(lambda rows: [{**row, "mask": b"no"} for row in rows])
    out, err = seg(capsys, "export", "masks", run, "--out", prefix, "--json", code=1)
    assert json.loads(out)["files"] == [f"{prefix}/south/b.tif"]
    assert err.startswith(f"{prefix}/north/a.tif: not written: ")
    assert sorted(contents(prefix)) == ["south/b.qml", "south/b.tif"]


def test_a_large_file_is_sent_in_parts_and_nothing_if_it_is_not_whole(prefix: str) -> None:
    content = bytes(range(256)) * 40_000  # 10 MB
    with storage.local_draft(f"{prefix}/large.tif") as local:
        Path(local).write_bytes(content)
        Path(local).with_suffix(".qml").write_text("style")
    assert contents(prefix) == {"large.tif": content, "large.qml": b"style"}
    found = storage.stat(f"{prefix}/large.tif")
    assert found is not None
    assert found.version.endswith("-2")  # the etag of an object of two parts
    with suppress(ZeroDivisionError), storage.local_draft(f"{prefix}/other.tif") as local:
        Path(local).write_bytes(content)
        raise ZeroDivisionError
    assert not Path(local).parent.exists()
    assert not storage.exists(f"{prefix}/other.tif")


def test_an_upload_outlives_a_store_that_refuses(
    prefix: str, proxied: Proxy, other_environment: pytest.MonkeyPatch
) -> None:
    other_environment.setattr(retries, "pause", lambda _: 0.0)
    content = bytes(range(256)) * 40_000
    proxied.refusals = 5
    with storage.local_draft(f"{prefix}/large.tif") as local:
        Path(local).write_bytes(content)
    assert (proxied.refusals, proxied.num_refused) == (0, 5)
    assert storage.read_bytes(f"{prefix}/large.tif") == content


def test_a_temporary_folder_that_is_not_there_is_named_for_each_scene(
    prefix: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = build_run(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    _, err = seg(capsys, "export", "masks", run, "--out", prefix, code=1)
    first, second, last = err.splitlines()
    why = "no temporary folder for it: No such file or directory: name one by TMPDIR"
    assert first == f"{prefix}/north/a.tif: not written: {prefix}/north/a.tif: {why}"
    assert second.startswith(f"{prefix}/south/b.tif: not written: ")
    assert last == "2 files could not be written (exit code 1)"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each task of a cluster is given, in order."""
    numbers: list[int] = []
    remote = spread.ray.remote

    def counted(function: Callable[..., Any]) -> Any:
        task = remote(function)

        class Counted:
            @staticmethod
            def remote(shared: Any, items: list[Any]) -> Any:
                numbers.append(len(items))
                return task.remote(shared, items)

        return Counted

    monkeypatch.setattr(spread.ray, "remote", counted)
    return numbers


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("damaged", [False, True])
def test_a_cluster_writes_the_same_files_a_scene_in_each_task(
    prefix: str, tasks: list[int], tmp_path: Path, capsys: Capture, damaged: bool
) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING)
    if damaged:
        BuiltRun(run, plan).rewrite(lambda rows: [{**row, "probability": b"no"} for row in rows])
    command, code = ["export", "masks", run, *EVERYTHING, "--out"], int(damaged)
    one, said = seg(capsys, *command, tmp_path / "one", code=code)
    assert tasks == []
    for out in (tmp_path / "spread", prefix):
        other, also_said = seg(capsys, *command, out, "--address", "auto", code=code)
        assert lines(other, out) == lines(one, tmp_path / "one")
        assert lines(also_said, out) == lines(said, tmp_path / "one")
        assert contents(out) == contents(tmp_path / "one")
    assert tasks == [1] * 4
    assert ("not written" in said) == damaged


@pytest.mark.usefixtures("without_actors")
def test_masks_of_real_imagery_in_a_bucket_are_cloud_optimised_and_where_the_catalogue_says(
    shared: Path, make_bundle: MakeBundle, prefix: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "scenes").mkdir()
    cut(shared / "brookline/region.tif", tmp_path / "scenes/brookline.tif", Window(430, 0, 600, 520))
    cut(shared / "joplin/tile_337-9136.tif", tmp_path / "scenes/joplin.tif", Window(0, 0, 520, 600))
    options = ["--keep-probability", "--model", make_bundle(gsd_m=None), "--out", tmp_path / "run", "--tile-size", 256]
    seg(capsys, "segment", tmp_path / "scenes", *options)
    seg(capsys, "export", "masks", tmp_path / "run", *EVERYTHING, "--out", prefix)
    for name, content in contents(prefix).items():
        storage.publish(tmp_path / name, content or b"")
    items = list(pystac.Collection.from_file(tmp_path / "collection.json").get_items())
    assert [item.properties["proj:code"] for item in items] == ["EPSG:26986", "EPSG:26915"]
    for item in items:
        with rasterio.open(tmp_path / f"scenes/{item.id}.tif") as scene:
            place = scene.shape, scene.transform, scene.crs
            bounds = transform_bounds(scene.crs, "OGC:CRS84", *scene.bounds)
        paths = [item.assets[name].get_absolute_href() for name in ("mask", "probability")]
        for path in paths:
            assert cog_validate(path, strict=True) == (True, [], [])
            with rasterio.open(path) as file:
                assert (file.shape, file.transform, file.crs) == place
        with rasterio.open(paths[0]) as file:
            mask = file.read(1, masked=True)
        assert item.properties["aerial_seg:coverage"] == mask.mean()
        assert item.properties["aerial_seg:valid_px"] == mask.count()
        assert item.bbox == pytest.approx(bounds, abs=1e-7)
    assert [item.bbox[0] for item in items if item.bbox] == pytest.approx([-71.1, -94.5], abs=0.2)
