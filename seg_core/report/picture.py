"""A run as one picture: coverage of its tiles over the imagery, with a scale bar, north, and a legend."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from pyproj import Transformer

from seg_core.imagery.area_projection import LONLAT
from seg_core.imagery.georef import GEOD
from seg_core.plots.style import DPI, to_png
from seg_core.report.cell_columns import FAILED, MISSING, NO_DATA, RAMP, Style, end_of_ramp, style_of
from seg_core.report.drawn import read_overview
from seg_core.report.frame import Box, Frame
from seg_core.report.notes import describe_quicklook
from seg_core.report.quicklook import Quicklook
from seg_core.report.texts import area_text, share_text
from seg_core.report.tiles import Tally, figures_of
from seg_core.run.places import Places
from seg_core.run.query import describe
from seg_core.run.stored_plan import read_plan

SIDE = 1600  # px of the longer side of the map
LEAST_SIDE = 700  # px of the shorter one, so that there is room for the legend
MARGINS = (110, 170)  # px above and below the map, for the title and the legend
OPACITY = 0.6  # of the colours over the imagery
BAR_SHARE = 0.25  # of the width of the map that the scale bar has at most
ARROW = 0.07  # of the height of the map
STEP = 1e-4  # degrees to the north, by which its direction is found
HATCHES = {" ": "", "dot": "..", "right_diagonal_line": "///", "diagonal_cross": "xx"}  # by Bokeh's names
OUTLINE = withStroke(linewidth=4, foreground="white")
LETTERS: dict[str, Any] = {"fontsize": 14, "weight": "bold", "path_effects": [OUTLINE]}
LEGEND = {"not done yet": MISSING, "failed": FAILED, "no data in the imagery": NO_DATA}


class ScaleBar(NamedTuple):
    """A bar of a round length on the ground."""

    metres: float
    length: float  # in units of the map

    @property
    def text(self) -> str:
        """The length in words."""
        return f"{self.metres / 1000:g} km" if self.metres >= 1000 else f"{self.metres:g} m"


def draw_picture(
    run: str, given: Places = (), report: Callable[[str], None] = lambda _: None
) -> tuple[bytes, dict[str, Any], list[str]]:
    """Draw a run as a PNG. Scenes that have moved are at the given places, if any.

    Also returns the run's figures, and a sentence on each reason why scenes have no imagery under their colours, such
    as that they can't be read. `report` is called with a text for each step. Raises SegError where there is no run, or
    if a file of it is damaged.
    """
    plan = read_plan(run, given)
    frame, tally, quicklook = read_overview(run, plan, report)
    report("drawing")
    figure = make_figure(run.rstrip("/").rpartition("/")[2], tally, frame, quicklook, plan.found_class)
    return to_png(figure), tally.figures(), list(describe_quicklook(quicklook))


def make_figure(name: str, tally: Tally, frame: Frame, quicklook: Quicklook, class_name: str) -> Figure:
    """Return the picture of a run, which is called `name` and finds `class_name`."""
    x, y = tally.cells.outlines(frame)
    left, right, bottom, top = (float(each) for each in (x.min(), x.max(), y.min(), y.max()))
    ratio = (top - bottom) * frame.aspect / (right - left)
    width, height = SIDE / max(1.0, ratio), SIDE * min(1.0, ratio)
    size = max(width, LEAST_SIDE) + 40, max(height, LEAST_SIDE / 2) + sum(MARGINS)
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), facecolor="white")
    above, below = (margin / size[1] for margin in MARGINS)
    axes = figure.add_axes((0.02, below, 0.96, 1 - above - below))
    axes.set(aspect=frame.aspect, xticks=[], yticks=[], facecolor="#f2f2f2")
    for picture in quicklook.pictures:
        pixels = np.dstack([picture.rgb, picture.valid.astype(np.uint8) * 255])
        extent = picture.box.left, picture.box.right, picture.box.bottom, picture.box.top
        axes.imshow(pixels, extent=extent, aspect=frame.aspect, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    planned, end = tally.cells.planned.tolist(), end_of_ramp(tally)
    cells = [figures_of(*each) for each in zip(tally.by_cell, planned, strict=True)]
    styles = [style_of(each) for each in cells]
    fills = [style.fill or colormaps[RAMP](each["coverage"] / end) for style, each in zip(styles, cells, strict=True)]
    _draw_cells(axes, np.stack([x, y], axis=-1), styles, fills, OPACITY if quicklook.pictures else 1.0)
    _draw_legend(figure, set(styles), end, below, class_name)
    if frame.crs is not None:
        box = Box(left, bottom, right, top)
        _draw_scale_bar(axes, choose_scale_bar(frame, box))
        _draw_north(axes, north_angle(frame, box))
    figures = tally.figures()
    building, valid = (
        area_text(figures[km2], figures[px]) for km2, px in (("building_km2", "building_px"), ("area_km2", "valid_px"))
    )
    figure.text(
        0.02, 1 - 0.42 * above, f"{name}: coverage {share_text(figures['coverage'])}", fontsize=20, weight="bold"
    )
    figure.text(0.02, 1 - 0.78 * above, f"{building} of {valid}; {describe(figures)}", fontsize=12, color="0.3")
    return figure


def _draw_cells(
    axes: Axes, corners: NDArray[np.float64], styles: Sequence[Style], fills: Sequence[Any], opacity: float
) -> None:
    """Draw the cells of a map, whose corners are `(cells, 4, 2)`: those that tell of a fault over the others."""
    for style in sorted(set(styles), key=lambda style: style.rank):
        chosen = [at for at, other in enumerate(styles) if other == style]
        axes.add_collection(
            PolyCollection(
                list(corners[chosen]),
                facecolors=[(*to_rgb(fills[at]), opacity) for at in chosen],
                edgecolors=style.line,
                linewidths=style.line_width,
                hatch=HATCHES[style.hatch],
                zorder=1 + style.rank,
            )
        )


def _draw_legend(figure: Figure, styles: Collection[Style], end: float, share: float, class_name: str) -> None:
    """Draw what colours and patterns mean, below the map, which leaves this share of the figure's height.

    `end` is the coverage of the last colour.
    """
    colours = ScalarMappable(Normalize(0, 100 * end), RAMP)
    bar = figure.colorbar(
        colours, cax=figure.add_axes((0.02, 0.62 * share, 0.45, 0.12 * share)), orientation="horizontal"
    )
    bar.set_label(f"{class_name}, % of the valid pixels", fontsize=12)
    patches = [
        Patch(facecolor=style.fill, edgecolor=style.line, hatch=HATCHES[style.hatch], label=text)
        for text, style in LEGEND.items()
        if style in styles
    ]
    if patches:
        figure.legend(
            handles=patches, loc="center right", bbox_to_anchor=(0.98, 0.6 * share), frameon=False, fontsize=12
        )


def choose_scale_bar(frame: Frame, box: Box) -> ScaleBar:
    """Choose a bar of a round length, of BAR_SHARE of the width of a rectangle of the map at most."""
    x, y = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    most = BAR_SHARE * (box.right - box.left)
    # Of the middle, because a map may reach around the Earth.
    lon, lat = _to_lonlat(frame, np.array([x - most / 2, x + most / 2]), np.array([y, y]))
    metres = abs(float(GEOD.inv(lon[0], lat[0], lon[1], lat[1])[2]))
    decade = 10.0 ** math.floor(math.log10(metres))
    length = max(factor * decade for factor in (1, 2, 5) if factor * decade <= metres)
    return ScaleBar(length, length / metres * most)


def north_angle(frame: Frame, box: Box) -> float:
    """Return the direction of north in the middle of a rectangle of the map, in degrees clockwise from its top."""
    x, y = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    lon, lat = _to_lonlat(frame, np.array([x]), np.array([y]))
    to_map = Transformer.from_crs(LONLAT, frame.crs, always_xy=True)
    east, north = to_map.transform(lon[0], lat[0] + STEP)
    start_x, start_y = to_map.transform(lon[0], lat[0])
    return math.degrees(math.atan2(east - start_x, (north - start_y) * frame.aspect))


def _to_lonlat(frame: Frame, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    lon, lat = Transformer.from_crs(frame.crs, LONLAT, always_xy=True).transform(x, y)
    return np.asarray(lon), np.asarray(lat)


def _draw_scale_bar(axes: Axes, bar: ScaleBar) -> None:
    """Draw a scale bar into the lower left corner."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x, y = left + 0.03 * (right - left), bottom + 0.035 * (top - bottom)
    for width, color in ((8, "white"), (4, "black")):
        axes.plot([x, x + bar.length], [y, y], color=color, linewidth=width, solid_capstyle="butt", zorder=10)
    axes.text(x + bar.length / 2, y + 0.012 * (top - bottom), bar.text, ha="center", zorder=10, **LETTERS)


def _draw_north(axes: Axes, angle: float) -> None:
    """Draw an arrow to the north into the upper right corner."""
    turn = math.radians(angle)
    start, across, up = (0.955, 0.86), ARROW * math.sin(turn), ARROW * math.cos(turn)
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 2.5, "mutation_scale": 22, "path_effects": [OUTLINE]}
    end = start[0] + across, start[1] + up
    axes.annotate("", end, start, xycoords="axes fraction", arrowprops=arrow, zorder=10)
    axes.text(start[0], start[1] - 0.012, "N", ha="center", va="top", transform=axes.transAxes, zorder=10, **LETTERS)
