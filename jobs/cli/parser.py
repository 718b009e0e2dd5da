"""The commands of `seg` with their options. The function of each command is in one of the `*_commands` modules."""

import argparse

from . import (
    audit_command,
    bench_commands,
    cluster_commands,
    dataset_commands,
    export_commands,
    model_commands,
    quantize_command,
    region_commands,
    report_command,
    run_commands,
    view_command,
)
from .area_options import add_areas
from .arguments import (
    parse_device,
    parse_nonnegative_int,
    parse_positive_float,
    parse_positive_int,
    parse_positive_ints,
)
from .command_parser import Commands, Parser, ShowVersion, add_command
from .option_groups import (
    SCENE_HELP,
    add_address,
    add_bench_options,
    add_dashboard,
    add_no_follow,
    add_normalize,
    add_precision,
    add_region_options,
    add_relocate,
    add_speed_options,
    add_submit_options,
    add_train_settings,
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands. It stores the function of the chosen command as `carry_out`."""
    parser: argparse.ArgumentParser = Parser(
        prog="seg", description="Building segmentation of whole regions of aerial imagery.", allow_abbrev=False
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version of the code and exit")
    parser.add_argument("-C", dest="folder", metavar="DIR", help="resolve relative paths against DIR")
    parser.set_defaults(parse=parser.parse_args)  # for seg submit, whose arguments hold another command
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_dataset,
        _add_train,
        _add_evaluate,
        _add_plan,
        _add_segment,
        _add_verify,
        _add_repair,
        _add_query,
        _add_rethreshold,
        _add_compact,
        _add_compare,
        _add_audit,
        _add_report,
        _add_view,
        _add_submit,
        _add_jobs,
        _add_logs,
        _add_stop,
        _add_resume,
        _add_models,
        _add_quantize,
        export_commands.add_export,
        _add_bench,
        _add_demo,
    ):
        add(commands)
    return parser


def _add_dataset(commands: Commands) -> None:
    text = "Make a training dataset of scenes and their labels."
    kinds = commands.add_parser("dataset", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="make"
    )
    text = "Cut scenes and their labels into blocks, and split these by ground, as seg train reads them."
    dataset_commands.add_options(add_command(kinds, "make", dataset_commands.make, text), SCENE_HELP)


def _add_train(commands: Commands) -> None:
    parser = add_command(commands, "train", model_commands.train, "Train a model with Ray Train.")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder to write the trained model to")
    parser.add_argument(
        "--work", metavar="DIR", help="folder or s3:// prefix for checkpoints and metrics (default: BUNDLE.train)"
    )
    add_address(parser)
    add_train_settings(parser)


def _add_evaluate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        model_commands.evaluate,
        "Score a bundle on a labelled split, or a run's masks against labels.",
    )
    parser.epilog = (
        "Figures: iou, f1, precision, recall and accuracy are of pixels; building_* of whole buildings, found if their "
        "IoU is 0.5 or more; boundary_* of pixels within 3 px of an outline. best_threshold has the best IoU. "
        "calibration_error is the mean distance between probability and truth, and uncalibrated_error that without the "
        "bundle's temperature."
    )
    parser.add_argument("target", metavar="BUNDLE|RUN")
    parser.add_argument(
        "--data", metavar="DIR", help="dataset with the split; for RGB labels of a run: with label_class_dict.csv"
    )
    parser.add_argument("--split", default="val", help="split to score a bundle on (val)")
    parser.add_argument("--tta", action="store_true", help="average over the eight flips and rotations of a chip")
    parser.add_argument(
        "--per-image", metavar="FILE", help="write the figures of each image to this file (.parquet or .csv)"
    )
    parser.add_argument("--figures", metavar="DIR", help="write threshold curve, calibration and samples as PNG")
    text = "of a run: label file of its scene, folder of its scenes' labels, or polygons (.gpkg, .geojson, .shp, ...)"
    parser.add_argument("--labels", metavar="PATH", help=text)
    parser.add_argument("--aoi", metavar="FILE", help="polygons outside of which a run is not scored; for polygons")
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class of --data that a run's masks show (its model's)"
    )
    add_normalize(parser)
    add_precision(parser)
    parser.add_argument("--device", type=parse_device, default="auto", help="auto, cpu or cuda")


def _add_plan(commands: Commands) -> None:
    parser = add_command(
        commands, "plan", region_commands.plan, "Show what a run would do, without running or writing anything."
    )
    add_region_options(parser)
    group = parser.add_argument_group("estimate of time and cost")
    text = "segment a few windows on this machine, and estimate the time for the whole region"
    group.add_argument("--calibrate", action="store_true", help=text)
    text = "number of devices that segment (default: this machine's)"
    group.add_argument("--devices", type=parse_positive_int, metavar="N", help=text)
    text = "price of a device per hour, for the cost"
    group.add_argument("--price", type=parse_positive_float, metavar="PER_HOUR", help=text)
    group.add_argument("--device", type=parse_device, default="auto", help="device to calibrate on: auto, cpu or cuda")


def _add_segment(commands: Commands) -> None:
    parser = add_command(
        commands, "segment", region_commands.segment, "Segment a region with Ray Data: masks and coverage of each tile."
    )
    add_region_options(parser)
    text = "folder or s3:// prefix for the results; the same command resumes the run"
    parser.add_argument("--out", required=True, metavar="RUN", help=text)
    text = "stop the run when more than N tiles have failed"
    parser.add_argument("--max-failures", type=parse_nonnegative_int, metavar="N", help=text)
    add_relocate(parser)
    add_speed_options(parser)


def _add_verify(commands: Commands) -> None:
    parser = add_command(
        commands, "verify", run_commands.verify, "Prove that no tile of a run is missing, from its files."
    )
    parser.add_argument("run", metavar="RUN")
    text = "also segment N random windows of different parts again (16), and compare the results"
    parser.add_argument("--deep", type=parse_positive_int, nargs="?", const=16, default=0, metavar="N", help=text)
    parser.add_argument("--model", metavar="BUNDLE", help="folder of the model, if it has moved since the run")
    parser.add_argument("--device", type=parse_device, default="auto", help="auto, cpu or cuda")
    add_relocate(parser)


def _add_repair(commands: Commands) -> None:
    parser = add_command(
        commands, "repair", run_commands.repair, "Remove the damaged parts of a run, which seg verify lists."
    )
    parser.add_argument("run", metavar="RUN")
    text = "name of a further part file to remove, such as one that seg verify --deep has found"
    parser.add_argument("parts", nargs="*", metavar="PART", help=text)


def _add_query(commands: Commands) -> None:
    text = "Query a run in SQL (DuckDB) with the tables tiles, scenes and failures. Without SQL, print a summary."
    parser = add_command(commands, "query", run_commands.query, text, json=False)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("sql", nargs="?", metavar="SQL", help="a query; -: read it from standard input")
    add_areas(parser)
    text = "write the areas and their figures to this file (.gpkg, .parquet, .geojson, .fgb or .csv)"
    parser.add_argument("--out", metavar="FILE", help=text)
    parser.add_argument("--schema", action="store_true", help="say what each column means, and its unit")
    text = "say which files, row groups and bytes SQL reads, instead of its result"
    parser.add_argument("--explain", action="store_true", help=text)
    text = "Ray cluster to measure the areas of a large run on (default: this machine)"
    parser.add_argument("--address", metavar="HOST:PORT", help=text)
    parser.add_argument("--format", default="table", choices=["table", "csv", "json", "parquet"])
    parser.add_argument("--json", action="store_const", dest="format", const="json", help="short for --format json")


def _add_rethreshold(commands: Commands) -> None:
    text = "Show the coverage of a run at other thresholds, or make a run at one, without segmenting again."
    parser = add_command(commands, "rethreshold", run_commands.rethreshold, text)
    parser.add_argument("run", metavar="RUN", help="a run that was segmented with --keep-probability")
    parser.add_argument("--threshold", type=float, metavar="P", help="probability from which a pixel is building")
    parser.add_argument("--out", metavar="RUN", help="folder or s3:// prefix for the new run")


def _add_compact(commands: Commands) -> None:
    text = "Merge the many files of a large run into a few. Others may read it meanwhile."
    parser = add_command(commands, "compact", run_commands.compact, text)
    parser.add_argument("run", metavar="RUN")
    text = "about how large a file becomes, in megabytes (256)"
    parser.add_argument("--size", type=parse_positive_int, default=256, metavar="MB", help=text)


def _add_compare(commands: Commands) -> None:
    text = "Compare two runs on the same ground: building that is gained, lost or kept."
    parser = add_command(commands, "compare", run_commands.compare, text)
    parser.add_argument("before", metavar="BEFORE", help="a run")
    parser.add_argument(
        "after", metavar="AFTER", help="another run of the same scenes, or of one image on the same grid"
    )
    text = "write a row for each tile to this GeoParquet file; or for each area, also to .gpkg, .geojson, .fgb or .csv"
    parser.add_argument("--out", metavar="FILE", help=text)
    text = "write a raster of change for each image: 0 none, 1 kept, 2 gained, 3 lost, 255 (nodata) unknown"
    parser.add_argument("--rasters", metavar="DIR", help=text)
    add_areas(parser)


def _add_audit(commands: Commands) -> None:
    text = "Draw random places of a run to be judged, and estimate from judged ones how much building there is."
    audit_command.add_options(add_command(commands, "audit", audit_command.audit, text))


def _add_report(commands: Commands) -> None:
    text = "Write a run as one HTML page to look at: map, histogram, scenes, failures and facts. It opens offline."
    parser = add_command(commands, "report", report_command.report, text)
    report_command.add_options(parser)
    add_relocate(parser)


def _add_view(commands: Commands) -> None:
    text = "Show the page of a run in a browser on this machine, with a box for SQL, until Ctrl-C."
    parser = add_command(commands, "view", view_command.view, text)
    view_command.add_options(parser)
    add_relocate(parser)


def _add_submit(commands: Commands) -> None:
    text = "Run a command on a Ray cluster: seg submit -- segment ..."
    add_submit_options(add_command(commands, "submit", cluster_commands.submit, text))


def _add_jobs(commands: Commands) -> None:
    add_dashboard(add_command(commands, "jobs", cluster_commands.jobs, "List the jobs submitted to a cluster."))


def _add_logs(commands: Commands) -> None:
    parser = add_command(commands, "logs", cluster_commands.logs, "Print the log of a job.")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job ends, and exit with its code")
    parser.add_argument("id", metavar="ID")
    add_dashboard(parser)


def _add_stop(commands: Commands) -> None:
    parser = add_command(commands, "stop", cluster_commands.stop, "Stop a job. What it has done stays.")
    parser.add_argument("id", metavar="ID")
    add_dashboard(parser)


def _add_resume(commands: Commands) -> None:
    text = "Submit the command of a job that has ended again, under its name."
    parser = add_command(commands, "resume", cluster_commands.resume, text)
    parser.add_argument("id", metavar="ID")
    add_dashboard(parser)
    add_no_follow(parser)


def _add_quantize(commands: Commands) -> None:
    text = "Give a model an int8 network, the fastest on CPUs: its ranges are measured on crops of scenes (needs nncf)."
    quantize_command.add_options(add_command(commands, "quantize", quantize_command.quantize, text))


def _add_bench(commands: Commands) -> None:
    text = "Measure the throughput of segmentation or training, and compare it with plain loops."
    kinds = commands.add_parser("bench", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="segment|scale|train"
    )
    parser = add_command(
        kinds,
        "segment",
        bench_commands.bench_segment,
        "Measure the whole pipeline, each of its stages alone, and a plain loop.",
    )
    add_bench_options(parser, "minimum time to measure each stage, in each round (20)", 20.0)
    text = "number of rounds; medians are shown (3)"
    parser.add_argument("--rounds", type=parse_positive_int, default=3, metavar="N", help=text)
    parser = add_command(
        kinds,
        "scale",
        bench_commands.bench_scale,
        "Measure throughput and memory by number of windows, number of actors and window size.",
    )
    add_bench_options(parser, "minimum time to measure each stage (10)", 10.0)
    text = "numbers of windows (10,100)"
    parser.add_argument("--sizes", type=parse_positive_ints, default=[10, 100], metavar="N,N", help=text)
    text = "numbers of actors (default: the value of --actors)"
    parser.add_argument("--workers", type=parse_positive_ints, default=[], metavar="N,N", help=text)
    text = "window sizes (default: the value of --window)"
    parser.add_argument("--windows", type=parse_positive_ints, default=[], metavar="PX,PX", help=text)
    parser.add_argument("--out", metavar="FILE", help="write a plot to this PNG file")
    parser = add_command(
        kinds,
        "train",
        bench_commands.bench_train,
        "Measure training on crops as they are made, and on one batch that is repeated.",
    )
    add_train_settings(parser)


def _add_models(commands: Commands) -> None:
    text = "Describe trained models."
    kinds = commands.add_parser("models", help=text, description=text, allow_abbrev=False).add_subparsers(
        required=True, metavar="show"
    )
    parser = add_command(
        kinds, "show", model_commands.models_show, "Show a bundle's architecture, training and scores."
    )
    parser.add_argument("model", nargs="?", metavar="BUNDLE", help="folder of a trained model (default: the built-in)")


def _add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        region_commands.demo,
        "Train, segment, verify and query a synthetic town, and draw a picture, in minutes.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder to create (demo)")
