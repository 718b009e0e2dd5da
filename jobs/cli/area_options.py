"""The options that say in which areas a run is to be measured, and the areas that they name."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import note
from .arguments import local_path

if TYPE_CHECKING:
    from seg_core.run.zonal import Areas


def add_areas(parser: ArgumentParser) -> None:
    """Add `--areas`, `--grid`, `--h3`, `--bbox`, of which one may be given, and their options."""
    group = parser.add_argument_group("areas to measure, with one row for each")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument("--areas", metavar="FILE", help="polygons, such as districts (.gpkg, .geojson, .shp, ...)")
    text = "cells of a square grid, whose sides measure METRES in an equal-area CRS (EPSG:6933), or in --crs"
    kinds.add_argument("--grid", type=float, metavar="METRES", help=text)
    text = "H3 cells, of a resolution from 0 to 15 (needs the package h3)"
    kinds.add_argument("--h3", type=int, metavar="RESOLUTION", help=text)
    kinds.add_argument(
        "--bbox",
        type=float,
        nargs=4,
        metavar=("WEST", "SOUTH", "EAST", "NORTH"),
        help="one rectangle in degrees of longitude and latitude",
    )
    group.add_argument("--id", metavar="COLUMN", help="attribute of --areas that names them (default: their number)")
    group.add_argument("--crs", metavar="CRS", help="coordinate reference system of --grid, in metres")


def has_areas(args: Namespace) -> bool:
    """Return whether one of the options names areas. Raises SegError for an option of another kind of areas."""
    if args.id is not None and args.areas is None:
        raise SegError("--id: is for --areas")
    if args.crs is not None and args.grid is None:
        raise SegError("--crs: is for --grid")
    return any(each is not None for each in (args.areas, args.grid, args.h3, args.bbox))


def choose_areas(args: Namespace, run: str, also: str | None = None) -> "Areas":
    """Return the areas that the options name, for a run, and perhaps another one. Repaired polygons are noted."""
    from seg_core.run.area_files import read_areas
    from seg_core.run.area_grids import EQUAL_AREA, bbox_area, grid_areas, h3_areas

    other = None if also is None else absolute(also)
    if args.bbox is not None:
        return bbox_area(*args.bbox)
    if args.areas is None:
        with waiting("making the cells"):
            if args.h3 is not None:
                return h3_areas(absolute(run), args.h3, other)
            return grid_areas(absolute(run), args.grid, args.crs or EQUAL_AREA, other)
    areas = read_areas(local_path(args.areas), args.id)
    if areas.num_repaired:
        note(f"{args.areas}: {areas.num_repaired:,} areas were invalid, and have been repaired")
    return areas
