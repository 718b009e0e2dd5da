"""The record of a run, `run.json`: what was run, with which model and settings, and what came of it."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from seg_core.errors import CorruptFileError, SegError
from seg_core.run.fence import PLAIN, Store
from seg_core.run.imagery_fit import ImageryFit
from seg_core.run.parquet import advised
from seg_core.run.places import Places, relocate
from seg_core.run.plan import Plan, Settings
from seg_core.run.typed_json import WrongTypeError, parse_fields
from seg_core.storage.files import read_header
from seg_core.version import code_version

FORMAT = "aerial-seg run"
VERSION = 2
MAX_WORST_SEAMS = 10
RESTORE_ADVICE = "restore run.json from a copy, or segment into another folder"


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """The bundle that a run is made with."""

    hash: str
    uri: str  # where it was when the run was made


@dataclass(frozen=True, kw_only=True)
class PlanFigures:
    """What tells the plan of a run from another, and how much it is."""

    fingerprint: str
    scenes: int
    parts: int
    tiles: int
    pixels: int

    @classmethod
    def of(cls, plan: Plan) -> "PlanFigures":
        """The figures of a plan."""
        return cls(fingerprint=plan.fingerprint, **plan.counts)


@dataclass(frozen=True, kw_only=True)
class SeamCounts:
    """How windows agree at their borders, of which one is looked at in each of some parts."""

    pixels: int = 0  # that were compared
    differing: int = 0  # of those
    worst: dict[str, float] = field(default_factory=dict)  # largest shares of pixels that differ, by key of the part

    def add(self, part: str, pixels: int, differing: int) -> "SeamCounts":
        """Return the counts with those of a part."""
        shares = {key: share for key, share in self.worst.items() if key != part}
        if differing:
            shares[part] = round(differing / pixels, 6)
        worst = sorted(shares.items(), key=lambda each: each[1], reverse=True)[:MAX_WORST_SEAMS]
        return SeamCounts(pixels=self.pixels + pixels, differing=self.differing + differing, worst=dict(worst))


@dataclass(kw_only=True)
class RunRecord:
    """The fields of `run.json`, which also holds FORMAT and VERSION. One that is None is not in the file yet."""

    code_version: str
    model: ModelReference
    settings: Settings
    plan: PlanFigures
    created: str  # UTC, ISO 8601
    finished: str | None  # likewise; None, and null in the file, until all parts are there
    class_name: str | None = None  # of what the model finds: the columns building_* are of it
    fit: ImageryFit | None = None  # how the imagery compares with what the model was trained on
    exact: bool | None = None  # whether no device has rounded
    software: dict[str, str] | None = None  # what decodes and computes, with versions; None: of an older version
    seams: SeamCounts | None = None
    bottleneck: dict[str, Any] | None = None  # what limited the speed of the latest job
    seconds: float | None = None  # that jobs took
    counts: dict[str, Any] | None = None  # as `query.summary` has them
    relocated: dict[str, str] | None = None  # where scenes are now, by where they were when the run was planned
    relocated_versions: dict[str, str] | None = None  # by scene_id, those found to be unchanged at the new place
    stored: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # all of the file as it was read

    def places(self, given: Places = ()) -> Places:
        """Where the scenes are now: at the given places, or else where this record says."""
        noted = ((old, relocate(new, given)) for old, new in (self.relocated or {}).items())
        return (*given, *noted)

    def add_software(self, found: Mapping[str, str]) -> list[str]:
        """Note what decodes and computes. Returns a line for each of them that differs from what is noted.

        An older run has noted nothing, and stays so.
        """
        if self.software is None:
            return []
        differing = [name for name in found if self.software.setdefault(name, found[name]) != found[name]]
        return [f"{name}: {self.software[name]} made the first tiles, {found[name]} makes others" for name in differing]

    def setting_figures(self) -> dict[str, Any]:
        """Return the threshold, how the imagery was normalized, and whether it looks like that of the training.

        What is not known is null.
        """
        known = self.fit.figures() if self.fit else {"imagery_distance": None, "imagery_is_unlike": None}
        return {"threshold": self.settings.threshold, "normalize": self.settings.normalize, **known}

    def fit_warnings(self, counts: Mapping[str, Any]) -> list[str]:
        """Return a line for each reason to doubt that the model knows the imagery. `counts` is the run's summary."""
        if self.fit is None:
            return []
        lines = (
            self.fit.describe(self.settings.normalize),
            self.fit.describe_probability(counts.get("mean_probability")),
        )
        return [line for line in lines if line]

    def to_json(self) -> dict[str, Any]:
        """The content of the file. What a newer version wrote, and this one does not know, stays where it was."""
        known = {name: value for name, value in asdict(self).items() if value is not None or name == "finished"}
        del known["stored"]
        for name in OBJECTS & known.keys():
            stored = self.stored.get(name) or {}
            named = {key: value for key, value in known[name].items() if value != {} or key in stored}
            known[name] = {**stored, **named}
        if "settings" in self.stored:  # without those that have come since, and held their default
            known["settings"] = self.stored["settings"]
        kept = {name: value for name, value in self.stored.items() if name in known or name not in FIELDS}
        return {"format": FORMAT, "version": VERSION, **kept, **known}


