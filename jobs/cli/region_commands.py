"""Commands on regions and runs: from parsed arguments to the job, and from its result to the terminal.

One function a command; each returns the exit code.
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
from ..terminal import note, show, show_table
from .arguments import folder, local, model_of, places

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seg_core.imagery.scene import Scene
    from seg_core.inference.recheck import Recheck
    from seg_core.run.plan import Plan
    from seg_core.run.verify import VerifyReport

    from ..resources import ExecutionOptions

TABLE_ROWS = 100

T = TypeVar("T")


def plan(args: Namespace) -> int:
    """`seg plan`."""
    from seg_core.model.bundle import read_bundle
    from seg_core.run.sizing import choose_window

    planned, refused, doubts = _planned(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    window = choose_window(args.window, planned.settings, read_bundle(model_of(args)), memory)
    figures: dict[str, Any] = {**planned.counts, "window": window, "windows": planned.num_windows(window)}
    if not args.calibrate and (args.price is not None or args.devices is not None or args.device != "auto"):
        raise SegError("--price, --devices, --device: are for an estimate: add --calibrate")
    if args.calibrate and planned.scenes:
        from ..calibrate import calibrate

        note("segmenting a few windows ...")
        figures |= calibrate(planned, model_of(args), window, args.window, args.device, args.devices, args.price)
    figures |= {"model": planned.model, "settings": asdict(planned.settings), "refused": refused, "doubts": doubts}
    if args.json:
        show(figures, as_json=True)
    else:
        settings = ", ".join(f"{k} {v}" for k, v in figures.pop("settings").items() if v is not None and v is not False)
        show({**figures, "settings": settings, "refused": len(refused), "doubts": len(doubts)}, as_json=False)
        for line in (*refused, *doubts):
            print(f"  {line}")
    return 2 if refused else 0


def _planned(args: Namespace) -> "tuple[Plan, list[str], list[str]]":
    """The plan, a line for each scene that is refused, and one for each doubt about those that are not."""
    from seg_core.imagery.overlaps import describe_overlaps
    from seg_core.imagery.region import read_region
    from seg_core.model.bundle import read_bundle, read_weights
    from seg_core.run.plan import Settings, make_plan

    if args.order == "given" and not args.mosaic:
        raise SegError("--order given: is for scenes that are one image: add --mosaic")
    if args.overlap and args.mosaic:
        raise SegError("--overlap count, --mosaic: in a mosaic each place counts once: leave out one of them")
    bundle = read_bundle(model_of(args))
    read_weights(model_of(args), bundle)  # damage shows here, not in a worker
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
    refused, doubts = unreadable + refused, _doubts(scenes)
    begun = args.command == "segment" and stat(f"{absolute(args.out)}/run.json") is not None
    if not args.mosaic and (args.overlap or begun):  # a run that has begun goes on as it began
        doubts += overlaps
    elif not args.mosaic:
        refused += overlaps
    return planned, refused, doubts + copies


def _doubts(scenes: "Sequence[Scene]") -> list[str]:
    """What is doubtful about scenes, each doubt once."""
    having: defaultdict[str, list[str]] = defaultdict(list)
    for scene in scenes:
        for doubt in scene.doubts:
            having[doubt].append(scene.scene_id)
    return [
        f"{ids[0]}{f' and {len(ids) - 1:,} more' if len(ids) > 1 else ''}: {doubt}" for doubt, ids in having.items()
    ]


def _accepted(args: Namespace) -> "Plan":
    """The plan of a region of which every scene can be segmented."""
    planned, refused, doubts = _planned(args)
    for line in doubts:
        note(line)
    if refused:
        more = f" (and {len(refused) - 1} more: see seg plan)" if len(refused) > 1 else ""
        raise SegError(f"{refused[0]}{more}")
    for scene in planned.scenes:
        if scene.crs is None:
            note(
                f"{scene.scene_id}: no CRS: its resolution is taken for the model's, its geometry and areas are null, "
                "and so are the areas of the whole run"
            )
    return planned


def _speed(args: Namespace) -> "ExecutionOptions":
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
    """`seg segment`."""
    from seg_core.run.relocation import match_run

    out, planned = folder("--out", args.out), _accepted(args)
    planned, notes = match_run(out, planned, places(args.relocate))
    for line in notes:
        note(line)
    from ..segment import segment as run

    record, num_new = run(planned, model_of(args), out, _speed(args))
    if not num_new:
        note(f"{args.out}: nothing to do: all {planned.counts['tiles']:,} tiles are there")
    seams, counts = record.seams, record.counts
    assert counts is not None  # which a run has when it is finished
    disagreement = seams.differing / seams.pixels if seams and seams.pixels else None
    show({"run": out, **counts, "seam_disagreement": disagreement}, args.json)
    failed = counts["failed"]
    if failed:
        _explain_failures(args.out, failed)
    return 1 if failed else 0


def verify(args: Namespace) -> int:
    """`seg verify`."""
    from seg_core.run.verify import verify as prove

    if not args.deep and (args.model or args.device != "auto" or args.relocate):
        raise SegError("--model, --device, --relocate: are to segment windows again with: add --deep")
    with waiting("reading the parts of the run"):
        found = prove(absolute(args.out))
    figures: dict[str, Any] = {"planned": found.num_planned, "done": found.num_done, "failed": found.num_failed}
    again = _recheck(args) if args.deep and found.ok else None
    differing, unread = (again.differing, again.unread) if again else ({}, [])
    found.problems += [f"{name}: {line}" for name, lines in differing.items() for line in lines]
    if again:
        figures |= {"rechecked": again.num_same + len(differing), "not_rechecked": unread if args.json else len(unread)}
    figures |= {"complete": found.ok, "problems": found.problems if args.json else len(found.problems)}
    show(figures if args.json else {"run": found.describe(), **figures}, args.json)
    if not args.json:
        for line in [*found.problems, *(f"could not be rechecked: {reason}" for reason in unread)][:TABLE_ROWS]:
            print(f"  {line}")
        _advise(args, found, list(differing), len(unread))
    return 0 if found.ok and not found.num_failed and not unread else 1


def _watched(results: "Iterator[T]", what: str) -> "Iterator[T]":
    """The results, with a line about what is under way while the next one is waited for."""
    for number in count(1):
        with waiting(f"{what}: number {number}"):
            found = next(results, None)
        if found is None:
            return
        yield found


def _recheck(args: Namespace) -> "Recheck":
    from seg_core.inference.recheck import recheck

    model = absolute(args.model) if args.model else None
    with waiting("segmenting again") as report:
        return recheck(absolute(args.out), args.deep, args.device, model, places(args.relocate), report)


def _advise(args: Namespace, found: "VerifyReport", differing: list[str], unread: int) -> None:
    """Say why `seg verify` ends with 1, and what to do."""
    if found.bad_parts or differing:
        command = shlex.join(["seg", "repair", args.out, *differing])
        note(f"{command} removes the parts that this is about; seg segment then makes them again")
    elif found.num_missing and found.num_missing == len(found.problems):
        note("the run is not finished: the seg segment command that began it goes on")
    if found.num_failed:
        _explain_failures(args.out, found.num_failed)
    if unread:
        note(
            f"{unread:,} windows could not be rechecked (exit code 1), the run itself is sound: "
            "where scenes have moved, add --relocate OLD=NEW"
        )


def _explain_failures(run: str, failed: int) -> None:
    ask = shlex.join(["seg", "query", run, "SELECT * FROM failures"])
    note(f"{failed:,} tiles failed (exit code 1): {ask} says why; the run's seg segment command tries them again")


def repair(args: Namespace) -> int:
    """`seg repair`."""
    from seg_core.run.verify import repair as remove_bad_parts

    with waiting("reading the parts of the run"):
        found = remove_bad_parts(absolute(args.out), args.parts)
    show({"removed": found.bad_parts if args.json else len(found.bad_parts)}, args.json)
    for path in [] if args.json else found.bad_parts[:TABLE_ROWS]:
        print(f"  {path}")
    if found.bad_parts:
        note("the seg segment command of the run makes again what is missing")
    return 0


def query(args: Namespace) -> int:
    """`seg query`."""
    from seg_core.run.query import describe, summary
    from seg_core.run.stored_plan import num_missing, read_plan

    if args.format == "parquet" and sys.stdout.isatty():
        raise SegError("--format parquet: Parquet is binary: redirect it to a file (> answer.parquet)")
    run = absolute(args.out)
    planned = read_plan(run)  # damage is named before anything is answered
    if args.sql is None and args.format in {"table", "json"}:
        with waiting("adding up the parts of the run"):
            figures = summary(run)
        as_json = args.format == "json"
        show(figures if as_json else {"run": describe(figures), **figures}, as_json)
    else:
        _answer(run, args)
    if missing := num_missing(run, planned):
        note(f"{args.out}: {missing:,} parts are not done yet, and not in this answer (seg verify names them)")
    return 0


def _answer(run: str, args: Namespace) -> None:
    from seg_core.run.query import ask, summary, to_table, write_answer

    with nullcontext(to_table(summary(run)).to_reader()) if args.sql is None else ask(run, args.sql) as answer:
        write_answer(answer, args.format, sys.stdout.buffer, TABLE_ROWS)


def export_masks(args: Namespace) -> int:
    """`seg export masks`."""
    from seg_core.run.export_masks import export_masks as write
    from seg_core.run.query import describe, summary

    run, out, files, problems = absolute(args.run), local(folder("--out", args.out)), [], 0
    with waiting("adding up the parts of the run"):
        known = summary(run)
    for path, problem in _watched(write(run, out), "writing masks"):
        files += [] if problem else [path]
        problems += bool(problem)
        note(f"no {path}: {problem}" if problem else path)
    unknown = {name: known[name] for name in ("failed", "missing")}
    show(
        {"files": files, **unknown} if args.json else {"run": describe(known), "files": len(files), **unknown},
        args.json,
    )
    if any(unknown.values()):
        note(f"{sum(unknown.values()):,} tiles failed or are not done yet: they are nodata there (exit code 1)")
    if problems:
        note(f"{problems:,} files could not be written (exit code 1)")
    return 1 if problems or any(unknown.values()) else 0


@contextmanager
def _bench_region(args: Namespace) -> "Iterator[tuple[Plan, str]]":
    """The plan of the scenes that were named, or of one made for it; and a folder to measure in, then gone."""
    from seg_core.model.bundle import read_bundle

    from ..benchmarks.scenes import make_scene, scratch

    if args.scenes and (args.codec or args.side):
        raise SegError("--codec, --side: are for a scene that is made: leave them out, or name no scene")
    with scratch(args.at) as folder:
        if not args.scenes:
            made = make_scene(folder, args.codec or "deflate", args.side or 4096, read_bundle(model_of(args)))
            args = Namespace(**{**vars(args), "scenes": [made]})
        yield _accepted(args), folder


def bench_segment(args: Namespace) -> int:
    """`seg bench segment`."""
    from ..benchmarks.segmenting import bench_segment as run

    with _bench_region(args) as (planned, folder):
        show(run(planned, model_of(args), folder, _speed(args), args.seconds, args.rounds), args.json)
    return 0


def bench_scale(args: Namespace) -> int:
    """`seg bench scale`."""
    from ..benchmarks.segmenting import bench_scale as run

    plot = local(args.out) if args.out else None
    if plot:
        make_folder(os.path.dirname(plot))  # before anything is measured
    with _bench_region(args) as (planned, folder):
        points = run(
            planned, model_of(args), folder, _speed(args), args.sizes, args.workers, args.windows, args.seconds
        )
    if plot:
        from seg_core.plots.figures import draw_scale
        from seg_core.storage.files import publish

        publish(plot, draw_scale(points))
    if args.json:
        show({"points": points, "plot": plot}, as_json=True)
        return 0
    show_table(points)
    return 0


def demo(args: Namespace) -> int:
    """`seg demo`."""
    from ..demo import demo as run

    figures = run(local(folder("--out", args.out)), note if args.json else partial(print, flush=True))
    show(figures, args.json)
    return 0 if figures["verified"] else 1
