"""Describe the rasters of an image as a STAC item: where it is, when it was taken, what was found, and the files."""

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from pyproj import CRS

from seg_core.errors import SegError
from seg_core.grid import num_splits
from seg_core.imagery.georef import footprints, split_at_antimeridian
from seg_core.imagery.geotiff import Bands
from seg_core.imagery.qgis_style import style_path
from seg_core.imagery.scene import Scene
from seg_core.run.part_reading import read_part_table
from seg_core.run.parts import Locations
from seg_core.run.plan import Part
from seg_core.run.stac_model import Model
from seg_core.run.stac_terms import (
    GEOJSON,
    JSON,
    Period,
    Result,
    check_library,
    date_fields,
    extension,
    find_period,
    plain_id,
    plain_name,
    relative_link,
    write_json,
)
from seg_core.run.sums import COLUMNS, add_sums, sum_table

if TYPE_CHECKING:
    import pystac

EXTENSIONS = [
    extension(name) for name in ("classification/v2.0.0", "processing/v1.2.0", "projection/v2.0.0", "raster/v2.0.0")
]
COG, STYLE = "image/tiff; application=geotiff; profile=cloud-optimized", "application/xml"
DIGITS = 8  # decimals of a degree, about a millimetre

Box = tuple[float, float, float, float]  # west, south, east, north, in degrees
Rasters = Mapping[str, tuple[str, Bands]]
"""The path of each raster of an image and what it holds, by the name of its kind."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What the STAC items of an export have in common. It travels to the processes that write them."""

    folder: str
    name: str  # of the collection
    class_name: str  # of what the model finds
    model: Model | None
    properties: Mapping[str, Any]  # of all items
    tile_size: int  # px
    created: datetime  # when the run was made: UTC without a time zone, as those of scenes
    period: Period | None  # when the scenes were taken, if one image is made of them
    is_joined: bool  # whether scenes are joined that were segmented each by itself

    @property
    def collection(self) -> str:
        """The path of the collection."""
        return f"{self.folder}/collection.json"

    @property
    def model_item(self) -> str:
        """The path of the item of the model."""
        return f"{self.folder}/model.json"

    def item_id(self, path: str) -> str:
        """Return the id of the item at a path, which follows from where it is in the folder."""
        return plain_id(os.path.splitext(posixpath.relpath(path, self.folder))[0])

    def period_of(self, image: Scene) -> Period:
        """Return from when to when an image was taken."""
        return self.period or find_period([image.captured], self.created)


def item_path(raster: str) -> str:
    """Return the path of the STAC item of a mask at a path."""
    return os.path.splitext(raster)[0] + ".json"


def write_item(
    catalogue: Catalogue, path: str, image: Scene, parts: Sequence[Part], there: Locations, rasters: Rasters
) -> Result:
    """Write the STAC item of an image, which describes its rasters and adds up its tiles.

    Returns its path, and the error if that can't be done.
    """
    try:
        check_library()  # in this process, which may be on another node
        properties = {"title": image.scene_id, **catalogue.properties, **_place(image)}
        item = _make_item(catalogue, path, image, properties | _add_up(catalogue, parts, there))
    except SegError as error:
        return path, error
    for name, asset in _assets(catalogue, path, rasters).items():
        item.add_asset(name, asset)
    return write_json(path, item.to_dict(include_self_link=False, transform_hrefs=False))


def _make_item(catalogue: Catalogue, path: str, image: Scene, properties: dict[str, Any]) -> "pystac.Item":
    """Return the item of an image, without its assets."""
    import pystac

    geometry, box = find_outline(image)
    item = pystac.Item(
        catalogue.item_id(path),
        geometry,
        list(box) if box else None,
        **date_fields(catalogue.period_of(image)),
        properties=properties,
        stac_extensions=list(EXTENSIONS),
        collection=catalogue.name,
    )
    item.add_links(_links(catalogue, path))
    return item


