"""The map and the histogram of a page, drawn by Bokeh. Only this module knows it."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    CustomJS,
    CustomJSTickFormatter,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    TapTool,
)
from bokeh.models.annotations.legends import ColorBar
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.sliders import Slider
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources

from seg_core.report.cells import Numbers
from seg_core.report.frame import Box, Frame
from seg_core.report.outlines import Outlines
from seg_core.report.quicklook import Quicklook
from seg_core.report.texts import UNKNOWN
from seg_core.report.tiles import STEPS

OPACITY, FAINT = 0.65, 0.15  # of the colours over the imagery, and where outlines are drawn
CHOSEN = "#ff8c00"  # outline of the tile that was clicked
OUTLINE = "#ff4fd8"
COARSEST = 2.0  # pixels of the imagery for one of the screen, with which outlines are shown
BAR = "#3b6ea5"
BIN_WIDTHS = (1, 2, 5, 10, 20, 25, 50)  # in STEPS of coverage
MAX_BINS = 25

Columns = dict[str, list[Any]]


def embed(models: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Return the library itself and the script that draws these models, both as HTML, and the place of each model."""
    script, places = components(models)
    library = Resources(mode="inline", components=["bokeh", "bokeh-widgets"], log_level="warn")
    return library.render(), script, places


@dataclass(frozen=True)
class MapContent:
    """What a map shows."""

    columns: Columns  # see `make_columns`
    chosen: int | None  # the cell that is shown first
    frame: Frame
    quicklook: Quicklook
    outlines: Outlines
    end: float  # coverage of the last colour
    scenes: dict[str, Box]  # where to zoom to
    class_name: str  # of what is found


def draw_map(content: MapContent) -> dict[str, Any]:
    """Return the map and its controls, as models by name."""
    plot, source, quicklook = _make_plot(content.frame), ColumnDataSource(content.columns), content.quicklook
    if content.chosen is not None:
        source.selected.indices = [content.chosen]
    if quicklook.uris:
        left, bottom, right, top = np.array(quicklook.boxes, float).T
        plot.image_url(quicklook.uris, left, top, right - left, top - bottom, anchor="top_left")
    cells = _draw_cells(plot, source, OPACITY if quicklook.uris else 1.0)
    for extent in (plot.x_range, plot.y_range):
        extent.update(renderers=[cells], range_padding=0.04)
    _mark_pictures(plot, content.columns)
    plot.add_tools(_hover(cells, content.class_name), TapTool(renderers=[cells]))
    plot.add_layout(_color_bar(content), "above")
    source.selected.js_on_change("indices", CustomJS(args={"source": source}, code=_read("show_tile.js")))
    controls: dict[str, Any] = {"opacity": _opacity(cells)} if quicklook.uris else {}
    if content.outlines.xs:
        _draw_outlines(plot, content.outlines, controls.get("opacity"))
    if len(content.scenes) > 1:
        controls["zoom"] = _zoom(plot, content.scenes)
    return {"map": plot, **controls}


def _make_plot(frame: Frame) -> Any:
    plot: Any = figure(
        name="map",
        tools="pan,wheel_zoom,box_zoom,reset",
        active_scroll="wheel_zoom",
        match_aspect=True,
        aspect_scale=1 / frame.aspect,
        sizing_mode="stretch_both",
        background_fill_color="#f3f3f1",
        toolbar_location="above",
    )
    plot.grid.visible = False
    plot.toolbar.logo = None
    for axis in (plot.xaxis, plot.yaxis):
        axis.formatter = BasicTickFormatter(use_scientific=False)
        axis.major_label_text_font_size = "11px"
        axis.ticker.desired_num_ticks = 3  # their labels are long
    if frame.crs is None:
        plot.yaxis.formatter = CustomJSTickFormatter(code="return String(-tick)")  # rows count downwards
    return plot


def _draw_cells(plot: Any, source: ColumnDataSource, opacity: float) -> Any:
    cells = plot.patches(
        "xs",
        "ys",
        source=source,
        name="cells",
        fill_color="fill",
        fill_alpha=opacity,
        line_color="line",
        line_width="line_width",
        hatch_pattern="hatch",
        hatch_color="hatch_color",
        hatch_scale=8,
        hatch_weight=1,
    )
    cells.nonselection_glyph = cells.glyph  # Bokeh would draw a copy, which the slider does not change
    cells.selection_glyph = cells.glyph.clone(line_color=CHOSEN, line_width=4)
    return cells


