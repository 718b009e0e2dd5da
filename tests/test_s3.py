"""Scenes, models and runs in a bucket of a real S3 server: the same rows, windows and not files, no secrets told."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)
from conftest import MakeBundle, MakeScene, forget_clients
from parts import EXECUTION, RESOURCES
from proxy import Proxy
from runs import published_parts, rows_of
from seg_command import SMALL, seg
from weed import KEY, SECRET, put

from aerial_seg import segment
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip, read_whole
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.run.ledger import read_live_ledger
from seg_core.run.parts import find_parts
from seg_core.run.plan import Settings, make_plan
from seg_core.run.resume import open_run
from seg_core.storage import files as storage
from seg_core.storage import retries
from seg_core.storage import s3 as store

SIDE = 2048


def test_a_window_of_a_scene_fetches_little_more_than_its_blocks(
    s3: str, make_scene: MakeScene, proxied: Proxy
) -> None:
    uri = put(make_scene("large.tif", SIDE, SIDE), f"{s3}/windows/large.tif")
    before = proxied.received
    scene = read_scene(uri, "large.tif")
    header = proxied.received - before
    assert header < 100_000
    pixels, valid = read_chip(scene, Window(512, 256, 512, 512))
    needed = 3 * 512 * 512  # of noise, which deflate can hardly shorten
    assert 0.9 * needed < proxied.received - before - header < 1.3 * needed
    assert pixels.shape == (3, 512, 512)
    assert valid.all()


def test_keys_that_a_program_gives_open_imagery_and_tables(
    s3: str, make_scene: MakeScene, other_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_scene("keys.tif", 64, 64)
    uri = put(path, f"{s3}/keys/keys.tif")
    given, program = tmp_path / "given", tmp_path / "program.py"
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()  # boto3 renews keys ten minutes before
    answer = {"Version": 1, "AccessKeyId": KEY, "SecretAccessKey": SECRET, "Expiration": soon}
    program.write_text(f"open({str(given)!r}, 'a').write('once\\n')\nprint({json.dumps(answer)!r}, end='')\n")
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    other_environment.setenv("AWS_CONFIG_FILE", str(config))
    other_environment.delenv("AWS_SHARED_CREDENTIALS_FILE")
    scene = read_scene(uri, "keys.tif")
    before = given.stat().st_size
    assert np.array_equal(read_chip(scene, Window(0, 0, 64, 64))[0], read_whole(path))
    assert given.stat().st_size > before
    system, inside = storage.filesystem(uri)
    assert system.get_file_info(inside).size == Path(path).stat().st_size
    program.write_text("raise SystemExit('log in again')\n")
    forget_clients()
    with pytest.raises(SegError, match=rf"^{s3}: .*log in again") as refusal:
        read_chip(scene, Window(0, 0, 64, 64))
    assert "\n" not in str(refusal.value)


def test_keys_that_arrow_does_not_find_are_given_to_it(
    s3: str, make_scene: MakeScene, other_environment: pytest.MonkeyPatch
) -> None:
    uri = put(make_scene("role.tif", 64, 64), f"{s3}/keys/role.tif")
    other_environment.delenv("AWS_SHARED_CREDENTIALS_FILE")
    session = boto3.Session(aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    session._session.get_credentials().method = "assume-role"
    other_environment.setattr(store, "_session", cache(lambda: session))
    system, inside = storage.filesystem(uri)
    assert system.get_file_info(inside).size > 0
    assert read_scene(uri, "role.tif").width == 64


def test_a_listing_is_handed_on_page_by_page(s3: str, proxied: Proxy) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: storage.publish(f"{s3}/pages/{number:04d}", b""), range(1001)))
    before = proxied.received
    names = storage.walk(f"{s3}/pages")
    first = next(names)
    page = proxied.received - before
    assert [first, *names] == [f"{s3}/pages/{number:04d}" for number in range(1001)]
    assert page < proxied.received - before < 1.1 * page  # one name, on a page that had not been asked for yet


def test_reading_outlives_a_store_that_refuses_and_breaks_off(s3: str, make_scene: MakeScene, proxied: Proxy) -> None:
    path = make_scene("scene.tif", SIDE, SIDE)
    uri = put(path, f"{s3}/unreliable/scene.tif")
    expected, _ = read_chip(read_scene(path, "scene.tif"), Window(0, 0, SIDE, SIDE))
    proxied.refused, proxied.cut = 0.3, 0.03
    scene = read_scene(uri, "scene.tif")
    found = [read_chip(scene, Window(row, 0, 256, SIDE))[0] for row in range(0, SIDE, 256)]
    assert np.array_equal(np.concatenate(found, axis=1), expected)
    for number in range(60):
        storage.publish(f"{s3}/unreliable/{number}", b"x" * 100_000)
        assert storage.read_bytes(f"{s3}/unreliable/{number}") == b"x" * 100_000
    assert proxied.num_refused > 3
    assert proxied.num_cut > 2


def test_no_quota_ends_the_attempts_of_a_client(s3: str, proxied: Proxy, other_environment: pytest.MonkeyPatch) -> None:
    other_environment.setattr(retries, "pause", lambda _: 0.0)
    other_environment.setattr(retries, "ATTEMPTS", 100)
    forget_clients()
    proxied.refusals = 80
    storage.publish(f"{s3}/refused", b"x")
    assert (proxied.refusals, proxied.num_refused) == (0, 80)


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (503, None, True),
        (500, "InternalError", True),
        (429, None, True),
        (400, "RequestTimeout", True),
        (400, "ThrottlingException", True),
        (403, "SlowDown", True),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (412, "PreconditionFailed", False),
        (200, None, False),
    ],
)
def test_what_another_attempt_may_mend_is_asked_again(status: int, code: str | None, again: bool) -> None:
    answer = SimpleNamespace(status_code=status), {"Error": {"Code": code}} if code else {}
    found = store._retry(answer, SimpleNamespace(host="here"), 1, None)
    assert (found is not None) == again
    assert store._retry(answer, SimpleNamespace(host="here"), retries.ATTEMPTS, None) is None


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (EndpointConnectionError(endpoint_url="here"), True),
        (ConnectTimeoutError(endpoint_url="here"), True),
        (ReadTimeoutError(endpoint_url="here"), True),
        (ConnectionClosedError(endpoint_url="here"), True),
        (NoCredentialsError(), False),
        (ValueError(), False),
    ],
)
def test_a_connection_that_breaks_is_tried_again(error: Exception, again: bool) -> None:
    assert (store._retry(None, SimpleNamespace(host="here"), 1, error) is not None) == again


def test_the_pauses_of_a_request_make_about_two_minutes() -> None:
    pauses = [[retries.pause(attempt) for attempt in range(1, retries.ATTEMPTS)] for _ in range(1000)]
    assert 90 < min(map(sum, pauses)) < max(map(sum, pauses)) < 190
    assert 110 < np.mean([sum(each) for each in pauses]) < 150
    assert max(each[0] for each in pauses) <= 0.2


def test_an_object_that_arrives_damaged_is_asked_for_again(
    s3: str,
    proxied: Proxy,
    other_environment: pytest.MonkeyPatch,
) -> None:
    other_environment.setattr(retries, "DAMAGE_PAUSES", (0.0, 0.0))
    storage.publish(f"{s3}/garbled/run.json", b"x" * 1000)  # boto3 sends a checksum, which is kept
    proxied.garbled = 2
    assert storage.read_bytes(f"{s3}/garbled/run.json") == b"x" * 1000
    assert proxied.garbled == 0
    proxied.garbled = 3
    with pytest.raises(SegError, match=r"run\.json: what arrives does not match its checksum"):
        storage.read_bytes(f"{s3}/garbled/run.json")


@pytest.mark.usefixtures("without_actors")
def test_a_store_that_breaks_off_at_the_very_end_is_no_refusal(
    s3: str,
    make_scene: MakeScene,
    make_bundle: MakeBundle,
    proxied: Proxy,
    other_environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finish, run = segment._finish, f"{s3}/broken/run"
    command = ["segment", make_scene(), "--model", make_bundle(), "--out", run, *SMALL]

    def break_off(*args: Any) -> None:
        proxied.cut = 1.0
        finish(*args)

    other_environment.setattr(segment, "_finish", break_off)
    other_environment.setattr(retries, "DAMAGE_PAUSES", ())
    other_environment.setattr(retries, "ATTEMPTS", 2)
    forget_clients()
    _, err = seg(capsys, *command, code=1)
    assert err.splitlines()[-1].startswith(f"seg: {run}")
    assert err.endswith(": the run has begun, and the same command goes on\n")
    proxied.cut = 0.0
    other_environment.setattr(segment, "_finish", finish)
    storage.remove(f"{run}/driver.json")  # as this process, whose lease it was, is still there
    _, err = seg(capsys, *command)
    assert "nothing to do" in err


@pytest.mark.parametrize(("refused", "what"), [(1.0, "asks to slow down"), (None, "does not answer")])
def test_a_store_that_keeps_somebody_waiting_is_named_once(
    s3: str,
    proxied: Proxy,
    other_environment: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: float | None,
    what: str,
) -> None:
    other_environment.setattr(retries, "ATTEMPTS", retries.REPORTED_ATTEMPT + 1)
    if refused is None:
        proxied.server_close()
    else:
        proxied.refused = refused
    for name in ("a", "b"):
        with pytest.raises(SegError, match=f"{name}: "):
            storage.read_bytes(f"{s3}/{name}")
    line = f"S3 at http://127.0.0.1:{proxied.port} {what}: trying for two minutes"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("seg_core")] == [line]


@pytest.mark.parametrize("name", ["a b.tif", "50%.tif", "x#1.tif", "über.tif", "two\nlines.tif", "q?.tif"])
def test_scenes_of_odd_names_are_served(
    s3: str, make_scene: MakeScene, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    path = make_scene(name, 70, 50)
    uri = put(path, f"{s3}/{request.node.name.encode().hex()}/{name}")
    for source in (str(tmp_path), storage.folder_of(uri)):
        scenes, unreadable = read_region([source])
        assert unreadable == []
        assert [scene.scene_id for scene in scenes] == [name]
        assert read_chip(scenes[0], scenes[0].window)[0].shape == (3, 70, 50)


@pytest.fixture
def region(s3: str, make_scene: MakeScene, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Two scenes on disk, in `scenes/`, and the same in a prefix, whose URI is returned."""
    for name in ("north.tif", "south/scene.tif"):
        path = make_scene(f"scenes/{name}", 300, 200)
        uri = put(path, f"{s3}/{request.node.name}/scenes/{name}")
    assert (tmp_path / "scenes").is_dir()
    return storage.folder_of(storage.folder_of(uri))


