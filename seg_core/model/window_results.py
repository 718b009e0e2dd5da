"""What a model returns for a window: a packed mask and figures of each tile, computed on the device."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seg_core.chips import WindowFigures

# Probabilities are added up as whole multiples of this unit, so that the sum does not depend on their order.
SUM_UNIT = 2.0**-24


class WindowSpec(NamedTuple):
    """Where the window is in its chip, and what to compute for it."""

    halo: int  # px from the chip's first corner to the window's
    height: int  # px of the window
    width: int  # px of the window
    tile_size: int  # px
    threshold: float  # probability from which a pixel is building
    keep_probability: bool = False  # whether to return the probability of each pixel too


@dataclass(frozen=True)
class WindowResult:
    """What a model returns for a window."""

    figures: WindowFigures
    valid: NDArray[np.bool_]  # `(height, width)`

    def building(self, tile_size: int) -> NDArray[np.bool_]:
        """Return which pixels are building, `bool (height, width)`."""
        height, width = self.valid.shape
        pixels = np.unpackbits(self.figures.building_bits, axis=-1, count=tile_size).view(np.bool_)
        return pixels.reshape(height, -1)[:, :width]


def window_index(halo: int, height: int, width: int) -> tuple[Any, ...]:
    """Return the index that takes the window from arrays `(..., h, w)` of its chip."""
    return (..., slice(halo, halo + height), slice(halo, halo + width))


def empty_figures(spec: WindowSpec) -> WindowFigures:
    """Return the figures of a window without valid pixels, which needs no inference."""
    tiles = -(-spec.height // spec.tile_size), -(-spec.width // spec.tile_size)
    bits = np.zeros((spec.height, tiles[1], -(-spec.tile_size // 8)), np.uint8)
    levels = np.zeros((spec.height, spec.width), np.uint8) if spec.keep_probability else None
    zeros = np.zeros(tiles, np.int64)
    return WindowFigures(bits, zeros, np.zeros(tiles), zeros, levels)


def summarise(probability: Tensor, valid: Tensor, spec: WindowSpec) -> tuple[Tensor, ...]:
    """Reduce the pixels of windows to what their rows need.

    Takes probabilities `float32 (n, h, w)` and which pixels are valid, `bool (n, h, w)`. Returns the packed masks (see
    `pack`), and for each tile, `int64 (n, 4, tile rows, tile columns)`: the number of building pixels, the sum of
    probabilities in SUM_UNIT, the number of valid pixels, and the number of valid pixels whose probability is NaN. With
    `spec.keep_probability` the third tensor holds the probabilities in 255ths, `uint8 (n, h, w)`.
    """
    building = (probability >= np.float32(spec.threshold).item()) & valid
    per_pixel = building, to_units(probability, valid), valid, probability.isnan() & valid
    figures = [sum_tiles(each, spec.tile_size) for each in per_pixel]
    outputs = pack(building, spec.tile_size), torch.stack(figures, dim=1)
    if not spec.keep_probability:
        return outputs
    return (*outputs, (probability * 255).masked_fill(~valid, 0.0).round().byte())


def pack(pixels: Tensor, tile_size: int) -> Tensor:
    """Pack `bool (n, h, w)` to bits, `uint8 (n, h, tile columns, bytes)`: each line of a tile as np.packbits does."""
    lines = F.pad(pixels.byte(), (0, -pixels.shape[-1] % tile_size)).unflatten(-1, (-1, tile_size))
    eights = F.pad(lines, (0, -tile_size % 8)).unflatten(-1, (-1, 8))
    places = 128 >> torch.arange(8, dtype=torch.uint8, device=pixels.device)
    packed: Tensor = (eights * places).sum(dim=-1, dtype=torch.uint8)
    return packed


def to_units(probability: Tensor, valid: Tensor) -> Tensor:
    """Convert probabilities to SUM_UNIT, `int64`. Invalid pixels and NaN give 0."""
    return (probability.masked_fill(~valid, 0.0) / SUM_UNIT).round().nan_to_num().long()


def sum_tiles(numbers: Tensor, tile_size: int) -> Tensor:
    """Sum whole numbers or booleans `(n, h, w)` over each tile, to `int64 (n, tile rows, tile columns)`."""
    height, width = numbers.shape[-2:]
    dtype = torch.int64
    if numbers.dtype == torch.bool:  # many times as fast, and enough for the pixels of a line
        numbers, dtype = numbers.view(torch.uint8), torch.int32
    padded = F.pad(numbers, (0, -width % tile_size, 0, -height % tile_size))
    rows: Tensor = padded.unflatten(-1, (-1, tile_size)).sum(-1, dtype=dtype)
    tiles: Tensor = rows.unflatten(-2, (-1, tile_size)).sum(-2, dtype=torch.int64)
    return tiles
