"""Describe the rasters of a run in STAC: an item for each image, and a collection of them.

    collection.json ─┬─▶ a.json ────────▶ a.tif, a_probability.tif, a.qml
                     ├─▶ north/b.json ──▶ ...
                     └─▶ model.json, which all of them are derived from

All links among these files are relative, so that the folder can be moved. The version of STAC is 1.1.0
(https://stacspec.org).
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from seg_core.errors import SegError
from seg_core.imagery.captured import YEARS, parse_date
from seg_core.imagery.scene import Scene
from seg_core.run.record import RunRecord, read_record
from seg_core.run.stac_item import Box, Catalogue, find_outline, item_path, model_links
from seg_core.run.stac_model import find_model, make_model_item
from seg_core.run.stac_terms import GEOJSON, Result, check_library, find_period, plain_id, relative_link, write_json
from seg_core.run.stored_plan import read_plan

WORLD = (-180.0, -90.0, 180.0, 90.0)
LATEST = datetime(YEARS.stop, 1, 1)  # noqa: DTZ001 - as `Scene.captured`

NOT_IN_LINKS = frozenset("#?%")  # clients take them for a fragment, a query or a code of another character

log = logging.getLogger(__name__)


def open_catalogue(run: str, folder: str, *, mosaic: bool = False, model: str | None = None) -> Catalogue:
    """Return what all STAC items of a run's rasters in a folder say, which are one with `mosaic`.

    `model` is the path of the run's bundle, if that has moved. A warning says if it is not found, and so is left out,
    and if scenes have no CRS, so that their items have no place. Raises SegError if no scene has one, if pystac is not
    installed, if there is no run, and if `model` is another bundle.
    """
    check_library()
    plan, record = read_plan(run), read_record(run)
    _check_places(plan.images)
    created, scenes = parse_date(record.created) or LATEST, plan.scenes[plan.settings.mosaic :]
    is_one = mosaic or plan.settings.mosaic
    return Catalogue(
        folder=folder,
        name=plain_id(posixpath.basename(run)),
        class_name=plan.found_class,
        model=find_model(record, created, model),
        properties=_common_properties(record),
        tile_size=plan.settings.tile_size,
        created=created,
        period=find_period([scene.captured for scene in scenes], created) if is_one else None,
        is_joined=mosaic and len(plan.images) > 1,
    )


def _check_places(images: Sequence[Scene]) -> None:
    bare = [image.scene_id for image in images if image.crs is None]
    if len(bare) == len(images):
        raise SegError("--stac: the scenes have no CRS, so that a catalogue can't say where they are: leave it out")
    if bare:
        numbers = f"{len(bare):,} of {len(images):,} scenes have no CRS"
        log.warning("--stac: %s, such as %s: their items say no place", numbers, bare[0])


def _common_properties(record: RunRecord) -> dict[str, Any]:
    """Return the properties of all items of a run."""
    finished = {"processing:datetime": record.finished} if record.finished else {}
    return {
        "processing:level": "L4",  # results of a model
        "processing:software": {"aerial-seg": record.code_version},
        **finished,
        "aerial_seg:model": record.model.hash,
        "aerial_seg:threshold": record.settings.threshold,
        "aerial_seg:normalize": record.settings.normalize,
    }


def name_items(catalogue: Catalogue, rasters: Sequence[str]) -> list[str]:
    """Return the paths of all files of a catalogue of masks at these paths.

    Raises SegError if two items would have one id, or an item the path of another file or one that no link can have.
    """
    items = [item_path(each) for each in rasters]
    own = [catalogue.model_item, catalogue.collection]
    for path in items:
        if NOT_IN_LINKS & set(posixpath.relpath(path, catalogue.folder)):
            raise SegError(f"--stac: {path}: a link with # ? or % leads elsewhere: rename the scene")
    if taken := set(own) & set(items):
        raise SegError(f"--stac: {min(taken)}: is both the catalogue's and a scene's: rename the scene, and segment it")
    numbers = Counter(catalogue.item_id(path) for path in items)
    if double := next((name for name, number in numbers.items() if number > 1), None):
        raise SegError(f"--stac: two scenes would have the id {double}: rename one, and segment it")
    return [*items, *own]


def write_collection(catalogue: Catalogue, items: Mapping[str, Scene]) -> Iterator[Result]:
    """Write the collection of items, each with its image by its path, and before it the item of the model.

    Yields the path of each, with the error if it could not be written. Without items, nothing is written.
    """
    if items and catalogue.model:
        yield write_json(catalogue.model_item, make_model_item(catalogue.model).to_dict(transform_hrefs=False))
    if items:
        yield write_json(catalogue.collection, _make_collection(catalogue, items))


def _make_collection(catalogue: Catalogue, items: Mapping[str, Scene]) -> dict[str, Any]:
    import pystac

    periods = [catalogue.period_of(image) for image in items.values()]
    span = min(start for start, _ in periods), max(end for _, end in periods)
    extent = pystac.Extent(pystac.SpatialExtent([list(_bounds(items.values()))]), pystac.TemporalExtent([list(span)]))
    text = f"Masks of {catalogue.class_name}: one for each image of the run {catalogue.name}, made by aerial-seg."
    title = f"Masks of {catalogue.class_name}: {catalogue.name}"
    collection = pystac.Collection(catalogue.name, text, extent, title, href=catalogue.collection)
    collection.catalog_type = pystac.CatalogType.SELF_CONTAINED
    for path in items:
        link = relative_link(path, catalogue.collection)
        collection.add_link(pystac.Link("item", link, GEOJSON, catalogue.item_id(path)))
    collection.add_links(model_links(catalogue, catalogue.collection))
    return collection.to_dict(include_self_link=False)


def _bounds(images: Iterable[Scene]) -> Box:
    """Return the box of all images that have a place: around the whole world if one crosses the antimeridian."""
    boxes = [box for image in images if (box := find_outline(image)[1])]
    if not boxes:
        return WORLD
    west, south, east, north = zip(*boxes, strict=True)
    if any(box[0] > box[2] for box in boxes):
        return WORLD[0], min(south), WORLD[2], max(north)
    return min(west), min(south), max(east), max(north)
