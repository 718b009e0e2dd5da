"""Processes that have loaded what they need when they begin: new ones take seconds to load torch."""

import multiprocessing
from collections.abc import Callable
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["parts", "seg_core.model.segmenter", "cv2"])


def exit_code(function: Callable[..., object], *args: Any) -> int | None:
    """Call a function of a module in a process of its own. Returns the code that the process ended with."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    process.join(200)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode
