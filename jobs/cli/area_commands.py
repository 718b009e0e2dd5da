"""What `seg query` and `seg compare` answer for areas: measure or compare a run in each, and print or write that."""

import os
import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from seg_core.errors import SegError
from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import TABLE_ROWS, note, print_figures
from .area_options import choose_areas
from .arguments import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from geopandas import GeoDataFrame

    from seg_core.run.zonal import Areas

T = TypeVar("T")
R = TypeVar("R")


def measure(args: Namespace) -> int:
    """Print or write what a run has found in each of some areas."""
    from seg_core.run.area_files import check_new_areas
    from seg_core.run.areas import measure_areas

    if args.out is not None:
        check_new_areas(local_path(args.out))
    areas = choose_areas(args, args.run)
    with waiting("measuring the areas") as report:
        found = measure_areas(absolute(args.run), areas, report, **choose_spread(args))
    if found["covered"].isna().all():
        _note_miss(areas, args.run)
    give_areas(found, args.out, args.format)
    return 0


def _note_miss(areas: "Areas", run: str) -> None:
    """Say where areas are that touch no tile of a run, and where its images are."""
    from seg_core.imagery.extents import describe_bounds, describe_extent
    from seg_core.run.stored_plan import read_plan

    west, south, east, north = map(float, areas.frame.total_bounds)
    here = describe_bounds((west, south, east, north), areas.frame.crs)
    note(f"no area touches a tile: areas are at {here}, images at {describe_extent(read_plan(absolute(run)).images)}")


def choose_spread(args: Namespace, items_per_task: int | None = None) -> dict[str, Any]:
    """Return the argument `spread` of a function of many parts or images, if there is a cluster to spread them over."""
    spread = partial(_spread, args, items_per_task)
    return {"spread": spread} if args.address or os.environ.get("RAY_ADDRESS") else {}


def _spread(
    args: Namespace, items_per_task: int | None, function: "Callable[[T], R]", items: "Sequence[T]"
) -> "Iterator[R]":
    from ..spread import spread_over_cluster

    return spread_over_cluster(args.address, function, items, args.debug, items_per_task)


def give_areas(found: "GeoDataFrame", out: str | None, form: str) -> None:
    """Write measured areas to a file and print its name, or print them without their geometries."""
    from pyarrow import Table

    from seg_core.run.area_files import write_areas
    from seg_core.run.query import write_result

    if out is not None:
        write_areas(found, local_path(out))
        print_figures({"file": out, "areas": len(found)}, as_json=form == "json")
    else:
        table = Table.from_pandas(found.drop(columns="geometry"), preserve_index=False)
        write_result(table.to_reader(), form, sys.stdout.buffer, TABLE_ROWS)


def compare(args: Namespace) -> int:
    """Print or write what was gained and lost in each of some areas."""
    from seg_core.run.area_files import check_new_areas
    from seg_core.run.compare_areas import compare_areas

    if args.rasters is not None:
        raise SegError("--rasters: shows pixels of whole images: leave out the areas")
    if args.out is not None:
        check_new_areas(local_path(args.out))
    areas = choose_areas(args, args.before, args.after)
    with waiting("comparing the runs") as report:
        found = compare_areas(absolute(args.before), absolute(args.after), areas, report)
    if found.reason:
        note(f"{found.reason}: each is measured by itself, so that kept, gained and lost are not known")
        if number := found.num_without_difference:
            note(f"{number} of {len(found.frame)} areas are not known to both runs as a whole: they have no difference")
    give_areas(found.frame, args.out, "json" if args.json else "table")
    return 0
