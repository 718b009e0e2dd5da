"""Run a bundle's network on chips: probabilities of a window, or the figures that the rows of its tiles are made of.

    chip ─ upload ─▶ device ─▶ normalise ─▶ network ─▶ crop to the window ─▶ threshold ─▶ bits, sums ─▶ host

Everything between upload and host happens on the device, which may have several batches in progress.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seg_core.chips import JpegStreams, WindowFigures, pack_validity
from seg_core.errors import JobError
from seg_core.grey_levels import Normalization
from seg_core.model.batch_size import find_batch
from seg_core.model.bundle import read_bundle
from seg_core.model.compiled import COMPILE_AFTER, Batch, CompiledNetwork, stack_chips
from seg_core.model.device_chips import ChipUploader, DeviceChip
from seg_core.model.engines import load_network
from seg_core.model.jpeg_decoder import MAX_CHIPS_PER_CALL, JpegDecoder
from seg_core.model.loading import choose_device
from seg_core.model.networks import class_probability, normalise
from seg_core.model.window_results import (
    SUM_UNIT,
    WindowResult,
    WindowSpec,
    empty_figures,
    summarise,
    window_index,
)

# The eight symmetries of a square: quarter turns, with and without a flip before. The first is the identity.
VIEWS = [(turns, flip) for flip in (False, True) for turns in range(4)]
NOT_FINITE = "the network's output is not finite"


class Segmenter:
    """A model on a device.

    Precision: `exact` is float32 on a CPU in which a pixel's probability is the same to the last bit, whatever window
    it is in. torch does it with channels-first arrays and at least two threads. With channels-last arrays, which are
    faster, oneDNN uses routines that add up in an order that depends on the chip's size. The others agree within
    rounding: `float32`, `bfloat16`, and `int8` for bundles that have an int8 network. `auto` is that of older runs:
    bfloat16 on a GPU, exact on a CPU. `choose_precision` resolves it for new ones. On a GPU, `exact` is `float32`.

    Engine: torch, or OpenVINO on a CPU where results need not be exact: see `seg_core.model.engines`.

    Compiling: networks that need not be exact can be compiled. `auto` compiles on a GPU for each size of batches on
    which enough time has been spent. `yes` compiles at once on any device. If compiling fails, the network runs
    uncompiled, and a warning is logged.
    """

    def __init__(
        self, path: str, device: str = "auto", tta: bool = False, precision: str = "auto", compiling: str = "no"
    ) -> None:
        """Load the bundle at `path`. With `tta` (test-time augmentation), probabilities are the mean of eight views.

        `compiling` is `auto`, `no` or `yes`. Raises SegError if there is no such bundle or device, or if it can't
        compute in this precision.
        """
        self.bundle = read_bundle(path)
        self.device = choose_device(device)
        self.on_gpu = self.device.type == "cuda"
        if precision == "auto":
            precision = "bfloat16" if self.on_gpu else "exact"
        self.exact = precision == "exact" and not self.on_gpu
        self.network = load_network(path, self.bundle, self.device, precision, in_torch=compiling == "yes")
        self.views = VIEWS if tta else VIEWS[:1]
        self.normalizations: dict[Normalization, Tensor] = {}  # on the device, `float32 (2, bands)`
        self.decoder = JpegDecoder(self.device, partial(_free_memory, self.on_gpu))
        self.uploader = ChipUploader(self.device)
        self.in_flight = 4 if self.on_gpu else 0  # batches that may be in progress while more are prepared
        after = {"no": None, "auto": COMPILE_AFTER if self.on_gpu else None, "yes": 0.0}[compiling]
        self.compiled = CompiledNetwork(after, self.on_gpu)

    @torch.inference_mode()
    def __call__(
        self,
        pixels: NDArray[np.uint8],
        valid: NDArray[np.bool_],
        halo: int,
        height: int,
        width: int,
        normalization: Normalization | None = None,
    ) -> NDArray[np.float32]:
        """Return the building probability of a chip's window, `float32 (height, width)`.

        The chip is `uint8 (bands, h, w)`, and `valid` is `bool (h, w)`. The window begins `halo` px from the chip's
        first corner. `normalization` is the bundle's by default. Raises JobError if a probability is NaN.
        """
        if not valid.any():
            return np.zeros((height, width), np.float32)
        images, masks, normalizations = map(stack_chips, self._gather([self.stage(pixels, valid, normalization)]))
        probability = self._probability(images, masks, normalizations, halo, height, width)[0].cpu().numpy()
        if np.isnan(probability).any():
            raise JobError(NOT_FINITE)
        return np.asarray(probability)

    def allocate_pixels(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Allocate memory for a chip's pixels, `uint8`, which a GPU can copy by itself. Any thread may call this.

        The caller may drop it after `stage`: torch does not reuse it before the GPU has copied it.
        """
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_gpu).numpy()

    def stage(
        self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_], normalization: Normalization | None = None
    ) -> DeviceChip:
        """Start copying a chip to the device, which may compute meanwhile. Any thread may call this.

        The chip is `uint8 (bands, h, w)`, and `valid` is `bool (h, w)`. `normalization` is the bundle's by default.
        """
        return self.uploader.upload(torch.from_numpy(pixels), valid)._replace(normalization=normalization)

    def stage_streams(self, streams: JpegStreams, normalization: Normalization | None = None) -> DeviceChip:
        """Decode a chip's JPEG streams on the device. Raises ReadError if they can't be decoded."""
        image, ready = self.decoder(streams)
        chip = self.uploader.upload(image, streams.valid, ready)
        return chip._replace(decoded=True, normalization=normalization)

    @torch.inference_mode()
    def start(self, chips: Sequence[DeviceChip], spec: WindowSpec, may_compile: bool = True) -> "Pending":
        """Start segmenting chips of one size together. On a GPU this returns before the work is done.

        `may_compile` allows compiling the network for batches of this size. It does not pay for rare sizes. Raises
        RuntimeError or MemoryError if the device can't process the batch.
        """
        started, compiled = time.perf_counter(), False
        inferred = [number for number, chip in enumerate(chips) if chip.any_valid]
        size = (len(inferred), *chips[0].image.shape, spec) if may_compile else None
        events: list[Any] = []
        outputs: tuple[Tensor, ...] = ()
        if inferred:
            batch = self._gather([chips[number] for number in inferred])
            compiled = not self.exact and self.compiled.prepare(self._compute_outputs, size, batch, spec)
            started = time.perf_counter() if compiled else started
            events += self._record_time()
            outputs = tuple(self._to_host(each) for each in self._run(size, batch, spec))
            events += self._record_time()
        seconds = time.perf_counter() - started
        return Pending(self, chips, spec, inferred, outputs, events, size, compiled, seconds)

    def _gather(self, chips: Sequence[DeviceChip]) -> Batch:
        """Return the images, masks and normalizations of chips on the device, for use in its current stream."""
        normalizations = [self._to_tensor(chip.normalization or self.bundle.normalization) for chip in chips]
        return *self.uploader.gather(chips), normalizations

    def _to_tensor(self, normalization: Normalization) -> Tensor:
        """Return the mean and the deviation of each band on the device, `float32 (2, bands)`."""
        if normalization not in self.normalizations:
            with self.compiled.recording_lock:  # the copy waits for the GPU
                self.normalizations[normalization] = torch.tensor(normalization, device=self.device)
        return self.normalizations[normalization]

    def _record_time(self) -> list[Any]:
        """Record a CUDA event at this point of the GPU's work. Returns none on a CPU, whose calls are synchronous."""
        if not self.on_gpu:
            return []
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return [event]

    @property
    def engine(self) -> str:
        """What runs the network, with its version, such as `torch 2.14.0`."""
        return self.network.name

    @property
    def memory(self) -> int | None:
        """Total memory of the GPU in bytes; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.on_gpu else None

    @property
    def decodes_rgb(self) -> bool:
        """Whether JPEG streams may hold RGB. A GPU's engine takes all for YCbCr, and ignores Adobe's marker."""
        return not self.on_gpu

    @property
    def decodes_together(self) -> int:
        """How many chips a GPU's JPEG engine decodes in one call; 0 on a CPU, where each thread decodes its own."""
        return MAX_CHIPS_PER_CALL if self.on_gpu else 0

    def find_batch(self, bands: int, height: int, width: int) -> int:
        """Measure how many chips of this size to segment together: see `seg_core.model.batch_size`.

        It is 1 on a CPU, whose threads share the work on one chip.
        """
        if not self.on_gpu:
            return 1
        return find_batch(partial(self._time_batch, bands, height, width), self.free_memory)

    @torch.inference_mode()
    def _time_batch(self, bands: int, height: int, width: int, number: int) -> float:
        chips = torch.zeros(number, bands, height, width, dtype=torch.uint8, device=self.device)
        valid = torch.ones(number, height, width, dtype=torch.bool, device=self.device)
        normalizations = self._to_tensor(self.bundle.normalization).expand(number, -1, -1)
        seconds = []
        for _ in range(4):
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            self._probability(chips, valid, normalizations, 0, height, width)
            torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])  # the first run also allocates memory and chooses routines

    def free_memory(self) -> None:
        """Release the memory that torch caches on the GPU, after it has run out of memory."""
        _free_memory(self.on_gpu)

    def is_lost(self) -> bool:
        """Return whether this process can no longer use the device. Most CUDA errors are permanent."""
        try:
            if self.on_gpu:
                with self.compiled.recording_lock:
                    torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def _to_host(self, output: Tensor) -> Tensor:
        """Start copying a tensor to the host."""
        if not self.on_gpu:
            return output
        return torch.empty(output.shape, dtype=output.dtype, pin_memory=True).copy_(output, non_blocking=True)

    def _run(self, size: tuple[Any, ...] | None, batch: Batch, spec: WindowSpec) -> tuple[Tensor, ...]:
        """Run a batch, in the network that is compiled for its size if there is one."""
        if self.exact:  # one by one: oneDNN adds up in another order if there are several
            each = [
                self._compute_outputs(image[None], mask[None], normalization[None], spec)
                for image, mask, normalization in zip(*batch, strict=True)
            ]
            return tuple(torch.cat(part) for part in zip(*each, strict=True))
        return self.compiled(self._compute_outputs, size, batch, spec)

    def _compute_outputs(
        self, images: Tensor, masks: Tensor, normalizations: Tensor, spec: WindowSpec
    ) -> tuple[Tensor, ...]:
        """Return what `summarise` returns for the windows of a batch."""
        probability = self._probability(images, masks, normalizations, spec.halo, spec.height, spec.width)
        return summarise(probability, masks[window_index(spec.halo, spec.height, spec.width)], spec)

    def _probability(
        self, images: Tensor, masks: Tensor, normalizations: Tensor, halo: int, height: int, width: int
    ) -> Tensor:
        x = normalise(images, masks, normalizations[:, 0], normalizations[:, 1])
        window = window_index(halo, height, width)
        each = [self._infer_view(x, turns, flip)[window] for turns, flip in self.views]
        return sum(each[1:], each[0]) / len(each)

    def _infer_view(self, x: Tensor, turns: int, flip: bool) -> Tensor:
        """Return the building probability `(n, h, w)`, inferred on the input after a flip and quarter turns."""
        logits = self.network(torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1)))
        probability = torch.rot90(class_probability(logits, self.bundle.building), -turns, (-2, -1))
        return probability.flip(-1) if flip else probability


