"""From a bundle to what it says of chips: the building probability, or the figures that tiles' rows are made of.

    chip ─ stage ─▶ device ─▶ normalise ─▶ network ─▶ cut out the window ─▶ threshold ─▶ bits, sums ─▶ host

From there to the host all is done on the device, on which several batches may be under way.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seg_core.chips import JpegStreams, WindowFigures
from seg_core.errors import JobError, SegError
from seg_core.model.bundle import Bundle, Weights, read_bundle, read_weights
from seg_core.model.compiled import COMPILE_AFTER, CompiledNetwork, stack_chips
from seg_core.model.jpeg_decoder import MAX_CHIPS_PER_CALL, JpegDecoder
from seg_core.model.networks import build_model, check_sizes, class_probability, fold_batchnorm, normalise

# The eight symmetries of a square: quarter turns, with and without a flip before. The first is the image as it is.
VIEWS = [(turns, flip) for flip in (False, True) for turns in range(4)]

# Probabilities are added up in this unit, in which they are whole numbers: the sum does not depend on their order.
SUM_UNIT = 2.0**-24
NO_NUMBER = "the network's answer is not finite"
MAX_BATCH = 64  # chips
MIN_BATCH_GAIN = 1.05  # by which more chips at once must be faster to be worth their memory
FREE_BATCH = 4  # chips: up to so many go together though they are no faster, to spare the process that starts them


class DeviceChip(NamedTuple):
    """A chip where the device has it at hand."""

    image: Tensor  # `uint8 (bands, h, w)`: on the device, or in memory of the host where that had no room
    mask: Tensor  # what of it is valid, `bool (h, w)`, likewise
    valid: NDArray[np.bool_]  # the same, on the host
    any_valid: bool  # whether anything is valid
    ready: Any = None  # the event of a GPU after which they are there
    decoded: bool = False  # whether the device made the image, from JPEG streams

    def cut(self, at: tuple[slice, slice]) -> "DeviceChip":
        """A chip that is a piece of this one, and shares its memory."""
        valid = self.valid[at]
        return self._replace(image=self.image[:, *at], mask=self.mask[at], valid=valid, any_valid=bool(valid.any()))


@dataclass(frozen=True)
class WindowResult:
    """What a model says of a window."""

    figures: WindowFigures
    valid: NDArray[np.bool_]  # `(height, width)`

    def building(self, tile_size: int) -> NDArray[np.bool_]:
        """Which pixels are building, `bool (height, width)`."""
        height, width = self.valid.shape
        pixels = np.unpackbits(self.figures.building_bits, axis=-1, count=tile_size).view(np.bool_)
        return pixels.reshape(height, -1)[:, :width]


class WindowSpec(NamedTuple):
    """What of a chip is its window, and what is wanted of that."""

    halo: int  # px from the chip's corner to the window's
    height: int
    width: int
    tile_size: int
    threshold: float
    keep_probability: bool = False


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda`, ... Raises SegError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SegError(f"--device {name}: not a device: say auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SegError(f"--device {name}: this machine has no GPU that torch {torch.__version__} can use")
    return device


def load_model(bundle: Bundle, weights: Weights) -> torch.nn.Module:
    """The network of a bundle with its weights, ready for inference.

    Raises SegError where they don't fit, or the network does not take the sizes of chips.
    """
    model = build_model(bundle.architecture)
    try:
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    except RuntimeError as error:
        raise SegError(f"the weights are not those of {bundle.architecture}: {error}") from error
    check_sizes(bundle.architecture["name"], model, bundle.bands)
    return model.eval()


class Segmenter:
    """A model on a device.

    The precision `auto` is bfloat16 on a GPU and float32 on a CPU. There float32 is `exact`: a pixel's probability is
    the same to the last bit however the scene was cut. That takes channels first: for channels last, twice as fast,
    oneDNN has routines that add up in an order that depends on the chip's size, where its direct convolution (taken for
    channels first and two threads or more) does not. bfloat16 goes without, and is three times as fast on processors
    that have it (AVX-512 BF16, AMX).

    What is not exact may be compiled: with `auto` on a GPU, for each size of chips that has taken so long that it pays;
    with `yes` at once, on any device; where it can't be, the network runs as it is, and a warning is logged.
    """

    def __init__(
        self, path: str, device: str = "auto", tta: bool = False, precision: str = "auto", compiling: str = "no"
    ) -> None:
        """Load the bundle at `path`. With `tta` (test-time augmentation) a probability is the mean of eight views."""
        self.bundle = read_bundle(path)
        self.device = choose_device(device)
        model = fold_batchnorm(load_model(self.bundle, read_weights(path, self.bundle)))
        self.on_gpu = self.device.type == "cuda"
        self.bfloat16 = precision == "bfloat16" or (precision == "auto" and self.on_gpu)
        self.exact = not (self.on_gpu or self.bfloat16)
        self.views = VIEWS if tta else VIEWS[:1]
        self.layout = torch.contiguous_format if self.exact else torch.channels_last
        self.model = model.to(self.device).to(memory_format=self.layout)
        self.mean, self.std = (torch.tensor(each, device=self.device) for each in (self.bundle.mean, self.bundle.std))
        self.decoder = JpegDecoder(self.device, self.free_memory)
        # What copies takes little, and goes before the network's work.
        self.copies = torch.cuda.Stream(self.device, priority=-1) if self.on_gpu else None
        self.in_flight = 4 if self.on_gpu else 0  # how much may be under way while more is prepared
        after = {"no": None, "auto": COMPILE_AFTER if self.on_gpu else None, "yes": 0.0}[compiling]
        self.compiled = CompiledNetwork(self._answer, after, self.on_gpu)

    @torch.inference_mode()
    def __call__(
        self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_], halo: int, height: int, width: int
    ) -> NDArray[np.float32]:
        """Building probability `float32 (height, width)` of a chip's window.

        The chip is `uint8 (bands, h, w)` with `valid` `bool (h, w)`; the window begins `halo` px from its corner.
        Raises JobError where the answer is no number.
        """
        if not valid.any():
            return np.zeros((height, width), np.float32)
        images, masks = self._gather([self.stage(pixels, valid)])
        found = self._probability(stack_chips(images), stack_chips(masks), halo, height, width)[0].cpu().numpy()
        if np.isnan(found).any():
            raise JobError(NO_NUMBER)
        return np.asarray(found)

    def allocate_pixels(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Memory for the pixels of a chip, out of which a GPU fetches them itself; for any thread.

        It may be let go as soon as they are staged: torch does not give it away before the GPU is done with it.
        """
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_gpu).numpy()

    def stage(self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> DeviceChip:
        """A chip on the device, or on its way there while that computes; from any thread."""
        return self._place(torch.from_numpy(pixels), valid)

    def stage_streams(self, streams: JpegStreams) -> DeviceChip:
        """Bring a chip to the device, which decodes it. Raises ReadError where it can't."""
        image, decoded = self.decoder(streams)
        return self._place(image, streams.valid, decoded)._replace(decoded=True)

    @torch.inference_mode()
    def _place(self, image: Tensor, valid: NDArray[np.bool_], after: Any = None) -> DeviceChip:
        """A chip; its image may be on the device already, after an event."""
        mask, holds = torch.from_numpy(valid), bool(valid.any())
        if self.copies is None or not holds:
            return DeviceChip(image, mask, valid, holds)
        full = bool(valid.all())
        image = image if image.is_cuda else image.pin_memory()
        mask = mask if full else mask.pin_memory()
        with torch.cuda.stream(self.copies):
            if after is not None:
                after.wait(self.copies)
            with suppress(torch.OutOfMemoryError):
                image = image.to(self.device, non_blocking=True)
                mask = torch.ones_like(mask, device=self.device) if full else mask.to(self.device, non_blocking=True)
            return DeviceChip(image, mask, valid, holds, self.copies.record_event())

    @torch.inference_mode()
    def start(self, chips: Sequence[DeviceChip], cut: WindowSpec, may_compile: bool = True) -> "Pending":
        """Segment chips of one size together. A GPU is then at work on them, and further ones may be started.

        With `may_compile` the network may be compiled for batches of that size: for rare ones it does not pay. Raises
        RuntimeError or MemoryError where they are too much for the device.
        """
        began, compiled = time.perf_counter(), False
        some = [number for number, chip in enumerate(chips) if chip.any_valid]
        size = (len(some), *chips[0].image.shape, cut) if may_compile else None
        events: list[Any] = []
        found: tuple[Tensor, ...] = ()
        if some:
            images, masks = self._gather([chips[number] for number in some])
            compiled = not self.exact and self.compiled.prepare(size, images, masks, cut)
            began = time.perf_counter() if compiled else began
            events += self._note_time()
            found = tuple(self._to_host(each) for each in self._run(size, images, masks, cut))
            events += self._note_time()
        return Pending(self, chips, cut, some, found, events, size, compiled, time.perf_counter() - began)

    def _note_time(self) -> list[Any]:
        """An event of the GPU at this place in its work; none on a CPU, which is done with it by now."""
        if not self.on_gpu:
            return []
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return [event]

    @property
    def memory(self) -> int | None:
        """Bytes that the GPU has in all; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.on_gpu else None

    @property
    def decodes_rgb(self) -> bool:
        """Whether JPEG streams may hold RGB: a GPU's engine takes it for YCbCr, whatever Adobe's marker says."""
        return not self.on_gpu

    @property
    def decodes_together(self) -> int:
        """How many chips a GPU's JPEG engine takes at once; 0 on a CPU, where each thread decodes its own."""
        return MAX_CHIPS_PER_CALL if self.on_gpu else 0

    def find_batch(self, bands: int, height: int, width: int) -> int:
        """How many chips of a size to segment together: as many as are faster by a twentieth than half as many.

        Up to FREE_BATCH also where they are not slower by as much. 1 on a CPU, whose threads share the work on a chip.
        """
        if not self.on_gpu:
            return 1
        return find_batch(partial(self._time_batch, bands, height, width), self.free_memory)

    @torch.inference_mode()
    def _time_batch(self, bands: int, height: int, width: int, number: int) -> float:
        chips = torch.zeros(number, bands, height, width, dtype=torch.uint8, device=self.device)
        valid = torch.ones(number, height, width, dtype=torch.bool, device=self.device)
        seconds = []
        for _ in range(4):
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            self._probability(chips, valid, 0, height, width)
            torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])  # the first time it allocates, and finds its routines

    def free_memory(self) -> None:
        """Give back what the device keeps for later, after it has run out of memory."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether this process can't use the device any more: most errors of CUDA are for good."""
        try:
            if self.on_gpu:
                with self.compiled.recording_lock:
                    torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def _gather(self, chips: Sequence[DeviceChip]) -> tuple[list[Tensor], list[Tensor]]:
        """The images and masks of chips on the device."""
        if self.on_gpu:
            stream = torch.cuda.current_stream(self.device)
            for chip in {id(chip.ready): chip for chip in chips}.values():  # pieces of one chip have one event
                chip.ready.wait(stream)
                for each in (chip.image, chip.mask):
                    if each.is_cuda:  # else its memory might be given away before the network is done with it
                        each.record_stream(stream)
        images, masks = ([getattr(chip, part) for chip in chips] for part in ("image", "mask"))
        if not all(each.is_cuda == self.on_gpu for each in (*images, *masks)):
            images, masks = ([each.to(self.device, non_blocking=True) for each in part] for part in (images, masks))
        return images, masks

    def _to_host(self, found: Tensor) -> Tensor:
        """A tensor on its way to the host."""
        if not self.on_gpu:
            return found
        return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)

    def _run(
        self, size: tuple[Any, ...] | None, images: Sequence[Tensor], masks: Sequence[Tensor], cut: WindowSpec
    ) -> tuple[Tensor, ...]:
        """The answer to a batch; what is not exact may be compiled for its size."""
        if self.exact:  # oneDNN adds up in another order where there are several
            each = [self._answer(image[None], mask[None], cut) for image, mask in zip(images, masks, strict=True)]
            return tuple(torch.cat(part) for part in zip(*each, strict=True))
        return self.compiled(size, images, masks, cut)

    def _answer(self, images: Tensor, masks: Tensor, cut: WindowSpec) -> tuple[Tensor, ...]:
        """Of the windows of a batch: bits of building, four figures of each tile, and perhaps probabilities."""
        probability = self._probability(images, masks, cut.halo, cut.height, cut.width)
        valid = masks[_inside(cut.halo, cut.height, cut.width)]
        building = (probability >= np.float32(cut.threshold).item()) & valid
        of_pixels = building, to_units(probability, valid), valid, probability.isnan() & valid
        figures = [sum_tiles(each, cut.tile_size) for each in of_pixels]
        answer = pack(building, cut.tile_size), torch.stack(figures, dim=1)
        if not cut.keep_probability:
            return answer
        return (*answer, (probability * 255).masked_fill(~valid, 0.0).round().byte())

    def _probability(self, images: Tensor, masks: Tensor, halo: int, height: int, width: int) -> Tensor:
        x = normalise(images, masks, self.mean, self.std)
        each = [self._infer(x, turns, flip)[_inside(halo, height, width)] for turns, flip in self.views]
        return sum(each[1:], each[0]) / len(each)

    def _infer(self, x: Tensor, turns: int, flip: bool) -> Tensor:
        """Probability of building `(n, h, w)`, of the input seen after quarter turns and perhaps a flip."""
        seen = torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1)).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(seen)
        probability = torch.rot90(class_probability(logits, self.bundle.building), -turns, (-2, -1))
        return probability.flip(-1) if flip else probability


