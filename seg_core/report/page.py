"""Make the page of a run: read its files once, and put figures, pictures and charts into one HTML file."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from seg_core.errors import SegError
from seg_core.report.cell_columns import end_of_ramp, make_columns
from seg_core.report.drawn import Drawn, draw
from seg_core.report.facts import (
    MAX_SCENES,
    describe_model,
    describe_run,
    list_failures,
    list_scenes,
    list_worst_seams,
    scene_texts,
)
from seg_core.report.frame import Box, Frame
from seg_core.report.notes import describe_map
from seg_core.report.texts import area_text, count_text, moment_text, share_text
from seg_core.report.tiles import Tally
from seg_core.run.places import Places
from seg_core.run.query import describe
from seg_core.run.record import RunRecord, now, read_record
from seg_core.run.schema import describe_columns
from seg_core.run.stored_plan import read_plan
from seg_core.run.verify import verify
from seg_core.version import code_version

MAX_ZOOMS = 200  # scenes to choose from on the map
MAX_PROBLEMS = 10  # of seg verify that are shown
TEMPLATE = "page.html"
FIRST_SQL = "SELECT scene_id, tile_row, tile_col, coverage, building_m2\nFROM tiles ORDER BY coverage DESC LIMIT 20"


@dataclass(frozen=True)
class Page:
    """A page, and what the run is in a few words and figures."""

    html: str
    state: str
    figures: dict[str, Any]
    problems: int  # that seg verify finds, other than missing parts


def check_library(command: str = "seg report") -> None:
    """Raise SegError if Bokeh, which a command needs, is not installed."""
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise SegError(f"{command}: needs the package bokeh: pip install 'aerial-seg[report]'") from error


def make_page(
    run: str, given: Places = (), report: Callable[[str], None] = lambda _: None, *, has_sql: bool = False
) -> Page:
    """Make the page of a run, which may be unfinished. Scenes that have moved are at the given places, if any.

    With `has_sql`, it has a box for SQL, which it sends to the path `query` beside its own. `report` is called with a
    text for each step. The page is smaller than 15 MB, and memory does not grow with the imagery. Raises SegError where
    there is no run, if a file of it is damaged, and if Bokeh is not installed.
    """
    check_library()
    plan, record = read_plan(run, given), read_record(run)
    report("checking the run")
    proof = verify(run)
    drawn, class_name = draw(run, plan, report), plan.found_class
    report("writing the page")
    figures = drawn.tally.figures()
    num_problems = len(proof.problems) - proof.num_missing_parts
    state = proof.describe() if num_problems else describe(figures)
    html = _render(
        name=posixpath.basename(run),
        state=state,
        state_kind="bad" if figures["failed"] or num_problems else "unfinished" if figures["missing"] else "",
        problems=proof.problems[:MAX_PROBLEMS] if num_problems else [],
        class_name=class_name,
        notes=describe_map(drawn, class_name),
        sql=_sql_box() if has_sql else None,
        **_tables(run, record, drawn.tally, class_name),
        **_charts(drawn, class_name),
    )
    return Page(html, state, figures, num_problems)


def _tables(run: str, record: RunRecord, tally: Tally, class_name: str) -> dict[str, Any]:
    """Return the figures and tables of a page as text, by their names in the template."""
    figures, scenes = tally.figures(), list_scenes(tally)
    return {
        "warnings": [f"{line[0].upper()}{line[1:]}." for line in record.fit_warnings(figures)],
        "headline": _headline(figures, class_name),
        "histogram_note": _histogram_note(tally),
        "scenes": [scene_texts(row) for row in scenes[:MAX_SCENES]],
        "scenes_note": _scenes_note(len(scenes)),
        "failures": list_failures(tally),
        "worst_seams": list_worst_seams(record, tally.plan),
        "run_facts": describe_run(run, record, tally),
        "model_facts": describe_model(record),
        "made": f"Made by aerial-seg {code_version()} at {moment_text(now())}.",
    }


def _charts(drawn: Drawn, class_name: str) -> dict[str, Any]:
    """Return the charts of a page as HTML, and the tile that is shown first, by their names in the template."""
    from seg_core.report.charts import MapContent, draw_histogram, draw_map, embed

    tally, frame = drawn.tally, drawn.frame
    columns = make_columns(tally, frame, drawn.crops)
    chosen = _densest(columns)
    content = MapContent(
        columns, chosen, frame, drawn.quicklook, drawn.outlines, end_of_ramp(tally), _boxes(frame), class_name
    )
    models = draw_map(content)
    if tally.histogram.any():
        models["histogram"] = draw_histogram(tally.histogram)
    library, script, places = embed(models)
    return {
        "library": library,
        "script": script,
        "map": places.pop("map"),
        "histogram": places.pop("histogram", ""),
        "controls": list(places.values()),
        "tile": {name: values[chosen] if chosen is not None else "" for name, values in columns.items()},
    }


def _render(**values: Any) -> str:
    """Fill the template. All text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read(TEMPLATE)).render(**values)


def _read(name: str) -> str:
    return files("seg_core.report").joinpath(name).read_text(encoding="utf-8")


def _sql_box() -> dict[str, Any]:
    """Return what the box for SQL holds at first, the columns that it may name, and its script."""
    return {"first": FIRST_SQL, "columns": describe_columns(), "script": _read("ask.js")}


def _headline(figures: dict[str, Any], class_name: str) -> dict[str, str]:
    return {
        "coverage": share_text(figures["coverage"]),
        f"{class_name} area": area_text(figures["building_km2"], figures["building_px"]),
        "valid area": area_text(figures["area_km2"], figures["valid_px"]),
        "scenes": count_text(figures["scenes"]),
        "tiles done": f"{figures['tiles']:,} of {figures['planned']:,}",
        "failed": count_text(figures["failed"]),
        "not done yet": count_text(figures["missing"]),
    }


def _boxes(frame: Frame) -> dict[str, Box]:
    """Return where the scenes lie on the map, if they are not too many to choose from."""
    if len(frame.images) > MAX_ZOOMS:
        return {}
    return {image.scene_id: frame.box(image) for image in frame.images}


def _densest(columns: dict[str, list[Any]]) -> int | None:
    """Return the number of the tile that is shown before one is clicked: the densest with a picture, if any has one."""
    numbers = range(len(columns["name"]))
    return max(numbers, key=lambda at: (bool(columns["mask"][at]), columns["share"][at]), default=None)


def _histogram_note(tally: Tally) -> str:
    number = int(tally.histogram.sum())
    if not number:
        return "No tile with data is done yet."
    return f"{tally.without_building:,} of {number:,} tiles with data hold nothing that the model found."


def _scenes_note(number: int) -> str:
    if number <= MAX_SCENES:
        return ""
    return (
        f"The table has {MAX_SCENES:,} of {number:,} scenes: first those with failed or missing tiles, then those with "
        "the most building. seg query has them all."
    )
