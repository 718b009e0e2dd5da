"""A run as a picture: image, truth, prediction and the coverage of each tile, side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.grey_levels import LUMA
from seg_core.grid import Window
from seg_core.plots.style import DPI, to_png
from seg_core.run.rows import Row, decode_mask

Rgb = NDArray[np.uint8]  # `(height, width, 3)`

ORANGE, WHITE, GREEN, RED = (255, 140, 0), (255, 255, 255), (0, 200, 0), (255, 40, 40)
MISSING_GREY = 128
OUTLINE = 400  # px of a picture for each px of width of an outline
BRIGHT = 0.6  # of 1, from which on a tile is lettered in black
PANEL, STRIP, GAP, TITLE = 640, 40, 10, 20  # px: side of a panel, above it for its title, around it, of its letters
TEXT_SHARE = 0.16  # of a tile's width, that a letter of the figure in it is high


class Label(NamedTuple):
    """A text in a picture."""

    row: float  # px from the picture's top to the text's middle
    col: float
    height: float  # px of the picture
    text: str
    color: str


class Panel(NamedTuple):
    """A picture with its title, and texts in it."""

    title: str
    picture: Rgb
    labels: Sequence[Label] = ()


def assemble_mask(rows: Sequence[Row], height: int, width: int) -> NDArray[np.bool_]:
    """The masks of one scene's tiles, put together, `(height, width)`."""
    mask = np.zeros((height, width), np.bool_)
    whole = Window(0, 0, height, width)
    for row in rows:
        mask[Window.from_row(row).slices(whole)] = decode_mask(row["mask"], row["height"], row["width"])
    return mask


def as_rgb(image: NDArray[np.uint8]) -> Rgb:
    """An image `uint8 (height, width, bands)` to look at: its first three bands, or its first one in grey."""
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def paint_mask(image: Rgb, mask: NDArray[np.bool_]) -> Rgb:
    """The image with the mask in orange over it."""
    painted = image.copy()
    painted[mask] = (0.35 * image[mask] + 0.65 * np.array(ORANGE)).astype(np.uint8)
    return painted


def darken(image: Rgb, cells: NDArray[np.bool_]) -> Rgb:
    """The image with these pixels at a third of their brightness."""
    painted = image.copy()
    painted[cells] //= 3
    return painted


def paint_state(image: Rgb, state: NDArray[np.uint8]) -> Rgb:
    """The image with building in orange over it, and darker where nothing is known.

    `state` is `uint8 (height, width)`: 1 is building, 0 is not, MISSING is not known.
    """
    return paint_mask(darken(image, state == MISSING), state == 1)


def paint_outlines(image: Rgb, label: NDArray[np.uint8]) -> Rgb:
    """The image with the outlines of its labelled objects in orange, and darker where the label is MISSING.

    `label` is class indices, `uint8 (height, width)`. Where classes meet, there is an outline too.
    """
    painted = darken(image, label == MISSING)
    for index in set(np.unique(label).tolist()) - {0, MISSING}:
        found, _ = cv2.findContours((label == index).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, found, -1, ORANGE, max(1, max(label.shape) // OUTLINE))
    return painted


def paint_errors(image: Rgb, predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Rgb:
    """The image in grey, with found buildings in white, false ones in green and missed ones in red."""
    painted = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] // 2, 3, axis=2)
    for cells, colour in ((predicted & truth, WHITE), (predicted & ~truth, GREEN), (truth & ~predicted, RED)):
        painted[cells] = (0.35 * painted[cells] + 0.65 * np.array(colour)).astype(np.uint8)
    return np.asarray(painted, np.uint8)


def truth_panels(title: str, image: Rgb, predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> list[Panel]:
    """Image, truth, prediction and errors. `predicted` and `truth` are as `paint_state` takes them."""
    known = (predicted != MISSING) & (truth != MISSING)
    found = (predicted == 1) & known, (truth == 1) & known
    return [
        Panel(title, image),
        Panel("truth", paint_state(image, truth)),
        Panel("prediction", paint_state(image, predicted)),
        Panel("errors: false green, missed red", paint_errors(darken(image, ~known), *found)),
    ]


def coverage_panel(title: str, rows: Sequence[Row], height: int, width: int) -> Panel:
    """Each tile in the colour of its coverage, with the figure in it; grey where nothing is valid."""
    picture = np.full((height, width, 3), MISSING_GREY, np.uint8)
    highest = max((row["coverage"] or 0.0 for row in rows), default=0.0) or 1.0
    labels, whole = [], Window(0, 0, height, width)
    for row in rows:
        tile, coverage = Window.from_row(row), row["coverage"]
        at = tile.slices(whole)
        if coverage is not None:
            color = colormaps["viridis"](coverage / highest)[:3]
            picture[at] = np.multiply(color, 255).round()
            labels.append(_coverage_label(tile, coverage, "black" if np.dot(color, LUMA) > BRIGHT else "white"))
        _frame(picture[at])
    return Panel(title, picture, labels)


def _coverage_label(tile: Window, coverage: float, color: str) -> Label:
    row, col = tile.row_off + tile.height / 2, tile.col_off + tile.width / 2
    return Label(row, col, TEXT_SHARE * tile.width, f"{100 * coverage:.0f} %", color)


def _frame(tile: Rgb) -> None:
    """Draw a white line of 2 px along the edges of a tile."""
    for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]):
        tile[edge] = WHITE


def assemble_panels(panels: Sequence[Panel], columns: int = 2) -> bytes:
    """Pictures with their titles above them, so many in a row, as a PNG. A row is as high as its highest picture."""
    columns = min(columns, len(panels))
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(round(_scale(panel) * panel.picture.shape[0]) for panel in line) for line in lines]
    wide, high = columns * (PANEL + 2 * GAP), sum(heights) + len(lines) * (STRIP + GAP)
    figure, below = Figure(figsize=(wide / DPI, high / DPI)), high
    for line, height in zip(lines, heights, strict=True):
        below -= STRIP + height + GAP
        for column, panel in enumerate(line):
            left = column * (PANEL + 2 * GAP) + GAP
            _draw_panel(figure, panel, (left / wide, (below + GAP) / high, PANEL / wide, height / high))
    return to_png(figure)


def _scale(panel: Panel) -> float:
    """How many px of the PNG a px of a picture is."""
    return PANEL / float(max(panel.picture.shape[:2]))


def _draw_panel(figure: Figure, panel: Panel, place: tuple[float, float, float, float]) -> None:
    left, bottom, _, height = place
    axes = figure.add_axes(place, anchor="N")  # at the top, where the title is
    axes.set_axis_off()
    axes.imshow(panel.picture)
    title_gap = GAP / (figure.get_figheight() * DPI)
    figure.text(left, bottom + height + title_gap, panel.title, fontsize=_points(TITLE), va="baseline")
    scale = _scale(panel)
    for label in panel.labels:
        size = _points(label.height * scale)
        axes.text(label.col, label.row, label.text, fontsize=size, color=label.color, ha="center", va="center")


def _points(pixels: float) -> float:
    """A length in px of the PNG as points, in which matplotlib measures text."""
    return 72 * pixels / DPI