@dataclass
class Pending:
    """The results of a batch, that the device may still be at work on."""

    segmenter: Segmenter
    chips: Sequence[DeviceChip]
    cut: WindowSpec
    some: list[int]  # the chips in which anything is valid: the others were not inferred
    found: tuple[Tensor, ...]
    events: list[Any]  # of CUDA: when it began, and ended
    size: tuple[Any, ...] | None  # of the batch; None where nothing may be compiled for it
    compiled: bool  # whether the network was compiled for it just now
    seconds: float  # that the device took; while it is at work, those that it took to start it

    def result(self) -> list[WindowResult]:
        """Wait for the results, one a chip. Raises RuntimeError where the device fails, or one is not a number."""
        if self.events:
            self.events[1].synchronize()
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        if self.size is not None:
            self.segmenter.compiled.seconds_spent[self.size] += self.seconds
        inside = _inside(self.cut.halo, self.cut.height, self.cut.width)
        places = {number: place for place, number in enumerate(self.some)}
        return [
            WindowResult(
                self._figures(places[number]) if number in places else _nothing_valid(self.cut), chip.valid[inside]
            )
            for number, chip in enumerate(self.chips)
        ]

    def _figures(self, place: int) -> WindowFigures:
        """The figures of the window at that place of the batch. Raises RuntimeError where one is not a number."""
        bits, (num_building, sums, num_valid, unknown), *kept = (each[place].numpy() for each in self.found)
        if unknown.any():  # counted apart: no value in a sum would be told from others, whatever a tile's size
            raise RuntimeError(NO_NUMBER)
        return WindowFigures(bits, num_building, sums * SUM_UNIT, num_valid, kept[0] if kept else None)


