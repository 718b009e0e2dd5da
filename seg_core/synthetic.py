"""Synthetic towns seen from the air at 1 m per pixel, with exact building labels.

Streets form a bent, rotated grid: (u, v) are metres in the straight grid, (x, y) are pixels in the picture. Ground is
painted immediately. Roofs and trees are only collected, because all shadows must be drawn before any roof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise, product

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Pair = tuple[float, float]
Colour = tuple[float, float, float]

GRASS, SOIL, WATER = (104, 122, 72), (150, 138, 106), (58, 82, 88)
ASPHALT, PAVEMENT, CONCRETE, MARKING = (112, 112, 114), (166, 163, 156), (148, 146, 140), (205, 205, 198)
CARS = ((225, 225, 225), (40, 42, 46), (150, 152, 156), (150, 40, 38), (48, 70, 120))
GREY_ROOFS = ((128, 126, 126), (112, 113, 116), (74, 74, 80), (102, 112, 128))
HALL_ROOFS = (*GREY_ROOFS, (222, 221, 216), (180, 166, 140))
HOUSE_ROOFS = (*HALL_ROOFS, (156, 90, 72), (138, 80, 66), (120, 92, 74))
SUBPIXEL_BITS = 4
UNIT_SQUARE = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


@dataclass(frozen=True)
class _Wing:
    """A rectangular part of a building."""

    corners: Points
    colour: Colour
    height: float
    gabled: bool


@dataclass
class _Scene:
    """The street grid, the ground painted so far, and the buildings and trees on it."""

    rng: np.random.Generator
    ground: Image
    angle: float
    phase: float
    sun: Points
    wings: list[_Wing] = field(default_factory=list)
    trees: list[tuple[float, float, float]] = field(default_factory=list)

    def to_pixel(self, u: float, v: float) -> Pair:
        u, v = u + 12 * math.sin(v / 120 + self.phase), v + 12 * math.sin(u / 150 - self.phase)
        (height, width), cos, sin = self.ground.shape[:2], math.cos(self.angle), math.sin(self.angle)
        return width / 2 + cos * u - sin * v, height / 2 + sin * u + cos * v

    def outline(self, u: float, v: float, offsets: Points) -> Points:
        """Return the pixels of a figure given in metres about (u, v), turned with the street but still right-angled."""
        (x0, y0), (x1, y1) = self.to_pixel(u, v - 1), self.to_pixel(u, v + 1)
        along = np.array((x1 - x0, y1 - y0)) / math.hypot(x1 - x0, y1 - y0)
        return offsets @ np.array(((along[1], -along[0]), along)) + ((x0 + x1) / 2, (y0 + y1) / 2)

    def pave(self, u: float, v: float, size: Pair, colour: Colour) -> None:
        _fill(self.ground, self.outline(u, v, UNIT_SQUARE * size), colour)

    def plant(self, u: float, v: float, largest: float) -> None:
        self.trees.append((*self.to_pixel(u, v), self.rng.uniform(1.5, largest)))

    def pick(self, *colours: Colour) -> Colour:
        """Return one of the colours, slightly changed in brightness and tint."""
        tint = self.rng.normal(0, 8) + self.rng.normal(0, 3, 3)
        red, green, blue = (tint + colours[self.rng.integers(len(colours))]).tolist()
        return red, green, blue


def _fill(canvas: Image, outline: Points, colour: Colour | float) -> None:
    fixed_point = np.rint(outline * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed_point], colour, shift=SUBPIXEL_BITS)


def _disc(canvas: Image, centre: Points, radius: float, colour: Colour | float) -> None:
    cv2.circle(canvas, (round(centre[0]), round(centre[1])), round(radius), colour, -1)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> NDArray[np.float32]:
    """Return smooth noise of about unit variance whose patches are `cell` pixels wide.

    The noise is `float32 (height, width, 1)`.
    """
    coarse = rng.standard_normal((height // cell + 3, width // cell + 3), dtype=np.float32)
    fine = cv2.resize(coarse, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine, np.float32)[:height, :width, None]


def _draw_ground(rng: np.random.Generator, height: int, width: int) -> Image:
    dryness = 0.35 + 0.25 * _smooth_noise(rng, height, width, 150) + 0.15 * _smooth_noise(rng, height, width, 30)
    grass, soil = np.array((GRASS, SOIL), np.float32)
    return np.asarray(grass + (soil - grass) * np.clip(dryness, 0, 1), np.uint8)


def _place_streets(rng: np.random.Generator, reach: float, spacing: Pair) -> list[Pair]:
    """Return position and half width in metres of parallel streets. Every fourth is a main street."""
    positions = np.cumsum(rng.uniform(*spacing, int(2 * reach / spacing[0]) + 2)) - reach
    return [(float(position), 6.5 if k % 4 == 1 else 3.5) for k, position in enumerate(positions)]


def _paint_streets(scene: _Scene, streets_u: list[Pair], streets_v: list[Pair], reach: float) -> None:
    steps = np.arange(-reach, reach, 8.0)
    paths = [(half, [scene.to_pixel(u, v) for v in steps]) for u, half in streets_u]
    paths += [(half, [scene.to_pixel(u, v) for u in steps]) for v, half in streets_v]
    lines = [(half, np.rint(np.multiply(path, 1 << SUBPIXEL_BITS)).astype(np.int32)) for half, path in paths]
    # Streets are painted layer by layer, so that no sidewalk crosses a junction.
    for (colour, margin), (half, line) in product(((PAVEMENT, 4), (ASPHALT, 0)), lines):
        cv2.polylines(scene.ground, [line], False, colour, int(2 * half) + margin, shift=SUBPIXEL_BITS)
    for half, line in lines:
        dashes = [line[k : k + 2] for k in range(0, len(line) - 1, 2)]
        if half > 5:
            cv2.polylines(scene.ground, dashes, False, MARKING, 1, cv2.LINE_AA, SUBPIXEL_BITS)


def _assign_land_use(scene: _Scene, streets_u: list[Pair], streets_v: list[Pair]) -> None:
    """Assign a land use to every block in or near the picture."""
    blocks, (height, width) = [], scene.ground.shape[:2]
    pairs = product(pairwise(streets_u), pairwise(streets_v))
    for ((u0, half0), (u1, half1)), ((v0, half2), (v1, half3)) in pairs:
        middle = (u0 + half0 + u1 - half1) / 2, (v0 + half2 + v1 - half3) / 2
        x, y = scene.to_pixel(*middle)
        if -90 < x < width + 90 and -90 < y < height + 90:
            blocks.append((middle, (u1 - half1 - u0 - half0 - 5, v1 - half3 - v0 - half2 - 5)))
    # A fixed deck, rather than independent draws, keeps the share of buildings similar for all seeds.
    houses, halls, park = _add_houses, _add_halls, _add_park
    deck = (houses, houses, halls, houses, houses, park, houses, houses, halls, houses, houses, houses)
    for k, (middle, extent) in zip(scene.rng.permutation(len(blocks)), blocks, strict=True):
        deck[k % len(deck)](scene, middle, extent)


def _add_houses(scene: _Scene, middle: Pair, extent: Pair) -> None:
    for inward in (-1, 1):
        v = middle[1] - extent[1] / 2
        while (lot := scene.rng.uniform(15.5, 25)) <= middle[1] + extent[1] / 2 - v:
            _add_house(scene, middle[0] - inward * extent[0] / 2, v + lot / 2, inward, (extent[0] / 2, lot))
            v += lot


def _add_house(scene: _Scene, edge: float, v: float, inward: int, lot: Pair) -> None:
    """Add garden, drive, car, trees and house of one lot. The middle of its street side is at (edge, v)."""
    rng, side = scene.rng, scene.rng.choice((-1, 1))
    setback, deep, wide = rng.uniform(3, 8), rng.uniform(8, 12), min(rng.uniform(9, 16), lot[1] - 4)
    if rng.random() < 0.5:
        scene.pave(edge + inward * lot[0] / 2, v, lot, scene.pick(GRASS, GRASS, SOIL))
    drive = v + side * (wide / 2 - 1.5)
    scene.pave(edge + inward * (setback / 2 - 1), drive, (setback + 3, 3), scene.pick(CONCRETE, PAVEMENT))
    if rng.random() < 0.5:
        scene.pave(edge - inward * 4.2, v - side * rng.uniform(0, 4), (1.2, 3.6), scene.pick(*CARS))
    for _ in range(rng.poisson(1.7)):
        scene.plant(edge + inward * rng.uniform(1, lot[0]), v + rng.uniform(-0.5, 0.5) * lot[1], 4.5)
    colour, height, parts = scene.pick(*HOUSE_ROOFS), rng.uniform(4, 7), [UNIT_SQUARE * (deep, wide)]
    if rng.random() < 0.35:
        parts.insert(0, UNIT_SQUARE * (deep, 7) + (inward * 6, side * (wide / 2 - 3.5)))
    for part in parts:
        corners = scene.outline(edge + inward * (setback + deep / 2), v, part)
        scene.wings.append(_Wing(corners, colour, height, gabled=True))


def _add_halls(scene: _Scene, middle: Pair, extent: Pair) -> None:
    """Add large, mostly flat roofs in a row, each with a yard and a car park beside it."""
    rng, deep, v = scene.rng, extent[0], middle[1] - extent[1] / 2
    while (wide := rng.uniform(32, 66)) <= middle[1] + extent[1] / 2 - v:
        centre, span, inward = v + wide / 2, rng.uniform(0.42, 0.6) * deep, rng.choice((-1, 1))
        scene.pave(middle[0], centre, (deep, wide), scene.pick(CONCRETE, ASPHALT, GRASS))
        _add_car_park(scene, middle[0] - inward * (span / 2 + 4), centre, (deep - span - 10, wide - 3))
        anchor = middle[0] + inward * (deep - span - 6) / 2
        corners = scene.outline(anchor, centre, UNIT_SQUARE * (span, wide - 7))
        scene.wings.append(_Wing(corners, scene.pick(*HALL_ROOFS), rng.uniform(6, 11), rng.random() < 0.25))
        v += wide + rng.uniform(0, 8)


def _add_car_park(scene: _Scene, u: float, v: float, size: Pair) -> None:
    scene.pave(u, v, size, scene.pick(ASPHALT))
    for row, stall in product((-1, 1), np.arange(1.5 - size[1] / 2, size[1] / 2 - 1.5, 3.0)):
        bay = u + row * (size[0] / 2 - 2.5)
        scene.pave(bay, v + stall + 1.5, (5, 0), MARKING)
        if scene.rng.random() < 0.5:
            scene.pave(bay, v + stall, (3.8, 1), scene.pick(*CARS))


def _add_park(scene: _Scene, middle: Pair, extent: Pair) -> None:
    (u, v), pond = middle, scene.rng.random() < 0.6
    scene.pave(u, v, extent, scene.pick(GRASS))
    scene.pave(u, v, (2, extent[1]), scene.pick(SOIL))
    if pond:
        turn = np.linspace(0, 2 * np.pi, 40)
        radius = 0.28 + np.sin(np.outer(turn, (2, 3)) + scene.rng.uniform(0, 6, 2)) @ (0.05, 0.03)
        shore = np.stack((np.cos(turn), np.sin(turn)), 1) * radius[:, None] * extent
        _fill(scene.ground, scene.outline(u, v, shore), WATER)
    for du, dv in scene.rng.uniform(-0.5, 0.5, (int(extent[0] * extent[1] / 80), 2)):
        if not pond or math.hypot(du, dv) > 0.38:
            scene.plant(u + du * extent[0], v + dv * extent[1], 5.5)


def _cast_shadows(scene: _Scene) -> None:
    shade = np.zeros(scene.ground.shape[:2], np.uint8)
    for wing in scene.wings:
        swept = np.vstack((wing.corners, wing.corners - scene.sun * wing.height)).astype(np.float32)
        _fill(shade, np.asarray(cv2.convexHull(swept), np.float64), 255)
    for x, y, radius in scene.trees:
        _disc(shade, (x, y) - scene.sun * radius, radius, 255)
    # Sky light brightens shadows, most of all in blue.
    light = cv2.merge([cv2.convertScaleAbs(shade, alpha=-dark, beta=255) for dark in (0.58, 0.55, 0.47)])
    cv2.multiply(scene.ground, light, scene.ground, 1 / 255)


def _draw_roofs(scene: _Scene) -> Image:
    """Draw all roofs and return the building label, `uint8 (height, width)`."""
    building, roofs = np.zeros(scene.ground.shape[:2], np.uint8), scene.ground.copy()
    for wing in scene.wings:
        _fill(building, wing.corners, 1)
        _fill(roofs, wing.corners, wing.colour)
        a, b, c, d = wing.corners
        if math.dist(a, b) < math.dist(b, c):
            a, b, c, d = b, c, d, a
        for eave in ((a, b), (c, d)) if wing.gabled else ():
            slope = (eave[0] + eave[1]) / 2 - wing.corners.mean(0)
            light = 1 + 0.18 * float(slope @ scene.sun) / math.hypot(*slope)
            plane = np.array((*eave, eave[1] - slope, eave[0] - slope))
            _fill(roofs, plane, (wing.colour[0] * light, wing.colour[1] * light, wing.colour[2] * light))
    # The label limits what is copied, because the planes' rasters may extend beyond it by a pixel.
    cv2.copyTo(roofs, building, scene.ground)
    return building


def _draw_trees(scene: _Scene, building: Image) -> None:
    height, width = building.shape
    for x, y, radius in scene.trees:
        if 0 <= x < width and 0 <= y < height and building[int(y), int(x)]:
            continue
        red, green, blue = scene.pick((58, 78, 46))
        _disc(scene.ground, np.array((x, y)), radius, (red, green, blue))
        for offset in scene.rng.normal(0, 0.35, (2, 2)) + 0.2 * scene.sun:
            _disc(scene.ground, (x, y) + offset * radius, radius / 2, (red + 14, green + 16, blue + 10))


def _apply_camera(scene: _Scene) -> Image:
    """Apply the effects of surfaces and camera: uneven brightness, a slight blur, sensor noise."""
    height, width = scene.ground.shape[:2]
    coarse, fine = (_smooth_noise(scene.rng, height, width, cell) for cell in (50, 4))
    grain = 4 * scene.rng.standard_normal(scene.ground.shape, dtype=np.float32)
    blurred = np.asarray(cv2.GaussianBlur(scene.ground, (0, 0), 0.6), np.float32)
    image = blurred * (1 + 0.04 * coarse + 0.03 * fine) + grain
    return np.asarray(np.clip(image, 0, 254), np.uint8)


def _draw_valid(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Return the valid mask, `bool (height, width)`: all of the scene but one corner.

    The corner is cut off along a ragged slanted edge.
    """
    share, reach, steps = rng.uniform(0.056, 0.07), rng.uniform(0.28, 0.45), np.linspace(0, 1, 8)
    edge = np.stack((reach * (1 - steps), 2 * share / reach * steps), 1)
    edge[1:-1] += rng.normal(0, 0.006, (6, 2))
    covered = np.ones((height, width), np.uint8)
    _fill(covered, np.vstack(([[0, 0]], edge)) * (width, height), 0)
    return covered[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))].astype(np.bool_, order="C")


