"""The options of all commands. Each command names its function in a module of commands beside this one."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

from seg_core.version import code_version

from ..training.settings import PRESETS, TrainSettings
from . import cluster_commands, model_commands, region_commands
from .arguments import actors, alpha, bands, count, device, number, number_or_auto, numbers, positive, relocation

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - argparse gives it no public name

SOURCES = "a file, a folder or s3:// prefix, a glob, or a manifest (.txt, .csv, .parquet)"


class Parser(argparse.ArgumentParser):
    """A parser that refuses unknown options with its own usage; argparse would print that of the whole program."""

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """What argparse's own returns, where nothing is unknown."""
        found, unknown = super().parse_known_args(*args, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands; `carry_out` is the function of a command."""
    parser: argparse.ArgumentParser = Parser(
        prog="seg", description="Building segmentation of whole regions of aerial imagery.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"seg {code_version()}")
    parser.add_argument("-C", dest="folder", metavar="DIR", help="take relative paths from DIR")
    parser.set_defaults(parse=parser.parse_args)  # for a command that is given another one
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _train,
        _evaluate,
        _plan,
        _segment,
        _verify,
        _repair,
        _query,
        _submit,
        _jobs,
        _logs,
        _stop,
        _models,
        _export,
        _bench,
        _demo,
    ):
        add(commands)
    return parser


def _command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str, json: bool = True
) -> argparse.ArgumentParser:
    """Add a command, which the function carries out; it returns the exit code."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(carry_out=function)
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-sign-request", action="store_true", help="use S3 without credentials (public buckets)")
    parser.add_argument("--debug", action="store_true", help="show Ray's messages, and the traceback of an error")
    return parser


def _train(commands: Commands) -> None:
    parser = _command(commands, "train", model_commands.train, "Train a model with Ray Train.")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write the trained model to")
    parser.add_argument(
        "--work", metavar="DIR", help="folder or s3:// prefix for checkpoints and metrics (default: BUNDLE.train)"
    )
    _address(parser)
    _settings(parser)


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="dataset: train/, train_labels/, val/, val_labels/"
    )
    text = "settings to start from; auto: small where there is neither a GPU nor a cluster, else large"
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help=text)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change any setting")
    group = parser.add_argument_group(
        "settings, as they are in large (flags win over --set, --config, --preset, in this order)"
    )
    for setting in fields(TrainSettings):
        flag, help_text = f"--{setting.name.replace('_', '-')}", f"{setting.metadata['help']} ({setting.default})"
        kind = type(setting.default)
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        else:
            choices = setting.metadata["choices"] or None
            group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else "N", help=help_text)


def _evaluate(commands: Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        model_commands.evaluate,
        "Score a bundle on a labelled split, or a run's masks against labels.",
    )
    parser.add_argument("target", metavar="BUNDLE|RUN")
    parser.add_argument(
        "--data", metavar="DIR", help="dataset with the split; for RGB labels: its label_class_dict.csv"
    )
    parser.add_argument("--split", default="val", help="split to score a bundle on (val)")
    parser.add_argument("--tta", action="store_true", help="mean over the eight flips and turns of a chip")
    parser.add_argument(
        "--per-image", metavar="FILE", help="write the figures of each image to this file (.parquet or .csv)"
    )
    parser.add_argument("--figures", metavar="DIR", help="write threshold curve, calibration and samples as PNG")
    parser.add_argument("--labels", metavar="PATH", help="label file of a run's scene, or folder of its scenes' labels")
    _precision(parser)
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda")


def _plan(commands: Commands) -> None:
    parser = _command(
        commands, "plan", region_commands.plan, "Say what a run would do. Costs nothing and writes nothing."
    )
    _region(parser)
    group = parser.add_argument_group("an estimate")
    text = "segment a few windows here, and say how long the whole region takes"
    group.add_argument("--calibrate", action="store_true", help=text)
    group.add_argument("--devices", type=number, metavar="N", help="devices to segment with (default: this machine's)")
    group.add_argument("--price", type=float, metavar="PER_HOUR", help="of a device, for the cost")
    group.add_argument("--device", type=device, default="auto", help="what to calibrate on: auto, cpu or cuda")


def _segment(commands: Commands) -> None:
    parser = _command(
        commands, "segment", region_commands.segment, "Segment a region with Ray Data: masks and coverage of each tile."
    )
    _region(parser)
    parser.add_argument("--out", required=True, metavar="RUN", help="folder for the results; the same command resumes")
    parser.add_argument("--max-failures", type=count, metavar="N", help="end the run when more tiles than N fail")
    _relocate(parser)
    _speed(parser)