def _free_memory(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.empty_cache()


@dataclass
class Pending:
    """A batch that the device may still be working on."""

    segmenter: Segmenter
    chips: Sequence[DeviceChip]
    spec: WindowSpec
    inferred: list[int]  # numbers of the chips with any valid pixel; the others are not inferred
    outputs: tuple[Tensor, ...]  # of the inferred chips: see `summarise`
    events: list[Any]  # CUDA events at the start and the end of the work
    size: tuple[Any, ...] | None  # identifies the batch's size; None if the network may not be compiled for it
    compiled: bool  # whether the network was compiled for this batch
    seconds: float  # that the device took; until the result is there, the time to start the work

    def result(self) -> list[WindowResult]:
        """Wait for the results, one for each chip. Raises RuntimeError if the device fails or a probability is NaN."""
        if self.events:
            self.events[1].synchronize()
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        if self.size is not None:
            self.segmenter.compiled.seconds_spent[self.size] += self.seconds
        window = window_index(self.spec.halo, self.spec.height, self.spec.width)
        places = {number: place for place, number in enumerate(self.inferred)}
        results = []
        for number, chip in enumerate(self.chips):
            valid = chip.valid[window]
            found = self._figures(places[number], valid) if number in places else empty_figures(self.spec)
            results.append(WindowResult(found, valid))
        return results

    def _figures(self, place: int, valid: NDArray[np.bool_]) -> WindowFigures:
        """Return the figures of the window at this place of the batch. Raises RuntimeError if a probability is NaN.

        `valid` says which pixels of the window are valid, `bool (height, width)`.
        """
        bits, (num_building, sums, num_valid, num_nan), *levels = (each[place].numpy() for each in self.outputs)
        if num_nan.any():  # counted apart: in a sum of whole numbers no value could stand for NaN
            raise RuntimeError(NOT_FINITE)
        kept, packed = levels[0] if levels else None, pack_validity(valid, self.spec.tile_size)
        return WindowFigures(bits, num_building, sums * SUM_UNIT, num_valid, kept, packed)
