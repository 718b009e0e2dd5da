"""Options that several commands of `seg` share."""

import argparse
from dataclasses import fields
from typing import Any

from seg_core.processor import PRECISIONS

from ..training.settings import PRESETS, TrainSettings, key_of
from .arguments import (
    parse_actors,
    parse_alpha,
    parse_bands,
    parse_device_kind,
    parse_nonnegative_int,
    parse_positive_float,
    parse_positive_int,
    parse_positive_int_or_auto,
    parse_relocation,
)

SCENE_HELP = "a file, a folder or s3:// prefix, a glob, or a manifest (.txt, .csv, .parquet)"


def add_train_settings(parser: argparse.ArgumentParser) -> None:
    """Add the dataset, and the settings of training with the ways to change them."""
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="dataset: train/, train_labels/, val/, val_labels/"
    )
    text = "settings to start from; auto: large with a GPU or a cluster, else small"
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help=text)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change any setting")
    group = parser.add_argument_group(
        "settings, with the values of the preset large (flags override --set, --config and --preset, in this order)"
    )
    for setting in fields(TrainSettings):
        flag, text = f"--{key_of(setting).replace('_', '-')}", setting.metadata["help"]
        kind: type[Any] = type(setting.default)
        shown = text if setting.default == "" else f"{text} ({setting.default})"
        options: dict[str, Any] = {"dest": setting.name, "help": shown}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, **options)
        else:
            choices = setting.metadata["choices"] or None
            metavar = None if choices else "NAME" if kind is str else "N"
            group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **options)


def add_region_options(parser: argparse.ArgumentParser, number: str = "+") -> None:
    """Add the scenes, the model and the options that change the result. `number` is argparse's `nargs` for scenes."""
    parser.add_argument("scenes", nargs=number, metavar="SCENE", help=SCENE_HELP)
    parser.add_argument("--model", metavar="BUNDLE", help="folder of a trained model (default: the built-in one)")
    group = parser.add_argument_group("options that change the result")
    group.add_argument("--tile-size", type=int, default=512, metavar="PX", help="side of a tile (512)")
    group.add_argument("--halo", type=int, metavar="PX", help="context read around a window (default: the model's)")
    group.add_argument(
        "--threshold", type=float, metavar="P", help="least probability of a building pixel (default: the model's)"
    )
    group.add_argument(
        "--mosaic", action="store_true", help="treat scenes on one grid as one image: no seams, overlaps counted once"
    )
    group.add_argument(
        "--order",
        choices=("name", "given"),
        default="name",
        help="which scene of a mosaic counts where scenes overlap: the first by name, or the first in the given order",
    )
    group.add_argument("--resample", action="store_true", help="resample scenes to the resolution of the model")
    group.add_argument("--scale", nargs=2, type=float, metavar=("MIN", "MAX"), help="pixel values to map to 0 and 255")
    group.add_argument("--bands", type=parse_bands, metavar="B,B,B", help="bands to read, numbered from 1")
    text = "alpha band, which marks the pixels that hold data (default: the band that the file labels alpha)"
    group.add_argument("--alpha", type=parse_alpha, metavar="N|none", help=text)
    add_normalize(group)
    add_precision(group)
    text = (
        "decoder of JPEG inside GeoTIFFs: cpu: GDAL (default); device: the model's device, on a GPU its JPEG engine; "
        "auto: device if the run begins on GPUs, else cpu"
    )
    group.add_argument("--decode", choices=("cpu", "device", "auto"), default="cpu", help=text)
    group.add_argument(
        "--keep-probability", action="store_true", help="also store the probability of each pixel, rounded to 1/255"
    )
    group.add_argument(
        "--part", type=int, default=4096, metavar="PX", help="side of the block that is committed as one file (4096)"
    )
    text = "accept overlapping scenes without --mosaic, and count their common area once per scene"
    parser.add_argument("--overlap", choices=("count",), help=text)
    text = "segment images with these names, such as '*.png', even if they look like previews of other scenes"
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument(
        "--window", type=parse_positive_int_or_auto, metavar="PX|auto", help="side of what is inferred at once (auto)"
    )


