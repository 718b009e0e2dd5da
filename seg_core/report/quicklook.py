"""The imagery under the map, with few pixels: a picture of each file, where it lies."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from rasterio.transform import Affine
from rasterio.warp import reproject

from seg_core.chips import Valid
from seg_core.errors import SegError
from seg_core.imagery.decimated import read_decimated
from seg_core.imagery.georef import Transform
from seg_core.imagery.scene import Scene
from seg_core.plots.pictures import Rgb
from seg_core.report.frame import Box, Frame
from seg_core.report.pictures import data_uri, encode_image, shrink, to_rgb
from seg_core.run.places import relocate
from seg_core.run.plan import Plan
from seg_core.threads import count_cpus, for_each

NUM_PIXELS = 8_000_000  # of all pictures together, about
MAX_BYTES = 3_500_000  # of all pictures together: they are made smaller until they fit
SMALLER = 0.8  # of the sides, each time
MAX_FILES = 1000  # that are opened; of more, some are chosen evenly


class Picture(NamedTuple):
    """A picture of a file, and the rectangle of the map that it fills."""

    rgb: Rgb
    valid: Valid
    box: Box


@dataclass
class Quicklook:
    """The imagery of a run to look at."""

    pictures: list[Picture] = field(default_factory=list)  # later ones lie on top of earlier ones
    num_files: int = 0
    num_chosen: int = 0
    problems: list[str] = field(default_factory=list)  # a line for each file that can't be read

    @cached_property
    def uris(self) -> list[str]:
        """URIs that hold the pictures themselves, with MAX_BYTES together at most."""
        return _encode_within(self.pictures, MAX_BYTES)

    @property
    def boxes(self) -> list[Box]:
        """Where the pictures lie on the map."""
        return [picture.box for picture in self.pictures]


def draw_quicklook(plan: Plan, frame: Frame, report: Callable[[str], None] = lambda _: None) -> Quicklook:
    """Draw the files of a run. Those that can't be read, or have changed, are left out and named.

    `report` is called with a text for each file. Memory does not grow with the imagery.
    """
    files = plan.scenes[1:] if plan.settings.mosaic else plan.scenes
    numbers = np.unique(np.linspace(0, len(files) - 1, min(len(files), MAX_FILES)).astype(int))
    pixels = sum(files[at].window.num_pixels for at in numbers)
    factor = max(1.0, (pixels / NUM_PIXELS) ** 0.5)
    found = Quicklook(num_files=len(files), num_chosen=len(numbers))

    def draw(number: int) -> Picture | str:
        try:
            return _draw(plan, frame, files[number], factor)
        except SegError as error:
            return str(error)

    # The first lies on top of the others, because in a mosaic its pixels count.
    for done, picture in enumerate(for_each(draw, numbers[::-1].tolist(), count_cpus()), 1):
        report(f"{done:,} of {len(numbers):,} files")
        if isinstance(picture, str):
            found.problems.append(picture)
        else:
            found.pictures.append(picture)
    return found


def _draw(plan: Plan, frame: Frame, scene: Scene, factor: float) -> Picture:
    """Draw a file, with `factor` x `factor` of its pixels for one."""
    there = replace(scene, uri=relocate(scene.uri, plan.places))
    pixels, valid = read_decimated(there, factor, plan.settings.scale)
    shape = max(1, round(scene.height / factor)), max(1, round(scene.width / factor))
    rgb, valid = shrink(to_rgb(pixels), valid, shape)
    a, b, c, d, e, f = scene.transform
    if frame.crs is None or (scene.crs == frame.crs and a > 0 > e and b == d == 0):
        return Picture(rgb, valid, frame.box(scene))
    across, down = scene.width / shape[1], scene.height / shape[0]
    return _warp(rgb, valid, (a * across, b * down, c, d * across, e * down, f), scene, frame)


def _warp(rgb: Rgb, valid: Valid, transform: Transform, scene: Scene, frame: Frame) -> Picture:
    """Turn the picture of a scene so that its north is at the top, in the CRS of the map."""
    box = frame.box(scene)
    width, height = box.right - box.left, box.top - box.bottom
    columns = max(1, round((valid.size * width / (height * frame.aspect)) ** 0.5))
    rows = max(1, round(valid.size / columns))
    warped, _ = reproject(
        np.concatenate([np.moveaxis(rgb, -1, 0), valid[None].astype(np.uint8) * 255]),
        np.zeros((4, rows, columns), np.uint8),
        src_crs=scene.crs,
        dst_crs=frame.crs,
        src_transform=Affine(*transform),
        dst_transform=Affine(width / columns, 0.0, box.left, 0.0, -height / rows, box.top),
    )
    return Picture(to_rgb(warped[:3]), warped[3] > 0, box)


def _encode_within(pictures: list[Picture], most: int) -> list[str]:
    """Encode pictures, smaller and smaller until they have so many bytes together at most."""
    share = 1.0
    while True:
        shapes = [tuple(max(1, round(side * share)) for side in each.valid.shape) for each in pictures]
        smaller = (shrink(each.rgb, each.valid, shape) for each, shape in zip(pictures, shapes, strict=True))
        uris = [data_uri(encode_image(rgb, valid), "webp") for rgb, valid in smaller]
        if sum(map(len, uris)) <= most or share < SMALLER**20:
            return uris
        share *= SMALLER
