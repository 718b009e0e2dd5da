"""Decode JPEG streams to the pixels of chips, on the device of the model."""

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

MAX_CHIPS_PER_CALL = 8  # chips that are decoded in one call; each may contain several windows


class DecodedChip(NamedTuple):
    """The pixels of a chip on the device."""

    image: Tensor  # `uint8 (bands, h, w)`
    ready: Any  # the GPU's event after which the image is complete; None on a CPU


class JpegDecoder:
    """A decoder of chips on a device. Any thread may use it.

    A GPU's JPEG engine runs one call at a time, and much of a call's cost does not depend on its input. Chips that
    arrive during a call are therefore decoded together in the next one.
    """

    def __init__(self, device: torch.device, free_memory: Callable[[], None]) -> None:
        self.device, self.free_memory = device, free_memory
        self.on_gpu = device.type == "cuda"
        # The context in which a GPU's engine decodes.
        self.decode_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        # Joining blocks is quick, and has priority over the network: otherwise the engine would wait for the network.
        self.stream = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self.batcher = CallBatcher(self._decode_together, MAX_CHIPS_PER_CALL)

    def __call__(self, chip: JpegStreams) -> DecodedChip:
        """Decode a chip.

        The result differs from GDAL's by the rounding of colours that are stored at half the resolution. Raises
        ReadError if a block can't be decoded.
        """
        return self.batcher(chip) if self.on_gpu else self.decode([chip])[0]

    def _decode_together(self, chips: Sequence[JpegStreams]) -> list[DecodedChip]:
        with self.decode_context():
            return self.decode(chips)

    def decode(self, chips: Sequence[JpegStreams]) -> list[DecodedChip]:
        """Decode several chips. Only one thread at a time may call it. Raises ReadError if a block can't be decoded."""
        for _ in range(2):
            try:
                return self._decode(chips)
            except RuntimeError as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
            # This is outside the except clause, because the error's frames hold blocks on the device.
            if "memory" not in reason.lower():
                break
            self.free_memory()
        raise ReadError(f"a block can't be decoded: {reason}")

    @torch.inference_mode()
    def _decode(self, chips: Sequence[JpegStreams]) -> list[DecodedChip]:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            images = {count: iter(self._decode_blocks(chips, count)) for count in {chip.components for chip in chips}}
            joined = [self._join(chip, [next(images[chip.components]) for _ in chip.blocks]) for chip in chips]
            ready = None if self.stream is None else self.stream.record_event()
        return [DecodedChip(image, ready) for image in joined]

    def _decode_blocks(self, chips: Sequence[JpegStreams], components: int) -> list[Tensor]:
        """Decode all blocks of the chips with this number of components, each to `uint8 (components, h, w)`."""
        from torchvision.io import ImageReadMode, decode_jpeg

        if self.stream is not None:
            # The engine starts writing without waiting, perhaps into memory that queued work of this stream still reads
            # (https://github.com/pytorch/vision/pull/9606).
            self.stream.synchronize()
        streams = [torch.from_numpy(block) for chip in chips if chip.components == components for block in chip.blocks]
        if not streams:
            return []
        mode = ImageReadMode.RGB if components == 3 else ImageReadMode.GRAY
        images: list[Tensor] = decode_jpeg(streams, mode=mode, device=self.device)
        return [image.contiguous() for image in images]  # a CPU's are interleaved by pixel

    def _join(self, chip: JpegStreams, images: Sequence[Tensor]) -> Tensor:
        """Join blocks to the chip's pixels, `uint8 (bands, h, w)`. Missing blocks are 0."""
        (height, width), by_place = chip.block_shape, dict(zip(chip.block_offsets, images, strict=True))
        down, across = (-(-canvas // block) for canvas, block in zip(chip.canvas_shape, chip.block_shape, strict=True))
        missing = torch.zeros(chip.components, height, width, dtype=torch.uint8, device=self.device)
        blocks = []
        for place in product(range(0, down * height, height), range(0, across * width, width)):
            block = by_place.get(place, missing)
            block_height = block.shape[1]
            if not min(height, chip.canvas_shape[0] - place[0]) <= block_height <= height or block.shape[2] != width:
                raise ReadError(f"a block can't be decoded: its size is not {width} x {height} px")
            # The last strip of a file may be cut short.
            blocks.append(block if block_height == height else F.pad(block, (0, 0, 0, height - block_height)))
        # As few calls as possible: at each of them other threads may take the interpreter's lock.
        grid = torch.stack(blocks).view(down, across, -1, height, width).permute(2, 0, 3, 1, 4)
        image = _take(grid.reshape(-1, down * height, across * width), 0, np.array(chip.bands))
        if not self.on_gpu:
            return torch.from_numpy(expand_reflection(image.numpy(), chip.rows, chip.cols))
        image = _take(_take(image, 1, chip.rows), 2, chip.cols)
        return image.contiguous()  # so that the blocks' memory beside the chip is released


def _take(image: Tensor, axis: int, indices: NDArray[np.intp]) -> Tensor:
    """Take indices of an axis. The result is a view if they are consecutive."""
    if (np.diff(indices) == 1).all():
        return image.narrow(axis, int(indices[0]), len(indices))
    index = torch.from_numpy(indices)
    if image.is_cuda:
        index = index.pin_memory().to(image.device, non_blocking=True)  # an unpinned copy would wait for queued work
    return image.index_select(axis, index)
