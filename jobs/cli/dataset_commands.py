"""The commands that make training datasets.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from seg_core.errors import SegError

from ..progress import waiting
from ..terminal import note, print_figures
from .arguments import local_path, output_folder, parse_alpha, parse_bands, parse_nonnegative_int, parse_positive_int
from .region_commands import list_doubts

if TYPE_CHECKING:
    from seg_core.imagery.scene import Scene


def add_options(parser: argparse.ArgumentParser, scene_help: str) -> None:
    """Add the options of `seg dataset make`."""
    parser.add_argument("scenes", nargs="+", metavar="SCENE", help=scene_help)
    text = (
        "polygons (.gpkg, .geojson, .shp, .fgb, .parquet), or a raster of one band, or a folder with one for each "
        "scene: 0 background, 1 or 255 building"
    )
    parser.add_argument("--labels", required=True, metavar="FILE", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    text = "polygons outside of which nothing is labelled: it is neither trained on nor scored"
    parser.add_argument("--aoi", metavar="FILE", help=text)
    parser.add_argument(
        "--all-touched", action="store_true", help="label each pixel that a polygon touches, not only by its centre"
    )
    text = "attribute that names the class of each polygon (default: all are building)"
    parser.add_argument("--class-column", metavar="NAME", help=text)
    text = "classes, of which the later wins where they overlap (default: all that the attribute has, by name)"
    parser.add_argument("--classes", type=parse_names, default=(), metavar="A,B,C", help=text)
    parser.add_argument("--block", type=parse_positive_int, default=512, metavar="PX", help="side of a block (512)")
    parser.add_argument(
        "--val", type=float, default=0.2, metavar="SHARE", help="share of the blocks to validate on (0.2)"
    )
    parser.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="share of the blocks to test on (0)")
    parser.add_argument("--seed", type=parse_nonnegative_int, default=0, metavar="N", help="chooses the split (0)")
    parser.add_argument("--bands", type=parse_bands, metavar="B,B,B", help="bands to take, numbered from 1")
    parser.add_argument(
        "--alpha", type=parse_alpha, metavar="N|none", help="alpha band (default: as the file labels it)"
    )


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text}: expected different names separated by commas, such as road,building")
    return names


def make(args: Namespace) -> int:
    """Run `seg dataset make`: write a training dataset of scenes and their labels."""
    labels, aoi = local_path(args.labels), local_path(args.aoi) if args.aoi else None
    out = local_path(output_folder("--out", args.out))
    from seg_core.datasets.labels import LabelSettings
    from seg_core.datasets.make import MakeSettings, make_dataset
    from seg_core.datasets.summary import describe, figures

    reading = LabelSettings(args.class_column, args.classes, args.all_touched, aoi)
    settings = MakeSettings(reading, args.block, args.val, args.test, args.seed)
    with waiting("making the dataset") as report:
        made = make_dataset(_read_scenes(args, report), labels, out, settings, report)
    for line in describe(made):
        note(line)
    print_figures({"dataset": out, **figures(made)}, args.json)
    return 0


def _read_scenes(args: Namespace, report: Callable[[str], Any]) -> "list[Scene]":
    """Read the headers of the scenes, with the bands that are wanted. Raises SegError if one can't be read."""
    from seg_core.imagery.region import read_region
    from seg_core.imagery.scene import choose_bands

    report("reading headers")
    scenes, unreadable = read_region(args.scenes, alpha=args.alpha)
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise SegError(f"{unreadable[0]}{more}: repair it, or leave it out")
    for line in list_doubts(scenes):
        note(line)
    wanted = args.bands
    return [replace(scene, bands=choose_bands(scene, len(wanted or scene.bands), wanted)) for scene in scenes]
