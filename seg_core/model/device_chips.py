"""Copy chips to the device of a model, while it works on others."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seg_core.grey_levels import Normalization


class DeviceChip(NamedTuple):
    """A chip that is ready for the device to use."""

    image: Tensor  # `uint8 (bands, h, w)`: on the device, or in the host's memory if the device had no room for it
    mask: Tensor  # which pixels are valid, `bool (h, w)`: in the same memory
    valid: NDArray[np.bool_]  # which pixels are valid, on the host
    any_valid: bool  # whether any pixel is valid
    ready: Any = None  # the GPU's event after which image and mask are complete
    decoded: bool = False  # whether the device decoded the image from JPEG streams
    normalization: Normalization | None = None  # mean and deviation that become 0 and 1; None: those of the bundle

    def cut(self, at: tuple[slice, slice]) -> "DeviceChip":
        """Return a piece of this chip, which shares its memory."""
        valid = self.valid[at]
        return self._replace(image=self.image[:, *at], mask=self.mask[at], valid=valid, any_valid=bool(valid.any()))


class ChipUploader:
    """Copies chips to a device. Any thread may use it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        # Copies are quick, and have priority over the network.
        self.stream = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None

    @torch.inference_mode()
    def upload(self, image: Tensor, valid: NDArray[np.bool_], ready: Any = None) -> DeviceChip:
        """Start copying a chip to the device. On a CPU, and if nothing is valid, the chip stays where it is.

        `image` is `uint8 (bands, h, w)`, `valid` is `bool (h, w)`. The image may be on the device already; `ready` is
        then the GPU's event after which it is complete.
        """
        mask, any_valid = torch.from_numpy(valid), bool(valid.any())
        if self.stream is None or not any_valid:
            return DeviceChip(image, mask, valid, any_valid)
        all_valid = bool(valid.all())
        image = image if image.is_cuda else image.pin_memory()
        mask = mask if all_valid else mask.pin_memory()
        with torch.cuda.stream(self.stream):
            if ready is not None:
                ready.wait(self.stream)
            with suppress(torch.OutOfMemoryError):
                image = image.to(self.device, non_blocking=True)
                mask = (
                    torch.ones_like(mask, device=self.device) if all_valid else mask.to(self.device, non_blocking=True)
                )
            return DeviceChip(image, mask, valid, any_valid, self.stream.record_event())

    def gather(self, chips: Sequence[DeviceChip]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the images and masks of chips on the device, for use in its current stream."""
        if self.on_gpu:
            stream = torch.cuda.current_stream(self.device)
            for chip in {id(chip.ready): chip for chip in chips}.values():  # pieces of one chip have one event
                chip.ready.wait(stream)
                for each in (chip.image, chip.mask):
                    if each.is_cuda:  # otherwise torch could reuse its memory before the network has read it
                        each.record_stream(stream)
        images, masks = [chip.image for chip in chips], [chip.mask for chip in chips]
        if not all(each.is_cuda == self.on_gpu for each in (*images, *masks)):
            images, masks = ([each.to(self.device, non_blocking=True) for each in part] for part in (images, masks))
        return images, masks
