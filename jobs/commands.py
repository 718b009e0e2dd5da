"""One function a command: from parsed arguments to the job, and from its result to the terminal.

Results go to standard output, messages to standard error. Each returns the exit code.
"""

import json
import os
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.settings import TrainSettings, make_settings, parse_assignment
from seg_core.errors import SegError
from seg_core.storage import absolute

if TYPE_CHECKING:
    from jobs.segment import Speed
    from seg_core.run import Plan

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


def train(args: Namespace) -> int:
    """`seg train`."""
    flags = {f.name: getattr(args, f.name) for f in fields(TrainSettings) if getattr(args, f.name) is not None}
    settings = make_settings(args.preset, args.config, [*map(parse_assignment, args.set), flags])
    out = absolute(args.out)
    from jobs.train import train as run

    bundle = run(settings, absolute(args.data), out, absolute(args.work or f"{out}.train"), args.address, args.debug)
    show({"bundle": out, "hash": bundle.hash, "epoch": bundle.provenance["epoch"], **bundle.metrics}, args.json)
    return 0


def evaluate(args: Namespace) -> int:
    """`seg evaluate`."""
    target = absolute(args.target)
    if os.path.exists(os.path.join(target, "run.json")):
        from seg_core.dataset import read_classes
        from seg_core.metrics import scores
        from seg_core.scoring import score_run

        if args.labels is None:
            raise SegError(f"{args.target}: is a run: name its truth with --labels")
        counts = score_run(target, absolute(args.labels), read_classes(absolute(args.data)) if args.data else None)
        show({**scores(counts), **counts._asdict()}, args.json)
        return 0
    from jobs.evaluate import evaluate_bundle
    from seg_core.bundle import read_bundle

    read_bundle(target)
    if args.data is None:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data")
    show(evaluate_bundle(target, absolute(args.data), args.split, args.device), args.json)
    return 0


def plan(args: Namespace) -> int:
    """`seg plan`."""
    from seg_core.bundle import read_bundle
    from seg_core.run import choose_window

    planned, refused = _planned(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    window = choose_window(args.window, planned.settings, read_bundle(absolute(args.model)), memory)
    figures: dict[str, Any] = {**planned.counts, "window": window, "windows": planned.num_windows(window)}
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
    from seg_core.run import Settings, make_plan
    from seg_core.scenes import read_region

    bundle = read_bundle(absolute(args.model))
    read_weights(absolute(args.model), bundle)  # damage shows here, not in a worker
    settings = Settings(
        tile_size=args.tile_size,
        part=args.part,
        halo=bundle.halo if args.halo is None else args.halo,
        threshold=bundle.threshold if args.threshold is None else args.threshold,
        resample=args.resample,
        scale=tuple(args.scale) if args.scale else None,
        bands=args.bands,
        keep_probability=args.keep_probability,
    )
    scenes, unreadable = read_region(args.scenes)
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
        address=args.address,
        verbose=args.debug,
    )


def segment(args: Namespace) -> int:
    """`seg segment`."""
    planned, out = _accepted(args), absolute(args.out)
    from jobs.segment import segment as run

    record = run(planned, absolute(args.model), out, _speed(args))
    if not record["num_new"]:
        note(f"{args.out}: nothing to do: all {planned.counts['tiles']:,} tiles are there")
    show({"run": out, **record["counts"]}, args.json)
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
    figures |= {"complete": found.holds, "problems": found.problems if args.json else len(found.problems)}
    show(figures, args.json)
    for line in [] if args.json else found.problems[:TABLE_ROWS]:
        print(f"  {line}")
    return 0 if found.holds and not found.num_failed else 1


def query(args: Namespace) -> int:
    """`seg query`."""
    from seg_core.query import query as ask
    from seg_core.query import summary

    if args.sql is None and args.format in {"table", "json"}:
        show(summary(absolute(args.out)), args.format == "json")
        return 0
    from seg_core.query import SUMMARY, write_answer

    answer = ask(absolute(args.out), args.sql or SUMMARY)
    if args.format == "parquet" and sys.stdout.isatty():
        raise SegError("--format parquet: is no text: send it to a file (> answer.parquet)")
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


def bench(args: Namespace) -> int:
    """`seg bench`."""
    planned = _accepted(args)
    from jobs.bench import bench as run

    with tempfile.TemporaryDirectory() as folder:
        show(run(planned, absolute(args.model), os.path.join(folder, "run"), _speed(args)), args.json)
    return 0


def demo(args: Namespace) -> int:
    """`seg demo`."""
    from jobs.demo import demo as run

    figures = run(absolute(args.out), note if args.json else partial(print, flush=True))
    show(figures, args.json)
    return 0 if figures["verified"] else 1
