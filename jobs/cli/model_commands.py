"""The commands that train, score and describe models.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import exists, make_folder

from ..progress import waiting
from ..terminal import format_value, note, print_figures
from ..training.settings import TrainSettings, key_of, make_settings, parse_assignment
from .arguments import local_path, model_folder, output_folder
from .run_labels import class_of, open_run_labels

if TYPE_CHECKING:
    import pandas as pd


def train_settings(args: Namespace) -> TrainSettings:
    """Return the settings of a training from preset, config file, --set and flags."""
    flags = {key_of(f): getattr(args, f.name) for f in fields(TrainSettings) if getattr(args, f.name) is not None}
    preset = _choose_preset(args) if args.preset == "auto" else args.preset
    return make_settings(preset, args.config, [*map(parse_assignment, args.set), flags])


def _choose_preset(args: Namespace) -> str:
    """Return the preset `large` if there is a GPU or a cluster to train on, else `small`."""
    import torch

    if torch.cuda.is_available() or getattr(args, "address", None) or os.environ.get("RAY_ADDRESS"):
        return "large"
    return "small"


def train(args: Namespace) -> int:
    """Run `seg train`: train a model and write its bundle."""
    settings = train_settings(args)
    out = output_folder("--out", args.out)
    work = output_folder("--work", args.work) if args.work else f"{out}.train"
    from ..train import train as train_model

    bundle = train_model(settings, local_path(args.data), out, work, args.address, args.debug)
    figures = {"bundle": out, "hash": bundle.hash, "epoch": bundle.provenance["epoch"], **bundle.metrics}
    print_figures({**figures, "threshold": bundle.threshold}, args.json)
    return 0


def evaluate(args: Namespace) -> int:
    """Run `seg evaluate`: score a bundle on a dataset, or a run against labels."""
    from seg_core.model.bundle import HEADER, find_bundle, read_bundle

    target = find_bundle(args.target)
    if exists(f"{target}/run.json") or (args.labels and not exists(f"{target}/{HEADER}")):
        return _evaluate_run(args, target)
    if args.data is None and not exists(target):
        raise SegError(f"{target}: no such bundle or run")
    read_bundle(target)
    if args.class_name:
        raise SegError(f"--class {args.class_name}: is for a run: a bundle, as {args.target} is, knows its class")
    if args.labels or args.aoi:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data instead: --labels is for a run")
    if args.data is None:
        raise SegError(f"{args.target}: is a bundle: name a dataset with --data")
    from seg_core.inference.evaluate import evaluate as evaluate_model
    from seg_core.inference.evaluate import write_figures, write_samples
    from seg_core.model.loading import choose_precision_on
    from seg_core.model.segmenter import Segmenter

    table_path = _make_table_path(args)
    figures_folder = output_folder("--figures", args.figures) if args.figures else None
    precision = choose_precision_on(args.device, args.precision)
    segmenter, data = Segmenter(target, args.device, args.tta, precision), local_path(args.data)
    with waiting(f"segmenting the images of {args.split}") as report:
        evaluation = evaluate_model(segmenter, data, args.split, report, args.normalize)
    _note_warps(evaluation.labels_off_px)
    if table_path:
        _write_table(evaluation.table, table_path)
    if figures_folder:
        write_figures(evaluation, figures_folder)
        write_samples(evaluation, segmenter, f"{figures_folder}/samples.png")
    if difference := evaluation.fit.describe_difference(evaluation.normalize):
        note(difference)
    print_figures({"class": segmenter.bundle.class_name, **evaluation.figures()}, args.json)
    return 0


def _evaluate_run(args: Namespace, run: str) -> int:
    import pandas as pd

    from seg_core.run.record import read_record
    from seg_core.run.score import score_run
    from seg_core.training.dataset import read_classes
    from seg_core.training.shapes import score_figures

    record = read_record(run)  # refuses what is not a run before options are checked
    defaults = {
        "tta": False,
        "figures": None,
        "precision": "auto",
        "device": "auto",
        "split": "val",
        "normalize": "auto",
    }
    for option, default in defaults.items():
        if getattr(args, option) != default:
            raise SegError(f"--{option.replace('_', '-')}: is for a bundle, {args.target} is a run")
    if args.labels is None:
        raise SegError(f"{args.target}: is a run: name its labels with --labels")
    if args.class_name and not args.data:
        raise SegError(f"--class {args.class_name}: name its label_class_dict.csv's folder with --data")
    classes = read_classes(local_path(args.data), args.class_name or class_of(record)) if args.data else None
    table_path = _make_table_path(args)
    with (
        open_run_labels(run, args.labels, args.data, args.aoi) as labels,
        waiting("comparing masks with labels") as report,
    ):
        score = score_run(run, labels, classes, report)
    _note_warps(score.labels_off_px)
    if table_path:
        _write_table(pd.DataFrame(score.images), table_path)
    print_figures({**score_figures(score.counts, score.shapes), "failed_tiles": score.num_failed}, args.json)
    return 1 if score.num_failed else 0


def _make_table_path(args: Namespace) -> str | None:
    """Return the path for the figures of each image, if they are wanted. Its folder is there before anything begins."""
    if not args.per_image:
        return None
    path = local_path(args.per_image)
    if not path.lower().endswith((".csv", ".parquet")) or os.path.isdir(path):
        raise SegError(f"--per-image {args.per_image}: must be a file that ends in .parquet or .csv")
    make_folder(os.path.dirname(path))
    return path


def _write_table(table: "pd.DataFrame", path: str) -> None:
    write = table.to_csv if path.lower().endswith(".csv") else table.to_parquet
    write(path, index=False)


def _note_warps(labels_off_px: Mapping[str, float]) -> None:
    from seg_core.imagery.labels import describe_warps

    for line in describe_warps(labels_off_px):
        note(line)


def models_show(args: Namespace) -> int:
    """Run `seg models show`: describe a bundle."""
    from seg_core.model.bundle import describe, read_bundle, read_weights

    bundle = read_bundle(model_folder(args))
    weights = read_weights(model_folder(args), bundle)
    figures = {"bundle": model_folder(args), "class": bundle.class_name, **describe(bundle)}
    figures["weights"] = sum(w.size for w in weights.values())
    figures["weights_mb"] = round(sum(w.nbytes for w in weights.values()) / 1e6, 2)
    if args.json:
        print_figures(figures, as_json=True)
        return 0
    for name in ("architecture", "metrics", "provenance"):
        figures[name] = "\n".join(f"{key} {format_value(value)}" for key, value in figures[name].items())
    for name in ("levels", "confidence"):
        if name in figures:
            figures[name] = "a histogram: see --json"
    indent = " " * (max(map(len, figures)) + 2)
    print_figures({k: format_value(v).replace("\n", f"\n{indent}") for k, v in figures.items()}, as_json=False)
    return 0
