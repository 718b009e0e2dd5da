"""Bulk segmentation on Ray Data: plan ─▶ parts ─▶ actors that read ahead, segment and publish ─▶ receipts."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from jobs.progress import Progress
from jobs.session import Crew, make_crew, ray_session
from seg_core.ahead import ahead
from seg_core.bundle import read_bundle
from seg_core.coverage import Row, failed_rows, tile_rows
from seg_core.errors import ReadError
from seg_core.query import summary
from seg_core.raster import read_chip
from seg_core.results import write_part
from seg_core.run import Part, Plan, Settings, choose_window, find_run, now, open_run, parts_to_do, write_record
from seg_core.tiling import Window, chip_window, num_splits, split

READ_THREADS = 2  # GDAL releases the GIL; more only help where storage is slow
READ_AHEAD = 2  # chips
TASK_PIXELS = 2**24  # a Ray task costs the driver some 30 ms, so small parts share one

Chip = tuple[NDArray[np.uint8], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Options that only change how fast the rows come."""

    window: int | None = None  # px; None: as large as memory allows, up to 2048
    actors: tuple[int, int] | None = None
    gpus_per_actor: float = 1.0
    device: str = "auto"
    address: str | None = None
    verbose: bool = False


def segment(plan: Plan, model: str, out: str, speed: Speed) -> dict[str, Any]:
    """Segment what is left of a plan into the run at `out`. Returns the run's record, with `num_new` parts.

    Raises SegError where `out` holds something else than this run.
    """
    record = find_run(out, plan)
    todo = parts_to_do(out, plan)
    started = time.time()
    if todo:
        with ray_session(speed.address, verbose=speed.verbose):
            crew = make_crew(speed.actors, speed.gpus_per_actor, speed.device)
            window = choose_window(speed.window, plan.settings, read_bundle(model), crew.memory)
            record = open_run(out, plan, model)
            progress = Progress(sum(num_splits(part.window, window) for part in todo))
            for receipt in run_pipe(todo, model, out, plan.settings, window, crew, speed.device):
                progress.update(receipt["windows"], receipt["pixels"], receipt["started"])
            progress.end()
    assert record is not None  # a plan has parts, so either they are published or they were to do
    if todo or not record["finished"]:
        seconds = round(record.get("seconds", 0) + time.time() - started, 3)
        record |= {"finished": now(), "seconds": seconds, "counts": summary(out)}
        write_record(out, record)
    return {**record, "num_new": len(todo)}


def run_pipe(
    todo: Sequence[Part], model: str, out: str, settings: Settings, window: int, crew: Crew, device: str
) -> Iterable[Row]:
    """Parts to receipts. The rows themselves go from the actors to storage, and never through the driver."""
    pixels = sum(part.window.height * part.window.width for part in todo)
    tasks = min(len(todo), max(2 * crew.most, pixels // TASK_PIXELS))
    return (
        ray.data.from_items([part.to_row() for part in todo], override_num_blocks=tasks)
        .map_batches(
            PartSegmenter,
            fn_constructor_args=(model, out, settings, window, crew.threads, device),
            batch_size=len(todo) // tasks,
            compute=ActorPoolStrategy(min_size=crew.least, max_size=crew.most),
            num_cpus=crew.num_cpus,
            num_gpus=crew.num_gpus or None,
        )
        .iter_rows()
    )


class PartSegmenter:
    """An actor with a model: reads the windows of its parts ahead in threads, segments them, publishes the rows."""

    def __init__(self, model: str, out: str, settings: Settings, window: int, threads: int, device: str) -> None:
        # torch and OpenCV come late, so that the driver doesn't pay for them.
        import cv2
        import torch

        from seg_core.segmenter import Segmenter

        torch.set_num_threads(threads)
        cv2.setNumThreads(1)
        self.segmenter = Segmenter(model, device)
        self.out, self.settings, self.window = out, settings, window
        self.pool = ThreadPoolExecutor(READ_THREADS)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Receipts of a batch of parts."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        receipts = list(self.segment_parts([Part.from_row(row) for row in rows]))
        return {key: [receipt[key] for receipt in receipts] for key in receipts[0]}

    def segment_parts(self, parts: Sequence[Part]) -> Iterator[Row]:
        """Segment and publish parts; yields a receipt for each."""
        started = time.time()
        work = [(part, window) for part in parts for window in split(part.window, self.window)]
        read = zip(work, ahead(self.pool, self.read, work, READ_AHEAD), strict=True)
        for part in parts:
            count = num_splits(part.window, self.window)
            rows = [row for (_, window), chip in islice(read, count) for row in self.rows(part, window, chip)]
            write_part(self.out, part.key, rows, self.segmenter.bundle.hash)
            pixels, ended = part.window.height * part.window.width, time.time()
            yield {"windows": count, "pixels": pixels, "started": started, "ended": ended}
            started = ended

    def read(self, work: tuple[Part, Window]) -> Chip | ReadError:
        """The chip of a window, or why it can't be read."""
        part, window = work
        at = chip_window(window, self.settings.halo, self.segmenter.bundle.stride)
        try:
            return read_chip(part.scene, at, self.settings.scale)
        except ReadError as error:
            return error

    def rows(self, part: Part, window: Window, chip: Chip | ReadError) -> Iterator[Row]:
        """The rows of a window's tiles."""
        settings = self.settings
        if isinstance(chip, ReadError):
            return failed_rows(part.scene, window, settings.tile_size, str(chip))
        pixels, valid = chip
        probability = self.segmenter(pixels, valid, settings.halo, window.height, window.width)
        inside = valid[settings.halo :, settings.halo :][: window.height, : window.width]
        return tile_rows(
            part.scene,
            window,
            settings.tile_size,
            probability,
            inside,
            threshold=settings.threshold,
            keep_probability=settings.keep_probability,
        )
