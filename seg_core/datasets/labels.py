"""Labels of scenes as people have them, vectors or rasters, as class indices on each scene's own grid."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory, mkdtemp
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.burning import burn
from seg_core.imagery.extents import describe_bounds, describe_extent
from seg_core.imagery.headers import read_scene
from seg_core.imagery.labels import AlignedLabel, find_label, open_label, overlaps
from seg_core.imagery.scene import Scene
from seg_core.imagery.vector_formats import is_vector
from seg_core.imagery.vectors import (
    PolygonIndex,
    Source,
    Tally,
    index_polygons,
    open_vectors,
    read_bounds,
)
from seg_core.storage.files import exists, stat

BACKGROUND = "background"
BUILDING = "building"
ONE, WHITE = 1, 255  # what buildings are in a label raster
BLOCK = 1024  # px: side of what is read of a label raster at once, to see what it holds


class Labels(Protocol):
    """Labels of scenes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, the background first."""

    @property
    def tally(self) -> Tally | None:
        """What was read of a vector file; None of a raster."""

    def read(self, scene: Scene, window: Window) -> NDArray[np.uint8]:
        """Return the class index of each pixel of a window, `uint8 (height, width)`, and MISSING where unknown."""


@dataclass(frozen=True)
class VectorLabels:
    """Polygons; what none covers is background."""

    index: PolygonIndex
    names: tuple[str, ...]
    values: NDArray[np.uint8]  # the class of each value in the index
    all_touched: bool

    @property
    def tally(self) -> Tally:
        """What was read of the file."""
        return self.index.tally

    def read(self, scene: Scene, window: Window) -> NDArray[np.uint8]:
        """Return the class index of each pixel of a window, `uint8 (height, width)`."""
        return burn(self.index, scene, window, self.values, self.all_touched)


@dataclass(frozen=True)
class RasterLabels:
    """Rasters of one band: 0 is background, `building` is building, `missing` and what holds no data is unknown."""

    aligned: dict[str, AlignedLabel]  # by the id of the scene, whose URI may change
    building: int
    missing: int | None = None
    names: tuple[str, ...] = (BACKGROUND, BUILDING)
    tally: Tally | None = field(default=None, init=False)

    def read(self, scene: Scene, window: Window) -> NDArray[np.uint8]:
        """Return the class index of each pixel of a window, `uint8 (height, width)`, and MISSING where unknown."""
        if scene.scene_id not in self.aligned:
            return np.full(window.shape, MISSING, np.uint8)
        (pixels,), known = self.aligned[scene.scene_id].read(window)
        return np.where(known & (pixels != self.missing), pixels == self.building, MISSING).astype(np.uint8)


@dataclass(frozen=True)
class AreaLabels:
    """Labels within an area of interest. Outside of it they are MISSING."""

    labels: Labels
    area: PolygonIndex

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.labels.names

    @property
    def tally(self) -> Tally | None:
        """What was read of a vector file."""
        return self.labels.tally

    def read(self, scene: Scene, window: Window) -> NDArray[np.uint8]:
        """Return the class index of each pixel of a window, `uint8 (height, width)`, and MISSING where unknown."""
        inside = burn(self.area, scene, window, np.ones(1, np.uint8))
        if not inside.any():
            return np.full(window.shape, MISSING, np.uint8)
        return np.where(inside, self.labels.read(scene, window), MISSING).astype(np.uint8)


@dataclass(frozen=True)
class LabelSettings:
    """How labels are to be read."""

    class_column: str | None = None  # attribute that names the class of a polygon; without it all are buildings
    classes: tuple[str, ...] = ()  # names of classes; empty: those that the attribute has
    all_touched: bool = False
    area: str | None = None  # vector file of the area of interest


@contextmanager
def open_labels(path: str, scenes: Sequence[Scene], settings: LabelSettings) -> Iterator[Labels]:
    """Open the labels of scenes, which stay readable within the block.

    Raises SegError for labels that can't be placed on the scenes, or don't touch them.
    """
    with TemporaryDirectory(prefix="seg-labels-") as folder:
        labels: Labels = (
            _open_vectors(path, scenes, settings, folder) if is_vector(path) else _open_rasters(path, scenes, settings)
        )
        if settings.area is not None:
            labels = AreaLabels(labels, _index(settings.area, scenes, folder, None))
        yield labels


def _index(path: str, scenes: Sequence[Scene], folder: str, column: str | None) -> PolygonIndex:
    """Index a file of polygons. Raises SegError if none of them touches a scene."""
    unplaced = next((scene for scene in scenes if scene.crs is None), None)
    if unplaced is not None:
        raise SegError(
            f"{unplaced.uri}: has no CRS, so {path} can't be placed on it: add one (gdal_edit.py -a_srs EPSG:CODE)"
        )
    source = open_vectors(path)
    index = index_polygons(source, scenes, mkdtemp(dir=folder), column)
    if not index.tally.numbers:
        raise SegError(f"{path}: {_describe_miss(index.tally, source, scenes)}")
    return index


def _open_vectors(path: str, scenes: Sequence[Scene], settings: LabelSettings, folder: str) -> VectorLabels:
    index = _index(path, scenes, folder, settings.class_column)
    if settings.class_column is None:
        if settings.classes:
            raise SegError(
                f"--classes {','.join(settings.classes)}: add --class-column NAME, the attribute that holds them"
            )
        return VectorLabels(index, (BACKGROUND, BUILDING), np.ones(1, np.uint8), settings.all_touched)
    found = index.tally.numbers
    if None in found:
        raise SegError(f"{path}: a polygon has no {settings.class_column}: fill it in, or remove the polygon")
    values = [value for value in found if value is not None]
    wanted = settings.classes or tuple(sorted(values))
    if BACKGROUND in settings.classes[1:]:
        raise SegError(
            f"--classes {','.join(wanted)}: {BACKGROUND} lies under all others, and cuts nothing out of them: name it "
            "first, or cut the holes out of the polygons"
        )
    names = (BACKGROUND, *(name for name in wanted if name != BACKGROUND))
    absent = next((value for value in values if value not in names), None)
    if absent is not None:
        raise SegError(f"{path}: {settings.class_column} is {absent!r}, which is not in --classes {','.join(wanted)}")
    if not 2 <= len(names) < MISSING:
        raise SegError(
            f"{path}: {settings.class_column} names {len(names) - 1} classes: 1 to {MISSING - 2} can be learnt"
        )
    numbers = np.array([names.index(value) for value in values], np.uint8)
    return VectorLabels(index, names, numbers, settings.all_touched)


def _describe_miss(tally: Tally, source: Source, scenes: Sequence[Scene]) -> str:
    """Say why a vector file holds nothing for the scenes."""
    if tally.read:
        dropped = describe_dropped(tally)
        return f"holds no polygon on the scenes, only {dropped}: buffer lines and points, or close the lines"
    here = describe_bounds(read_bounds(source), source.crs)
    return f"no polygon lies on a scene: labels are at {here}, scenes at {describe_extent(scenes)}"


def describe_dropped(tally: Tally) -> str:
    """Return the numbers of dropped features by kind, as text; empty if there are none."""
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(tally.dropped.items()) if number)


def _open_rasters(path: str, scenes: Sequence[Scene], settings: LabelSettings) -> RasterLabels:
    if settings.class_column is not None or settings.classes or settings.all_touched:
        raise SegError(f"{path}: a raster: --class-column, --classes and --all-touched are for vector labels")
    if stat(path) is None and exists(path):
        found = {scene.uri: find_label(path, scene.scene_id) for scene in scenes}
        headers = {label: _read_header(label) for label in found.values()}
    else:
        headers = {path: _read_header(path)}
        found = {scene.uri: path for scene in _find_touched(headers[path], scenes)}
    aligned = {scene.scene_id: open_label(found[scene.uri], scene, (0, ONE)) for scene in scenes if scene.uri in found}
    by_file = {label: _values_of(header) for label, header in headers.items()}
    for label, values in by_file.items():
        if unknown := values - {0, ONE, WHITE}:
            raise SegError(f"{label}: holds {min(unknown)}: in a label raster 0 is background, 1 or 255 building")
    present = set().union(*by_file.values())
    both = any({ONE, WHITE} <= values for values in by_file.values())
    if {ONE, WHITE} <= present and not both:
        one, white = (next(label for label, values in by_file.items() if value in values) for value in (ONE, WHITE))
        raise SegError(f"{path}: buildings are {ONE} in {one} and {WHITE} in {white}: give all labels the same value")
    return RasterLabels(aligned, ONE if both or WHITE not in present else WHITE, WHITE if both else None)


def _read_header(path: str) -> Scene:
    header = read_scene(path, path)
    if len(header.bands) != 1:
        raise SegError(f"{path}: {len(header.bands)} bands: a label raster has one, 0 background, 1 or 255 building")
    return header


def _find_touched(header: Scene, scenes: Sequence[Scene]) -> list[Scene]:
    """Find the scenes that a label raster touches."""
    path = header.uri
    touched = [scene for scene in scenes if scene.crs is None or header.crs is None or overlaps(header, scene)]
    if not touched:
        here, there = describe_extent([header]), describe_extent(scenes)
        raise SegError(f"{path}: does not touch a scene: labels are at {here}, scenes at {there}")
    if len(touched) > 1 and (header.crs is None or any(scene.crs is None for scene in touched)):
        raise SegError(
            f"{path}: one raster for {len(touched)} scenes, which no georeference places: name a folder with a label "
            f"for each"
        )
    return touched


def _values_of(header: Scene) -> set[int]:
    """Values of a label raster where it holds data."""
    label, values = AlignedLabel(replace(header, blank_is_data=True), header), set[int]()
    for window in split(header.window, BLOCK):
        pixels, known = label.read(window)
        values |= set(np.unique(pixels[0][known]).tolist())
    return values
