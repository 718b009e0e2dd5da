"""The command line, called in this process."""

from typing import Any

import pytest

from aerial_seg.cli.main import main

Json = dict[str, Any]
# Exact, since tests compare rows to the last bit.
SMALL = ["--tile-size", "64", "--part", "256", "--window", "128", "--precision", "exact"]


def seg(capsys: pytest.CaptureFixture[str], *command: object, code: int = 0) -> tuple[str, str]:
    """Run a command that is to end with `code`; its standard output and error."""
    found = main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err