def find_outline(image: Scene) -> tuple[dict[str, Any] | None, Box | None]:
    """Return the outline of an image as GeoJSON and its bounds, in degrees; None if it has no place."""
    found = footprints(image.crs, image.transform, [image.window]) if image.crs else np.array([None])
    (polygon,), (box,) = split_at_antimeridian(found)
    if polygon is None:
        return None, None
    west, south, east, north = (round(side, DIGITS) for side in box)
    rounded = shapely.transform(polygon, lambda corners: corners.round(DIGITS))
    return json.loads(shapely.to_geojson(rounded)), (west, south, east, north)


def _place(image: Scene) -> dict[str, Any]:
    """Return the properties that say where the pixels of an image are."""
    system = CRS.from_user_input(image.crs) if image.crs else None
    authority = system.to_authority(min_confidence=100) if system else None
    wkt = {"proj:wkt2": system.to_wkt()} if system and not authority else {}
    return {
        **({"gsd": image.gsd_m} if image.gsd_m else {}),
        "proj:code": ":".join(authority) if authority else None,
        **wkt,
        "proj:shape": [image.height, image.width],
        "proj:transform": list(image.transform),
    }


def _add_up(catalogue: Catalogue, parts: Sequence[Part], there: Locations) -> dict[str, Any]:
    """Return the figures of an image, from the rows of its tiles: those that are known.

    Where scenes are joined, their ground may count twice. Then there are only numbers of tiles.
    """
    planned = sum(num_splits(part.window, catalogue.tile_size) for part in parts)
    found = add_sums([sum_table(read_part_table(location, COLUMNS)) for location in there.values()])
    done, failed = found.pop("tiles"), found.pop("failed")
    tiles = {"planned_tiles": planned, "failed_tiles": failed, "missing_tiles": planned - done - failed}
    figures = tiles if catalogue.is_joined else {**tiles, **found}
    return {f"aerial_seg:{name}": value for name, value in figures.items() if value is not None}


def _assets(catalogue: Catalogue, path: str, rasters: Rasters) -> "dict[str, pystac.Asset]":
    """Return the rasters of an image and their styles as assets of the item at a path."""
    import pystac

    assets = {}
    for kind, (raster, bands) in rasters.items():
        described = _describe(catalogue, kind, bands)
        title = f"{kind.capitalize()} of {catalogue.class_name}"
        assets[kind] = pystac.Asset(relative_link(raster, path), title, None, COG, ["data"], described)
        style, name = style_path(raster), "style" if kind == "mask" else f"{kind}_style"
        assets[name] = pystac.Asset(relative_link(style, path), f"Style for QGIS: {kind}", None, STYLE, ["style"])
    return assets


def _describe(catalogue: Catalogue, kind: str, bands: Bands) -> dict[str, Any]:
    """Return what the band of a raster holds. Without a nodata value, an internal mask marks nodata."""
    scale = {"raster:scale": bands.scale} if bands.scale != 1 else {}
    nodata = {} if bands.nodata is None else {"nodata": bands.nodata}
    band = {"name": kind, "data_type": bands.dtype, **nodata, "raster:sampling": "area", **scale}
    return {"bands": [band], **(_classes(catalogue.class_name) if kind == "mask" else {})}


def _classes(class_name: str) -> dict[str, Any]:
    """Return the values of a mask as the classification extension has them."""
    values = ((0, f"not {class_name}", "background"), (1, class_name, plain_name(class_name, "class-1")))
    classes = [{"value": value, "name": name, "description": text} for value, text, name in values]
    return {"classification:classes": classes}


def _links(catalogue: Catalogue, path: str) -> "list[pystac.Link]":
    import pystac

    up = relative_link(catalogue.collection, path)
    links = [pystac.Link(rel, up, JSON, catalogue.name) for rel in ("root", "parent", "collection")]
    return [*links, *model_links(catalogue, path)]


def model_links(catalogue: Catalogue, path: str) -> "list[pystac.Link]":
    """Return the link to the item of the model, if there is one, from the file at a path."""
    import pystac

    if catalogue.model is None:
        return []
    name = {"mlm:name": catalogue.model.name}
    return [pystac.Link("derived_from", relative_link(catalogue.model_item, path), GEOJSON, extra_fields=name)]
