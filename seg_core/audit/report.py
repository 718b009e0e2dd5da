"""What a judged sample says: building area with an interval, of the run and of areas, and where to look first."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray

from seg_core.audit.estimate import BUILT, Estimate, Interval, Judged, estimate_areas, estimate_run
from seg_core.audit.sample import Place, count_judged
from seg_core.audit.strata import NAMES, Survey, is_building
from seg_core.grid import split
from seg_core.imagery.georef import lonlat, position
from seg_core.run.area_files import area_table, check_id
from seg_core.run.zonal import Areas, count_pixels, pair_tiles
from seg_core.threads import count_cpus, for_each

LOOK_FIRST = 10  # tiles
AREA_FIGURES = ("area_m2", "mapped_m2", "building_m2", "building_low_m2", "building_high_m2", "places", "wrong")


class Audit(NamedTuple):
    """A judged sample, and the estimate that follows from it."""

    survey: Survey
    places: Sequence[Place]
    truths: Sequence[bool | None]
    judged: Judged
    estimate: Estimate


def audit_run(survey: Survey, places: Sequence[Place], truths: Sequence[bool | None]) -> Audit:
    """Estimate what is wrong with a run from places and their truth. Raises SegError if there are too few."""
    judged = count_judged(places, truths)
    return Audit(survey, places, truths, judged, estimate_run(survey.m2, judged, survey.names))


def figures(audit: Audit) -> dict[str, Any]:
    """Return the figures of the whole run. Areas are in km2; `_low` and `_high` bound 95 %."""
    estimate = audit.estimate
    return {
        "places": len(audit.places),
        "judged": int(audit.judged.places.sum()),
        "wrong": int(audit.judged.wrong.sum()),
        "mapped_km2": float(audit.survey.m2[BUILT].sum()) / 1e6,
        **_bounds("building", estimate.building_m2, "_km2", 1e-6),
        **_bounds("users_accuracy", estimate.users_accuracy),
        **_bounds("producers_accuracy", estimate.producers_accuracy),
        **_bounds("overall_accuracy", estimate.overall_accuracy),
    }


def _bounds(name: str, interval: Interval, unit: str = "", factor: float = 1.0) -> dict[str, float | None]:
    values = {"": interval.estimate, "_low": interval.low, "_high": interval.high}
    return {f"{name}{bound}{unit}": None if np.isnan(each) else float(each) * factor for bound, each in values.items()}


def strata_table(audit: Audit) -> list[dict[str, Any]]:
    """Return a row for each stratum that the run has: its area, its judged places, and the share that is wrong."""
    judged = audit.judged
    return [
        {
            "stratum": name,
            "km2": float(m2) / 1e6,
            "places": int(judged.places[at]),
            "wrong": int(judged.wrong[at]),
            "share_wrong": float(audit.estimate.shares[at]),
        }
        for at, (name, m2) in enumerate(zip(audit.survey.names, audit.survey.m2, strict=True))
        if m2
    ]


def look_first(audit: Audit, number: int = LOOK_FIRST) -> list[dict[str, Any]]:
    """Return the tiles where the most ground is expected to be wrong, from their strata: the worst one first."""
    survey, shares = audit.survey, audit.estimate.shares
    wrong = [tiles.m2 @ shares for tiles in survey.tiles]
    part = np.repeat(np.arange(len(wrong)), [len(each) for each in wrong])
    tile = np.concatenate([np.arange(len(each)) for each in wrong])
    m2 = np.concatenate(wrong)
    found = []
    for at in np.argsort(-m2, kind="stable")[:number]:
        image, window = survey.parts[part[at]].scene, survey.tiles[part[at]].windows[tile[at]]
        assert image.crs is not None  # see survey_run
        middle = np.array([window.row_off + window.height / 2]), np.array([window.col_off + window.width / 2])
        lon, lat = lonlat(image.crs, image.transform, *middle)
        place = {"scene_id": image.scene_id, "row_off": window.row_off, "col_off": window.col_off}
        found.append({**place, "lon": float(lon[0]), "lat": float(lat[0]), "expected_wrong_m2": float(m2[at])})
    return found


def wrong_places(audit: Audit) -> list[dict[str, Any]]:
    """Return the judged places that the run has wrong."""
    return [
        {
            "place": number,
            "scene_id": place.scene_id,
            "row": place.row,
            "col": place.col,
            "mapped": audit.survey.describe(is_building(place.stratum)),
            "truth": audit.survey.describe(truth),
        }
        for number, (place, truth) in enumerate(zip(audit.places, audit.truths, strict=True), 1)
        if truth is not None and truth != is_building(place.stratum)
    ]


def audit_areas(audit: Audit, areas: Areas, report: Callable[[str], None] = lambda _: None) -> geopandas.GeoDataFrame:
    """Estimate the building area of each area with an interval. Returns a row for each, in their order and CRS.

    The columns are the id; `area_m2`, of the whole area; `mapped_m2`, what the run says; `building_m2`,
    `building_low_m2` and `building_high_m2`, corrected; and the number of judged `places` within, and of `wrong` ones.
    All but `area_m2` are null for an area in which the run holds no data. `report` is called with a text for each part.
    """
    check_id(areas, AREA_FIGURES)
    areas.project_to(audit.survey.plan.images)
    m2 = np.zeros((len(areas.frame), len(NAMES)))
    numbers = range(len(audit.survey.parts))
    for number, found in enumerate(for_each(partial(_strata_of_part, audit.survey, areas), numbers, count_cpus()), 1):
        for area, strata in found:
            m2[area] += strata
        report(f"{number} of {len(numbers)} parts")
    within = _judge_areas(audit, areas)
    building = estimate_areas(m2, within, audit.judged)
    values = {
        "mapped_m2": m2[:, BUILT].sum(axis=1),
        "building_m2": building.estimate,
        "building_low_m2": building.low,
        "building_high_m2": building.high,
        "places": within.places.sum(axis=1),
        "wrong": within.wrong.sum(axis=1),
    }
    return area_table(areas, values, m2.sum(axis=1) > 0)


def _strata_of_part(survey: Survey, areas: Areas, number: int) -> list[tuple[int, NDArray[np.float64]]]:
    """Return the ground area in each stratum, of each area, within a part."""
    part, found = survey.parts[number], []
    tiles = list(split(part.window, survey.plan.settings.tile_size))
    pairs = pair_tiles(areas, part.scene, tiles)
    if not len(pairs.tile):
        return []
    read = {tile.window.origin: tile for tile in survey.read_part(number)}
    for at, area, piece in zip(*pairs, strict=True):
        tile = read.get(tiles[at].origin)
        if tile is None:
            continue
        if piece is None:
            found.append((int(area), tile.areas()))
            continue
        layers = {name: tile.strata == stratum for stratum, name in enumerate(NAMES)}
        for _, pixels in count_pixels(layers, tile.window, [(int(area), piece)]):
            found.append((int(area), np.array([pixels[name] for name in NAMES]) * tile.pixel_m2))
    return found


def _judge_areas(audit: Audit, areas: Areas) -> Judged:
    """Return what was judged within each area, `(areas, 5)`, in the CRS of each place's scene."""
    found = Judged(*np.zeros((2, len(areas.frame), len(NAMES)), np.int64))
    for place, truth in zip(audit.places, audit.truths, strict=True):
        if truth is None:
            continue
        image = audit.survey.parts[place.part].scene
        assert image.crs is not None  # see survey_run
        point = shapely.Point(*position(image.transform, place.row + 0.5, place.col + 0.5))
        within = areas.projected(image.crs).tree.query(point, predicate="intersects")
        found.places[within, place.stratum] += 1
        found.wrong[within, place.stratum] += truth != is_building(place.stratum)
    return found
