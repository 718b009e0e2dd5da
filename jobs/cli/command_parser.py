"""What all commands of `seg` share: how arguments are parsed, and the options that each command has."""

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from seg_core.version import code_version

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - argparse gives it no public name


class Parser(argparse.ArgumentParser):
    """A parser that shows the command's usage for an unknown option. argparse would show the whole program's usage."""

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse arguments as argparse does, and exit with a usage error if some are unknown.

        An optional argument may also come after options, as SQL in `seg query RUN --json SQL`. argparse takes it to be
        absent there (https://github.com/python/cpython/issues/59317).
        """
        parsed, unknown = super().parse_known_args(*args, **options)
        for action in self._get_positional_actions():  # there is no public way
            is_absent = action.nargs == "?" and getattr(parsed, action.dest, None) == action.default
            if is_absent and unknown and (unknown[0] == "-" or not unknown[0].startswith("-")):
                setattr(parsed, action.dest, unknown.pop(0))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class ShowVersion(argparse.Action):
    """Prints the version, which is looked up only then: in a checkout it takes a call of git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        print(f"seg {code_version()}")
        parser.exit()


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str, json: bool = True
) -> argparse.ArgumentParser:
    """Add a command with its function, which takes the parsed arguments and returns the exit code."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(carry_out=function)
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-sign-request", action="store_true", help="use S3 without credentials (public buckets)")
    parser.add_argument("--debug", action="store_true", help="show Ray's messages, and the traceback of an error")
    text = "how messages on standard error are written (text)"
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help=text)
    return parser