def _draw_outlines(plot: Any, outlines: Outlines, opacity: Slider | None) -> None:
    """Draw outlines that are hidden until the map is zoomed in, where the colours over imagery become faint."""
    source, name = ColumnDataSource({"xs": outlines.xs, "ys": outlines.ys}), "outlines"
    lines = plot.multi_line("xs", "ys", source=source, name=name, line_color=OUTLINE, line_width=1.5, visible=False)
    limits = {"coarsest": COARSEST * outlines.pixel, "faint": FAINT}
    args = {"plot": plot, "x_range": plot.x_range, "outlines": lines, "opacity": opacity, **limits}
    show = CustomJS(args=args, code=_read("show_outlines.js"))
    plot.js_on_change("inner_width", show)
    for end in ("start", "end"):
        plot.x_range.js_on_change(end, show)


def _mark_pictures(plot: Any, columns: Columns) -> None:
    """Draw a dot on the cells that have a picture, unless all have one."""
    marked = [at for at, mask in enumerate(columns["mask"]) if mask]
    if len(marked) < sum(figure != UNKNOWN for figure in columns["coverage"]):
        x, y = ([float(np.mean(columns[name][at])) for at in marked] for name in ("xs", "ys"))
        plot.scatter(x, y, size=5, fill_color="white", line_color="black", line_width=1)


def _hover(cells: Any, class_name: str) -> HoverTool:
    """Return the tool that shows the figures of a cell. Bokeh escapes what stands in its columns."""
    labels = {"name": "", "state": "state", "coverage": "coverage", "valid": "valid", "building": class_name}
    return HoverTool(renderers=[cells], tooltips=[(label, f"@{column}") for column, label in labels.items()])


def _color_bar(content: MapContent) -> ColorBar:
    return ColorBar(
        color_mapper=LinearColorMapper(palette=Viridis256, low=0, high=100 * content.end),
        orientation="horizontal",
        height=12,
        padding=4,
        title=f"{content.class_name}, % of the valid pixels",
        title_text_font_style="normal",
    )


def _opacity(cells: Any) -> Slider:
    """Return the control that lets the imagery show through."""
    slider = Slider(title="Colours over imagery", start=0, end=1, step=0.05, value=OPACITY, sizing_mode="stretch_width")
    for glyph in (cells.glyph, cells.selection_glyph):
        slider.js_link("value", glyph, "fill_alpha")
    return slider


def _zoom(plot: Any, scenes: dict[str, Box]) -> Select:
    """Return the control that zooms to a scene."""
    options: list[str | tuple[Any, str]] = [("", "all scenes"), *((name, name) for name in scenes)]
    select = Select(title="Zoom to", options=options, value="", sizing_mode="stretch_width")
    left, bottom, right, top = zip(*scenes.values(), strict=True)
    boxes = {"": Box(min(left), min(bottom), max(right), max(top)), **scenes}
    places = {name: list(box) for name, box in boxes.items()}
    args = {"places": places, "x_range": plot.x_range, "y_range": plot.y_range}
    select.js_on_change("value", CustomJS(args=args, code=_read("zoom_to.js")))
    return select


def draw_histogram(tiles: Numbers) -> Any:
    """Return the histogram of coverage, from the number of tiles in each of STEPS equal bins from 0 to 1."""
    last = int(np.flatnonzero(tiles).max(initial=0)) + 1
    width = next((each for each in BIN_WIDTHS if last <= each * MAX_BINS), BIN_WIDTHS[-1])
    number = -(-last // width)
    counts = np.pad(tiles, (0, width))[: number * width].reshape(number, width).sum(axis=1)
    left = np.arange(number) * width * 100 / STEPS
    right = left + width * 100 / STEPS
    texts = [f"{low:g} to {high:g} %" for low, high in zip(left, right, strict=True)]
    numbers = [f"{count:,}" for count in counts.tolist()]
    source = ColumnDataSource({"left": left, "right": right, "top": counts, "range": texts, "number": numbers})
    plot: Any = figure(name="histogram", tools="", sizing_mode="stretch_both", x_axis_label="coverage of a tile, %")
    plot.quad(left="left", right="right", top="top", bottom=0, source=source, fill_color=BAR, line_color="white")
    plot.add_tools(HoverTool(tooltips=[("coverage", "@range"), ("tiles", "@number")]))
    plot.yaxis.axis_label = "tiles"
    plot.yaxis.ticker.min_interval = 1  # a tile is the least
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.x_range.start = plot.y_range.start = 0
    plot.yaxis.minor_tick_line_color = None
    plot.xgrid.visible = False
    plot.toolbar_location = None
    return plot


def _read(name: str) -> str:
    return files("seg_core.report").joinpath(name).read_text(encoding="utf-8")
