"""The commands that plan and segment a region.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from seg_core.errors import SegError
from seg_core.storage.files import absolute, stat

from ..progress import waiting
from ..terminal import note, print_figures
from .arguments import absolute_places, local_path, model_folder, output_folder
from .run_commands import explain_failures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seg_core.imagery.scene import Scene
    from seg_core.run.plan import Plan

    from ..resources import ExecutionOptions


def plan(args: Namespace) -> int:
    """Run `seg plan`: show what a run would do."""
    from seg_core.model.bundle import read_bundle
    from seg_core.run.sizing import choose_window
    from seg_core.threads import count_memory

    planned, refused, doubts = _make_plan(args)
    planned = normalize_plan(planned, args)
    window = choose_window(args.window, planned.settings, read_bundle(model_folder(args)), count_memory() // 2)
    figures: dict[str, Any] = {**planned.counts, "window": window, "windows": planned.num_windows(window)}
    if not args.calibrate and (args.price is not None or args.devices is not None or args.device != "auto"):
        raise SegError("--price, --devices, --device: are only for an estimate: add --calibrate")
    if args.calibrate and planned.scenes:
        from ..calibrate import calibrate

        note("segmenting a few windows ...")
        figures |= calibrate(planned, model_folder(args), window, args.window, args.device, args.devices, args.price)
    if planned.fit is not None:
        figures |= planned.fit.figures()
        doubts += filter(None, [planned.fit.describe(planned.settings.normalize)])
    figures |= {
        "model": planned.model,
        "class": planned.class_name,
        "settings": asdict(planned.settings),
        "refused": refused,
        "doubts": doubts,
    }
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
    from seg_core.training.class_names import describe_class

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
        normalize=args.normalize,
    )
    as_given = args.mosaic and args.order == "given"
    with waiting("reading the headers of scenes"):
        scenes, unreadable = read_region(args.scenes, as_given, args.alpha, args.include)
        planned, refused = make_plan(scenes, bundle, settings, args.window)
        overlaps, copies = describe_overlaps(scenes if args.mosaic else planned.scenes)
    if described := describe_class(bundle.classes, bundle.building):
        note(f"{model_folder(args)}: {described}")
    refused, doubts = unreadable + refused, list_doubts(scenes)
    resumed = args.command == "segment" and stat(f"{absolute(args.out)}/run.json") is not None
    if not args.mosaic and (args.overlap or resumed):  # a resumed run keeps the scenes that it began with
        doubts += overlaps
    elif not args.mosaic:
        refused += overlaps
    return planned, refused, doubts + copies


def list_doubts(scenes: "Sequence[Scene]") -> list[str]:
    """Return one line per doubt, with the first scene that it is about and the number of further ones."""
    scene_ids: defaultdict[str, list[str]] = defaultdict(list)
    for scene in scenes:
        for doubt in scene.doubts:
            scene_ids[doubt].append(scene.scene_id)
    return [
        f"{ids[0]}{f' and {len(ids) - 1:,} more' if len(ids) > 1 else ''}: {doubt}" for doubt, ids in scene_ids.items()
    ]


def make_accepted_plan(args: Namespace) -> "Plan":
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


def normalize_plan(planned: "Plan", args: Namespace) -> "Plan":
    """Return the plan with its normalization, found from a sample of its imagery."""
    from seg_core.model.bundle import read_bundle
    from seg_core.run.normalization import normalize_plan as normalize

    with waiting("comparing a sample of the imagery with that of the training") as report:
        return normalize(planned, read_bundle(model_folder(args)), report)


def execution_options(args: Namespace) -> "ExecutionOptions":
    """Return the options of a run that do not change its result."""
    from ..resources import ExecutionOptions

    return ExecutionOptions(
        window=args.window,
        batch=args.batch,
        actors=args.actors,
        gpus_per_actor=args.gpus_per_actor,
        readers=args.readers,
        device=args.device,
        compiling=args.compile,
        max_failures=getattr(args, "max_failures", None),
        address=args.address,
        node_timeout=args.node_timeout,
        verbose=args.debug,
    )


def segment(args: Namespace) -> int:
    """Run `seg segment`: segment a region, or what is left of it."""
    from seg_core.model.bundle import read_bundle
    from seg_core.run.normalization import normalize_as_run
    from seg_core.run.relocation import match_run

    out, planned, places = output_folder("--out", args.out), make_accepted_plan(args), absolute_places(args.relocate)
    if stat(f"{out}/run.json") is None:
        planned = normalize_plan(planned, args)
    else:
        planned = normalize_as_run(out, planned, read_bundle(model_folder(args)), places)
    planned, notes = match_run(out, planned, places)
    if planned.fit is not None:
        notes += filter(None, [planned.fit.describe(planned.settings.normalize)])
    for line in notes:
        note(line)
    from ..segment import segment as segment_region

    record, num_new = segment_region(planned, model_folder(args), out, execution_options(args))
    if not num_new:
        note(f"{args.out}: nothing to do: all {planned.counts['tiles']:,} tiles are there")
    seams, counts = record.seams, record.counts
    assert counts is not None  # which a run has when it is finished
    disagreement = seams.differing / seams.pixels if seams and seams.pixels else None
    print_figures({"run": out, **counts, "seam_disagreement": disagreement, **record.setting_figures()}, args.json)
    for line in record.fit_warnings(counts):
        note(line)
    failed = counts["failed"]
    if failed:
        explain_failures(args.out, failed)
    return 1 if failed else 0


def demo(args: Namespace) -> int:
    """Run `seg demo`: train on a synthetic town and segment it."""
    from ..demo import demo as run_demo

    out = local_path(output_folder("--out", args.out))
    figures = run_demo(out, note if args.json else partial(print, flush=True))
    print_figures(figures, args.json)
    return 0 if figures["verified"] else 1
