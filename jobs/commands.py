"""One function a command: from parsed arguments to the job, and from its result to the terminal.

Results go to standard output, messages to standard error. Each returns the exit code.
"""

import json
import os
import sys
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.settings import TrainSettings, make_settings, parse_assignment
from seg_core.errors import SegError
from seg_core.storage import absolute, exists, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.segment import Speed
    from seg_core.plan import Plan

TABLE_ROWS = 100


def show(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures: one JSON object, or a line each."""
    if as_json:
        print(json.dumps(figures))
        return
    wide = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{wide}}  {_text(value)}")


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else str(value)


def note(line: str) -> None:
    """A message, on standard error."""
    print(line, file=sys.stderr, flush=True)


def _train_settings(args: Namespace) -> TrainSettings:
    flags = {f.name: getattr(args, f.name) for f in fields(TrainSettings) if getattr(args, f.name) is not None}
    return make_settings(args.preset, args.config, [*map(parse_assignment, args.set), flags])


def _model(args: Namespace) -> str:
    """The folder of the model that was named, or else of the one that comes with the package."""
    from seg_core.bundle import BUILT_IN

    return absolute(args.model) if args.model else BUILT_IN


def _local(path: str) -> str:
    """The absolute form of a path that must be on disk."""
    if is_remote(path):
        raise SegError(f"{path}: this must be on a disk: only scenes, models, runs and --work may be in S3")
    return absolute(path)


def train(args: Namespace) -> int:
    """`seg train`."""
    settings = _train_settings(args)
    out = absolute(args.out)
    work = absolute(args.work or f"{out}.train")
    from jobs.train import train as run

    bundle = run(settings, _local(args.data), out, work, args.address, args.debug)
    figures = {"bundle": out, "hash": bundle.hash, "epoch": bundle.provenance["epoch"], **bundle.metrics}
    show({**figures, "threshold": bundle.threshold}, args.json)
    return 0


def evaluate(args: Namespace) -> int:
    """`seg evaluate`."""
    target = absolute(args.target)
    if exists(f"{target}/run.json"):
        return _evaluate_run(args, target)
    from seg_core.bundle import read_bundle

    read_bundle(target)
    if args.data is None:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data")
    from jobs.evaluate import evaluate as score
    from jobs.evaluate import write_figures, write_samples
    from seg_core.segmenter import Segmenter

    segmenter, data = Segmenter(target, args.device, args.tta), _local(args.data)
    found = score(segmenter, data, args.split)
    if args.per_image:
        found.images.to_parquet(_local(args.per_image), index=False)
    if args.figures:
        folder = absolute(args.figures)
        write_figures(found, folder)
        write_samples(found, segmenter, data, args.split, f"{folder}/samples.png")
    show(found.figures(), args.json)
    return 0


def _evaluate_run(args: Namespace, run: str) -> int:
    from seg_core.dataset import read_classes
    from seg_core.metrics import scores
    from seg_core.scoring import score_run

    for option in ("tta", "per_image", "figures"):
        if getattr(args, option):
            raise SegError(f"--{option.replace('_', '-')}: is for a bundle, {args.target} is a run")
    if args.labels is None:
        raise SegError(f"{args.target}: is a run: name its truth with --labels")
    counts = score_run(run, absolute(args.labels), read_classes(_local(args.data)) if args.data else None)
    show({**scores(counts), **counts._asdict()}, args.json)
    return 0


def plan(args: Namespace) -> int:
    """`seg plan`."""
    from seg_core.bundle import read_bundle
    from seg_core.plan import choose_window

    planned, refused = _planned(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    window = choose_window(args.window, planned.settings, read_bundle(_model(args)), memory)
    figures: dict[str, Any] = {**planned.counts, "window": window, "windows": planned.num_windows(window)}
    if not args.calibrate and (args.price is not None or args.devices is not None):
        raise SegError("--price, --devices: are for an estimate: add --calibrate")
    if args.calibrate and planned.scenes:
        from jobs.calibrate import calibrate

        figures |= calibrate(planned, _model(args), window, args.device, args.devices, args.price)
    figures |= {"model": planned.model, "settings": asdict(planned.settings), "refused": refused}
    if args.json:
        show(figures, as_json=True)
    else:
        settings = ", ".join(f"{k} {v}" for k, v in figures.pop("settings").items() if v is not None and v is not False)
        show({**figures, "settings": settings, "refused": len(refused)}, as_json=False)
        for line in refused:
            print(f"  {line}")
    return 2 if refused else 0


def _planned(args: Namespace) -> "tuple[Plan, list[str]]":
    from seg_core.bundle import read_bundle, read_weights
    from seg_core.plan import Settings, make_plan
    from seg_core.scenes import read_region

    bundle = read_bundle(_model(args))
    read_weights(_model(args), bundle)  # damage shows here, not in a worker
    settings = Settings(
        tile_size=args.tile_size,
        part=args.part,
        halo=bundle.halo if args.halo is None else args.halo,
        threshold=bundle.threshold if args.threshold is None else args.threshold,
        resample=args.resample,
        scale=tuple(args.scale) if args.scale else None,
        bands=args.bands,
        keep_probability=args.keep_probability,
        mosaic=args.mosaic,
    )
    scenes, unreadable = read_region(args.scenes, as_given=args.mosaic and args.order == "given")
    planned, refused = make_plan(scenes, bundle, settings, args.window)
    return planned, unreadable + refused


def _accepted(args: Namespace) -> "Plan":
    """The plan of a region of which every scene can be segmented."""
    planned, refused = _planned(args)
    if refused:
        more = f" (and {len(refused) - 1} more: see seg plan)" if len(refused) > 1 else ""
        raise SegError(f"{refused[0]}{more}")
    for scene in planned.scenes:
        if scene.crs is None:
            note(f"{scene.scene_id}: no CRS: its resolution is taken for the model's, areas and geometry stay null")
    return planned


def _speed(args: Namespace) -> "Speed":
    from jobs.segment import Speed

    return Speed(
        window=args.window,
        actors=args.actors,
        gpus_per_actor=args.gpus_per_actor,
        device=args.device,
        max_failures=getattr(args, "max_failures", None),
        address=args.address,
        verbose=args.debug,
    )


def segment(args: Namespace) -> int:
    """`seg segment`."""
    planned, out = _accepted(args), absolute(args.out)
    from jobs.segment import segment as run

    record = run(planned, _model(args), out, _speed(args))
    if not record["num_new"]:
        note(f"{args.out}: nothing to do: all {planned.counts['tiles']:,} tiles are there")
    seams = record.get("seams") or {"pixels": 0}
    disagreement = seams["differing"] / seams["pixels"] if seams["pixels"] else None
    show({"run": out, **record["counts"], "seam_disagreement": disagreement}, args.json)
    failed = record["counts"]["failed"]
    if failed:
        note(
            f"{failed:,} tiles failed: seg query {args.out} 'SELECT * FROM failures'; the same command tries them again"
        )
    return 1 if failed else 0


def verify(args: Namespace) -> int:
    """`seg verify`."""
    from seg_core.verify import verify as prove

    found = prove(absolute(args.out))
    figures: dict[str, Any] = {"planned": found.num_planned, "done": found.num_done, "failed": found.num_failed}
    differing: dict[str, list[str]] = {}
    if args.deep and found.holds:
        from jobs.recheck import recheck

        model = absolute(args.model) if args.model else None
        figures["rechecked"], differing = recheck(absolute(args.out), args.deep, args.device, model)
        found.problems = [f"{name}: {line}" for name, lines in differing.items() for line in lines]
    figures |= {"complete": found.holds, "problems": found.problems if args.json else len(found.problems)}
    show(figures, args.json)
    for line in [] if args.json else found.problems[:TABLE_ROWS]:
        print(f"  {line}")
    if not found.holds and not args.json:
        command = " ".join(["seg repair", args.out, *differing])
        note(f"{command} removes the parts that this is about; seg segment then makes them again")
    return 0 if found.holds and not found.num_failed else 1


def repair(args: Namespace) -> int:
    """`seg repair`."""
    from seg_core.verify import repair as mend

    found = mend(absolute(args.out), args.parts)
    show({"removed": found.bad_parts if args.json else len(found.bad_parts)}, args.json)
    for path in [] if args.json else found.bad_parts[:TABLE_ROWS]:
        print(f"  {path}")
    if found.bad_parts:
        note("the seg segment command of the run makes again what is missing")
    return 0


def query(args: Namespace) -> int:
    """`seg query`."""
    from seg_core.query import query as ask
    from seg_core.query import summary, to_table, write_answer

    if args.format == "parquet" and sys.stdout.isatty():
        raise SegError("--format parquet: is no text: send it to a file (> answer.parquet)")
    run = absolute(args.out)
    if args.sql is None and args.format in {"table", "json"}:
        show(summary(run), args.format == "json")
        return 0
    answer = to_table(summary(run)) if args.sql is None else ask(run, args.sql)
    write_answer(answer, args.format, sys.stdout.buffer, TABLE_ROWS)
    return 0


def submit(args: Namespace) -> int:
    """`seg submit`."""
    from jobs.cli import make_parser
    from jobs.submit import connect
    from jobs.submit import submit as send

    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command:
        raise SegError("submit: no command: say seg submit -- segment ...")
    make_parser().parse_args(command)  # wrong use shows here, not in a log far away
    client = connect(args.address)
    job = send(client, command, os.getcwd())
    if args.no_follow:
        print(job)
        return 0
    note(f"job {job}")
    return _follow(client, job)


def _follow(client: Any, job: str) -> int:
    from jobs.submit import exit_code, follow

    for text in follow(client, job):
        print(text, end="", flush=True)
    return exit_code(client, job)


def jobs(args: Namespace) -> int:
    """`seg jobs`."""
    from jobs.submit import connect, listing

    found = listing(connect(args.address))
    if args.json:
        show({"jobs": found}, as_json=True)
    for job in [] if args.json else found:
        print(f"{job['id']}  {job['status']:<9}  {job['seconds']:>8.1f} s  {job['command']}")
    return 0


def logs(args: Namespace) -> int:
    """`seg logs`."""
    from jobs.submit import connect, details

    client = connect(args.address)
    details(client, args.id)
    return _follow(client, args.id)


def stop(args: Namespace) -> int:
    """`seg stop`."""
    from jobs.submit import connect
    from jobs.submit import stop as end

    note(f"{args.id}: {end(connect(args.address), args.id)}")
    return 0


def models_show(args: Namespace) -> int:
    """`seg models show`."""
    from seg_core.bundle import describe, read_bundle, read_weights

    bundle = read_bundle(_model(args))
    weights = read_weights(_model(args), bundle)
    figures = {"bundle": _model(args), **describe(bundle)}
    figures["weights"] = f"{sum(w.size for w in weights.values()):,}"
    figures["weights_mb"] = round(sum(w.nbytes for w in weights.values()) / 1e6, 2)
    if args.json:
        show(figures, as_json=True)
        return 0
    for name in ("architecture", "metrics", "provenance"):
        figures[name] = "\n".join(f"{key} {_text(value)}" for key, value in figures[name].items())
    wide = max(map(len, figures)) + 2
    show({k: _text(v).replace("\n", "\n" + " " * wide) for k, v in figures.items()}, as_json=False)
    return 0


def export_model(args: Namespace) -> int:
    """`seg export model`."""
    from seg_core.export import SUFFIXES, export_model

    source = absolute(args.model)
    out = _local(args.out or args.model + SUFFIXES[args.to])
    bundle = export_model(source, args.to, out)
    show({"file": out, "bytes": os.path.getsize(out), "model": bundle.hash, "stride": bundle.stride}, args.json)
    return 0


@contextmanager
def _bench_region(args: Namespace) -> "Iterator[tuple[Plan, str]]":
    """The plan of the scenes that were named, or of one made for it; and a folder to measure in, then gone."""
    from jobs.made import make_scene, scratch
    from seg_core.bundle import read_bundle

    if args.scenes and (args.codec or args.side):
        raise SegError("--codec, --side: are for a scene that is made: leave them out, or name no scene")
    with scratch(args.at) as folder:
        if not args.scenes:
            made = make_scene(folder, args.codec or "deflate", args.side or 4096, read_bundle(_model(args)))
            args = Namespace(**{**vars(args), "scenes": [made]})
        yield _accepted(args), folder


def bench_segment(args: Namespace) -> int:
    """`seg bench segment`."""
    from jobs.bench import bench_segment as run

    with _bench_region(args) as (planned, folder):
        show(run(planned, _model(args), folder, _speed(args), args.seconds), args.json)
    return 0


def bench_scale(args: Namespace) -> int:
    """`seg bench scale`."""
    from jobs.bench import bench_scale as run

    plot = _local(args.out) if args.out else None
    with _bench_region(args) as (planned, folder):
        points = run(planned, _model(args), folder, _speed(args), args.sizes, args.workers, args.windows, args.seconds)
    if plot:
        from seg_core.figures import draw_scale
        from seg_core.storage import publish

        publish(plot, draw_scale(points))
    if args.json:
        show({"points": points, "plot": plot}, as_json=True)
        return 0
    wide = {name: max(len(name), *(len(_text(point[name])) for point in points)) for name in points[0]}
    print("  ".join(f"{name:>{wide[name]}}" for name in wide))
    for point in points:
        print("  ".join(f"{_text(point[name]):>{wide[name]}}" for name in wide))
    return 0


def bench_train(args: Namespace) -> int:
    """`seg bench train`."""
    settings = _train_settings(args)
    from jobs.bench_train import bench_train as run

    show(run(settings, _local(args.data)), args.json)
    return 0


def demo(args: Namespace) -> int:
    """`seg demo`."""
    from jobs.demo import demo as run

    figures = run(_local(args.out), note if args.json else partial(print, flush=True))
    show(figures, args.json)
    return 0 if figures["verified"] else 1