@pytest.mark.usefixtures("without_actors")
def test_a_run_in_a_bucket_has_the_rows_of_one_on_disk(
    region: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = make_bundle(), storage.folder_of(region)
    for name in os.listdir(model):
        put(f"{model}/{name}", f"{base}/model/{name}")
    local, remote = str(tmp_path / "run"), f"{base}/run"
    seg(capsys, "segment", tmp_path / "scenes", "--model", model, "--out", local, *SMALL)
    command = ["segment", region, "--model", f"{base}/model", "--out", remote, *SMALL]
    told = [*seg(capsys, *command), *seg(capsys, *command)]
    assert "nothing to do" in told[-1]
    assert rows_of(remote) == rows_of(local)
    assert {entry.key for _, entries in read_live_ledger(remote) for entry in entries} == find_parts(remote).keys()
    told += seg(capsys, "verify", remote)
    summary = json.loads(seg(capsys, "query", remote, "--json")[0])
    assert summary == json.loads(seg(capsys, "query", local, "--json")[0])
    answer, _ = seg(
        capsys, "query", remote, "SELECT count(*) AS n, (SELECT count(*) FROM scenes) AS s FROM tiles", "--json"
    )
    assert json.loads(answer) == [{"n": summary["tiles"], "s": summary["scenes"]}]
    told.append((storage.read_bytes(f"{remote}/run.json") or b"").decode())
    assert not any(SECRET in text for text in told)

    os.utime(tmp_path / "scenes" / "north.tif")
    before = {path: storage.stat(path) for path in published_parts(remote)}
    pixels = np.random.default_rng(5).integers(0, 250, (3, 300, 200)).astype(np.uint8)
    put(str(write(tmp_path / "changed.tif", pixels)), f"{region}/north.tif")
    _, err = seg(capsys, *command)
    assert "north.tif has changed since" in err
    seg(capsys, "verify", remote)
    after = {path: storage.stat(path) for path in published_parts(remote)}
    assert set(before) == set(after)
    assert sum(before[path] != after[path] for path in before) == 2  # the parts of one of two scenes


def write(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    from conftest import NORTH_UP, UTM

    from seg_core.imagery.geotiff import write_geotiff

    write_geotiff(str(path), pixels, crs=UTM, transform=NORTH_UP)
    return path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://nowhere-at-all/scenes", "s3://nowhere-at-all/scenes: no such bucket"),
        ("{s3}/nothing/here", "{s3}/nothing/here: no such file or folder"),
        ("{s3}/nothing/*.tif", "{s3}/nothing/*.tif: no such file or folder"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(
    s3: str, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    _, err = seg(capsys, "plan", source.format(s3=s3), "--model", make_bundle(), code=2)
    assert err == f"seg: {message.format(s3=s3)}\n"


@pytest.mark.parametrize("command", ["verify", "query", "repair"])
def test_a_run_that_is_not_there_is_said_to_be_so(s3: str, capsys: pytest.CaptureFixture[str], command: str) -> None:
    _, err = seg(capsys, command, "s3://nowhere-at-all/run", code=2)
    assert err == "seg: s3://nowhere-at-all/run: no such bucket\n"
    _, err = seg(capsys, command, f"{s3}/nothing", code=2)
    assert err == f"seg: {s3}/nothing: no such run\n"


def test_a_run_that_cannot_be_written_is_refused_before_anything_starts(
    make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], s3: str
) -> None:
    command = ["segment", make_scene("a.tif", 64, 64), "--model", make_bundle(), "--out", "s3://nowhere-at-all/run"]
    _, err = seg(capsys, *command, *SMALL, code=2)
    assert err == "seg: s3://nowhere-at-all/run: no such bucket\n"
    assert s3


def test_more_threads_read_where_the_store_is_slow_to_answer(
    s3: str, make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, proxied: Proxy
) -> None:
    settings, model = Settings(tile_size=256, part=512, halo=24, threshold=0.5), make_bundle()
    path = make_scene("slow.tif", 512, SIDE)
    plan, _ = make_plan(read_region([put(path, f"{s3}/slow/slow.tif")])[0], read_bundle(model), settings)
    run = str(tmp_path / "run")
    open_run(run, plan, model)
    resources = replace(
        RESOURCES, threads=1
    )  # beside other tests, two would wait for each other longer than for the store
    segmenter = PartSegmenter(model, run, settings, 256, resources, EXECUTION, "s")
    proxied.delay = 2.0  # s, far more than a window takes the model: windows are read four at a time
    used = [receipt.readers for receipt in segmenter.segment_parts(list(plan.parts()))]
    assert RESOURCES.readers < used[-1]