def _verify(commands: Commands) -> None:
    parser = _command(
        commands, "verify", region_commands.verify, "Prove that no tile of a run is missing, from its files."
    )
    parser.add_argument("out", metavar="RUN")
    text = "also segment N random windows again (16), each of another part, and compare"
    parser.add_argument("--deep", type=number, nargs="?", const=16, default=0, metavar="N", help=text)
    parser.add_argument("--model", metavar="BUNDLE", help="where the model is now (default: where it was)")
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda")
    _relocate(parser)


def _relocate(parser: argparse.ArgumentParser) -> None:
    text = "scenes of the run whose paths begin with OLD have moved, and begin with NEW now; may be repeated"
    parser.add_argument("--relocate", type=relocation, action="append", default=[], metavar="OLD=NEW", help=text)


def _repair(commands: Commands) -> None:
    parser = _command(
        commands, "repair", region_commands.repair, "Remove the parts of a run in which something does not hold."
    )
    parser.add_argument("out", metavar="RUN")
    text = "name of a part file to remove as well, such as seg verify --deep finds"
    parser.add_argument("parts", nargs="*", metavar="PART", help=text)


def _query(commands: Commands) -> None:
    text = "Ask a run in SQL (DuckDB): tables tiles, scenes and failures. Without SQL, a summary."
    parser = _command(commands, "query", region_commands.query, text, json=False)
    parser.add_argument("out", metavar="RUN")
    parser.add_argument("sql", nargs="?", metavar="SQL")
    parser.add_argument("--format", default="table", choices=["table", "csv", "json", "parquet"])
    parser.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")


def _submit(commands: Commands) -> None:
    parser = _command(
        commands,
        "submit",
        cluster_commands.submit,
        "Run a command on a Ray cluster: seg submit -- segment ...",
        json=False,
    )
    _dashboard(parser)
    parser.add_argument("--no-follow", action="store_true", help="print the job's id and return")
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def _jobs(commands: Commands) -> None:
    _dashboard(_command(commands, "jobs", cluster_commands.jobs, "List the jobs submitted to a cluster."))


def _logs(commands: Commands) -> None:
    parser = _command(
        commands, "logs", cluster_commands.logs, "Follow the log of a job, and exit with its code.", json=False
    )
    parser.add_argument("id", metavar="ID")
    _dashboard(parser)


def _stop(commands: Commands) -> None:
    parser = _command(commands, "stop", cluster_commands.stop, "Stop a job.", json=False)
    parser.add_argument("id", metavar="ID")
    _dashboard(parser)


def _bench(commands: Commands) -> None:
    text = "Measure the pipe that segments, or the step that trains, against plain loops in the same run."
    kinds = commands.add_parser("bench", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="segment|scale|train"
    )
    parser = _command(
        kinds,
        "segment",
        region_commands.bench_segment,
        "The whole pipe against each of its stages alone and a loop by hand.",
    )
    _bench_region(parser, "how long each stage is measured at least, in each round (20)", 20.0)
    parser.add_argument("--rounds", type=number, default=3, metavar="N", help="how often; medians are shown (3)")
    parser = _command(
        kinds,
        "scale",
        region_commands.bench_scale,
        "How rate and memory grow with the number of windows, of actors, and the window.",
    )
    _bench_region(parser, "how long each stage alone is measured at least (10)", 10.0)
    parser.add_argument("--sizes", type=numbers, default=[10, 100], metavar="N,N", help="numbers of windows (10,100)")
    text = "numbers of actors (default: as --actors says)"
    parser.add_argument("--workers", type=numbers, default=[], metavar="N,N", help=text)
    text = "sizes of windows (default: as --window says)"
    parser.add_argument("--windows", type=numbers, default=[], metavar="PX,PX", help=text)
    parser.add_argument("--out", metavar="FILE", help="write a plot to this PNG file")
    parser = _command(
        kinds,
        "train",
        model_commands.bench_train,
        "Training on crops as they are made against training on a batch that stays.",
    )
    _settings(parser)


def _bench_region(parser: argparse.ArgumentParser, text: str, seconds: float) -> None:
    _region(parser, "*")
    _speed(parser)
    parser.add_argument("--seconds", type=positive, default=seconds, metavar="S", help=text)
    group = parser.add_argument_group("without SCENE, one is made")
    group.add_argument("--codec", choices=["none", "deflate", "lzw", "zstd", "jpeg"], help="how it is stored (deflate)")
    group.add_argument("--side", type=number, metavar="PX", help="how wide and high it is (4096)")
    group.add_argument("--at", metavar="DIR", help="folder or s3:// prefix to measure in (default: a temporary folder)")


