"""The process that segments parts on one device.

reading ─ chips ─▶ batches on the device ─ results ─▶ publishing: rows, then the part's file ─▶ receipt
   └────────────── guard: started parts, windows that crash the process ────────┘
"""

import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from itertools import groupby, islice
from typing import Any

from seg_core.errors import JobError
from seg_core.grid import num_splits
from seg_core.run.attempts import Attempt
from seg_core.run.check import Expected
from seg_core.run.fence import PLAIN, Store
from seg_core.run.plan import Part, Settings, unpack_parts
from seg_core.run.sizing import fit_window, gpu_share
from seg_core.storage.files import stat

from ..resources import ActorResources, ExecutionOptions
from .batches import BatchSegmenter
from .guard import CrashGuard
from .publishing import Publisher
from .reading import WindowReader
from .receipts import Receipt
from .seams import SeamChecker
from .stopwatch import Stopwatch
from .writers import PublishedPart, WindowRows, make_writers

# s after which a thread must yield the interpreter, so that the one that feeds the GPU gets it; the default is 5 ms.
GPU_SWITCH_INTERVAL = 1e-4
# Receipts per message from an actor with a GPU: each message costs 2 ms of the process that feeds the GPU.
RECEIPTS_TOGETHER = 8


def check_output_is_shared(out: str) -> None:
    """Raise JobError unless this node sees the run that the driver has opened."""
    if stat(f"{out}/run.json") is None:
        raise JobError(
            f"{out}: the run that began there isn't seen from {socket.gethostname()}: use an --out on a disk that all "
            "nodes share, or in S3"
        )


class PartSegmenter:
    """An actor with a model. It reads windows of its parts ahead in threads, segments them, and publishes the rows."""

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
        check_output_is_shared(out)
        # These are imported here, so that the driver does not load torch and OpenCV.
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
        expected = Expected(settings.tile_size, settings.part, segmenter.bundle.hash, settings.keep_probability)
        self.publisher = Publisher(out, expected, writers, segmenter.on_gpu, self.guard, self.clock, store)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Segment and publish the parts of a batch. Yields their receipts as rows.

        `batch["parts"]` holds lists of packed parts: see `pack_parts`.
        """
        parts = [part for packed in batch["parts"] for part in unpack_parts(packed)]
        receipts = self.segment_parts(parts)
        # Groups must not depend on time: if Ray repeats a task, it drops as many groups as it has received before.
        number = 1  # the first one alone and soon: it says whether the rows are exact
        try:
            while known := [receipt.to_row() for receipt in islice(receipts, number)]:
                yield {"receipts": [known]}
                number = RECEIPTS_TOGETHER if self.segmenter.on_gpu else 1
        except BrokenExecutor:  # a writing process was killed, for example for lack of memory: treat it as this one
            os._exit(1)

    def segment_parts(self, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Segment and publish parts. Yields the receipt of each."""
        started = time.time()
        interrupted = self.guard.claim(parts)
        if interrupted:  # segmenting a neighbour could crash the process, and the wrong window would be blamed
            self.seams.skip(parts)
        side = self.batches.window  # if memory runs out, it gets smaller for the next task
        windows = self.segment_windows(parts, side, interrupted)
        for part, published in self.publisher.publish(windows, side, interrupted):
            receipt = self.receipt(part, published, started)
            yield receipt
            started = receipt.ended
        self.publisher.end_task()
        self.guard.end_task()

    def segment_windows(
        self, parts: Sequence[Part], side: int, interrupted: Mapping[str, Attempt]
    ) -> Iterator[WindowRows]:
        """Yield the segmented windows, of `side` px, of parts.

        `interrupted` has the parts over which a process died, by key.
        """
        # Nothing else is read during an interrupted part: it could crash the process, and the wrong window be blamed.
        for is_interrupted, group in groupby(parts, lambda part: part.key in interrupted):
            if is_interrupted:
                yield from self.guard.segment_each(list(group), side, interrupted, self.batches.rows)
            else:
                yield from self.batches.infer(list(group), side)

    def receipt(self, part: Part, published: PublishedPart, started: float) -> Receipt:
        """Return the receipt of a published part, on which work began at `started` (s since 1970)."""
        seam_pixels, seam_differing = self.seams.take(part)
        return Receipt(
            actor=self.name,
            part=part.key,
            scene=part.scene.scene_id,
            window=part.window,
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
            software={**self.reader.decoders, "engine": self.segmenter.engine},
            times=self.clock.take(),
        )
