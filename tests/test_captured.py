"""When scenes were taken: what says so, in which order, and where it can be asked for."""

import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import pytest
import rasterio
from conftest import MakeBundle, MakeScene
from runs import build_run
from seg_command import SMALL, seg

import seg_core
from seg_core.imagery.captured import parse_date
from seg_core.imagery.headers import read_scene
from seg_core.imagery.region import read_region
from seg_core.run.stored_plan import read_plan
from seg_core.storage import files

Capture = pytest.CaptureFixture[str]
NOON = datetime(2013, 7, 1, 12, 30)  # noqa: DTZ001 - no time zone is what is tested
ITEM = {"type": "Feature", "stac_version": "1.0.0", "properties": {"datetime": "2013-07-01T14:30:00+02:00"}}


def tag(path: Path, **tags: str) -> None:
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(**tags)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2013:07:01 12:30:00", NOON),
        ("2013-07-01T12:30:00", NOON),
        ("2013-07-01 12:30:00.75", NOON),
        ("2013-07-01T12:30:00Z", NOON),
        ("2013-07-01T14:30:00+02:00", NOON),
        (" 2013-07-01 ", datetime(2013, 7, 1)),  # noqa: DTZ001
        (date(2013, 7, 1), datetime(2013, 7, 1)),  # noqa: DTZ001
        (pd.Timestamp(NOON), NOON),
        (datetime(2013, 7, 1, 14, 30, tzinfo=timezone(timedelta(hours=2))), NOON),
        ("0000:00:00 00:00:00", None),
        ("1601-01-01T00:00:00", None),
        ("2013:13:01 12:30:00", None),
        ("last summer", None),
        ("", None),
        (None, None),
        (pd.NaT, None),
        (20130701, None),
    ],
)
def test_dates_are_read_as_utc_without_a_time_zone(value: object, expected: datetime | None) -> None:
    found = parse_date(value)
    assert found == expected
    assert type(found) is type(expected)


def test_a_stac_item_counts_first_then_exif_then_the_tiff_tag(make_scene: MakeScene) -> None:
    path = Path(make_scene("a.tif", 8, 8))
    assert read_scene(str(path), "a").captured is None
    tag(path, TIFFTAG_DATETIME="2015:01:02 03:04:05")
    assert read_scene(str(path), "a").captured == datetime(2015, 1, 2, 3, 4, 5)  # noqa: DTZ001
    tag(path, EXIF_DateTime="2014:01:01 00:00:00", EXIF_DateTimeOriginal="2014:05:06 07:08:09")
    assert read_scene(str(path), "a").captured == datetime(2014, 5, 6, 7, 8, 9)  # noqa: DTZ001
    path.with_suffix(".json").write_text(json.dumps(ITEM))
    assert read_scene(str(path), "a").captured == NOON
    span = {"datetime": None, "start_datetime": "2012-03-04T00:00:00Z"}
    path.with_suffix(".json").write_text(json.dumps({**ITEM, "properties": span}))
    assert read_scene(str(path), "a").captured == datetime(2012, 3, 4, tzinfo=UTC).replace(tzinfo=None)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"properties": {"datetime": "2013-07-01"}}', "\xff"])
def test_json_that_is_no_stac_item_says_nothing(make_scene: MakeScene, content: str) -> None:
    path = Path(make_scene("a.tif", 8, 8))
    tag(path, TIFFTAG_DATETIME="2013:07:01 12:30:00")
    path.with_suffix(".json").write_bytes(content.encode("latin-1"))
    assert read_scene(str(path), "a").captured == NOON


def test_a_manifest_says_when_its_scenes_were_taken(make_scene: MakeScene, tmp_path: Path) -> None:
    one, two, three = (Path(make_scene(f"{name}.tif", 8, 8)) for name in "abc")
    for path in (one, two):
        tag(path, TIFFTAG_DATETIME="2015:01:02 03:04:05")
    table = pd.DataFrame({"path": [one, two, three], "Acquired": ["2013-07-01T12:30:00Z", None, "2013:07:01 12:30:00"]})
    table.to_csv(tmp_path / "list.csv", index=False)
    scenes, _ = read_region([str(tmp_path / "list.csv")])
    assert [scene.captured for scene in scenes] == [NOON, datetime(2015, 1, 2, 3, 4, 5), NOON]  # noqa: DTZ001
    table = pd.DataFrame({"uri": map(str, [one, two]), "date": [date(2013, 7, 1), None]})
    table.to_parquet(tmp_path / "list.parquet")
    scenes, _ = read_region([str(tmp_path / "list.parquet")])
    assert scenes[0].captured == datetime(2013, 7, 1)  # noqa: DTZ001


def test_a_manifest_with_a_date_that_is_none_is_refused(make_scene: MakeScene, tmp_path: Path, capsys: Capture) -> None:
    pd.DataFrame({"path": [make_scene("a.tif", 8, 8)], "date": ["July"]}).to_csv(tmp_path / "list.csv", index=False)
    _, err = seg(capsys, "plan", tmp_path / "list.csv", code=2)
    assert err.count("\n") == 1
    assert "list.csv: row 1 below the header: date is 'July': say 2013-07-01, or nothing" in err


def test_dates_and_versions_are_in_the_table_and_in_what_groups_by_them(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("without_actors")
    scene, run = Path(make_scene("a.tif", 64, 64)), str(tmp_path / "run")
    tag(scene, TIFFTAG_DATETIME="2013:07:01 12:30:00")
    seg(capsys, "segment", scene, "--model", make_bundle(), "--out", run, *SMALL)
    (row,) = seg_core.open_run(run).query("SELECT * FROM scenes").to_pylist()
    assert (row["captured"], row["gdal_version"], row["decoder_version"]) == (NOON, rasterio.__gdal_version__, None)
    sql = "SELECT year(captured) AS year, sum(valid_px) AS px FROM tiles JOIN scenes USING (scene_id) GROUP BY ALL"
    out, _ = seg(capsys, "query", run, sql, "--json")
    assert json.loads(out) == [{"year": 2013, "px": 64 * 64}]
    assert read_plan(run).scenes[0].captured == NOON


def test_a_date_that_is_learnt_later_makes_no_part_anew(tmp_path: Path) -> None:
    _, plan = build_run(tmp_path)
    before = [(part.key, part.version) for part in plan.parts()]
    (tmp_path / "scenes/north/a.json").write_text(json.dumps(ITEM))
    scenes, _ = read_region([str(tmp_path / "scenes")])
    assert scenes[0].captured == NOON
    later = replace(plan, scenes=tuple(scenes))
    assert [(part.key, part.version) for part in later.parts()] == before
    assert later.fingerprint == plan.fingerprint


def test_a_stac_item_in_s3_is_read_if_it_is_listed(make_scene: MakeScene, s3: str) -> None:
    path = Path(make_scene("a.tif", 8, 8))
    files.publish(f"{s3}/dates/a.tif", path.read_bytes())
    assert read_scene(f"{s3}/dates/a.tif", "a").captured is None
    files.publish(f"{s3}/dates/a.json", json.dumps(ITEM).encode())
    assert read_scene(f"{s3}/dates/a.tif", "a").captured == NOON
