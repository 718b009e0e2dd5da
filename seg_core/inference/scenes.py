"""Segment what fits into memory, window by window, in this process: a scene, a window of it, or an array."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import Pixels, Valid
from seg_core.grey_levels import Normalization
from seg_core.grid import (
    Window,
    align,
    chip_window,
    expand_reflected_mask,
    expand_reflection,
    intersection,
    reflect_window,
    round_up,
    split,
)
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene
from seg_core.model.segmenter import Segmenter

WINDOW = 1024  # px a side of what is read and inferred at once

Probability = NDArray[np.float32]


def segment_scene(
    segmenter: Segmenter,
    scene: Scene,
    window: Window | None = None,
    scale: tuple[float, float] | None = None,
    normalization: Normalization | None = None,
) -> tuple[Probability, Valid]:
    """Building probability `float32 (height, width)` of a scene or a window within it, and which pixels hold data.

    The values are those of a bulk run, for they are computed on the same grid with the same halo. `scale` names the two
    values of the file that become 0 and 255. Raises ReadError where the file can't be read.
    """
    return _segment(
        segmenter, lambda chip: read_chip(scene, chip, scale), scene.window, window or scene.window, normalization
    )


def segment_pixels(
    segmenter: Segmenter, pixels: Pixels, valid: Valid, normalization: Normalization | None = None
) -> tuple[Probability, Valid]:
    """Building probability `float32 (height, width)` of pixels `uint8 (bands, height, width)`, as of a scene of them.

    `valid` `bool (height, width)` says which hold data.
    """

    def read(chip: Window) -> tuple[Pixels, Valid]:
        box, rows, cols = reflect_window(chip, *valid.shape)
        at = box.slices(whole)
        image = expand_reflection(np.ascontiguousarray(pixels[:, *at]), rows, cols)
        return image, expand_reflected_mask(valid[at], rows, cols)

    whole = Window(0, 0, *valid.shape)
    return _segment(segmenter, read, whole, whole, normalization)


def _segment(
    segmenter: Segmenter,
    read: Callable[[Window], tuple[Pixels, Valid]],
    image: Window,
    wanted: Window,
    normalization: Normalization | None,
) -> tuple[Probability, Valid]:
    """The probabilities of the `wanted` window of an image of which `read` gives chips, and which pixels are valid."""
    halo, stride = segmenter.bundle.halo, segmenter.bundle.stride
    probability = np.zeros((wanted.height, wanted.width), np.float32)
    holds_data = np.zeros(probability.shape, np.bool_)
    for window in split(align(wanted, stride, image), round_up(WINDOW, stride)):
        pixels, valid = read(chip_window(window, halo, stride, segmenter.bundle.min_chip))
        found = segmenter(pixels, valid, halo, window.height, window.width, normalization)
        common = intersection(window, wanted)
        target, source = common.slices(wanted), common.slices(window)
        holds_data[target] = valid[halo : halo + window.height, halo : halo + window.width][source]
        probability[target] = np.where(holds_data[target], found[source], 0)
    return probability, holds_data
