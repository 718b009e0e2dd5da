"""JPEG streams to the pixels of chips, decoded where the model is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seg_core.chips import JpegStreams
from seg_core.errors import ReadError
from seg_core.grid import expand_reflection
from seg_core.threads import CallBatcher

AT_ONCE = 8  # chips that are decoded together; each may be that of several windows


class Decoded(NamedTuple):
    """The pixels of a chip on the device."""

    image: Tensor  # `uint8 (bands, h, w)`
    ready: Any  # the event of a GPU after which they are there; None on a CPU


class Decoder:
    """Decodes chips on a device; for any thread.

    A GPU's JPEG engine serves one call at a time, and much of what a call costs does not depend on what it is given:
    chips that are asked for meanwhile are decoded together.
    """

    def __init__(self, device: torch.device, free_memory: Callable[[], None]) -> None:
        self.device, self.free_memory = device, free_memory
        self.on_gpu = device.type == "cuda"
        self.at_work: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered while a GPU's engine decodes
        # What joins blocks takes little, and goes before the network's work: else the engine would wait for that.
        self.stream = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self.batcher = CallBatcher(self._decode_together, AT_ONCE)

    def __call__(self, chip: JpegStreams) -> Decoded:
        """Decode a chip.

        It differs from what GDAL decodes by the rounding of colours that were stored at half the resolution. Raises
        ReadError where a block can't be decoded.
        """
        return self.batcher(chip) if self.on_gpu else self.decode([chip])[0]

    def _decode_together(self, chips: Sequence[JpegStreams]) -> list[Decoded]:
        with self.at_work():
            return self.decode(chips)

    def decode(self, chips: Sequence[JpegStreams]) -> list[Decoded]:
        """Decode several chips; for one thread at a time."""
        for _ in range(2):
            try:
                return self._decode(chips)
            except RuntimeError as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
            # Outside the clause: the error's frames hold blocks on the device.
            if "memory" not in reason.lower():
                break
            self.free_memory()
        raise ReadError(f"a block can't be decoded: {reason}")

    @torch.inference_mode()
    def _decode(self, chips: Sequence[JpegStreams]) -> list[Decoded]:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            images = {number: iter(self._decode_blocks(chips, number)) for number in {c.components for c in chips}}
            joined = [self._join(chip, [next(images[chip.components]) for _ in chip.blocks]) for chip in chips]
            ready = None if self.stream is None else self.stream.record_event()
        return [Decoded(image, ready) for image in joined]

    def _decode_blocks(self, chips: Sequence[JpegStreams], components: int) -> list[Tensor]:
        """All blocks of those chips whose blocks have so many components, each `uint8 (components, h, w)`."""
        from torchvision.io import ImageReadMode, decode_jpeg

        if self.stream is not None:
            # The engine writes at once, perhaps into memory that what is queued here still reads
            # (https://github.com/pytorch/vision/pull/9606).
            self.stream.synchronize()
        streams = [torch.from_numpy(block) for chip in chips if chip.components == components for block in chip.blocks]
        if not streams:
            return []
        mode = ImageReadMode.RGB if components == 3 else ImageReadMode.GRAY
        images: list[Tensor] = decode_jpeg(streams, mode=mode, device=self.device)
        return [image.contiguous() for image in images]  # a CPU's come pixel by pixel

    def _join(self, chip: JpegStreams, images: Sequence[Tensor]) -> Tensor:
        """The chip that blocks make together; those that are not there are 0."""
        (height, width), found = chip.block, dict(zip(chip.places, images, strict=True))
        down, across = (-(-canvas // block) for canvas, block in zip(chip.canvas, chip.block, strict=True))
        nothing = torch.zeros(chip.components, height, width, dtype=torch.uint8, device=self.device)
        blocks = []
        for place in product(range(0, down * height, height), range(0, across * width, width)):
            block = found.get(place, nothing)
            high = block.shape[1]
            if not min(height, chip.canvas[0] - place[0]) <= high <= height or block.shape[2] != width:
                raise ReadError(f"a block can't be decoded: it is not of {width} x {height} px")
            # The last strip of a file may end with it.
            blocks.append(block if high == height else F.pad(block, (0, 0, 0, height - high)))
        # In as few steps as can be: at each of them other threads may take the interpreter.
        grid = torch.stack(blocks).view(down, across, -1, height, width).permute(2, 0, 3, 1, 4)
        image = _take(grid.reshape(-1, down * height, across * width), 0, np.array(chip.bands))
        if not self.on_gpu:
            return torch.from_numpy(expand_reflection(image.numpy(), chip.rows, chip.cols))
        image = _take(_take(image, 1, chip.rows), 2, chip.cols)
        return image.contiguous()  # of what the blocks hold beside the chip nothing is kept


def _take(image: Tensor, axis: int, places: NDArray[np.intp]) -> Tensor:
    """What is at those places of an axis: a view where each follows the last."""
    if (np.diff(places) == 1).all():
        return image.narrow(axis, int(places[0]), len(places))
    index = torch.from_numpy(places)
    if image.is_cuda:
        index = index.pin_memory().to(image.device, non_blocking=True)  # else it would wait for what is queued
    return image.index_select(axis, index)