def _nothing_valid(cut: WindowSpec) -> WindowFigures:
    """The figures of a window that is not inferred, for nothing in its chip is valid."""
    tiles = -(-cut.height // cut.tile_size), -(-cut.width // cut.tile_size)
    bits = np.zeros((cut.height, tiles[1], -(-cut.tile_size // 8)), np.uint8)
    levels = np.zeros((cut.height, cut.width), np.uint8) if cut.keep_probability else None
    none = np.zeros(tiles, np.int64)
    return WindowFigures(bits, none, np.zeros(tiles), none, levels)


def _inside(halo: int, height: int, width: int) -> tuple[Any, ...]:
    return (..., slice(halo, halo + height), slice(halo, halo + width))


def pack(pixels: Tensor, tile_size: int) -> Tensor:
    """`bool (n, h, w)` as bits, `uint8 (n, h, tile columns, bytes)`: of each line of a tile, as np.packbits does it."""
    lines = F.pad(pixels.byte(), (0, -pixels.shape[-1] % tile_size)).unflatten(-1, (-1, tile_size))
    eights = F.pad(lines, (0, -tile_size % 8)).unflatten(-1, (-1, 8))
    places = 128 >> torch.arange(8, dtype=torch.uint8, device=pixels.device)
    packed: Tensor = (eights * places).sum(dim=-1, dtype=torch.uint8)
    return packed


def to_units(probability: Tensor, valid: Tensor) -> Tensor:
    """Probabilities in SUM_UNIT, `int64`: 0 where they are not valid, or no numbers."""
    return (probability.masked_fill(~valid, 0.0) / SUM_UNIT).round().nan_to_num().long()


def sum_tiles(numbers: Tensor, tile_size: int) -> Tensor:
    """Sums of whole numbers `(n, h, w)` over each tile, `int64 (n, tile rows, tile columns)`."""
    height, width = numbers.shape[-2:]
    padded = F.pad(numbers, (0, -width % tile_size, 0, -height % tile_size))
    rows: Tensor = padded.unflatten(-1, (-1, tile_size)).sum(-1)
    tiles: Tensor = rows.unflatten(-2, (-1, tile_size)).sum(-2)
    return tiles


def find_batch(time_batch: Callable[[int], float], free_memory: Callable[[], None], most: int = MAX_BATCH) -> int:
    """The largest power of two up to `most` that is worth it, from the seconds that so many chips take."""
    best, rate = 1, 0.0
    while best <= most:
        try:
            found = best / time_batch(best)
        except RuntimeError:  # not of memory alone: some routines have a largest size
            break
        if found < (MIN_BATCH_GAIN if best > FREE_BATCH else 1 / MIN_BATCH_GAIN) * rate:
            break
        best, rate = 2 * best, found
    free_memory()
    return max(1, best // 2)
