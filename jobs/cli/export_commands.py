"""`seg export`: write results and models for other programs.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
from argparse import ArgumentParser, Namespace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from seg_core.errors import SegError
from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import note, print_figures
from . import picture_command
from .area_commands import choose_spread
from .arguments import local_path, output_folder
from .command_parser import Commands, add_command
from .exported import print_exported

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


def add_export(commands: Commands) -> None:
    """Add `seg export` with its kinds and their options."""
    text = "Write results and models for other programs."
    kinds = commands.add_parser("export", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="masks|footprints|coverage|picture|model"
    )
    _add_masks(kinds)
    _add_footprints(kinds)
    _add_coverage(kinds)
    _add_picture(kinds)
    _add_model(kinds)


def _add_masks(kinds: Commands) -> None:
    text = "Write a run's masks as one GeoTIFF per scene: 1 is building, 0 is background, 255 (nodata) is unknown."
    parser = add_command(kinds, "masks", export_masks, text)
    parser.add_argument("run", metavar="RUN")
    text = "write all scenes as one image; where they overlap, the first by name or in the given order counts"
    parser.add_argument("--mosaic", action="store_true", help=text)
    text = "also write the probabilities of a run that was segmented with --keep-probability"
    parser.add_argument("--probability", action="store_true", help=text)
    text = "also describe them in a STAC collection, with an item for each scene and one of the model (needs pystac)"
    parser.add_argument("--stac", action="store_true", help=text)
    parser.add_argument(
        "--model", metavar="BUNDLE", help="for --stac: folder of the model, if it has moved since the run"
    )
    text = "folder or s3:// prefix to write them to; with --address, a folder that all nodes share"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    _add_address(parser, "write the files of a large run on, a scene in each task")


def _add_footprints(kinds: Commands) -> None:
    text = "Write a run's buildings as polygons, each whole across the borders of tiles and parts."
    parser = add_command(kinds, "footprints", export_footprints, text)
    parser.add_argument("run", metavar="RUN")
    text = "file to write them to (.parquet, .gpkg, .geojson, .fgb or .pmtiles)"
    parser.add_argument("--out", required=True, metavar="FILE", help=text)
    text = "leave out buildings of less than so many square metres (0)"
    parser.add_argument("--min-area", type=float, default=0.0, metavar="M2", help=text)
    text = "leave out vertices that move the outline by less than so many metres (0)"
    parser.add_argument("--simplify", type=float, default=0.0, metavar="METRES", help=text)
    text = "give outlines right angles, where these fit the pixels"
    parser.add_argument("--regularize", action="store_true", help=text)
    text = "coordinate reference system (default: that of the scenes; longitude and latitude if they have several)"
    parser.add_argument("--crs", metavar="CRS", help=text)
    _add_address(parser)


def _add_coverage(kinds: Commands) -> None:
    text = "Write a grid of a run's coverage: how much of the valid ground of each cell is building."
    parser = add_command(kinds, "coverage", export_coverage, text)
    parser.add_argument("run", metavar="RUN")
    text = "side of a cell in metres; edges lie at multiples of it"
    parser.add_argument("--cell", type=float, required=True, metavar="METRES", help=text)
    text = "coordinate reference system of the grid, in metres (default: EPSG:6933, where cells have the same area)"
    parser.add_argument("--crs", metavar="CRS", help=text)
    text = "file to write: .tif with the bands coverage and known (NaN: no data), or .parquet with a row for each cell"
    parser.add_argument("--out", required=True, metavar="FILE", help=text)
    _add_address(parser)


def _add_picture(kinds: Commands) -> None:
    text = "Draw a run as one picture, with scale, north and legend; or chosen places of it beside their imagery."
    picture_command.add_options(add_command(kinds, "picture", picture_command.export_picture, text))


def _add_address(parser: ArgumentParser, what: str = "read the masks of a large run on") -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help=f"Ray cluster to {what} (default: this machine)")


def _add_model(kinds: Commands) -> None:
    text = "Write a bundle as one file, which maps imagery to building probabilities."
    parser = add_command(kinds, "model", export_model, text)
    parser.add_argument("model", metavar="BUNDLE", help="folder of a trained model")
    parser.add_argument("--to", required=True, choices=["onnx", "torch-export"], help="kind of file")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: BUNDLE.onnx or BUNDLE.pt2)")


def export_masks(args: Namespace) -> int:
    """Run `seg export masks`: write the masks of a run as GeoTIFFs."""
    from seg_core.run.export_masks import export_masks as write_masks
    from seg_core.run.query import summary

    run, out, files, problems = absolute(args.run), output_folder("--out", args.out), [], 0
    options = {"mosaic": args.mosaic, "probability": args.probability, **_choose_catalogue(args, run, out)}
    with waiting("adding up the parts of the run"):
        known = summary(run)
    results = write_masks(run, out, **options, **choose_spread(args, items_per_task=1))
    for path, problem in _show_waiting(results, "writing files"):
        files += [] if problem else [path]
        problems += bool(problem)
        note(f"{path}: not written: {problem}" if problem else path)
    shown: dict[str, Any] = {"files": files if args.json else len(files)}
    code = print_exported(args, known, shown, "they are nodata in the masks")
    if problems:
        note(f"{problems:,} files could not be written (exit code 1)")
    return 1 if problems else code


def _choose_catalogue(args: Namespace, run: str, out: str) -> dict[str, Any]:
    """Return the argument `catalogue` of what writes masks, if they are to be described."""
    from seg_core.model.bundle import find_bundle
    from seg_core.run.stac import open_catalogue

    if not args.stac:
        if args.model:
            raise SegError("--model: is for --stac")
        return {}
    model = find_bundle(args.model) if args.model else None
    return {"catalogue": open_catalogue(run, out, mosaic=args.mosaic, model=model)}


def _show_waiting(results: "Iterator[T]", what: str) -> "Iterator[T]":
    """Yield the results, and show a progress line while the next result is computed."""
    for number in count(1):
        with waiting(f"{what}: number {number}"):
            result = next(results, None)
        if result is None:
            return
        yield result


def export_footprints(args: Namespace) -> int:
    """Run `seg export footprints`: write the buildings of a run as polygons."""
    from seg_core.footprints.export import check_new_footprints, choose_shape
    from seg_core.footprints.export import export_footprints as write_footprints
    from seg_core.run.query import summary

    run, out = absolute(args.run), local_path(args.out)
    check_new_footprints(out)
    shape = choose_shape(run, out, args.crs, args.min_area, args.simplify, args.regularize)
    if shape.crs is None:
        note("the scenes have no CRS: coordinates are the pixels of each, and y is the negative row, as in QGIS")
    with waiting("finding the buildings") as report:
        known = summary(run)
        found = write_footprints(run, out, shape, report, **choose_spread(args))
    note(out)
    first = {"file": out} if args.json else {}
    return print_exported(args, known, first | found, "the buildings beside them may be cut, see touches_gap")


def export_coverage(args: Namespace) -> int:
    """Run `seg export coverage`: write a grid of a run's coverage."""
    from seg_core.run.area_grids import EQUAL_AREA
    from seg_core.run.export_coverage import export_coverage as write_coverage
    from seg_core.run.query import summary

    run, out = absolute(args.run), local_path(args.out)
    with waiting("measuring the cells") as report:
        cells = write_coverage(run, args.cell, out, args.crs or EQUAL_AREA, report, **choose_spread(args))
        known = summary(run)
    note(out)
    first = {"file": out} if args.json else {}
    return print_exported(args, known, {**first, "cells": len(cells)}, "their ground counts as not known")


def export_model(args: Namespace) -> int:
    """Run `seg export model`: write a bundle as one ONNX or torch.export file."""
    from seg_core.model.bundle import find_bundle
    from seg_core.model.export import SUFFIXES
    from seg_core.model.export import export_model as write_model

    from ..submitting.packages import lasting_name

    source = find_bundle(args.model)
    out = local_path(args.out or lasting_name(source) + SUFFIXES[args.to])
    with waiting("exporting the network"):
        bundle = write_model(source, args.to, out)
    figures = {"file": out, "bytes": os.path.getsize(out), "model": bundle.hash, "stride": bundle.stride}
    print_figures(figures, args.json)
    return 0
