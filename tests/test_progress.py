"""Nothing is silent for long: what is waited for, and for how long, is shown on a terminal and in a log."""

import io
import time

import pytest

from aerial_seg import progress
from aerial_seg.progress import Progress, waiting


class Stream(io.StringIO):
    """Standard error, perhaps of a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def wait_for(stream: Stream, number: int, text: str) -> None:
    """Wait until a text was written so often."""
    while stream.getvalue().count(text) < number:
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.01)
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL", 0.01)


def test_a_log_has_a_line_now_and_then_that_says_what_is_waited_for_and_how_far_it_is() -> None:
    stream = Stream(tty=False)
    with waiting("starting", stream) as say:
        wait_for(stream, 2, "starting ... 0:00\n")
        say("3 of 4")
        wait_for(stream, 1, "starting: 3 of 4 ... 0:00\n")
    assert "\r" not in stream.getvalue()


def test_the_line_on_a_terminal_is_rewritten_and_in_the_end_gone() -> None:
    stream = Stream(tty=True)
    with waiting("starting", stream):
        wait_for(stream, 2, "\r\x1b[Kstarting ... 0:00")
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("tty", [False, True])
def test_a_run_says_that_it_waits_for_its_first_part_and_goes_on_to_speak(
    tty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(tty)
    monkeypatch.setattr("sys.stderr", stream)
    shown = Progress(3)
    wait_for(stream, 2, "0 of 3 windows, waiting for workers to finish the first part ... 0:00")
    shown.update(1, 10**6, time.time() - 1, 0)
    wait_for(stream, 2, "1 of 3 windows, ")
    shown.update(2, 2 * 10**6, time.time() - 1, 1)
    shown.end()
    last = stream.getvalue().splitlines()[-1]
    assert "3 of 3 windows, " in last
    assert last.endswith("0:00 left, 1 tiles failed")


def test_what_is_waited_for_ends_with_an_error() -> None:
    stream = Stream(tty=False)
    with pytest.raises(ValueError, match="no"), waiting("starting", stream):
        raise ValueError("no")
    before = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == before
