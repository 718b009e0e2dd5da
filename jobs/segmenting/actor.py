"""The process that segments parts on one device.

reading ─ chips ─▶ batches on the device ─ results ─▶ publishing: rows, then the part's file ─▶ receipt
   └──────────────── guard: parts at work, windows that end the process ────────┘
"""

import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from itertools import groupby, islice
from typing import Any

from seg_core.grid import num_splits
from seg_core.run.attempts import Attempt
from seg_core.run.fence import PLAIN, Store
from seg_core.run.plan import Part, Settings
from seg_core.run.sizing import fit_window, gpu_share

from ..resources import ActorResources, ExecutionOptions
from .batches import BatchSegmenter
from .guard import CrashGuard
from .publishing import Publisher
from .reading import WindowReader
from .receipts import Receipt
from .seams import SeamChecker
from .stopwatch import Stopwatch
from .writers import PublishedPart, WindowRows, make_writers

# s that a thread may keep the interpreter from the one that gives a GPU its work; by default 50 times that.
GPU_SWITCH_INTERVAL = 1e-4
# Receipts that are passed on together beside a GPU: each time costs the process that starts its work 2 ms.
RECEIPTS_TOGETHER = 8


class PartSegmenter:
    """An actor with a model: reads the windows of its parts ahead in threads, segments them, publishes the rows."""

    def __init__(
        self,
        model: str,
        out: str,
        settings: Settings,
        window: int,
        resources: ActorResources,
        execution: ExecutionOptions,
        session: str,
        watched: frozenset[str] = frozenset(),
        store: Store = PLAIN,
    ) -> None:
        # torch and OpenCV come late, so that the driver doesn't pay for them.
        import cv2
        import torch

        from seg_core.model.segmenter import Segmenter

        torch.set_num_threads(resources.threads)
        cv2.setNumThreads(1)
        sys.setswitchinterval(GPU_SWITCH_INTERVAL)
        segmenter = Segmenter(model, execution.device, precision=settings.precision, compiling=execution.compiling)
        gpu_memory = gpu_share(segmenter.memory, resources.num_gpus)
        fitted = fit_window(window, execution.window, settings, segmenter.bundle, gpu_memory)
        writers = make_writers(resources.writers, processes=segmenter.on_gpu)
        self.name, self.planned_window = uuid.uuid4().hex, window
        self.segmenter, self.clock = segmenter, Stopwatch()
        segmenter.decoder.decode_context = partial(self.clock.on, "decoding")
        self.guard = CrashGuard(out, session, settings.tile_size, store)
        self.reader = WindowReader(settings, segmenter, resources, self.guard, self.clock)
        self.seams = SeamChecker(watched, settings, segmenter, resources.writers)
        self.batches = BatchSegmenter(settings, segmenter, self.reader, self.seams, fitted, execution)
        self.publisher = Publisher(out, segmenter.bundle.hash, writers, segmenter.on_gpu, self.guard, self.clock, store)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """The receipts of the parts of a batch of lists of parts, as rows."""
        parts = [Part.from_row(row) for rows in batch["parts"] for row in rows]
        receipts = self.segment_parts(parts)
        # Groups never depend on time: of a task that is tried again Ray drops as many as it has got.
        together = 1  # the first one soon, for it says what the run is made by
        try:
            while known := [receipt.to_row() for receipt in islice(receipts, together)]:
                yield {"receipts": [known]}
                together = RECEIPTS_TOGETHER if self.segmenter.on_gpu else 1
        except BrokenExecutor:  # a writing process was killed, as for want of memory: as if it had been this one
            os._exit(1)

    def segment_parts(self, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Segment and publish parts; yields a receipt for each."""
        started = time.time()
        interrupted = self.guard.claim(parts)
        if interrupted:  # to look at a neighbour could end the process in another window's name
            self.seams.skip(parts)
        side = self.batches.window  # smaller in the next task, where memory runs out in this one
        windows = self.segment_windows(parts, side, interrupted)
        for part, published in self.publisher.publish(windows, side, interrupted):
            receipt = self.receipt(part, published, started)
            yield receipt
            started = receipt.ended
        self.guard.end_task()

    def segment_windows(
        self, parts: Sequence[Part], side: int, interrupted: Mapping[str, Attempt]
    ) -> Iterator[WindowRows]:
        """The windows of parts, of `side` px, each with what makes its rows."""
        # Nothing is read ahead beside an interrupted part: it could end the process in the name of that one's window.
        for is_interrupted, group in groupby(parts, lambda part: part.key in interrupted):
            if is_interrupted:
                yield from self.guard.segment_each(list(group), side, interrupted, self.batches.rows)
            else:
                yield from self.batches.infer(list(group), side)

    def receipt(self, part: Part, published: PublishedPart, started: float) -> Receipt:
        """What the driver is told about a part that is published."""
        seam_pixels, seam_differing = self.seams.take(part)
        return Receipt(
            actor=self.name,
            readers=self.reader.num_threads,
            started=started,
            ended=max(started, published.ended),
            windows=num_splits(part.window, self.planned_window),
            pixels=part.window.num_pixels,
            failed=published.failed,
            seam_pixels=seam_pixels,
            seam_differing=seam_differing,
            decoded_on_cpu=self.batches.runner.take_decoded_on_cpu(),
            exact=self.segmenter.exact,
            times=self.clock.take(),
        )
