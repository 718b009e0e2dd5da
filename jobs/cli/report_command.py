"""`seg report`: a run as one HTML page to look at."""

import os
import shlex
from argparse import ArgumentParser, Namespace

from seg_core.storage.disk import check_new_file
from seg_core.storage.files import absolute, publish

from ..progress import waiting
from ..terminal import note, print_figures
from .arguments import absolute_places, local_path

SUFFIXES = (".html", ".htm")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `seg report`, except those that it shares with other commands."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write (.html)")


def report(args: Namespace) -> int:
    """Run `seg report`: write the page of a run, finished or not."""
    from seg_core.report.page import check_library, make_page

    out = local_path(args.out)
    check_new_file(out, SUFFIXES, "a page is")
    check_library()
    with waiting("making the page") as show:
        page = make_page(absolute(args.run), absolute_places(args.relocate), show)
    publish(out, page.html.encode())
    kept = {name: page.figures[name] for name in ("tiles", "failed", "missing")}
    print_figures({"file": out, "bytes": os.path.getsize(out), "run": page.state, **kept}, args.json)
    if page.problems:
        note(f"{shlex.join(['seg', 'verify', args.run])} finds {page.problems:,} problems: the page names them")
    return 0