def add_normalize(parser: argparse._ActionsContainer) -> None:
    """Add the statistics by which pixels are normalized."""
    text = (
        "which mean and deviation of the pixels become 0 and 1: model: those of the training; region: those of a "
        "sample of the region; scene: those of each scene; auto: region if it looks unlike the training, else model "
        "(default)"
    )
    parser.add_argument("--normalize", choices=("auto", "scene", "region", "model"), default="auto", help=text)


def add_precision(parser: argparse._ActionsContainer) -> None:
    """Add the precision to compute in."""
    text = (
        "auto: bfloat16 on a GPU, and on a CPU with instructions for it, else float32; exact: float32 on a CPU, the "
        "same bits for any window size, but slow; int8: fastest on a CPU, for bundles of seg quantize"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=text)


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run that do not change its result."""
    group = parser.add_argument_group("options that only change speed")
    text = "processes that segment: MIN at once, and up to MAX as further nodes come (default: one per GPU)"
    group.add_argument("--actors", type=parse_actors, metavar="MIN[:MAX]", help=text)
    text = "how long to wait for nodes with room for MIN processes, on a cluster (900)"
    group.add_argument("--node-timeout", type=parse_nonnegative_int, default=900, metavar="S", help=text)
    text = "GPUs per process (1)"
    group.add_argument("--gpus-per-actor", type=parse_positive_float, default=1.0, metavar="N", help=text)
    text = "tasks that read for each process, on free CPUs of any node; 0: it reads by itself (0)"
    group.add_argument("--readers", type=parse_nonnegative_int, default=0, metavar="N", help=text)
    group.add_argument("--device", type=parse_device_kind, default="auto", help="auto, cpu or cuda")
    text = "windows inferred together; auto: as many as make a GPU faster, 1 on a CPU"
    group.add_argument("--batch", type=parse_positive_int_or_auto, metavar="N|auto", help=text)
    text = "use torch.compile where results needn't be exact; auto: on a GPU, for window sizes that take long enough"
    group.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help=text)
    add_address(parser)


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the address of a Ray cluster."""
    parser.add_argument("--address", metavar="HOST:PORT", help="Ray cluster to run on (default: start Ray here)")


def add_dashboard(parser: argparse.ArgumentParser) -> None:
    """Add the address of a Ray cluster's dashboard, through which jobs are submitted."""
    parser.add_argument("--address", metavar="URL", help="dashboard of the cluster (http://127.0.0.1:8265)")


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a job, and its command."""
    add_dashboard(parser)
    parser.add_argument("--name", metavar="NAME", help="what seg jobs calls the job")
    text = "{} that the command's own process reserves, on any node (default: none, on the head)"
    parser.add_argument("--num-cpus", type=parse_positive_float, metavar="N", help=text.format("CPUs"))
    parser.add_argument("--num-gpus", type=parse_positive_float, metavar="N", help=text.format("GPUs"))
    add_no_follow(parser)
    parser.add_argument("job", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def add_no_follow(parser: argparse.ArgumentParser) -> None:
    """Add the choice whether to follow the log of a job that is submitted."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--follow", action="store_true", help="print the job's log, and exit with its code (default)")
    group.add_argument("--no-follow", action="store_true", help="print the job's id and return")


def add_relocate(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where scenes have moved."""
    text = "paths of scenes that began with OLD begin with NEW now, because they have moved; may be repeated"
    parser.add_argument("--relocate", type=parse_relocation, action="append", default=[], metavar="OLD=NEW", help=text)


def add_bench_options(parser: argparse.ArgumentParser, text: str, seconds: float) -> None:
    """Add the options for measuring segmentation: `text` describes `--seconds`, which is `seconds` by default."""
    add_region_options(parser, "*")
    add_speed_options(parser)
    parser.add_argument("--seconds", type=parse_positive_float, default=seconds, metavar="S", help=text)
    group = parser.add_argument_group("synthetic scene, used if no SCENE is given")
    group.add_argument("--codec", choices=["none", "deflate", "lzw", "zstd", "jpeg"], help="its compression (deflate)")
    group.add_argument("--side", type=parse_positive_int, metavar="PX", help="its width and height (4096)")
    group.add_argument("--at", metavar="DIR", help="folder or s3:// prefix to measure in (default: a temporary folder)")
