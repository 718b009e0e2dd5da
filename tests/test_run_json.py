"""`run.json` as a type: what is written for it, what is kept of a newer version, and what can't be read as it."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from runs import SETTINGS

from seg_core.run.plan import Plan
from seg_core.run.record import RunRecord, SeamCounts, new_record, read_record, write_record
from seg_core.run.typed_json import WrongTypeError, parse_fields

OLDER = Path(__file__).with_name("older_run") / "run"
RECORD = new_record(Plan(scenes=(), settings=replace(SETTINGS, bands=(3, 2, 1)), model="hash"), "/models/a")
AT_FIRST = ["format", "version", "code_version", "model", "settings", "plan", "created", "finished", "software"]
IN_THE_END = [
    *AT_FIRST[:-1],
    "class_name",
    "exact",
    "software",
    "seams",
    "bottleneck",
    "seconds",
    "counts",
    "relocated",
    "relocated_versions",
]


def finished() -> RunRecord:
    """A record that holds a value in every field."""
    return replace(
        RECORD,
        finished="2025-01-01T00:00:00Z",
        class_name="road",
        exact=True,
        seams=SeamCounts(pixels=9, differing=1),
        bottleneck={"limit": "model"},
        seconds=1.5,
        counts={"failed": 0},
        relocated={"/a": "/b"},
        relocated_versions={"a.tif": "1"},
    )


def written(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def test_fields_are_written_in_this_order_once_they_have_a_value(tmp_path: Path) -> None:
    write_record(str(tmp_path), RECORD)
    assert list(written(tmp_path)) == AT_FIRST
    assert written(tmp_path)["finished"] is None
    write_record(str(tmp_path), finished())
    assert list(written(tmp_path)) == IN_THE_END
    assert written(tmp_path)["model"] == {"hash": "hash", "uri": "/models/a"}
    assert written(tmp_path)["settings"]["bands"] == [3, 2, 1]
    assert written(tmp_path)["seams"] == {"pixels": 9, "differing": 1}


def test_the_worst_seams_are_kept_and_a_part_that_is_done_again_counts_anew() -> None:
    seams = SeamCounts()
    for number in range(12):
        seams = seams.add(f"part-{number}", 100, number)
    assert (seams.pixels, seams.differing) == (1200, 66)
    assert list(seams.worst.items()) == [(f"part-{number}", number / 100) for number in range(11, 1, -1)]
    seams = seams.add("part-11", 100, 0).add("part-2", 100, 50)
    assert list(seams.worst)[:2] == ["part-2", "part-10"]
    assert "part-11" not in seams.worst


def test_what_is_written_is_read(tmp_path: Path) -> None:
    seams = SeamCounts(pixels=9, differing=1, worst={"part-1": 0.25})
    for record in (RECORD, finished(), replace(finished(), seams=seams)):
        write_record(str(tmp_path), record)
        assert read_record(str(tmp_path)) == record


def test_the_record_of_an_older_version_is_rewritten_byte_for_byte(tmp_path: Path) -> None:
    record = read_record(str(OLDER))
    assert (record.code_version, record.plan.tiles, record.seams) == ("0.1.0", 6, SeamCounts(pixels=2048))
    write_record(str(tmp_path), record)
    assert (tmp_path / "run.json").read_bytes() == (OLDER / "run.json").read_bytes()


def test_what_is_not_known_keeps_its_place_when_the_record_is_rewritten(tmp_path: Path) -> None:
    later = json.loads((OLDER / "run.json").read_text())
    later = {"later": {"a": [1]}, **later, "latest": None}
    later["plan"]["areas"] = 3
    later["model"]["later"] = "x"
    (tmp_path / "run.json").write_text(json.dumps(later))
    record = read_record(str(tmp_path))
    record.exact, record.relocated = False, {"/a": "/b"}
    write_record(str(tmp_path), record)
    expected = {**later, "exact": False, "relocated": {"/a": "/b"}}
    assert written(tmp_path) == expected
    assert set(written(tmp_path)["plan"]) == {*asdict(record.plan), "areas"}


def test_float32_of_an_older_run_on_a_cpu_was_exact_and_stays_so(tmp_path: Path) -> None:
    older = json.loads((OLDER / "run.json").read_text())
    older["settings"]["precision"] = "float32"
    for changes, expected in (({}, "exact"), ({"exact": False}, "float32"), ({"software": {}}, "float32")):
        (tmp_path / "run.json").write_text(json.dumps(older | changes))
        record = read_record(str(tmp_path))
        assert record.settings.precision == expected
        assert record.add_software({"GDAL": "3.10"}) == []
        write_record(str(tmp_path), record)
        assert written(tmp_path)["settings"]["precision"] == "float32"
        assert written(tmp_path).get("software") == ({"GDAL": "3.10"} if "software" in changes else None)


def test_software_that_changes_during_a_run_is_named() -> None:
    record = replace(RECORD, software={})
    assert record.add_software({"GDAL": "3.10", "engine": "torch 2"}) == []
    assert record.add_software({"GDAL": "3.12", "engine": "torch 2"}) == [
        "GDAL: 3.10 made the first tiles, 3.12 makes others"
    ]
    assert record.software == {"GDAL": "3.10", "engine": "torch 2"}


def test_settings_that_came_later_stay_out_of_the_record_of_an_older_run(tmp_path: Path) -> None:
    older = json.loads((OLDER / "run.json").read_text())
    for name in ("alpha", "window", "mosaic"):
        del older["settings"][name]
    (tmp_path / "run.json").write_text(json.dumps(older))
    record = read_record(str(tmp_path))
    assert record.settings == read_record(str(OLDER)).settings
    write_record(str(tmp_path), record)
    assert written(tmp_path)["settings"] == older["settings"]


def test_a_field_that_is_forgotten_leaves_the_file(tmp_path: Path) -> None:
    write_record(str(tmp_path), finished())
    record = read_record(str(tmp_path))
    record.seams = record.finished = None
    write_record(str(tmp_path), record)
    assert list(written(tmp_path)) == [name for name in IN_THE_END if name != "seams"]
    assert written(tmp_path)["finished"] is None


@dataclass
class Inner:
    size: int
    name: str = ""


@dataclass
class Outer:
    inner: Inner
    share: float = 0.5
    flag: bool | None = None
    pair: tuple[int, int] | None = None
    many: tuple[str, ...] = ()
    by_name: dict[str, int] | None = None
    free: Any = None


def test_json_is_read_as_the_types_of_a_dataclass() -> None:
    values = {"inner": {"size": 1}, "pair": [1, 2], "many": ["a"], "by_name": {"a": 1}, "share": 1, "new": 5}
    assert Outer(**parse_fields(Outer, values)) == Outer(Inner(1), 1, None, (1, 2), ("a",), {"a": 1})


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ([], "", []),
        ({}, "inner", None),
        ({"inner": {}}, "inner.size", None),
        ({"inner": {"size": True}}, "inner.size", True),
        ({"inner": {"size": 1.5}}, "inner.size", 1.5),
        ({"inner": {"size": 1, "name": None}}, "inner.name", None),
        ({"inner": {"size": 1}, "flag": 0}, "flag", 0),
        ({"inner": {"size": 1}, "share": "1"}, "share", "1"),
        ({"inner": {"size": 1}, "pair": [1]}, "pair", [1]),
        ({"inner": {"size": 1}, "pair": [1, "2"]}, "pair", "2"),
        ({"inner": {"size": 1}, "many": "ab"}, "many", "ab"),
        ({"inner": {"size": 1}, "by_name": {"a": "b"}}, "by_name.a", "b"),
        ({"inner": {"size": 1}, "by_name": [1]}, "by_name", [1]),
    ],
)
def test_a_value_of_another_type_is_named(values: object, name: str, value: object) -> None:
    with pytest.raises(WrongTypeError) as refusal:
        parse_fields(Outer, values)
    assert (refusal.value.name, refusal.value.value) == (name, value)
