"""`seg view`: the page of a run on this machine, with SQL."""

import json
import webbrowser
from argparse import ArgumentParser, Namespace

from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import Terminated, note
from .arguments import absolute_places, parse_port

PORT = 8600


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `seg view`, except those that it shares with other commands."""
    parser.add_argument("run", metavar="RUN")
    text = f"port to serve on, 0 for any that is free ({PORT})"
    parser.add_argument("--port", type=parse_port, default=PORT, metavar="N", help=text)
    parser.add_argument("--open", action="store_true", help="also open the page in a browser")


def view(args: Namespace) -> int:
    """Run `seg view`: serve the page of a run on this machine until Ctrl-C."""
    from seg_core.report.page import check_library

    check_library("seg view")
    from seg_core.view.server import ViewServer
    from seg_core.view.site import RunSite

    site = RunSite(absolute(args.run), absolute_places(args.relocate))
    with ViewServer(site, args.port) as server:
        with waiting("making the page") as report:
            site.page(report)
        _announce(server.url, args)
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            note("ended")
        finally:
            site.close()
    return 0


def _announce(url: str, args: Namespace) -> None:
    print(json.dumps({"url": url}) if args.json else url, flush=True)
    note("only this machine reaches it; Ctrl-C ends it")
    if args.open:
        webbrowser.open(url)
