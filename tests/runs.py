"""Runs that are built by hand, without a model, and what is in a run."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import DATA_FIELDS, NORTH_UP, UTM, window_figures
from numpy.typing import NDArray

from seg_core.grid import Window, split
from seg_core.imagery.georef import Transform
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import read_region
from seg_core.imagery.scene import Scene
from seg_core.model.bundle import Bundle, read_bundle, write_bundle
from seg_core.run.check import Expected
from seg_core.run.ledger import describe_part, write_ledger
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import Location, find_parts, index_parts
from seg_core.run.plan import Part, Plan, Settings, make_plan
from seg_core.run.query import summary
from seg_core.run.record import now, write_record
from seg_core.run.resume import open_run
from seg_core.run.rows import Failure, Row, encode_mask, failed_rows, tile_rows
from seg_core.run.tables import part_path, write_part
from seg_core.run.verify import VerifyReport, verify
from seg_core.storage.files import sha256

Mask = NDArray[np.bool_]

SETTINGS = Settings(tile_size=32, part=64, halo=16, threshold=0.5)


def read_part(path: str, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a part that has a file of its own."""
    return read_rows(Location(path), columns)


def published_parts(run: str) -> list[str]:
    """The paths of the parts of a run that have files of their own, and of files that are no parts."""
    index = index_parts(run)
    return sorted([*(location.path for location in index.own.values()), *index.other])


def write_light_bundle(path: str | Path, **fields: Any) -> str:
    """Write a bundle whose weights are a handful of numbers: enough to plan with, and quick without torch."""
    described: dict[str, Any] = {
        "architecture": {"name": "unet", "in_channels": 3, "classes": 1, "width": 4, "depth": 2},
        **DATA_FIELDS,
        "stride": 4,
        "context_px": 12,
        "halo": 16,
        "activation_bytes_per_px": 100,
        "threshold": 0.5,
        **fields,
    }
    seed = described.pop("seed", 0)
    weights = {"head": np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)}
    write_bundle(str(path), Bundle(**described), weights)
    return str(path)


def write_region(
    folder: Path,
    crs: str | None = UTM,
    corner: tuple[float, float] = (NORTH_UP[2], NORTH_UP[5]),
    missing: tuple[slice, slice] = np.s_[30:70, 60:110],
) -> str:
    """Two scenes in folders of their own: 100 x 120 px with a missing block of more than a tile, and 40 x 30 px.

    The second one lies 10 km to the south of the first, whose corner is given.
    """
    rng = np.random.default_rng(7)
    for name, height, width in (("north/a.tif", 100, 120), ("south/b.tif", 40, 30)):
        pixels = rng.integers(1, 250, (3, height, width)).astype(np.uint8)
        pixels[:, *missing] = 0
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        place = (1.0, 0.0, corner[0], 0.0, -1.0, corner[1] - 10_000 * (name == "south/b.tif"))
        write_geotiff(str(folder / name), pixels, crs=crs, transform=place, nodata=0)
    return str(folder)


def bare_scene(
    height: int,
    width: int,
    crs: str | None = UTM,
    transform: Transform = NORTH_UP,
    *,
    scene_id: str = "a.tif",
    gsd_m: float | None = None,
) -> Scene:
    """A scene's header, with no file behind it: plans, rows and maps need none."""
    return Scene(
        scene_id=scene_id,
        uri=f"/nowhere/{scene_id}",
        size=1,
        version="1",
        height=height,
        width=width,
        bands=(1, 2, 3),
        dtype="uint8",
        nodata=None,
        masked=False,
        crs=crs,
        transform=transform,
        gsd_m=gsd_m,
        source_gsd_m=gsd_m,
    )


def part_rows(part: Part, settings: Settings, seed: int = 0) -> list[Row]:
    """Rows of a part with random probabilities, seeded by the part's key too; the scene's own validity."""
    of_part = int(sha256(part.key.encode())[:8], 16)
    rng = np.random.default_rng(of_part + seed)
    probability = rng.random((part.window.height, part.window.width), dtype=np.float32) ** 2
    _, valid = read_chip(part.scene, part.window, settings.scale)
    figures = window_figures(probability, valid, settings.tile_size, settings.threshold, keep=settings.keep_probability)
    return list(tile_rows(part.scene, part.window, settings.tile_size, figures))


