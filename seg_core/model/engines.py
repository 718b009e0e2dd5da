"""Run a bundle's network in the engine that suits the device: torch on a GPU, OpenVINO on a CPU.

OpenVINO is two to three times as fast as torch on the same processor, in the same precision. It is not used where
results must be exact, nor where torch.compile is asked for. Where it can't take a network, torch does the work.
"""

import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from seg_core.grid import round_up
from seg_core.model.bundle import Bundle, read_weights
from seg_core.model.loading import load_model
from seg_core.model.networks import class_probability, fold_batchnorm, stride_of
from seg_core.model.quantized import read_quantized
from seg_core.processor import choose_precision

if TYPE_CHECKING:
    from seg_core.model.openvino_network import OpenVinoNetwork

TRACED_SIDE = 128  # px, or the next multiple of the stride: small, so that converting takes no time
UNET_SIDE = 64  # px; likewise for a U-Net of ours, which takes any multiple of its stride
MAX_DIFFERENCE = 0.02  # of a probability from torch's; rounding in float32 stays far below it

log = logging.getLogger(__name__)


class Network(Protocol):
    """A network in an engine."""

    name: str  # of the engine, with its version

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits `(n, outputs, h, w)` of normalised images, `float32 (n, bands, h, w)`."""


class TorchNetwork:
    """A network in torch: exact if its arrays are channels-first and its precision float32, on a CPU."""

    def __init__(self, model: nn.Module, device: torch.device, *, channels_last: bool, bfloat16: bool) -> None:
        """Move the model to the device. With `bfloat16`, convolutions are computed in it."""
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.bfloat16, self.device = bfloat16, device
        self.model = model.to(device).to(memory_format=self.layout)
        self.name = f"torch {torch.__version__}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            logits: Tensor = self.model(images.contiguous(memory_format=self.layout))
        return logits


def load_network(path: str, bundle: Bundle, device: torch.device, precision: str, *, in_torch: bool = False) -> Network:
    """Load the network of the bundle at `path` for inference.

    `precision` is `exact` (in torch, with float32 and the same bits for any window), `float32`, `bfloat16` or `int8`.
    `in_torch` rules out other engines. Raises SegError if the weights are damaged, or if `int8` is asked for on a GPU
    or of a bundle that has no int8 network.
    """
    on_gpu = device.type == "cuda"
    if precision == "int8":
        return _load_int8(path, bundle, on_gpu)
    model = fold_batchnorm(load_model(bundle, read_weights(path, bundle)))
    if not (on_gpu or in_torch or precision == "exact"):
        try:
            return _convert(model, bundle, precision)
        except Exception as error:  # each operation that OpenVINO does not know fails in its own way
            log.warning("the network runs in torch, which is slower: OpenVINO can't take it: %s", _last_line(error))
    return TorchNetwork(model, device, channels_last=on_gpu or precision != "exact", bfloat16=precision == "bfloat16")


def _load_int8(path: str, bundle: Bundle, on_gpu: bool) -> "OpenVinoNetwork":
    choose_precision("int8", on_gpu)
    bundle.check_precision("int8")
    from seg_core.model.openvino_network import OpenVinoNetwork, read_model

    return OpenVinoNetwork(read_model(read_quantized(path, bundle.int8_sha256)), "int8")


def _convert(model: nn.Module, bundle: Bundle, precision: str) -> "OpenVinoNetwork":
    """Convert a network to OpenVINO. Raises exceptions of any type if it can't be converted, or answers differently."""
    from seg_core.model.openvino_network import OpenVinoNetwork, convert

    stride = stride_of(model)
    side = round_up(UNET_SIDE if bundle.architecture["name"] == "unet" else TRACED_SIDE, stride)
    converted = convert(model, bundle.bands, side)
    images = torch.randn(2, bundle.bands, side + stride, side, generator=torch.Generator().manual_seed(0))
    network = OpenVinoNetwork(converted, "float32")
    with torch.inference_mode():
        logits = model(images), network(images)
    expected, found = (class_probability(each, bundle.building) for each in logits)
    difference = float((expected - found).abs().max())
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"its probabilities differ by {difference:.3g}")
    return network if precision == "float32" else OpenVinoNetwork(converted, precision)


def _last_line(error: Exception) -> str:
    """Return the last line of an error's text, where OpenVINO says what is wrong, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