def _models(commands: Commands) -> None:
    text = "Look at trained models."
    kinds = commands.add_parser("models", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="show"
    )
    parser = _command(
        kinds, "show", model_commands.models_show, "Say what a bundle is, what it was trained on, and its scores."
    )
    parser.add_argument("model", nargs="?", metavar="BUNDLE", help="folder of a trained model (default: the built-in)")


def _export(commands: Commands) -> None:
    text = "Write results and models for other programs."
    kinds = commands.add_parser("export", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="masks|model"
    )
    text = "Write a run's masks as GeoTIFFs, one a scene: 1 is building, 0 is not, 255 (nodata) is not known."
    parser = _command(kinds, "masks", region_commands.export_masks, text)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write them to")
    parser = _command(
        kinds,
        "model",
        model_commands.export_model,
        "Write a bundle as one file: imagery in, probability of building out.",
    )
    parser.add_argument("model", metavar="BUNDLE", help="folder of a trained model")
    parser.add_argument("--to", required=True, choices=["onnx", "torch-export"], help="kind of file")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: BUNDLE.onnx or BUNDLE.pt2)")


def _demo(commands: Commands) -> None:
    parser = _command(
        commands,
        "demo",
        region_commands.demo,
        "Train, segment, verify, query and look, on a synthetic town, in minutes.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder to make (demo)")


def _region(parser: argparse.ArgumentParser, number: str = "+") -> None:
    parser.add_argument("scenes", nargs=number, metavar="SCENE", help=SOURCES)
    parser.add_argument("--model", metavar="BUNDLE", help="folder of a trained model (default: the built-in one)")
    group = parser.add_argument_group("options that change the result")
    group.add_argument("--tile-size", type=int, default=512, metavar="PX", help="side of a tile (512)")
    group.add_argument("--halo", type=int, metavar="PX", help="context read around a window (default: the model's)")
    group.add_argument("--threshold", type=float, metavar="P", help="probability of building (default: the model's)")
    group.add_argument(
        "--mosaic", action="store_true", help="take scenes on one grid as one image: no seams, overlaps counted once"
    )
    group.add_argument(
        "--order",
        choices=("name", "given"),
        default="name",
        help="whose pixels count where scenes of a mosaic overlap: the first by name, or as they were named here",
    )
    group.add_argument("--resample", action="store_true", help="read scenes at the resolution of the model")
    group.add_argument(
        "--scale", nargs=2, type=float, metavar=("MIN", "MAX"), help="pixel values that become 0 and 255"
    )
    group.add_argument("--bands", type=bands, metavar="B,B,B", help="bands to read, numbered from 1")
    text = "band that says which pixels hold data (default: the one that the file labels alpha)"
    group.add_argument("--alpha", type=alpha, metavar="N|none", help=text)
    _precision(group)
    text = (
        "who decodes JPEG inside GeoTIFFs: cpu, by GDAL (default); device: where the model is, a GPU's JPEG engine; "
        "auto: device where a run begins on GPUs, else cpu"
    )
    group.add_argument("--decode", choices=("cpu", "device", "auto"), default="cpu", help=text)
    group.add_argument(
        "--keep-probability", action="store_true", help="store the probability beside each mask, in 255ths, rounded"
    )
    group.add_argument(
        "--part", type=int, default=4096, metavar="PX", help="side of the block that is committed (4096)"
    )
    text = "take scenes that overlap without --mosaic, and count their common ground in each of them"
    parser.add_argument("--overlap", choices=("count",), help=text)
    text = "names of images to segment though they look like previews of the scenes beside them, such as '*.png'"
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument(
        "--window", type=number_or_auto, metavar="PX|auto", help="side of what is inferred at once (auto)"
    )


def _precision(parser: argparse._ActionsContainer) -> None:
    text = "float32: on a CPU the same to the last bit however it is cut; bfloat16: faster; auto: that on a GPU"
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help=text)


def _speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options that only change speed")
    group.add_argument("--actors", type=actors, metavar="MIN[:MAX]", help="processes that segment (one a GPU)")
    group.add_argument("--gpus-per-actor", type=float, default=1.0, metavar="N", help="share of a GPU each gets (1)")
    group.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda")
    text = "windows that are inferred together; auto: as many as a GPU is faster with, on a CPU 1"
    group.add_argument("--batch", type=number_or_auto, metavar="N|auto", help=text)
    text = "torch.compile, for what needn't be exact; auto: on a GPU, for sizes of windows that take long enough"
    group.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help=text)
    _address(parser)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help="Ray cluster to run on (default: start one here)")


def _dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help="dashboard of the cluster (http://127.0.0.1:8265)")
