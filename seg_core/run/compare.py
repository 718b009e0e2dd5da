"""Compare two runs on the same ground, such as two dates, models or thresholds: building that is gained, lost or kept.

Only pixels that are valid in both runs are compared. A tile that failed in one of them, or is not done, is unknown.
See `compare_areas` for the same by area.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.geotiff import Bands, write_cog
from seg_core.imagery.qgis_style import Entry, write_class_style
from seg_core.imagery.scene import Scene
from seg_core.run.export_masks import Scale, decode_pixels, new_files
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import find_parts
from seg_core.run.plan import Part, Plan
from seg_core.run.record import read_record
from seg_core.run.rows import Row, locate_tiles
from seg_core.run.schema import BBOX, GEO_METADATA
from seg_core.run.stored_plan import read_plan
from seg_core.storage.disk import staged_file
from seg_core.storage.files import make_folder

NONE, KEPT, GAINED, LOST = range(4)  # pixels of a raster of change; MISSING is unknown
CLASSES = {"kept": KEPT, "gained": GAINED, "lost": LOST}
# As viewers show them: grey, blue and orange can be told apart by people who are colour-blind.
COLOURS = {NONE: (255, 255, 255), KEPT: (120, 120, 120), GAINED: (0, 114, 178), LOST: (213, 94, 0)}
LEGEND = [Entry(value, COLOURS[value], name) for name, value in {"none": NONE, **CLASSES}.items()]
CHANGE = Bands(nodata=MISSING, colours=COLOURS)
WAY_OUT = "compare them by areas (--areas, --grid, --h3 or --bbox)"
GRID_TOLERANCE = 0.01  # px by which the corners of an image may differ
COLUMNS = (
    *Window._fields,
    *("scene_id", "tile_row", "tile_col", "status", "valid_px", "building_px", "area_m2"),
    *("mask", "valid", "geometry", "bbox"),
)
CHANGES = pa.schema(
    [
        pa.field("scene_id", pa.string(), nullable=False),  # of the run before
        *(pa.field(name, pa.int32(), nullable=False) for name in ("tile_row", "tile_col", *Window._fields)),
        pa.field("compared_px", pa.int64()),  # valid in both runs; null if the tile is unknown in one of them
        *(pa.field(f"{name}_px", pa.int64()) for name in CLASSES),
        pa.field("compared_m2", pa.float64()),
        *(pa.field(f"{name}_m2", pa.float64()) for name in CLASSES),
        pa.field("geometry", pa.binary()),
        pa.field("bbox", BBOX),
    ],
    metadata=GEO_METADATA,
)


class OtherGridError(SegError):
    """Two runs can't be compared pixel by pixel, as their images or tiles are not the same."""


class Pair(NamedTuple):
    """A part of an image in both runs."""

    before: Part
    after: Part


@dataclass
class Change:
    """What was compared in all: pixels and square metres, by class."""

    tiles: int = 0
    unknown: int = 0  # tiles
    has_areas: bool = True  # whether all tiles with valid pixels have one
    pixels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("compared", *CLASSES), 0))
    areas: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("compared", *CLASSES), 0.0))

    def add(self, row: Row) -> None:
        """Add a tile."""
        self.tiles += 1
        if row["compared_px"] is None:
            self.unknown += 1
            return
        for name in self.pixels:
            self.pixels[name] += row[f"{name}_px"]
            self.areas[name] += row[f"{name}_m2"] or 0.0
        self.has_areas &= row["compared_m2"] is not None or not row["compared_px"]

    def figures(self) -> dict[str, Any]:
        """Return the totals. The coverages before and after are of the compared pixels; areas are in km2."""
        compared, kept, gained, lost = self.pixels.values()
        shares = {
            "coverage_before": (kept + lost) / compared if compared else None,
            "coverage_after": (kept + gained) / compared if compared else None,
        }
        pixels = {f"{name}_px": number for name, number in self.pixels.items()}
        areas = {f"{name}_km2": area / 1e6 if self.has_areas else None for name, area in self.areas.items()}
        return {"tiles": self.tiles, "unknown": self.unknown, **pixels, **shares, **areas}


