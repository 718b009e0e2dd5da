"""A run: the output folder of one bulk job, what was planned for it, and what of that is left to do."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core import __version__
from seg_core.bundle import Bundle
from seg_core.errors import SegError
from seg_core.results import part_path, published_parts, read_scenes, scenes_path, write_scenes
from seg_core.scenes import Scene, fit_to_model
from seg_core.storage import PARTIAL, check_writable, make_folder, publish
from seg_core.tiling import Window, num_splits, split

FORMAT = "aerial-seg run"
VERSION = 1
MAX_WINDOW = 2048  # px; beyond it the halo costs little, and memory much


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that change what a run's rows say. They are kept in `run.json`."""

    tile_size: int = 512  # px
    part: int = 4096  # px
    halo: int
    threshold: float
    resample: bool = False
    scale: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    keep_probability: bool = False
    window: int | None = None  # px; only where the model sees further than the halo, so that windows matter

    def check(self, stride: int) -> None:
        """Raise SegError for values that can't work with a model of that stride."""
        for name, least in (("tile_size", stride), ("halo", 0)):
            value = getattr(self, name)
            if value < least or value % stride:
                raise SegError(
                    f"--{name.replace('_', '-')} {value}: the model's stride is {stride}: use a multiple of it"
                )
        if self.part < self.tile_size or self.part % self.tile_size:
            raise SegError(f"--part {self.part}: use a multiple of the tile size, {self.tile_size}")
        if not 0 < self.threshold < 1:
            raise SegError(f"--threshold {self.threshold}: use a probability between 0 and 1")
        if self.scale is not None and not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise SegError(f"--scale {self.scale[0]:g} {self.scale[1]:g}: MIN must be less than MAX")