def build_run(
    folder: Path, *, settings: Settings = SETTINGS, failed_parts: Collection[int] = (), seed: int = 0, **region: Any
) -> tuple[str, Plan]:
    """A whole run, made without a model: its path and plan. Parts of those numbers hold failed rows only.

    Beside the run in `folder` are its region, `scenes`, and its `bundle`. `region` is how to write that region.
    """
    bundle = write_light_bundle(folder / "bundle")
    scenes, unreadable = read_region([write_region(folder / "scenes", **region)])
    plan, refused = make_plan(scenes, read_bundle(bundle), settings)
    assert not unreadable + refused
    run = str(folder / "run")
    record = open_run(run, plan, bundle)
    for number, part in enumerate(plan.parts()):
        rows = part_rows(part, settings, seed)
        if number in failed_parts:
            rows = list(
                failed_rows(part.scene, part.window, settings.tile_size, Failure("ReadError", "the disk said no"))
            )
        write_part(run, part.key, rows, plan.model, part.version)
    enter_parts(run, plan)
    record.finished, record.counts = now(), summary(run)
    write_record(run, record)
    return run, plan


def enter_parts(run: str, plan: Plan, parts_per_task: int = 2) -> None:
    """Write the ledger of parts that are published, as actors do at the end of each task."""
    parts = list(plan.parts())
    for first in range(0, len(parts), parts_per_task):
        enter_task(run, plan, parts[first : first + parts_per_task])


def enter_task(run: str, plan: Plan, parts: Sequence[Part]) -> None:
    """Write a file of the ledger, of parts that are published."""
    expected = Expected.of(plan)
    found = [describe_part(run, part, Path(part_path(run, part.key)).read_bytes(), expected) for part in parts]
    write_ledger(run, [each for each in found if each is not None], expected)


def plan_scenes(folder: Path, scenes: Sequence[Scene], settings: Settings = SETTINGS) -> tuple[str, Plan]:
    """A run of which no part is done yet."""
    bundle = write_light_bundle(folder / "bundle")
    plan, refused = make_plan(scenes, read_bundle(bundle), settings)
    assert not refused
    open_run(str(folder / "run"), plan, bundle)
    return str(folder / "run"), plan


def fill_run(run: str, plan: Plan, mask: Callable[[Window], Mask]) -> None:
    """Write rows of all tiles without imagery. All their pixels are valid, of a square metre each."""
    size = plan.settings.tile_size
    for part in plan.parts():
        rows: list[Row] = []
        for tile in split(part.window, size):
            is_building = mask(tile)
            building, number = int(is_building.sum()), tile.num_pixels
            figures = {"valid_px": number, "building_px": building, "coverage": building / number}
            areas = {"area_m2": float(number), "building_m2": float(building), "mean_probability": 0.25}
            place = {"tile_row": tile.row_off // size, "tile_col": tile.col_off // size, **tile._asdict()}
            encoded = {"mask": encode_mask(is_building) if building else None}
            empty = dict.fromkeys(("geometry", "bbox"))
            scene = {"status": "done", "scene_id": part.scene.scene_id}
            rows.append({**scene, **place, **figures, **areas, **encoded, **empty})
        write_part(run, part.key, rows, plan.model, part.version)


def replan(folder: Path, **changes: Any) -> Plan:
    """The plan of `folder`'s region as it is now, with some settings changed."""
    scenes, _ = read_region([str(folder / "scenes")])
    plan, refused = make_plan(scenes, read_bundle(str(folder / "bundle")), replace(SETTINGS, **changes))
    assert not refused
    return plan


def rows_of(run: str | Path) -> list[Row]:
    """All rows of a run, part by part."""
    return [row for _, location in sorted(find_parts(str(run)).items()) for row in read_rows(location)]


def digest_of(path: Path) -> str:
    """The digest of a file's content. Comparisons of digests that fail can be read; those of contents can't."""
    return sha256(path.read_bytes())


def part_digests(run: Path) -> dict[str, str]:
    """The digest of each part file, by name."""
    return {Path(path).name: digest_of(Path(path)) for path in published_parts(str(run))}


def file_digests(folder: str | Path) -> dict[Path, str | None]:
    """The digest of each file below a folder, and None for each folder, by path."""
    return {path: digest_of(path) if path.is_file() else None for path in Path(folder).rglob("*")}


@dataclass(frozen=True)
class BuiltRun:
    """A run to damage."""

    run: str
    plan: Plan

    @property
    def parts(self) -> list[Part]:
        return list(self.plan.parts())

    def path(self, part: int = 0) -> Path:
        return Path(part_path(self.run, self.parts[part].key))

    def rewrite(self, change: Callable[[list[Row]], list[Row]], part: int = 0) -> None:
        """Replace a part by its changed rows."""
        write_part(
            self.run,
            self.parts[part].key,
            change(read_part(str(self.path(part)))),
            self.plan.model,
            self.parts[part].version,
        )

    def verdict(self) -> VerifyReport:
        return verify(self.run)

    def problems(self) -> str:
        """What is said of a run that must not hold."""
        found = self.verdict()
        assert found.ok is False
        return "\n".join(found.problems)
