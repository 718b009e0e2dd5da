"""A stratified random sample of places of a run, and what judges have said of them.

strata of the run ─▶ places, at random by ground area ─┬─▶ GeoPackage and pictures ─▶ a person fills in `truth`
└─▶ labels that are at hand, such as footprints
"""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyogrio
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError

from seg_core.audit.estimate import Judged
from seg_core.audit.strata import NAMES, Survey, is_building
from seg_core.chips import MISSING
from seg_core.datasets.labels import Labels
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.area_projection import LONLAT
from seg_core.imagery.georef import lonlat
from seg_core.imagery.vector_formats import PARQUET, check_format, is_vector
from seg_core.imagery.vectors import gdal_name

MIN_SAMPLE = 50  # places
TRUTHS = {
    **dict.fromkeys(("building", "1", "1.0", "yes", "true"), True),
    **dict.fromkeys(("background", "0", "0.0", "no", "false"), False),
    **dict.fromkeys(("", "unsure", "?"), None),
}
PLACE_COLUMNS = ("scene_id", "row", "col", "truth")  # by which a judged sample is known


class Place(NamedTuple):
    """A pixel of a run."""

    part: int  # number of its part
    scene_id: str
    row: int  # of the image
    col: int
    stratum: int
    lon: float  # degrees, of its centre
    lat: float


def allocate(m2: NDArray[np.float64], number: int) -> NDArray[np.int64]:
    """Divide a number of places among strata: half of them equally, and half by ground area. Empty strata get none."""
    there = m2 > 0
    wanted = number * (0.5 * there / there.sum() + 0.5 * m2 / m2.sum())
    found: NDArray[np.int64] = np.floor(wanted).astype(np.int64)
    found[np.argsort(found - wanted, kind="stable")[: number - int(found.sum())]] += 1  # the largest remainders
    return found


def draw_places(survey: Survey, number: int, seed: int = 0) -> list[Place]:
    """Draw so many places. The same seed gives the same ones.

    Within a stratum, each square metre is as likely as any other. Raises SegError for fewer than MIN_SAMPLE.
    """
    if number < MIN_SAMPLE:
        raise SegError(f"--sample {number}: too few places to tell anything: say {MIN_SAMPLE} or more")
    rng = np.random.default_rng(seed)
    part_m2 = survey.part_m2
    wanted = defaultdict(list)  # stratum, and the area before the place within its part, by part
    for stratum, count in enumerate(allocate(survey.m2, number)):
        ends = np.cumsum(part_m2[:, stratum])
        for at in np.sort(rng.uniform(0, ends[-1], count)):
            part = int(np.searchsorted(ends, at, side="right"))
            wanted[part].append((stratum, float(at - (ends[part] - part_m2[part, stratum]))))
    places = [place for part in sorted(wanted) for place in _place_in_part(survey, part, wanted[part], rng)]
    return [places[at] for at in rng.permutation(len(places))]  # so that the first ones are a sample too


def _place_in_part(
    survey: Survey, part: int, wanted: Sequence[tuple[int, float]], rng: np.random.Generator
) -> list[Place]:
    tiles = survey.read_part(part)
    ends = np.cumsum(survey.tiles[part].m2, axis=0, dtype=np.float64)
    found = []
    for stratum, at in wanted:
        number = min(int(np.searchsorted(ends[:, stratum], at, side="right")), len(tiles) - 1)
        while not survey.tiles[part].m2[number, stratum]:  # the end of the sum, after rounding
            number -= 1
        tile = tiles[number]
        pixels = np.flatnonzero(tile.strata == stratum)
        row, col = divmod(int(rng.choice(pixels)), tile.window.width)
        found.append(_make_place(survey, part, row + tile.window.row_off, col + tile.window.col_off, stratum))
    return found


def _make_place(survey: Survey, part: int, row: int, col: int, stratum: int) -> Place:
    image = survey.parts[part].scene
    assert image.crs is not None  # see survey_run
    lon, lat = lonlat(image.crs, image.transform, np.array([row + 0.5]), np.array([col + 0.5]))
    return Place(part, image.scene_id, row, col, stratum, float(lon[0]), float(lat[0]))


def count_judged(places: Sequence[Place], truths: Sequence[bool | None]) -> Judged:
    """Count the places with a truth by stratum, and those that the run has wrong."""
    known = [(place.stratum, truth) for place, truth in zip(places, truths, strict=True) if truth is not None]
    wrong = [stratum for stratum, truth in known if truth != is_building(stratum)]
    strata = [stratum for stratum, _ in known]
    return Judged(*(np.bincount(np.array(each, np.int64), minlength=len(NAMES)) for each in (strata, wrong)))