@dataclass(frozen=True)
class Part:
    """A block of whole tiles of one scene: what is committed and resumed at once."""

    key: str
    scene: Scene
    window: Window

    def to_row(self) -> dict[str, Any]:
        """As plain values, to travel."""
        return {"key": self.key, "scene": json.dumps(asdict(self.scene)), **self.window._asdict()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Part":
        """The part that was made a row."""
        scene = Scene.from_plain(json.loads(row["scene"]))
        return cls(str(row["key"]), scene, Window(*(int(row[name]) for name in Window._fields)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do."""

    scenes: tuple[Scene, ...]
    settings: Settings
    model: str  # the bundle's hash

    def parts(self) -> Iterator[Part]:
        """All parts, scene by scene."""
        for scene in self.scenes:
            name = hashlib.sha256(scene.scene_id.encode()).hexdigest()[:16]
            for window in split(scene.window, self.settings.part):
                yield Part(f"{name}-{window.row_off:07d}-{window.col_off:07d}", scene, window)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Scenes, parts, tiles and pixels."""
        return {
            "scenes": len(self.scenes),
            "parts": sum(num_splits(s.window, self.settings.part) for s in self.scenes),
            "tiles": sum(num_splits(s.window, self.settings.tile_size) for s in self.scenes),
            "pixels": sum(s.height * s.width for s in self.scenes),
        }

    def num_windows(self, window_size: int) -> int:
        """How many windows of that size there are."""
        return sum(num_splits(part.window, window_size) for part in self.parts())

    @property
    def fingerprint(self) -> str:
        """Hash of scenes, settings and model."""
        content = json.dumps([[asdict(s) for s in self.scenes], asdict(self.settings), self.model])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def make_plan(
    scenes: Sequence[Scene], bundle: Bundle, settings: Settings, window: int | None = None
) -> tuple[Plan, list[str]]:
    """Plan a run over those scenes that the model can serve; and one line for each that it can't.

    The window only becomes a setting where the halo does not cover the model's context, so that it changes the rows.
    Raises SegError for settings that can't work with the model.
    """
    settings.check(bundle.stride)
    if window is not None and (window < settings.tile_size or window % settings.tile_size):
        raise SegError(f"--window {window}: use a multiple of the tile size, {settings.tile_size}")
    if bundle.context_px is None or settings.halo < bundle.context_px:
        settings = replace(settings, window=window or _largest_window(settings))
    served, refused = [], []
    for scene in scenes:
        try:
            served.append(
                fit_to_model(
                    scene,
                    num_bands=bundle.bands,
                    gsd_m=bundle.gsd_m,
                    bands=settings.bands,
                    scaled=settings.scale is not None,
                    resample=settings.resample,
                )
            )
        except SegError as error:
            refused.append(str(error))
    return Plan(scenes=tuple(served), settings=settings, model=bundle.hash), refused


def choose_window(wanted: int | None, settings: Settings, bundle: Bundle, memory: int) -> int:
    """The side of a window in px: as asked for, or the largest up to 2048 whose forward pass fits half the memory."""
    wanted = settings.window or wanted
    if wanted is not None:
        return min(wanted, settings.part)
    sizes = range(settings.tile_size, _largest_window(settings) + 1, settings.tile_size)
    fitting = [s for s in sizes if (s + 2 * settings.halo) ** 2 * bundle.activation_bytes_per_px <= memory / 2]
    return max(fitting, default=settings.tile_size)


def _largest_window(settings: Settings) -> int:
    return max(1, min(MAX_WINDOW, settings.part) // settings.tile_size) * settings.tile_size


def find_run(out: str, plan: Plan) -> dict[str, Any] | None:
    """The record of the run at `out`, None where nothing is yet. Raises SegError where `out` holds something else.

    That is: a folder that is no run, or a run of other scenes, settings or another model.
    """
    if Path(out, "run.json").is_file():
        record = read_record(out)
        _refuse_differences(out, record, plan)
        return record
    if os.path.exists(out) and (not os.path.isdir(out) or any(not f.startswith(PARTIAL) for f in os.listdir(out))):
        raise SegError(f"{out}: exists and is not a run: choose another folder")
    check_writable(out)
    return None


def open_run(out: str, plan: Plan, model_uri: str) -> dict[str, Any]:
    """The record of the run at `out`, made there if there is none. Raises SegError as `find_run` does."""
    record = find_run(out, plan)
    if record is None:
        make_folder(out)
        record = _new_record(plan, model_uri)
        write_record(out, record)
    make_folder(Path(out, "tiles"))
    if not scenes_path(out).is_file():
        make_folder(Path(out, "scenes"))
        write_scenes(out, plan.scenes)
    return record


def _new_record(plan: Plan, model_uri: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "code_version": __version__,
        "model": {"hash": plan.model, "uri": model_uri},
        "settings": asdict(plan.settings),
        "plan": {"fingerprint": plan.fingerprint, **plan.counts},
        "created": now(),
        "finished": None,
    }


def now() -> str:
    """The present time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_record(out: str, record: dict[str, Any]) -> None:
    """Publish `run.json`."""
    publish(Path(out, "run.json"), json.dumps(record, indent=2).encode())


def read_record(run: str) -> dict[str, Any]:
    """Read `run.json`. Raises SegError for a folder that is no run."""
    try:
        record = json.loads(Path(run, "run.json").read_bytes())
    except OSError as error:
        raise SegError(f"{run}: not a run: it holds no readable run.json") from error
    except ValueError as error:
        raise SegError(f"{run}: damaged: run.json is no JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise SegError(f"{run}: not a run: run.json does not say format {FORMAT!r}")
    if record.get("version") != VERSION:
        raise SegError(f"{run}: of version {record.get('version')}, this program reads {VERSION}: upgrade aerial-seg")
    absent = [name for name in ("settings", "model", "plan") if not isinstance(record.get(name), dict)]
    if absent:
        raise SegError(f"{run}: damaged: run.json lacks {', '.join(absent)}")
    return record


def read_plan(run: str) -> Plan:
    """The plan that a run was made with, from its own files."""
    record = read_record(run)
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["settings"].items()}
    return Plan(scenes=tuple(read_scenes(run)), settings=Settings(**stored), model=record["model"]["hash"])


def _refuse_differences(out: str, record: dict[str, Any], plan: Plan) -> None:
    if record["plan"]["fingerprint"] == plan.fingerprint:
        return
    there, here = record["settings"], json.loads(json.dumps(asdict(plan.settings)))
    differing = [f"{name} {there.get(name)} there, {here[name]} now" for name in here if there.get(name) != here[name]]
    if record["model"]["hash"] != plan.model:
        differing.append(f"model {record['model']['hash'][:8]} there, {plan.model[:8]} now")
    if not differing:
        differing.append(_scene_difference(read_scenes(out), plan.scenes))
    raise SegError(f"{out}: is a run with other settings ({'; '.join(differing)}): choose another folder")


def _scene_difference(there: Sequence[Scene], here: Sequence[Scene]) -> str:
    # As text, because a NaN, which a nodata value may be, differs from itself.
    before = {s.scene_id: {k: repr(v) for k, v in asdict(s).items()} for s in there}
    after = {s.scene_id: {k: repr(v) for k, v in asdict(s).items()} for s in here}
    odd = next((i for i in {**after, **before} if before.get(i) != after.get(i)), None)
    if odd is None:
        return "the order of its scenes"
    if odd not in after:
        return f"scene {odd} is there, not here"
    if odd not in before:
        return f"scene {odd} is new"
    changed = [name for name in after[odd] if before[odd][name] != after[odd][name]]
    return f"scene {odd} has changed since: {', '.join(changed)}"


def parts_to_do(run: str, plan: Plan) -> list[Part]:
    """The planned parts that are not published, can't be read, or hold a failed tile."""
    there = {path.name for path in published_parts(run)}
    return [
        part
        for part in plan.parts()
        if part_path(run, part.key).name not in there or _is_unfinished(part_path(run, part.key))
    ]


def _is_unfinished(path: Path) -> bool:
    """Whether a part is damaged or holds a failed tile, from its footer and the statistics of its status column."""
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return True
    index = footer.schema.names.index("status")
    groups = [footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups)]
    return any(group.max != "done" for group in groups)
