"""`seg audit`: how wrong a run is, and where."""

import shlex
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import absolute, exists

from ..progress import waiting
from ..terminal import note, print_figures, print_table
from .area_commands import give_areas
from .area_options import add_areas, choose_areas, has_areas
from .arguments import local_path, output_folder, parse_nonnegative_int, parse_positive_int
from .run_commands import note_missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seg_core.audit.report import Audit
    from seg_core.audit.sample import Place
    from seg_core.audit.strata import Survey

NUM_PLACES = 500  # that are drawn without --sample, where labels judge them


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `seg audit`."""
    parser.add_argument("run", metavar="RUN")
    text = f"number of places to draw at random, 50 or more (with --labels that are no sample: {NUM_PLACES})"
    parser.add_argument("--sample", type=parse_positive_int, metavar="N", help=text)
    parser.add_argument("--seed", type=parse_nonnegative_int, default=0, help="which places (0)")
    text = (
        "a sample whose column truth has been filled in (.gpkg, .geojson, .csv, ...), or a truth: footprints in a "
        "vector file, or a raster of one band"
    )
    parser.add_argument("--labels", metavar="FILE", help=text)
    parser.add_argument("--aoi", metavar="FILE", help="polygons outside of which footprints say nothing")
    text = "folder for the sample; or with areas, the file for them (.gpkg, .parquet, .geojson, .fgb or .csv)"
    parser.add_argument("--out", metavar="PATH", help=text)
    add_areas(parser)


def audit(args: Namespace) -> int:
    """Run `seg audit`: draw a sample of places to be judged, or estimate from judged ones how wrong a run is."""
    if args.labels is None:
        return _draw(args)
    return _estimate(args)


def _draw(args: Namespace) -> int:
    """Draw a sample, and write it to a folder."""
    from seg_core.audit.folder import SAMPLE, write_sample
    from seg_core.audit.sample import draw_places

    if args.sample is None or args.out is None:
        raise SegError("say --sample N --out FOLDER to draw places to be judged, or --labels FILE to estimate")
    if has_areas(args) or args.aoi is not None:
        raise SegError("--areas, --grid, --h3, --bbox, --aoi: are for --labels")
    folder = local_path(output_folder("--out", args.out))
    if exists(folder):
        raise SegError(f"--out {args.out}: already exists: choose another folder, so that no judged sample is lost")
    survey = _survey(args)
    places = draw_places(survey, args.sample, args.seed)
    with waiting("drawing pictures") as report:
        write_sample(survey, places, folder, report)
    numbers = {name: sum(place.stratum == at for place in places) for at, name in enumerate(survey.names)}
    drawn = {name: number for name, number in numbers.items() if number}
    strata = {"strata": drawn} if args.json else drawn
    print_figures({"places": len(places), **strata}, args.json)
    command = shlex.join(["seg", "audit", args.run, "--labels", f"{args.out}/{SAMPLE}"])
    note(
        f"{args.out}/{SAMPLE}: fill in the column truth with {survey.class_name} or background (QGIS shows the places, "
        f"{args.out}/places their pictures), then: {command}"
    )
    return 0


def _estimate(args: Namespace) -> int:
    """Estimate from judged places how wrong a run is."""
    from seg_core.audit.report import audit_areas, audit_run, figures, look_first, strata_table, wrong_places
    from seg_core.run.area_files import check_new_areas

    with_areas = has_areas(args)
    if args.out is not None:
        if not with_areas:
            raise SegError("--out: with --labels it is the file for areas: add --areas, --grid, --h3 or --bbox")
        check_new_areas(local_path(args.out))
    areas = choose_areas(args, args.run) if with_areas else None
    survey = _survey(args)
    places, truths = _judge(args, survey)
    found = audit_run(survey, places, truths)
    _note_unjudged(found)
    if areas is not None:
        with waiting("measuring the areas") as report:
            frame = audit_areas(found, areas, report)
        give_areas(frame, args.out, "json" if args.json else "table")
        return 0
    if args.json:
        lists = {"strata": strata_table(found), "wrong_places": wrong_places(found), "look_first": look_first(found)}
        print_figures(figures(found) | lists, as_json=True)
        return 0
    print_figures(figures(found), as_json=False)
    for title, rows in (("by stratum", strata_table(found)), ("look first here", look_first(found))):
        print(f"\n{title}:")
        print_table(rows)
    return 0


def _survey(args: Namespace) -> "Survey":
    from seg_core.audit.strata import survey_run

    with waiting("reading the masks of the run") as report:
        survey = survey_run(absolute(args.run), report)
    note_missing(args.run, survey.plan)
    return survey


def _judge(args: Namespace, survey: "Survey") -> "tuple[Sequence[Place], Sequence[bool | None]]":
    """Return places and their truth: those that a person has judged, or some that labels judge."""
    from seg_core.audit.sample import draw_places, find_places, judge_by_labels, read_judged
    from seg_core.datasets.labels import LabelSettings, open_labels

    path = local_path(args.labels)
    judged = read_judged(path)
    if judged is not None:
        if args.sample is not None or args.aoi is not None:
            raise SegError(f"--sample, --aoi: {args.labels} is a judged sample, which has its places")
        return find_places(survey, judged)
    places = draw_places(survey, args.sample or NUM_PLACES, args.seed)
    area = None if args.aoi is None else local_path(args.aoi)
    with open_labels(path, survey.plan.images, LabelSettings(area=area)) as labels:
        return places, judge_by_labels(survey, places, labels)


def _note_unjudged(found: "Audit") -> None:
    number, known = len(found.places), int(found.judged.places.sum())
    if known < number:
        note(f"{number - known:,} of {number:,} places have no truth: they are taken to be like the others")
