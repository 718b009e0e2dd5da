"""The coordinates of the map: those of the scenes' CRS, or degrees where they differ, or pixels where one has none."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from seg_core.imagery.area_projection import LONLAT, antimeridian_x
from seg_core.imagery.georef import lonlat, position
from seg_core.imagery.scene import Scene

SAMPLES = 9  # points along a side of a scene, whose outline may be curved on the map
GAP = 0.05  # between scenes without a place, relative to the largest of them

Coordinates = NDArray[np.float64]


class Box(NamedTuple):
    """A rectangle of the map, in its coordinates."""

    left: float
    bottom: float
    right: float
    top: float


@dataclass(frozen=True)
class Frame:
    """How pixels of images become coordinates of the map."""

    images: tuple[Scene, ...]
    crs: str | None  # of the map; None: pixels, and y is negative, as rows count downwards

    def locate(self, scene: Scene, rows: Coordinates, cols: Coordinates) -> tuple[Coordinates, Coordinates]:
        """Return x and y of pixel corners of an image, or of a scene of a mosaic."""
        if self.crs is None:
            top, left = self._offsets[scene.scene_id]
            return left + cols, -(top + rows)
        if scene.crs == self.crs:
            x, y = position(scene.transform, rows, cols)
            return np.asarray(x) + self._shift(scene), np.asarray(y)
        lon, lat = lonlat(scene.crs or LONLAT, scene.transform, rows, cols)
        return lon + self.turns(lon), lat

    def turns(self, lon: Coordinates) -> Coordinates:
        """Return the multiples of 360 degrees that bring longitudes near those of the first image."""
        return 360 * np.round((self._first_longitude - lon) / 360)

    def box(self, scene: Scene) -> Box:
        """Return the rectangle around an image, or a scene of a mosaic."""
        rows, cols = np.meshgrid(np.linspace(0, scene.height, SAMPLES), np.linspace(0, scene.width, SAMPLES))
        x, y = self.locate(scene, rows.ravel(), cols.ravel())
        return Box(float(x.min()), float(y.min()), float(x.max()), float(y.max()))

    def _shift(self, scene: Scene) -> float:
        """Return by how much x of a scene in the CRS of the map is moved, so that it is near the first image.

        Scenes on both sides of the antimeridian would be a turn apart, if the CRS ends there.
        """
        half = antimeridian_x(str(self.crs))
        return 0.0 if half is None else 2 * half * round((_middle_x(self.images[0]) - _middle_x(scene)) / (2 * half))

    @cached_property
    def _first_longitude(self) -> float:
        first = self.images[0]
        return float(lonlat(first.crs or LONLAT, first.transform, np.zeros(1), np.zeros(1))[0][0])

    @cached_property
    def _offsets(self) -> dict[str, tuple[float, float]]:
        """Where images without a place begin: they are laid out in rows, about as many as columns."""
        columns = math.ceil(math.sqrt(len(self.images)))
        height, width = (max(getattr(each, side) for each in self.images) for side in ("height", "width"))
        places = (divmod(number, columns) for number in range(len(self.images)))
        offsets = ((row * height * (1 + GAP), col * width * (1 + GAP)) for row, col in places)
        return {image.scene_id: offset for image, offset in zip(self.images, offsets, strict=True)}

    @property
    def is_geographic(self) -> bool:
        """Whether the coordinates are longitude and latitude."""
        return self.crs is not None and CRS.from_user_input(self.crs).is_geographic

    @property
    def aspect(self) -> float:
        """How much longer a unit of y is drawn than a unit of x, so that the ground is not stretched."""
        if not self.is_geographic or self.crs is None:
            return 1.0
        middle = self.images[0]
        _, lat = self.locate(middle, np.array([middle.height / 2]), np.array([middle.width / 2]))
        return 1 / max(0.05, math.cos(math.radians(float(lat[0]))))

    @property
    def unit(self) -> str:
        """What the coordinates measure in, such as `metre`."""
        return "pixel" if self.crs is None else str(CRS.from_user_input(self.crs).axis_info[0].unit_name)

    def describe(self) -> str:
        """Return a sentence that says what the coordinates of the map are."""
        if self.crs is None:
            where = "" if len(self.images) == 1 else " The images stand side by side, not where they belong."
            bare, number = sum(image.crs is None for image in self.images), len(self.images)
            who = "the imagery" if bare == number else f"{bare:,} of {number:,} images"
            return f"The place of {who} is not known (no CRS): coordinates are pixels.{where}"
        name = CRS.from_user_input(self.crs).name
        if self.crs == LONLAT:
            several = len({image.crs for image in self.images})
            return f"The scenes are in {several} CRS: the map shows longitude and latitude ({name})."
        shown = self.crs if self.crs.startswith("EPSG:") else "the scenes' CRS"
        return f"Coordinates are those of {shown} ({name}; unit: {self.unit})."


def _middle_x(scene: Scene) -> float:
    return float(position(scene.transform, scene.height / 2, scene.width / 2)[0])


def choose_frame(images: tuple[Scene, ...]) -> Frame:
    """Choose the coordinates in which all images can be drawn."""
    known = {image.crs for image in images}
    if None in known or not images:
        return Frame(images, None)
    return Frame(images, known.pop() if len(known) == 1 else LONLAT)
