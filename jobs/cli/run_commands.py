"""The commands on the results of a run.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
import shlex
import sys
from argparse import Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from seg_core.errors import SegError
from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import TABLE_ROWS, note, print_figures, print_table
from . import area_commands
from .area_options import has_areas
from .arguments import absolute_places, local_path, output_folder

if TYPE_CHECKING:
    from seg_core.inference.recheck import Recheck
    from seg_core.run.plan import Plan
    from seg_core.run.verify import VerifyReport

SHOWN_LEVEL = 15  # of the 255 thresholds, every 15th is shown: 17 lines


def verify(args: Namespace) -> int:
    """Run `seg verify`: check the files of a run, and with --deep segment some windows again."""
    from seg_core.run.verify import verify as verify_run

    if not args.deep and (args.model or args.device != "auto" or args.relocate):
        raise SegError("--model, --device, --relocate: are only for segmenting windows again: add --deep")
    with waiting("reading the parts of the run"):
        report = verify_run(absolute(args.run), again=bool(args.deep))
    figures: dict[str, Any] = {"planned": report.num_planned, "done": report.num_done, "failed": report.num_failed}
    rechecked = _recheck(args) if args.deep and report.ok else None
    differing, unread = (rechecked.differing, rechecked.unread) if rechecked else ({}, [])
    report.problems += [f"{name}: {line}" for name, lines in differing.items() for line in lines]
    if args.deep:
        figures["rechecked"] = rechecked.num_same + len(differing) if rechecked else 0
        figures["not_rechecked"] = unread if args.json else len(unread)
        if rechecked is None:
            note("--deep: no window was segmented again, because the files of the run have problems")
    figures |= {"complete": report.ok, "problems": report.problems if args.json else len(report.problems)}
    print_figures(figures if args.json else {"run": report.describe(), **figures}, args.json)
    if not args.json:
        for line in [*report.problems, *(f"could not be rechecked: {reason}" for reason in unread)][:TABLE_ROWS]:
            print(f"  {line}")
        _advise(args, report, list(differing), len(unread))
    return 0 if report.ok and not report.num_failed and not unread else 1


def _recheck(args: Namespace) -> "Recheck":
    from seg_core.inference.recheck import recheck
    from seg_core.model.bundle import find_bundle

    model = find_bundle(args.model) if args.model else None
    with waiting("segmenting again") as report:
        return recheck(absolute(args.run), args.deep, args.device, model, absolute_places(args.relocate), report)


def _advise(args: Namespace, report: "VerifyReport", differing: list[str], unread: int) -> None:
    """Print the reason for exit code 1 of `seg verify`, and what to do."""
    from seg_core.run.lease import find_driver

    if report.bad_parts or differing:
        command = shlex.join(["seg", "repair", args.run, *differing])
        note(f"{command} removes the parts with problems; seg segment then makes them again")
    elif report.num_missing_parts and report.num_missing_parts == len(report.problems):
        driver = find_driver(absolute(args.run))
        working = f"a driver is at work on it ({driver}); once that has ended, " if driver else ""
        note(f"the run is not finished: {working}repeat its seg segment command to resume it")
    if report.num_failed:
        explain_failures(args.run, report.num_failed)
    if unread:
        note(
            f"{unread:,} windows could not be rechecked (exit code 1), but the files of the run are complete: "
            "if scenes have moved, add --relocate OLD=NEW"
        )


def explain_failures(run: str, failed: int) -> None:
    """Print how to see why tiles failed, and how to try them again."""
    command = shlex.join(["seg", "query", run, "SELECT * FROM failures"])
    note(f"{failed:,} tiles failed (exit code 1): {command} shows why; the run's seg segment command tries them again")


def repair(args: Namespace) -> int:
    """Run `seg repair`: remove damaged parts of a run, so that they are made again."""
    from seg_core.run.verify import repair as remove_bad_parts

    with waiting("reading the parts of the run"):
        report = remove_bad_parts(absolute(args.run), args.parts)
    print_figures({"removed": report.bad_parts if args.json else len(report.bad_parts)}, args.json)
    for path in [] if args.json else report.bad_parts[:TABLE_ROWS]:
        print(f"  {path}")
    if report.bad_parts:
        note("the seg segment command of the run makes the missing parts again")
    return 0


def rethreshold(args: Namespace) -> int:
    """Run `seg rethreshold`: make a run at another threshold, or print the coverage at each one."""
    from seg_core.run.rethreshold import measure_curve
    from seg_core.run.rethreshold import rethreshold as make_run

    if (args.threshold is None) != (args.out is None):
        raise SegError(
            "--threshold, --out: a new run needs both; without them, the coverage at each threshold is shown"
        )
    run = absolute(args.run)
    if args.out is None:
        with waiting("reading the parts of the run") as report:
            rows = measure_curve(run, report).rows()
        if args.json:
            print_figures({"curve": rows}, as_json=True)
        else:
            print_table(rows[SHOWN_LEVEL - 1 :: SHOWN_LEVEL])
        note_missing(args.run)
        return 0
    out = output_folder("--out", args.out)
    with waiting("writing the parts of the new run") as report:
        record = make_run(run, args.threshold, out, report)
    if record.settings.threshold != args.threshold:
        note(
            f"the threshold is {record.settings.threshold}, not {args.threshold}: probabilities are kept in 255ths, so "
            "that at others some pixels are not known"
        )
    _print_summary(out, args.json)
    note_missing(args.out)
    return 0


def compact(args: Namespace) -> int:
    """Run `seg compact`: merge the files of a run into a few."""
    from seg_core.run.compact import compact_run

    with waiting("compacting the parts of the run") as report:
        found = compact_run(absolute(args.run), args.size, report)
    print_figures(found._asdict(), args.json)
    return 0


def compare(args: Namespace) -> int:
    """Run `seg compare`: compare two runs on the same ground, tile by tile or by areas."""
    from seg_core.run.compare import compare_runs, describe_differences

    differences = describe_differences(absolute(args.before), absolute(args.after))
    if differences:
        note(f"the runs differ in {' and in '.join(differences)}: part of the change may come from that")
    if has_areas(args):
        return area_commands.compare(args)
    if args.out is not None and not args.out.lower().endswith(".parquet"):
        raise SegError(f"--out {args.out}: is written as GeoParquet: name a file that ends in .parquet")
    out = None if args.out is None else local_path(args.out)
    if out is not None and not os.path.isdir(os.path.dirname(out)):
        raise SegError(f"--out {args.out}: there is no such folder: create it first")
    rasters = None if args.rasters is None else local_path(output_folder("--rasters", args.rasters))
    with waiting("comparing the parts of the runs") as report:
        found = compare_runs(absolute(args.before), absolute(args.after), out, rasters, report)
    print_figures(found.figures(), args.json)
    if found.unknown:
        note(f"{found.unknown:,} of {found.tiles:,} tiles failed or are not done in one of the runs: they are left out")
    return 0


def note_missing(run: str, plan: "Plan | None" = None) -> None:
    """Say if parts of a run are not done yet. The plan is read unless it is given."""
    from seg_core.run.stored_plan import num_missing, read_plan

    if missing := num_missing(absolute(run), plan or read_plan(absolute(run))):
        note(f"{run}: {missing:,} parts are not done yet and missing from this result (seg verify lists them)")


def _print_summary(run: str, as_json: bool) -> None:
    from seg_core.run.query import describe, summary
    from seg_core.run.record import read_record

    with waiting("adding up the parts of the run"):
        figures = summary(run)
    record = read_record(run)
    figures |= record.setting_figures()
    for line in record.fit_warnings(figures):
        note(line)
    print_figures(figures if as_json else {"run": describe(figures), **figures}, as_json)


def query(args: Namespace) -> int:
    """Run `seg query`: query a run in SQL, or print its summary."""
    from seg_core.run.stored_plan import read_plan

    with_areas = has_areas(args)
    _check_query(args, with_areas)
    run = absolute(args.run)
    planned = read_plan(run)  # reports damage before a result is printed
    if args.schema:
        return _print_schema(args)
    if args.explain:
        return _explain(run, args)
    code = 0
    if with_areas:
        code = area_commands.measure(args)
    elif args.sql is None and args.format in {"table", "json"}:
        _print_summary(run, args.format == "json")
    else:
        _write_result(run, args)
    note_missing(args.run, planned)
    return code


def _check_query(args: Namespace, with_areas: bool) -> None:
    """Raise SegError for an option of `seg query` that has no meaning beside the others."""
    if args.format == "parquet" and sys.stdout.isatty():
        raise SegError("--format parquet: Parquet is binary: redirect it to a file (> answer.parquet)")
    if args.schema and (with_areas or args.explain or args.sql is not None):
        raise SegError("--schema: takes no SQL, no areas and no --explain: it says what the columns mean")
    if with_areas and (args.explain or args.sql is not None):
        raise SegError("--areas, --grid, --h3, --bbox: take no SQL: their table has one row for each area")
    if args.explain and args.sql is None:
        raise SegError("--explain: needs a query in SQL: without SQL, the summary reads six columns of all rows")
    if args.explain and args.format not in {"table", "json"}:
        raise SegError(f"--format {args.format}: --explain prints text, or an object (--json)")
    if args.address is not None and not with_areas:
        raise SegError("--address: is for --areas, --grid, --h3 and --bbox: other questions take seconds")
    if args.out is not None and not with_areas:
        raise SegError("--out: is for --areas, --grid, --h3 and --bbox")


def _print_schema(args: Namespace) -> int:
    """Print what the columns of a run mean."""
    from pyarrow import Table

    from seg_core.run.query import write_result
    from seg_core.run.schema import describe_columns

    write_result(Table.from_pylist(describe_columns()).to_reader(), args.format, sys.stdout.buffer, TABLE_ROWS)
    return 0


def _explain(run: str, args: Namespace) -> int:
    """Print what a query reads."""
    from seg_core.run.sql import explain

    sql = sys.stdin.read() if args.sql == "-" else args.sql
    found = explain(run, sql)
    plan = found.pop("plan")
    print_figures(found | {"plan": plan} if args.format == "json" else found, args.format == "json")
    if args.format != "json":
        print(f"\n{plan}")
    return 0


def _write_result(run: str, args: Namespace) -> None:
    from seg_core.run.query import summary, to_table, write_result
    from seg_core.run.sql import run_sql

    sql = sys.stdin.read() if args.sql == "-" else args.sql
    with nullcontext(to_table(summary(run)).to_reader()) if sql is None else run_sql(run, sql) as result:
        write_result(result, args.format, sys.stdout.buffer, TABLE_ROWS)
