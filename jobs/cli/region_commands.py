"""The commands on regions and runs.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
import shlex
import sys
from argparse import Namespace
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from seg_core.errors import SegError
from seg_core.storage.files import absolute, make_folder, stat

from ..progress import waiting
from ..terminal import note, print_figures, print_table
from .arguments import absolute_places, local_path, model_folder, output_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seg_core.imagery.scene import Scene
    from seg_core.inference.recheck import Recheck
    from seg_core.run.plan import Plan
    from seg_core.run.verify import VerifyReport

    from ..resources import ExecutionOptions

TABLE_ROWS = 100  # that are printed at most

T = TypeVar("T")


def plan(args: Namespace) -> int:
    """Run `seg plan`: show what a run would do."""
    from seg_core.model.bundle import read_bundle
    from seg_core.run.sizing import choose_window

    planned, refused, doubts = _make_plan(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    window = choose_window(args.window, planned.settings, read_bundle(model_folder(args)), memory)
    figures: dict[str, Any] = {**planned.counts, "window": window, "windows": planned.num_windows(window)}
    if not args.calibrate and (args.price is not None or args.devices is not None or args.device != "auto"):
        raise SegError("--price, --devices, --device: are only for an estimate: add --calibrate")
    if args.calibrate and planned.scenes:
        from ..calibrate import calibrate

        note("segmenting a few windows ...")
        figures |= calibrate(planned, model_folder(args), window, args.window, args.device, args.devices, args.price)
    figures |= {"model": planned.model, "settings": asdict(planned.settings), "refused": refused, "doubts": doubts}
    if args.json:
        print_figures(figures, as_json=True)
    else:
        settings = ", ".join(f"{k} {v}" for k, v in figures.pop("settings").items() if v is not None and v is not False)
        print_figures({**figures, "settings": settings, "refused": len(refused), "doubts": len(doubts)}, as_json=False)
        for line in (*refused, *doubts):
            print(f"  {line}")
    return 2 if refused else 0


def _make_plan(args: Namespace) -> "tuple[Plan, list[str], list[str]]":
    """Return the plan, one line per refused scene, and one line per doubt about the accepted scenes."""
    from seg_core.imagery.overlaps import describe_overlaps
    from seg_core.imagery.region import read_region
    from seg_core.model.bundle import read_bundle, read_weights
    from seg_core.run.plan import Settings, make_plan

    if args.order == "given" and not args.mosaic:
        raise SegError("--order given: is only for a mosaic: add --mosaic")
    if args.overlap and args.mosaic:
        raise SegError("--overlap count, --mosaic: a mosaic counts each place once: leave out one of the options")
    bundle = read_bundle(model_folder(args))
    read_weights(model_folder(args), bundle)  # detects damage here instead of in a worker
    settings = Settings(
        tile_size=args.tile_size,
        part=args.part,
        halo=bundle.halo if args.halo is None else args.halo,
        threshold=bundle.threshold if args.threshold is None else args.threshold,
        resample=args.resample,
        scale=tuple(args.scale) if args.scale else None,
        bands=args.bands,
        keep_probability=args.keep_probability,
        precision=args.precision,
        decode=args.decode,
        mosaic=args.mosaic,
        alpha=args.alpha,
    )
    as_given = args.mosaic and args.order == "given"
    with waiting("reading the headers of scenes"):
        scenes, unreadable = read_region(args.scenes, as_given, args.alpha, args.include)
        planned, refused = make_plan(scenes, bundle, settings, args.window)
        overlaps, copies = describe_overlaps(scenes if args.mosaic else planned.scenes)
    refused, doubts = unreadable + refused, _list_doubts(scenes)
    resumed = args.command == "segment" and stat(f"{absolute(args.out)}/run.json") is not None
    if not args.mosaic and (args.overlap or resumed):  # a resumed run keeps the scenes that it began with
        doubts += overlaps
    elif not args.mosaic:
        refused += overlaps
    return planned, refused, doubts + copies


def _list_doubts(scenes: "Sequence[Scene]") -> list[str]:
    """Return one line per doubt, with the first scene that it is about and the number of further ones."""
    scene_ids: defaultdict[str, list[str]] = defaultdict(list)
    for scene in scenes:
        for doubt in scene.doubts:
            scene_ids[doubt].append(scene.scene_id)
    return [
        f"{ids[0]}{f' and {len(ids) - 1:,} more' if len(ids) > 1 else ''}: {doubt}" for doubt, ids in scene_ids.items()
    ]


def _make_accepted_plan(args: Namespace) -> "Plan":
    """Return the plan and print its doubts. Raises SegError if a scene is refused."""
    planned, refused, doubts = _make_plan(args)
    for line in doubts:
        note(line)
    if refused:
        more = f" (and {len(refused) - 1} more: see seg plan)" if len(refused) > 1 else ""
        raise SegError(f"{refused[0]}{more}")
    for scene in planned.scenes:
        if scene.crs is None:
            note(
                f"{scene.scene_id}: no CRS: its resolution is assumed to be the model's, its geometry and areas are "
                "null, and so are the areas of the whole run"
            )
    return planned


def _execution_options(args: Namespace) -> "ExecutionOptions":
    from ..resources import ExecutionOptions

    return ExecutionOptions(
        window=args.window,
        batch=args.batch,
        actors=args.actors,
        gpus_per_actor=args.gpus_per_actor,
        device=args.device,
        compiling=args.compile,
        max_failures=getattr(args, "max_failures", None),
        address=args.address,
        verbose=args.debug,
    )


def segment(args: Namespace) -> int:
    """Run `seg segment`: segment a region, or what is left of it."""
    from seg_core.run.relocation import match_run

    out, planned = output_folder("--out", args.out), _make_accepted_plan(args)
    planned, notes = match_run(out, planned, absolute_places(args.relocate))
    for line in notes:
        note(line)
    from ..segment import segment as segment_region

    record, num_new = segment_region(planned, model_folder(args), out, _execution_options(args))
    if not num_new:
        note(f"{args.out}: nothing to do: all {planned.counts['tiles']:,} tiles are there")
    seams, counts = record.seams, record.counts
    assert counts is not None  # which a run has when it is finished
    disagreement = seams.differing / seams.pixels if seams and seams.pixels else None
    print_figures({"run": out, **counts, "seam_disagreement": disagreement}, args.json)
    failed = counts["failed"]
    if failed:
        _explain_failures(args.out, failed)
    return 1 if failed else 0


def verify(args: Namespace) -> int:
    """Run `seg verify`: check the files of a run, and with --deep segment some windows again."""
    from seg_core.run.verify import verify as verify_run

    if not args.deep and (args.model or args.device != "auto" or args.relocate):
        raise SegError("--model, --device, --relocate: are only for segmenting windows again: add --deep")
    with waiting("reading the parts of the run"):
        report = verify_run(absolute(args.run))
    figures: dict[str, Any] = {"planned": report.num_planned, "done": report.num_done, "failed": report.num_failed}
    rechecked = _recheck(args) if args.deep and report.ok else None
    differing, unread = (rechecked.differing, rechecked.unread) if rechecked else ({}, [])
    report.problems += [f"{name}: {line}" for name, lines in differing.items() for line in lines]
    if rechecked:
        figures["rechecked"] = rechecked.num_same + len(differing)
        figures["not_rechecked"] = unread if args.json else len(unread)
    figures |= {"complete": report.ok, "problems": report.problems if args.json else len(report.problems)}
    print_figures(figures if args.json else {"run": report.describe(), **figures}, args.json)
    if not args.json:
        for line in [*report.problems, *(f"could not be rechecked: {reason}" for reason in unread)][:TABLE_ROWS]:
            print(f"  {line}")
        _advise(args, report, list(differing), len(unread))
    return 0 if report.ok and not report.num_failed and not unread else 1


def _show_waiting(results: "Iterator[T]", what: str) -> "Iterator[T]":
    """Yield the results, and show a progress line while the next result is computed."""
    for number in count(1):
        with waiting(f"{what}: number {number}"):
            result = next(results, None)
        if result is None:
            return
        yield result


def _recheck(args: Namespace) -> "Recheck":
    from seg_core.inference.recheck import recheck

    model = absolute(args.model) if args.model else None
    with waiting("segmenting again") as report:
        return recheck(absolute(args.run), args.deep, args.device, model, absolute_places(args.relocate), report)


def _advise(args: Namespace, report: "VerifyReport", differing: list[str], unread: int) -> None:
    """Print the reason for exit code 1 of `seg verify`, and what to do."""
    if report.bad_parts or differing:
        command = shlex.join(["seg", "repair", args.run, *differing])
        note(f"{command} removes the parts with problems; seg segment then makes them again")
    elif report.num_missing and report.num_missing == len(report.problems):
        note("the run is not finished: repeat its seg segment command to resume it")
    if report.num_failed:
        _explain_failures(args.run, report.num_failed)
    if unread:
        note(
            f"{unread:,} windows could not be rechecked (exit code 1), but the files of the run are complete: "
            "if scenes have moved, add --relocate OLD=NEW"
        )


def _explain_failures(run: str, failed: int) -> None:
    command = shlex.join(["seg", "query", run, "SELECT * FROM failures"])
    note(f"{failed:,} tiles failed (exit code 1): {command} shows why; the run's seg segment command tries them again")


def repair(args: Namespace) -> int:
    """Run `seg repair`: remove damaged parts of a run, so that they are made again."""
    from seg_core.run.verify import repair as remove_bad_parts

    with waiting("reading the parts of the run"):
        report = remove_bad_parts(absolute(args.run), args.parts)
    print_figures({"removed": report.bad_parts if args.json else len(report.bad_parts)}, args.json)
    for path in [] if args.json else report.bad_parts[:TABLE_ROWS]:
        print(f"  {path}")
    if report.bad_parts:
        note("the seg segment command of the run makes the missing parts again")
    return 0


def query(args: Namespace) -> int:
    """Run `seg query`: query a run in SQL, or print its summary."""
    from seg_core.run.query import describe, summary
    from seg_core.run.stored_plan import num_missing, read_plan

    if args.format == "parquet" and sys.stdout.isatty():
        raise SegError("--format parquet: Parquet is binary: redirect it to a file (> answer.parquet)")
    run = absolute(args.run)
    planned = read_plan(run)  # reports damage before a result is printed
    if args.sql is None and args.format in {"table", "json"}:
        with waiting("adding up the parts of the run"):
            figures = summary(run)
        as_json = args.format == "json"
        print_figures(figures if as_json else {"run": describe(figures), **figures}, as_json)
    else:
        _write_result(run, args)
    if missing := num_missing(run, planned):
        note(f"{args.run}: {missing:,} parts are not done yet and missing from this result (seg verify lists them)")
    return 0


def _write_result(run: str, args: Namespace) -> None:
    from seg_core.run.query import ask, summary, to_table, write_answer

    with nullcontext(to_table(summary(run)).to_reader()) if args.sql is None else ask(run, args.sql) as result:
        write_answer(result, args.format, sys.stdout.buffer, TABLE_ROWS)


def export_masks(args: Namespace) -> int:
    """Run `seg export masks`: write the masks of a run as GeoTIFFs."""
    from seg_core.run.export_masks import export_masks as write_masks
    from seg_core.run.query import describe, summary

    run, out, files, problems = absolute(args.run), local_path(output_folder("--out", args.out)), [], 0
    with waiting("adding up the parts of the run"):
        known = summary(run)
    for path, problem in _show_waiting(write_masks(run, out), "writing masks"):
        files += [] if problem else [path]
        problems += bool(problem)
        note(f"{path}: not written: {problem}" if problem else path)
    unknown = {name: known[name] for name in ("failed", "missing")}
    print_figures(
        {"files": files, **unknown} if args.json else {"run": describe(known), "files": len(files), **unknown},
        args.json,
    )
    if any(unknown.values()):
        note(f"{sum(unknown.values()):,} tiles failed or are not done yet: they are nodata in the masks (exit code 1)")
    if problems:
        note(f"{problems:,} files could not be written (exit code 1)")
    return 1 if problems or any(unknown.values()) else 0


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
        yield _make_accepted_plan(args), folder


def bench_segment(args: Namespace) -> int:
    """Run `seg bench segment`: measure the pipeline, its stages and a plain loop."""
    from ..benchmarks.segmenting import bench_segment as measure

    with _prepare_bench(args) as (planned, folder):
        options = _execution_options(args)
        print_figures(measure(planned, model_folder(args), folder, options, args.seconds, args.rounds), args.json)
    return 0


def bench_scale(args: Namespace) -> int:
    """Run `seg bench scale`: measure throughput and memory by number of windows, actors and window size."""
    from ..benchmarks.segmenting import bench_scale as measure

    plot = local_path(args.out) if args.out else None
    if plot:
        make_folder(os.path.dirname(plot))  # before anything is measured
    with _prepare_bench(args) as (planned, folder):
        options, series = _execution_options(args), (args.sizes, args.workers, args.windows)
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


def demo(args: Namespace) -> int:
    """Run `seg demo`: train on a synthetic town and segment it."""
    from ..demo import demo as run_demo

    out = local_path(output_folder("--out", args.out))
    figures = run_demo(out, note if args.json else partial(print, flush=True))
    print_figures(figures, args.json)
    return 0 if figures["verified"] else 1
