"""Measure what the driver and Ray cost many actors, which sleep instead of segmenting.

    python -m aerial_seg.benchmarks.sleeping [--actors 1,16,64] [--window-seconds 0.022] [--seconds 20]

All of them are on this machine, whose Ray is told that it has a CPU for each.
"""

import argparse
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..progress import waiting
from ..ray_session import ray_session
from ..segment import stream_receipts
from ..segmenting.receipts import Receipt
from ..terminal import print_table

WINDOWS_PER_PART = 4
PARTS_PER_MESSAGE = 8  # as of an actor with a GPU
TASK_SECONDS = 5.0
MAX_TASKS = 200  # of an actor; the measurement ends long before


class Sleeper:
    """An actor that sleeps `seconds` for each window of its parts."""

    def __init__(self, seconds: float) -> None:
        self.name, self.seconds = uuid.uuid4().hex, seconds

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Sleep for each of `batch["parts"]`, numbers of parts. Yields their receipts as rows."""
        for number in batch["parts"]:
            for first in range(0, number, PARTS_PER_MESSAGE):
                yield {"receipts": [[self.sleep() for _ in range(first, min(number, first + PARTS_PER_MESSAGE))]]}

    def sleep(self) -> dict[str, Any]:
        """Sleep for a part. Returns its receipt as a row."""
        started = time.time()
        time.sleep(self.seconds * WINDOWS_PER_PART)
        receipt = Receipt(actor=self.name, started=started, ended=time.time(), windows=WINDOWS_PER_PART, pixels=0)
        return receipt.to_row()


def measure(actors: int, window_seconds: float, seconds: float) -> dict[str, Any]:
    """Return the windows a second of each of `actors` actors, over `seconds` in which all of them are at work."""
    parts = max(1, round(TASK_SECONDS / window_seconds / WINDOWS_PER_PART))
    tasks = [{"parts": parts}] * (MAX_TASKS * actors)
    ended: dict[str, list[float]] = {}  # times at which each actor has ended a part
    started, cpu = np.inf, 0.0
    for receipt in stream_receipts(tasks, Sleeper, (window_seconds,), actors, num_cpus=1):
        ended.setdefault(receipt.actor, []).append(receipt.ended)
        if len(ended) == actors and started == np.inf:
            started, cpu = time.time(), time.process_time()
        if receipt.ended > started + seconds:
            break
    cores = (time.process_time() - cpu) / (time.time() - started)
    rates = [
        sum(started < t <= started + seconds for t in each) * WINDOWS_PER_PART / seconds for each in ended.values()
    ]
    return {
        "actors": actors,
        "windows_s_per_actor": round(float(np.mean(rates)), 2),
        "slowest_actor": round(min(rates), 2),
        "driver_cores": round(cores, 2),
    }


def main() -> None:
    """Measure each number of actors, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", default="1,16,64", help="numbers of actors (1,16,64)")
    parser.add_argument("--window-seconds", type=float, default=0.022, help="s that a window takes (0.022)")
    parser.add_argument("--seconds", type=float, default=20.0, help="s to measure for (20)")
    args = parser.parse_args()
    numbers, rows = [int(number) for number in args.actors.split(",")], []
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray_session(None, num_cpus=max(numbers)), waiting("measuring") as report:
        for number in numbers:
            report(f"{number} actors")
            rows.append(measure(number, args.window_seconds, args.seconds))
    print_table(rows)


if __name__ == "__main__":
    main()
