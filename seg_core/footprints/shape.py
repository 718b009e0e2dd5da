"""How footprints are drawn: which ones, with which outlines, and in which CRS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pyproj import CRS

from seg_core.errors import SegError
from seg_core.imagery.area_projection import LONLAT, parse_crs
from seg_core.imagery.georef import footprints, split_at_antimeridian
from seg_core.imagery.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How footprints are drawn."""

    crs: str | None  # None: coordinates of pixels
    cut: bool = False  # whether some are cut at the antimeridian, so that all are MultiPolygons
    min_area: float = 0.0  # m2 of its pixels; smaller ones are left out
    simplify: float = 0.0  # m that an outline may be off the pixels
    regularize: bool = False  # whether outlines get right angles

    @property
    def is_geographic(self) -> bool:
        """Whether coordinates are longitude and latitude, from -180 to 180 degrees."""
        return self.crs is not None and CRS.from_user_input(self.crs).is_geographic

    @property
    def geometry_type(self) -> str:
        """The type of all geometries."""
        return "MultiPolygon" if self.cut else "Polygon"


def make_shape(
    images: Sequence[Scene],
    crs: str | None = None,
    min_area: float = 0.0,
    simplify: float = 0.0,
    regularize: bool = False,
) -> Shape:
    """Check how footprints of images are to be drawn.

    `crs` is by default that of all images, or else longitude and latitude. The coordinates of images without a CRS are
    pixels. Raises SegError for an unknown CRS, for sizes that are negative or that images without a CRS don't have, and
    if only some images have a CRS.
    """
    for option, value, unit in (("--min-area", min_area, "square metres"), ("--simplify", simplify, "metres")):
        if not 0 <= value < math.inf:
            raise SegError(f"{option} {value:g}: say {unit}, 0 or more")
    if simplify and regularize:
        raise SegError("--simplify, --regularize: choose one: simplifying would undo right angles")
    chosen = _choose_crs(images, crs)
    if chosen is None and (min_area or simplify):
        raise SegError(f"--min-area, --simplify: {images[0].scene_id} has no CRS, so that its metres are not known")
    shape = Shape(crs=chosen, min_area=min_area, simplify=simplify, regularize=regularize)
    return replace(shape, cut=shape.is_geographic and _cross_antimeridian(images))


def _choose_crs(images: Sequence[Scene], wanted: str | None) -> str | None:
    systems = {image.crs for image in images}
    bare = [image.scene_id for image in images if image.crs is None]
    if bare and (wanted or len(systems) > 1):
        if wanted:
            raise SegError(f"--crs {wanted}: {bare[0]} has no CRS to convert from: leave it out")
        raise SegError(f"{bare[0]}: has no CRS, and other scenes have one: segment it in a run of its own")
    if wanted is None:
        return systems.pop() if len(systems) == 1 else LONLAT
    system = parse_crs(wanted)
    if not (system.is_projected or system.is_geographic):
        raise SegError(f"--crs {wanted}: is not that of a map ({system.type_name}): name another one")
    return str(system.to_string())


def _cross_antimeridian(images: Sequence[Scene]) -> bool:
    """Whether an image crosses the antimeridian."""
    outlines = np.array([footprints(str(image.crs), image.transform, [image.window])[0] for image in images], object)
    return any(each.geom_type == "MultiPolygon" for each in split_at_antimeridian(outlines)[0] if each is not None)