def draw_town(height: int, width: int, seed: int) -> tuple[Image, Image, NDArray[np.bool_]]:
    """Draw a town at 1 m per pixel, its building label, and its valid mask.

    Returns the image, uint8 (height, width, 3) in RGB; the label, uint8 (height, width), 1 on buildings and 0
    elsewhere, without shadows and with roof edges under trees; and the valid mask, bool (height, width). One corner (5
    to 8 % of the area) is missing: it is white, without buildings and not valid. Sides should be 64 to 4096 pixels.
    Equal sizes and seeds give equal towns.
    """
    rng, reach = np.random.default_rng(seed), math.hypot(height, width) / 2 + 200
    angle, phase, azimuth = rng.uniform((-0.6, 0, 0), (0.6, 2 * np.pi, 2 * np.pi))
    sun = np.array((np.cos(azimuth), np.sin(azimuth)))
    scene = _Scene(rng, _draw_ground(rng, height, width), angle, phase, sun)
    streets_u, streets_v = _place_streets(rng, reach, (64, 94)), _place_streets(rng, reach, (110, 190))
    _paint_streets(scene, streets_u, streets_v, reach)
    _assign_land_use(scene, streets_u, streets_v)
    _cast_shadows(scene)
    building, valid = _draw_roofs(scene), _draw_valid(rng, height, width)
    _draw_trees(scene, building)
    image = _apply_camera(scene)
    image[~valid], building[~valid] = 255, 0
    return image, building, valid
