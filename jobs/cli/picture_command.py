"""`seg export picture`: a run as one picture, or places of it side by side with their imagery."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from seg_core.errors import SegError
from seg_core.storage.disk import check_new_file
from seg_core.storage.files import absolute, publish

from ..progress import waiting
from ..terminal import note
from .arguments import absolute_places, local_path
from .exported import print_exported
from .option_groups import add_relocate
from .run_labels import class_of, open_run_labels

if TYPE_CHECKING:
    from seg_core.report.views import Place


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `seg export picture`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write (.png)")
    group = parser.add_argument_group(
        "places", "They are drawn instead of the map, a row for each. SCENE may be left out if the run has one image."
    )
    text = "a tile, by tile_row and tile_col; may be repeated"
    group.add_argument("--tile", action="append", default=[], type=_parse_tile, metavar="[SCENE:]ROW,COL", help=text)
    text = "a window in pixels, as in gdal_translate -srcwin; may be repeated"
    metavar = "[SCENE:]COL,ROW,WIDTH,HEIGHT"
    group.add_argument("--window", action="append", default=[], type=_parse_window, metavar=metavar, help=text)
    text = "the truth to draw too: label file of the scene, folder of the scenes' labels, or polygons (.gpkg, ...)"
    group.add_argument("--labels", metavar="PATH", help=text)
    text = "folder of label_class_dict.csv, for labels in colours"
    group.add_argument("--data", metavar="DIR", help=text)
    add_relocate(parser)


def _parse_tile(text: str) -> "Place":
    return _parse_place("--tile", text, 2, "ROW,COL or SCENE:ROW,COL")


def _parse_window(text: str) -> "Place":
    return _parse_place("--window", text, 4, "COL,ROW,WIDTH,HEIGHT in pixels, perhaps after SCENE:")


def _parse_place(option: str, text: str, number: int, form: str) -> "Place":
    from seg_core.grid import Window
    from seg_core.report.views import Place

    match = re.fullmatch(rf"(?:(.+):)?(\d+(?:,\d+){{{number - 1}}})", text)
    if match is None:
        raise ArgumentTypeError(f"{text}: expected {form}")
    numbers = [int(each) for each in match[2].split(",")]
    name = f"{option} {text}"
    if option == "--tile":
        return Place(name, match[1], (numbers[0], numbers[1]), None)
    col, row, width, height = numbers
    return Place(name, match[1], None, Window(row, col, height, width))


def export_picture(args: Namespace) -> int:
    """Run `seg export picture`: draw a run as one picture, or places of it."""
    out = local_path(args.out)
    check_new_file(out, (".png",), "a picture is")
    if not (args.tile or args.window) and (args.labels or args.data):
        raise SegError("--labels, --data: are for places: name some with --tile or --window")
    if args.data and not args.labels:
        raise SegError(f"--data {args.data}: says what the colours of labels mean: name these with --labels")
    picture, known, figures = _draw_places(args) if args.tile or args.window else _draw_map(args)
    publish(out, picture)
    note(out)
    meaning = "they are dark, or grey" if args.tile or args.window else "they are hatched"
    return print_exported(args, known, {**({"file": out} if args.json else {}), **figures}, meaning)


def _draw_map(args: Namespace) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    from seg_core.report.picture import draw_picture

    with waiting("drawing the run") as report:
        picture, known, missing = draw_picture(absolute(args.run), absolute_places(args.relocate), report)
    for line in missing:
        note(line)
    return picture, known, {}


def _draw_places(args: Namespace) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    from seg_core.report.panels import Labels, draw_panels
    from seg_core.run.query import summary
    from seg_core.run.record import read_record
    from seg_core.training.dataset import read_classes

    run = absolute(args.run)
    record = read_record(run)
    classes = read_classes(local_path(args.data), class_of(record)) if args.data else None
    opened = open_run_labels(run, args.labels, args.data) if args.labels else nullcontext(None)
    with opened as source, waiting("drawing the places") as report:
        labels = None if source is None else Labels(source, classes)
        picture, figures = draw_panels(run, [*args.tile, *args.window], labels, absolute_places(args.relocate), report)
        known = summary(run)
    return picture, known, figures
