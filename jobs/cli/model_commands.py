"""Commands on models: from parsed arguments to the job, and from its result to the terminal.

One function a command; each returns the exit code.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields

from seg_core.errors import SegError
from seg_core.storage.files import absolute, exists, make_folder

from ..progress import waiting
from ..terminal import note, show, text
from ..training.settings import TrainSettings, make_settings, parse_assignment
from .arguments import folder, local, model_of


def train_settings(args: Namespace) -> TrainSettings:
    """The settings of a training run, from preset, file and flags."""
    flags = {f.name: getattr(args, f.name) for f in fields(TrainSettings) if getattr(args, f.name) is not None}
    preset = _preset(args) if args.preset == "auto" else args.preset
    return make_settings(preset, args.config, [*map(parse_assignment, args.set), flags])


def _preset(args: Namespace) -> str:
    """Of the presets the one that suits what is there to train on."""
    import torch

    if torch.cuda.is_available() or getattr(args, "address", None) or os.environ.get("RAY_ADDRESS"):
        return "large"
    return "small"


def train(args: Namespace) -> int:
    """`seg train`."""
    settings = train_settings(args)
    out = folder("--out", args.out)
    work = folder("--work", args.work) if args.work else f"{out}.train"
    from ..train import train as run

    bundle = run(settings, local(args.data), out, work, args.address, args.debug)
    figures = {"bundle": out, "hash": bundle.hash, "epoch": bundle.provenance["epoch"], **bundle.metrics}
    show({**figures, "threshold": bundle.threshold}, args.json)
    return 0


def evaluate(args: Namespace) -> int:
    """`seg evaluate`."""
    from seg_core.model.bundle import HEADER, read_bundle

    target = absolute(args.target)
    if exists(f"{target}/run.json") or (args.labels and not exists(f"{target}/{HEADER}")):
        return _evaluate_run(args, target)
    if args.data is None and not exists(target):
        raise SegError(f"{target}: no such bundle or run")
    read_bundle(target)
    if args.labels:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data instead: --labels are for a run")
    if args.data is None:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data")
    from seg_core.inference.evaluate import evaluate as score
    from seg_core.inference.evaluate import write_figures, write_samples
    from seg_core.model.segmenter import Segmenter

    images = local(args.per_image) if args.per_image else None
    figures = folder("--figures", args.figures) if args.figures else None
    if images:
        make_folder(os.path.dirname(images))  # before anything is computed
    segmenter, data = Segmenter(target, args.device, args.tta, args.precision), local(args.data)
    with waiting(f"segmenting the images of {args.split}") as report:
        found = score(segmenter, data, args.split, report)
    _note_warps(found.labels_off_px)
    if images:
        write = found.images.to_csv if images.lower().endswith(".csv") else found.images.to_parquet
        write(images, index=False)
    if figures:
        write_figures(found, figures)
        write_samples(found, segmenter, data, args.split, f"{figures}/samples.png")
    show(found.figures(), args.json)
    return 0


def _evaluate_run(args: Namespace, run: str) -> int:
    from seg_core.run.record import read_record
    from seg_core.run.score import score_run
    from seg_core.training.dataset import read_classes
    from seg_core.training.metrics import scores

    read_record(run)  # before anything else is said of it
    unsaid = {"tta": False, "per_image": None, "figures": None, "precision": "auto", "device": "auto", "split": "val"}
    for option, value in unsaid.items():
        if getattr(args, option) != value:
            raise SegError(f"--{option.replace('_', '-')}: is for a bundle, {args.target} is a run")
    if args.labels is None:
        raise SegError(f"{args.target}: is a run: name its truth with --labels")
    classes = read_classes(local(args.data)) if args.data else None
    with waiting("comparing masks with labels"):
        counts, num_failed, labels_off_px = score_run(run, absolute(args.labels), classes)
    _note_warps(labels_off_px)
    show({**scores(counts), **counts._asdict(), "failed_tiles": num_failed}, args.json)
    return 1 if num_failed else 0


def _note_warps(labels_off_px: Mapping[str, float]) -> None:
    from seg_core.imagery.labels import describe_warps

    for line in describe_warps(labels_off_px):
        note(line)


def models_show(args: Namespace) -> int:
    """`seg models show`."""
    from seg_core.model.bundle import describe, read_bundle, read_weights

    bundle = read_bundle(model_of(args))
    weights = read_weights(model_of(args), bundle)
    figures = {"bundle": model_of(args), **describe(bundle)}
    figures["weights"] = sum(w.size for w in weights.values())
    figures["weights_mb"] = round(sum(w.nbytes for w in weights.values()) / 1e6, 2)
    if args.json:
        show(figures, as_json=True)
        return 0
    for name in ("architecture", "metrics", "provenance"):
        figures[name] = "\n".join(f"{key} {text(value)}" for key, value in figures[name].items())
    wide = max(map(len, figures)) + 2
    show({k: text(v).replace("\n", "\n" + " " * wide) for k, v in figures.items()}, as_json=False)
    return 0


def export_model(args: Namespace) -> int:
    """`seg export model`."""
    from seg_core.model.export import SUFFIXES, export_model

    source = absolute(args.model)
    out = local(args.out or source + SUFFIXES[args.to])
    bundle = export_model(source, args.to, out)
    show({"file": out, "bytes": os.path.getsize(out), "model": bundle.hash, "stride": bundle.stride}, args.json)
    return 0


def bench_train(args: Namespace) -> int:
    """`seg bench train`."""
    settings = train_settings(args)
    from ..benchmarks.training import bench_train as run

    show(run(settings, local(args.data)), args.json)
    return 0
