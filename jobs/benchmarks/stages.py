"""The stages of segmentation, each of which can be measured alone, and a plain loop to compare them with."""

import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from threading import Semaphore
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from seg_core.grid import chip_window, split
from seg_core.inference.windows import read_pixels, stage_windows, start_windows
from seg_core.model.networks import normalise
from seg_core.model.segmenter import Pending, Segmenter
from seg_core.run.plan import ReadBlock, Settings, WindowTask, unpack_parts
from seg_core.run.rows import encode_mask
from seg_core.run.sizing import fit_window, gpu_share
from seg_core.threads import count_cpus, prefetch

from ..resources import ActorResources, ExecutionOptions
from ..segmenting.reading import choose_reading


@dataclass(frozen=True)
class WindowDataset(Dataset[Any]):
    """The chips of windows: pixels `uint8 (bands, height, width)`, valid `bool (height, width)`, and the number."""

    tasks: Sequence[WindowTask]
    settings: Settings
    stride: int
    min_chip: int

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], int]:
        task = self.tasks[number]
        chip = chip_window(task.window, self.settings.halo, self.stride, self.min_chip)
        return *read_pixels(task.part, chip, self.settings), number


class Stages:
    """A process with a model, like an actor of a run. The method of a stage returns its useful Mpx/s.

    Useful pixels are those of windows, without halos. A stage runs for at least `seconds`, after a warm-up.
    """

    def __init__(
        self,
        model: str,
        parts: Sequence[dict[str, Any]],
        settings: Settings,
        window: int,
        resources: ActorResources,
        execution: ExecutionOptions,
    ) -> None:
        torch.set_num_threads(resources.threads)
        cv2.setNumThreads(1)
        self.settings, self.batch = settings, execution.batch or 1
        self.readers = resources.initial_readers(settings.decode)
        self.segmenter = Segmenter(model, execution.device, precision=settings.precision, compiling=execution.compiling)
        self.workers = max(1, count_cpus() - self.segmenter.on_gpu)
        bundle, gpu_memory = self.segmenter.bundle, gpu_share(self.segmenter.memory, resources.num_gpus)
        window = fit_window(window, execution.window, settings, bundle, gpu_memory)
        known = unpack_parts(parts)
        tasks = [WindowTask(part, each) for part in known for each in split(part.window, window)]
        # Repeated, so that they are read as in a run that has more parts than threads.
        repeated = known * -(-2 * (self.readers + self.segmenter.decodes_together) // len(known))
        self.read_blocks, self.depth = choose_reading(
            repeated, window, settings, self.segmenter, resources, self.readers
        )
        self.windows = WindowDataset(tasks, settings, bundle.stride, bundle.min_chip)
        by_size = sorted(range(len(tasks)), key=lambda number: -tasks[number].window.num_pixels)
        chips = ((number, *self.windows[number][:2]) for number in by_size)
        # The largest chip with valid pixels, since chips without any are not inferred.
        self.largest = next((chip for chip in chips if chip[2].any()), (by_size[0], *self.windows[by_size[0]][:2]))

    def choose_batch(self, batch: int | None) -> int:
        """Set the number of windows per batch; None: the number that is fastest. Returns it."""
        self.batch = batch or self.segmenter.find_batch(*self.largest[1].shape)
        return self.batch

    def decode(self, seconds: float) -> float:
        """Measure reading windows onto the device, with the threads and the depth that a run begins with."""
        turns = Semaphore(self.readers)

        def stage(block: ReadBlock) -> int:
            stage_windows(block, self.settings, self.segmenter, lambda: turns)
            return block.num_pixels

        with ThreadPoolExecutor(self.depth) as pool:
            return _measure_rate(prefetch(pool, stage, cycle(self.read_blocks), self.depth), seconds, self.readers)

    def copy(self, seconds: float) -> float | None:
        """Measure copying one chip to the device again and again. None for a CPU, which needs no copy."""
        if self.segmenter.device.type == "cpu":
            return None
        number, pixels, valid = self.largest
        chip = [torch.from_numpy(each).pin_memory() for each in (pixels, valid)]

        def run() -> int:
            for each in chip:
                each.to(self.segmenter.device, non_blocking=True)
            torch.cuda.synchronize()
            return self.windows.tasks[number].window.num_pixels

        return _measure_rate(iter(run, None), seconds)

    def model(self, seconds: float) -> float:
        """Measure segmenting one chip on the device again and again, with the copy of the results to the host."""
        number, pixels, valid = self.largest
        window = self.windows.tasks[number].window
        chip = self.segmenter.stage(pixels, valid)
        batch = [chip] * self.batch
        pending: deque[Pending] = deque()

        def run() -> int:
            while len(pending) <= self.segmenter.in_flight:
                pending.append(start_windows(batch, window, self.settings, self.segmenter))
            pending.popleft().result()
            return len(batch) * window.num_pixels

        return _measure_rate(iter(run, None), seconds)

    def loop(self, seconds: float) -> float:
        """Measure the plain loop."""
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            return _measure_rate(self.run_plain_loop(folder), seconds, self.workers)

    def run_plain_loop(self, folder: str) -> Iterator[int]:
        """Segment all windows again and again with torch's DataLoader, and write one PNG per window.

        Yields the pixels of each window. One process per core reads, and the network is that of a run: in the same
        engine and precision.
        """
        bundle, device, network = self.segmenter.bundle, self.segmenter.device, self.segmenter.network
        halo, on_gpu = self.settings.halo, device.type == "cuda"
        loader: Any = DataLoader(
            self.windows,
            batch_size=None,
            sampler=cycle(range(len(self.windows))),  # without end
            num_workers=self.workers,
            pin_memory=on_gpu,
            multiprocessing_context="spawn",  # Ray's and OpenMP's threads don't survive a fork
        )
        for pixels, valid, number in loader:
            window = self.windows.tasks[number].window
            image, mask = (each.to(device, non_blocking=True).unsqueeze(0) for each in (pixels, valid))
            logits = network(normalise(image, mask, bundle.mean, bundle.std)).float()
            binary = logits.shape[1] == 1
            probability = logits.sigmoid() if binary else logits.softmax(1)[:, bundle.building]
            building = (probability.reshape(mask.shape) >= self.settings.threshold) & mask
            inside = building[0, halo : halo + window.height, halo : halo + window.width]
            with open(f"{folder}/{number}.png", "wb") as file:
                file.write(encode_mask(inside.cpu().numpy()))
            yield window.num_pixels


def _measure_rate(steps: Iterator[int], seconds: float, concurrent: int = 1) -> float:
    """Return the Mpx/s of endless steps that yield their pixels, measured after the first `concurrent` steps.

    Concurrent steps all begin at the same time. Only when some have ended do their beginnings spread out.
    """
    for _ in range(concurrent):
        next(steps)
    started, pixels = time.perf_counter(), 0
    for step_pixels in steps:
        pixels += step_pixels
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return pixels / elapsed / 1e6
    raise AssertionError("the steps must not end")
