"""The commands that measure throughput.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import make_folder

from ..terminal import print_figures, print_table
from .arguments import local_path, model_folder
from .model_commands import train_settings
from .region_commands import execution_options, make_accepted_plan, normalize_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seg_core.run.plan import Plan


@contextmanager
def _prepare_bench(args: Namespace) -> "Iterator[tuple[Plan, str]]":
    """Yield the plan of the given scenes, or of a synthetic one, and a temporary folder to measure in."""
    from seg_core.model.bundle import read_bundle

    from ..benchmarks.scenes import make_scene, scratch_folder

    if args.scenes and (args.codec or args.side):
        raise SegError("--codec, --side: are only for a synthetic scene: leave out the options or SCENE")
    with scratch_folder(args.at) as folder:
        if not args.scenes:
            scene = make_scene(folder, args.codec or "deflate", args.side or 4096, read_bundle(model_folder(args)))
            args = Namespace(**{**vars(args), "scenes": [scene]})
        yield normalize_plan(make_accepted_plan(args), args), folder


def bench_segment(args: Namespace) -> int:
    """Run `seg bench segment`: measure the pipeline, its stages and a plain loop."""
    from ..benchmarks.segmenting import bench_segment as measure

    with _prepare_bench(args) as (planned, folder):
        options = execution_options(args)
        print_figures(measure(planned, model_folder(args), folder, options, args.seconds, args.rounds), args.json)
    return 0


def bench_scale(args: Namespace) -> int:
    """Run `seg bench scale`: measure throughput and memory by number of windows, actors and window size."""
    from ..benchmarks.segmenting import bench_scale as measure

    plot = local_path(args.out) if args.out else None
    if plot:
        make_folder(os.path.dirname(plot))  # before anything is measured
    with _prepare_bench(args) as (planned, folder):
        options, series = execution_options(args), (args.sizes, args.workers, args.windows)
        points = measure(planned, model_folder(args), folder, options, *series, args.seconds)
    if plot:
        from seg_core.plots.figures import draw_scale
        from seg_core.storage.files import publish

        publish(plot, draw_scale(points))
    if args.json:
        print_figures({"points": points, "plot": plot}, as_json=True)
        return 0
    print_table(points)
    return 0


def bench_train(args: Namespace) -> int:
    """Run `seg bench train`: measure the throughput of training."""
    settings = train_settings(args)
    from ..benchmarks.training import bench_train as measure

    print_figures(measure(settings, local_path(args.data)), args.json)
    return 0
