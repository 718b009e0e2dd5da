"""The stages of segmenting, each alone and for some time, and a loop as one would write it by hand."""

import os
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
from seg_core.model.bundle import read_weights
from seg_core.model.networks import normalise
from seg_core.model.segmenter import Pending, Segmenter, load_model
from seg_core.run.plan import Part, ReadBlock, Settings, WindowTask
from seg_core.run.rows import encode_mask
from seg_core.run.sizing import fit_window, gpu_share
from seg_core.threads import prefetch

from ..resources import ActorResources, ExecutionOptions
from ..segmenting.reading import choose_reading


@dataclass(frozen=True)
class Windows(Dataset[Any]):
    """The windows of parts, by number: to read one gives its chip."""

    tasks: Sequence[WindowTask]
    settings: Settings
    stride: int

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], int]:
        task = self.tasks[number]
        chip = chip_window(task.window, self.settings.halo, self.stride)
        return *read_pixels(task.part, chip, self.settings), number


class Stages:
    """A process with a model, as an actor of a run is one. Each method gives useful megapixels a second.

    Useful are the pixels of windows, without halo. Each runs for at least so many seconds, after a window to warm up.
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
        self.path, self.settings, self.batch = model, settings, execution.batch or 1
        self.readers = resources.initial_readers(settings.decode)
        self.segmenter = Segmenter(model, execution.device, precision=settings.precision, compiling=execution.compiling)
        self.workers = max(1, (os.cpu_count() or 1) - self.segmenter.on_gpu)
        bundle, gpu_memory = self.segmenter.bundle, gpu_share(self.segmenter.memory, resources.num_gpus)
        window = fit_window(window, execution.window, settings, bundle, gpu_memory)
        known = [Part.from_row(part) for part in parts]
        tasks = [WindowTask(part, at) for part in known for at in split(part.window, window)]
        # They are read again and again: as a run reads that has more of them than threads.
        many = known * -(-2 * (self.readers + self.segmenter.decodes_together) // len(known))
        self.read_blocks, self.depth = choose_reading(many, window, settings, self.segmenter, resources, self.readers)
        self.windows = Windows(tasks, settings, bundle.stride)
        by_size = sorted(range(len(tasks)), key=lambda number: -tasks[number].window.num_pixels)
        chips = ((number, *self.windows[number][:2]) for number in by_size)
        # One in which something is valid: nothing else is inferred.
        self.largest = next((chip for chip in chips if chip[2].any()), (by_size[0], *self.windows[by_size[0]][:2]))

    def settle_batch(self, batch: int | None) -> int:
        """Segment so many windows at once from now on; None: as many as pay."""
        self.batch = batch or self.segmenter.find_batch(*self.largest[1].shape)
        return self.batch

    def decode(self, seconds: float) -> float:
        """Reading, and bringing it to the device, with as many threads and as far ahead as a run begins with."""
        turns = Semaphore(self.readers)

        def stage(block: ReadBlock) -> int:
            stage_windows(block, self.settings, self.segmenter, lambda: turns)
            return block.num_pixels

        with ThreadPoolExecutor(self.depth) as pool:
            return _rate(prefetch(pool, stage, cycle(self.read_blocks), self.depth), seconds, self.readers)

    def copy(self, seconds: float) -> float | None:
        """Bringing one chip to the device again and again; None where the device is the host."""
        if self.segmenter.device.type == "cpu":
            return None
        number, pixels, valid = self.largest
        chip = [torch.from_numpy(each).pin_memory() for each in (pixels, valid)]

        def run() -> int:
            for each in chip:
                each.to(self.segmenter.device, non_blocking=True)
            torch.cuda.synchronize()
            return self.windows.tasks[number].window.num_pixels

        return _rate(iter(run, None), seconds)

    def model(self, seconds: float) -> float:
        """Segmenting one chip that the device has at hand again and again; with its result on the way to the host."""
        number, pixels, valid = self.largest
        at = self.windows.tasks[number].window
        chip = self.segmenter.stage(pixels, valid)
        batch = [chip] * self.batch
        under_way: deque[Pending] = deque()

        def run() -> int:
            while len(under_way) <= self.segmenter.in_flight:
                under_way.append(start_windows(batch, at, self.settings, self.segmenter))
            under_way.popleft().result()
            return len(batch) * at.num_pixels

        return _rate(iter(run, None), seconds)

    def loop(self, seconds: float) -> float:
        """A loop by hand."""
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            return _rate(self.loop_by_hand(folder), seconds, self.workers)

    def loop_by_hand(self, folder: str) -> Iterator[int]:
        """Over all windows, again and again: torch's DataLoader, the model, the threshold, a PNG file a window.

        It has a process a core to read with, and the model in the layout and precision that a run has it in.
        """
        bundle, device, layout = self.segmenter.bundle, self.segmenter.device, self.segmenter.layout
        network = load_model(bundle, read_weights(self.path, bundle)).to(device).to(memory_format=layout)
        halo, on_gpu = self.settings.halo, device.type == "cuda"
        loader: Any = DataLoader(
            self.windows,
            batch_size=None,
            sampler=cycle(range(len(self.windows))),  # without end
            num_workers=self.workers,
            pin_memory=on_gpu,
            multiprocessing_context="spawn",  # Ray's and OpenMP's threads don't outlive a fork
        )
        for pixels, valid, number in loader:
            at = self.windows.tasks[number].window
            image, mask = (each.to(device, non_blocking=True).unsqueeze(0) for each in (pixels, valid))
            image = normalise(image, mask, bundle.mean, bundle.std).contiguous(memory_format=layout)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.segmenter.bfloat16):
                logits = network(image).float()
            one = logits.shape[1] == 1
            probability = logits.sigmoid() if one else logits.softmax(1)[:, bundle.building]
            building = (probability.reshape(mask.shape) >= self.settings.threshold) & mask
            inside = building[0, halo : halo + at.height, halo : halo + at.width]
            with open(f"{folder}/{number}.png", "wb") as file:
                file.write(encode_mask(inside.cpu().numpy()))
            yield at.num_pixels


def _rate(sizes: Iterator[int], seconds: float, at_once: int = 1) -> float:
    """Megapixels a second of steps that each give their pixels, from the end of the first ones on.

    Of those that go on at once: together they began, and not until some have ended do others begin in between.
    """
    for _ in range(at_once):
        next(sizes)
    started, pixels = time.perf_counter(), 0
    for size in sizes:
        pixels += size
        spent = time.perf_counter() - started
        if spent >= seconds:
            return pixels / spent / 1e6
    raise AssertionError("the steps have no end")
