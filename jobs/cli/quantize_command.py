"""`seg quantize`: give a bundle an int8 network."""

from argparse import ArgumentParser, Namespace

from seg_core.errors import SegError

from ..progress import waiting
from ..terminal import note, print_figures
from .arguments import model_folder, output_folder, parse_bands, parse_positive_int
from .option_groups import SCENE_HELP, add_normalize


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `seg quantize`."""
    parser.add_argument("scenes", nargs="+", metavar="SCENE", help=SCENE_HELP)
    parser.add_argument("--model", metavar="BUNDLE", help="folder of a trained model (default: the built-in one)")
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="folder or s3:// prefix to write the bundle to")
    text = "crops of the scenes on which the ranges of values are measured (32)"
    parser.add_argument("--crops", type=parse_positive_int, default=32, metavar="N", help=text)
    parser.add_argument("--resample", action="store_true", help="resample scenes to the resolution of the model")
    parser.add_argument("--scale", nargs=2, type=float, metavar=("MIN", "MAX"), help="pixel values to map to 0 and 255")
    parser.add_argument("--bands", type=parse_bands, metavar="B,B,B", help="bands to read, numbered from 1")
    add_normalize(parser)


def quantize(args: Namespace) -> int:
    """Run `seg quantize`: write a bundle with an int8 network, whose ranges are measured on crops of scenes."""
    from seg_core.imagery.region import read_region
    from seg_core.inference.quantize import quantize_bundle
    from seg_core.model.bundle import read_bundle
    from seg_core.run.normalization import normalize_plan
    from seg_core.run.plan import Settings, make_plan

    path, out = model_folder(args), output_folder("--out", args.out)
    bundle = read_bundle(path)
    settings = Settings(
        halo=bundle.halo,
        threshold=bundle.threshold,
        resample=args.resample,
        scale=tuple(args.scale) if args.scale else None,
        bands=args.bands,
        normalize=args.normalize,
    )
    with waiting("reading the headers of scenes"):
        scenes, unreadable = read_region(args.scenes)
        plan, refused = make_plan(scenes, bundle, settings)
    for line in (*unreadable, *refused):
        note(line)
    if not plan.scenes:
        raise SegError(f"{args.scenes[0]}: no scene fits the model")
    with waiting("quantizing") as report:
        found = quantize_bundle(path, normalize_plan(plan, bundle, report), out, args.crops, report)
    if found.crops < args.crops:
        note(
            f"--crops {args.crops}: the scenes gave only {found.crops}: name more scenes, and int8 is closer to float32"
        )
    figures = {"bundle": out, "hash": found.bundle.hash, "crops": found.crops, "differing_share": found.differing}
    print_figures(figures, args.json)
    return 0