def compare_runs(
    before: str,
    after: str,
    out: str | None = None,
    rasters: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Change:
    """Compare two runs tile by tile. Returns the totals.

    `out` is a GeoParquet file to write with a row for each tile: see CHANGES. `rasters` is a folder to write a GeoTIFF
    to for each image of the run before: 0 is no building, 1 kept, 2 gained, 3 lost, and 255 unknown. `report` is called
    with a text for each part. Memory depends on the size of a part. Raises SegError if the runs are not of the same
    images and tiles, if `out` or a raster exists, and if a part is damaged.
    """
    plans = read_plan(before), read_plan(after)
    pairs, total = pair_parts(*plans), Change()
    paths = new_files(plans[0].images, rasters, "--rasters") if rasters else {}
    if out and os.path.exists(out):
        raise SegError(f"{out}: already exists: choose another --out")
    reader = PairReader((before, after), plans)
    counter = count(1)

    def compare(
        parts: Sequence[Pair], write: Callable[[Sequence[Row]], None]
    ) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
        """Compare parts: add up and write their rows, and yield the pixels of each tile that is known."""
        for pair in parts:
            rows = []
            for row, pixels in reader.compare(pair):
                total.add(row)
                rows.append(row)
                if pixels is not None:
                    yield Window.from_row(row), pixels
            write(rows)
            report(f"{next(counter)} of {len(pairs)} parts")

    with _writing_changes(out) as write:
        for scene_id, group in groupby(pairs, key=lambda pair: pair.before.scene.scene_id):
            parts = list(group)
            for raster in paths.get(scene_id, ()):
                make_folder(os.path.dirname(raster))
                write_cog(raster, parts[0].before.scene, compare(parts, write), CHANGE)
                write_class_style(raster, LEGEND)
            if not paths:
                deque(compare(parts, write), maxlen=0)
    return total


def describe_differences(before: str, after: str) -> list[str]:
    """Return in what two runs differ besides their imagery, which changes their buildings too."""
    records = read_record(before), read_record(after)
    values = {
        "threshold": [f"{record.settings.threshold:.4g}" for record in records],
        "model": [record.model.hash[:8] for record in records],
        "normalize": [record.settings.normalize for record in records],
    }
    return [f"{name} {one} and {two}" for name, (one, two) in values.items() if one != two]


def pair_parts(before: Plan, after: Plan) -> list[Pair]:
    """Return the parts of two runs that show the same ground.

    The images are those of the same scene_id, or the only one of each run. A part of a mosaic that one run lacks holds
    no data in it, and is left out. Raises OtherGridError with what differs.
    """
    images = {image.scene_id: image for image in after.images}
    alone = len(before.images) == len(after.images) == 1
    partners: dict[str, str] = {}
    for image in before.images:
        partner = after.images[0] if alone else images.get(image.scene_id)
        if partner is None:
            raise OtherGridError(f"{image.scene_id}: a scene of the first run alone: {WAY_OUT}")
        _check_grid(image, partner)
        partners[image.scene_id] = partner.scene_id
    if extra := images.keys() - set(partners.values()):
        raise OtherGridError(f"{min(extra)}: a scene of the second run alone: {WAY_OUT}")
    for name in ("tile_size", "part"):
        one, two = (getattr(plan.settings, name) for plan in (before, after))
        if one != two:
            raise OtherGridError(f"the runs have other tiles: {name} {one} and {two}: {WAY_OUT}")
    there = {(part.scene.scene_id, part.window): part for part in after.parts()}
    found = [(part, there.get((partners[part.scene.scene_id], part.window))) for part in before.parts()]
    return [Pair(one, two) for one, two in found if two is not None]


def _check_grid(one: Scene, two: Scene) -> None:
    """Raise OtherGridError unless two images have the same pixel grid."""
    if (one.height, one.width) != (two.height, two.width):
        sizes = " and ".join(f"{each.width} x {each.height}" for each in (one, two))
        raise OtherGridError(f"{one.scene_id}: the runs have other grids, of {sizes} px: {WAY_OUT}")
    if one.crs != two.crs:
        raise OtherGridError(f"{one.scene_id}: the runs have other grids, in {one.crs} and {two.crs}: {WAY_OUT}")
    size = max(abs(one.transform[0]), abs(one.transform[1]))
    corners = [
        np.array([each.transform[2::3], np.dot(np.reshape(each.transform, (2, 3)), (each.width, each.height, 1))])
        for each in (one, two)
    ]
    shift = float(np.abs(corners[0] - corners[1]).max() / size)
    if not shift < GRID_TOLERANCE:
        raise OtherGridError(f"{one.scene_id}: the runs have other grids, {shift:.2f} px apart: {WAY_OUT}")


class PairReader:
    """Reads the tiles of a part in both runs."""

    def __init__(self, runs: tuple[str, str], plans: tuple[Plan, Plan]) -> None:
        """List the parts of both runs."""
        self.tile_size = plans[0].settings.tile_size
        self.scales: list[Scale] = [plan.settings.scale for plan in plans]
        self.there = [find_parts(run) for run in runs]

    def compare(self, pair: Pair) -> Iterator[tuple[Row, NDArray[np.uint8] | None]]:
        """Yield a row of CHANGES for each tile, and its raster of change; None if the tile is unknown."""
        both = [self._read(run, part) for run, part in enumerate(pair)]
        for tile in split(pair.before.window, self.tile_size):
            one, two = (rows.get(tile.origin) for rows in both)
            if one is None or two is None or {one["status"], two["status"]} != {"done"}:
                place, _ = next(locate_tiles(pair.before.scene, tile, self.tile_size))
                yield {**place, "compared_px": None}, None
                continue
            pixels = [
                decode_pixels(row, part, scale) for row, part, scale in zip((one, two), pair, self.scales, strict=True)
            ]
            yield _compare_tile(one, pixels[0], pixels[1])

    def _read(self, run: int, part: Part) -> dict[tuple[int, int], Row]:
        there = self.there[run]
        rows = read_rows(there[part.key], COLUMNS) if part.key in there else []
        return {Window.from_row(row).origin: row for row in rows}


def _compare_tile(row: Row, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[Row, NDArray[np.uint8]]:
    """Compare the pixels of a tile: 1 is building, 0 is not, MISSING is not valid. `row` is that of the run before."""
    change = np.full(before.shape, NONE, np.uint8)
    change[(before == 1) & (after == 1)] = KEPT
    change[(before != 1) & (after == 1)] = GAINED
    change[(before == 1) & (after != 1)] = LOST
    change[(before == MISSING) | (after == MISSING)] = MISSING
    counts = {"compared": int((change != MISSING).sum())}
    counts |= {name: int((change == value).sum()) for name, value in CLASSES.items()}
    known = row["area_m2"] is not None and row["valid_px"]
    pixel_m2 = row["area_m2"] / row["valid_px"] if known else None
    place = {name: row[name] for name in ("scene_id", "tile_row", "tile_col", *Window._fields, "geometry", "bbox")}
    pixels = {f"{name}_px": number for name, number in counts.items()}
    areas = {f"{name}_m2": None if pixel_m2 is None else number * pixel_m2 for name, number in counts.items()}
    return {**place, **pixels, **areas}, change


@contextmanager
def _writing_changes(path: str | None) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yield a function that adds rows of CHANGES to a new GeoParquet file; without a path it does nothing."""
    if path is None:
        yield lambda _: None
        return
    with staged_file(path) as draft, pq.ParquetWriter(draft, CHANGES, compression="zstd") as file:
        yield lambda rows: file.write_table(pa.Table.from_pylist(list(rows), CHANGES))
