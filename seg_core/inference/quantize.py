"""Give a bundle an int8 network, quantised on crops of imagery."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg_core.chips import Valid
from seg_core.errors import ReadError, SegError
from seg_core.grid import chip_window, round_up
from seg_core.imagery.raster import read_image
from seg_core.model.bundle import Bundle, read_bundle, read_weights, write_bundle
from seg_core.model.engines import TRACED_SIDE
from seg_core.model.loading import load_model
from seg_core.model.networks import class_probability, fold_batchnorm, normalise
from seg_core.model.openvino_network import OpenVinoNetwork, read_model
from seg_core.model.quantize import import_nncf, quantize_network
from seg_core.model.quantized import QuantizedNetwork
from seg_core.run.normalization import draw_blocks, frames_of
from seg_core.run.plan import Plan
from seg_core.storage.files import exists

Crop = tuple[NDArray[np.float32], Valid]  # a normalised image `(1, bands, height, width)`, and its valid pixels


class Quantization(NamedTuple):
    """A bundle with an int8 network, and how well that agrees with the network in float32."""

    bundle: Bundle
    crops: int  # on which ranges were measured
    differing: float  # share of the valid pixels of these crops that have another answer in int8


def quantize_bundle(
    path: str, plan: Plan, out: str, number: int, report: Callable[[str], None] = lambda _: None
) -> Quantization:
    """Write the bundle at `path` to `out` with an int8 network.

    `number` crops are drawn from the scenes of a plan with a fixed seed. `report` is called with a text for each step.
    Raises SegError if there is something at `out`, if no crop can be read, or if NNCF is not installed.
    """
    if exists(out):
        raise SegError(f"{out}: already exists: choose another name for the bundle")
    import_nncf()
    bundle = read_bundle(path)
    weights = read_weights(path, bundle)
    model = fold_batchnorm(load_model(bundle, weights))
    crops = list(_read_crops(plan, bundle, number, report))
    if not crops:
        raise SegError(f"{plan.scenes[0].uri}: no crop of the scenes holds data: name others")
    report("measuring the ranges of values")
    quantized = quantize_network(model, [image for image, _ in crops], round_up(TRACED_SIDE, bundle.stride))
    report("comparing with float32")
    differing = _compare(model, quantized, bundle, crops)
    return Quantization(write_bundle(out, bundle, weights, quantized), len(crops), differing)


def _read_crops(plan: Plan, bundle: Bundle, number: int, report: Callable[[str], None]) -> Iterator[Crop]:
    """Yield crops, and which of their pixels are valid. Their sides are those of chips without a halo.

    Those that can't be read or hold no data are left out.
    """
    blocks = draw_blocks(frames_of(plan, plan.images), number, plan.settings.scale)
    for count, block in enumerate(blocks, 1):
        report(f"reading {count} of {len(blocks)} crops")
        # No smaller than the chips of a run, so that at an edge there is more than a strip.
        window = chip_window(block.window, 0, bundle.stride, bundle.min_chip)
        try:
            pixels, valid = read_image(block.frame.image, block.frame.pieces, window, block.scale)
        except ReadError:
            continue
        normalization = block.frame.image.normalization or plan.settings.normalization or bundle.normalization
        if valid.any():
            image = normalise(torch.from_numpy(pixels)[None], torch.from_numpy(valid)[None], *normalization)
            yield image.numpy(), valid


@torch.inference_mode()
def _compare(model: nn.Module, quantized: QuantizedNetwork, bundle: Bundle, crops: Sequence[Crop]) -> float:
    """Return the share of valid pixels that are on another side of the threshold in int8."""
    int8, differing, total = OpenVinoNetwork(read_model(quantized), "int8"), 0, 0
    for image, valid in crops:
        one, other = (
            (class_probability(network(torch.from_numpy(image)), bundle.building) >= bundle.threshold)[0].numpy()
            for network in (model, int8)
        )
        differing += int(np.count_nonzero((one != other) & valid))
        total += int(np.count_nonzero(valid))
    return differing / total