def judge_by_labels(survey: Survey, places: Sequence[Place], labels: Labels) -> list[bool | None]:
    """Return whether each place is building, from labels; None where they don't know."""
    found: list[bool | None] = []
    for place in places:
        image = survey.parts[place.part].scene
        label = int(labels.read(image, Window(place.row, place.col, 1, 1))[0, 0])
        found.append(None if label == MISSING else label == 1)
    return found


def to_frame(survey: Survey, places: Sequence[Place], pictures: Sequence[str]) -> geopandas.GeoDataFrame:
    """Return the places as points, with an empty column `truth` for a person to fill in."""
    columns: dict[str, Any] = {
        "place": np.arange(1, len(places) + 1),
        "truth": pd.array([None] * len(places), dtype="string"),
        "mapped": [survey.describe(is_building(place.stratum)) for place in places],
        "stratum": [survey.names[place.stratum] for place in places],
        **{name: [getattr(place, name) for place in places] for name in ("scene_id", "row", "col")},
        "picture": list(pictures),
    }
    lon, lat = zip(*((place.lon, place.lat) for place in places), strict=True)
    return geopandas.GeoDataFrame(columns, geometry=geopandas.points_from_xy(lon, lat), crs=LONLAT)


def read_judged(path: str) -> list[dict[str, Any]] | None:
    """Read a sample that a person has judged: `scene_id`, `row`, `col` and `truth` of each place.

    The file is a vector file or a CSV. Returns None if it does not have these columns: then it is a truth.
    Raises SegError if it can't be read.
    """
    if path.lower().endswith(".csv"):
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SegError(f"{path}: can't be read: {error}") from error
        if not rows or not set(PLACE_COLUMNS) <= rows[0].keys():
            raise SegError(f"{path}: not a judged sample: it does not have the columns {', '.join(PLACE_COLUMNS)}")
        return rows
    if not is_vector(path):
        return None
    driver = check_format(path)
    try:
        if driver == PARQUET:
            frame = pd.read_parquet(path)
        elif set(PLACE_COLUMNS) <= set(pyogrio.read_info(gdal_name(path, driver))["fields"]):
            frame = pyogrio.read_dataframe(gdal_name(path, driver), read_geometry=False)
        else:
            return None
    except (DataSourceError, DataLayerError, OSError, ValueError, pa.ArrowException) as error:
        raise SegError(f"{path}: can't be read: {error}") from error
    if not set(PLACE_COLUMNS) <= set(frame.columns):
        return None
    return [{name: row[name] for name in PLACE_COLUMNS} for row in frame.to_dict("records")]


def find_places(survey: Survey, rows: Sequence[dict[str, Any]]) -> tuple[list[Place], list[bool | None]]:
    """Find judged places in a run, with the stratum that each has there. Returns them with what was judged.

    Raises SegError for a place that the run does not have, or a word that is not known.
    """
    numbers = {(part.scene.scene_id, *part.window.origin): number for number, part in enumerate(survey.parts)}
    by_part = defaultdict(list)
    for at, judged in enumerate(rows):
        row, col = _pixel(judged)
        size = survey.plan.settings.part
        part = numbers.get((judged["scene_id"], row // size * size, col // size * size))
        if part is None:
            raise SegError(f"{_describe(judged)}: not in this run: it is of the sample of another one")
        by_part[part].append((at, row, col))
    places: dict[int, Place] = {}
    for part, wanted in by_part.items():
        tiles = survey.read_part(part)
        for at, row, col in wanted:
            stratum = next((tile.strata_at(row, col) for tile in tiles if tile.holds(row, col)), MISSING)
            if stratum == MISSING:
                raise SegError(f"{_describe(rows[at])}: holds no data in this run: is it of the sample of another one?")
            places[at] = _make_place(survey, part, row, col, stratum)
    return [places[at] for at in range(len(rows))], [_truth(judged, survey.class_name) for judged in rows]


def _describe(judged: dict[str, Any]) -> str:
    return f"{judged['scene_id']}: row {judged['row']}, column {judged['col']}"


def _pixel(judged: dict[str, Any]) -> tuple[int, int]:
    try:
        row, col = float(judged["row"]), float(judged["col"])
    except (TypeError, ValueError):
        row = col = math.nan
    if not (row.is_integer() and col.is_integer()):
        raise SegError(f"{_describe(judged)}: not a pixel: leave the columns of the sample as they are")
    return int(row), int(col)


def _truth(judged: dict[str, Any], class_name: str) -> bool | None:
    """Return what a judge has written: of the class or not, or None for an empty cell."""
    text = "" if pd.isna(judged["truth"]) else str(judged["truth"]).strip()
    truths = {**TRUTHS, class_name.lower(): True}
    if text.lower() not in truths:
        raise SegError(f"{_describe(judged)}: truth is {text!r}: say {class_name} or background, or leave it empty")
    return truths[text.lower()]