OBJECTS = {"model", "plan", "seams"}
FIELDS = {each.name for each in fields(RunRecord)} - {"stored"}


def new_record(plan: Plan, model_uri: str) -> RunRecord:
    """The record of a run that begins now."""
    return RunRecord(
        code_version=code_version(),
        model=ModelReference(hash=plan.model, uri=model_uri),
        settings=plan.settings,
        fit=plan.fit,
        plan=PlanFigures.of(plan),
        created=now(),
        finished=None,
        software={},
        class_name=plan.class_name or None,
    )


def now() -> str:
    """The present time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_record(out: str, record: RunRecord, store: Store = PLAIN) -> None:
    """Publish `run.json`."""
    store.publish(f"{out}/run.json", json.dumps(record.to_json(), indent=2).encode())


def read_record(run: str) -> RunRecord:
    """Read `run.json`.

    Raises SegError for a folder that is no run, or a newer version's, CorruptFileError where the record can't be one.
    """
    with advised(f": {RESTORE_ADVICE}"):
        content = read_header(run, "run.json", "run", FORMAT)
    _check_version(run, content.get("version"))
    settings = content.get("settings")
    known = {each.name for each in fields(Settings)}
    if isinstance(settings, dict) and (unknown := settings.keys() - known):
        raise SegError(
            f"{run}: was made by a newer version: its setting {min(unknown)} is not known here: update aerial-seg"
        )
    try:
        record = RunRecord(**{**parse_fields(RunRecord, content), "stored": content})
    except WrongTypeError as error:
        raise _wrong(run, error.name, error.value) from error
    if record.software is None and record.settings.precision == "float32" and record.exact is not False:
        record.settings = replace(record.settings, precision="exact")  # as float32 was called on a CPU
    if record.counts is None or not isinstance(record.counts.get("failed"), int):
        record.finished = None  # so that they are counted again
    return record


def _check_version(run: str, version: object) -> None:
    if not isinstance(version, int):
        raise _wrong(run, "version", version)
    if version > VERSION:
        raise SegError(f"{run}: run.json is of version {version}, this aerial-seg reads {VERSION}: update aerial-seg")
    if version < VERSION:
        raise SegError(
            f"{run}: of version {version}, this aerial-seg reads {VERSION}: use the aerial-seg that made it, or "
            "segment into another folder"
        )


def _wrong(run: str, name: str, value: object) -> CorruptFileError:
    return CorruptFileError(f"{run}: damaged: {name} in run.json is {json.dumps(value)[:60]}: {RESTORE_ADVICE}")
