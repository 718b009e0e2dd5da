"""From a bundle to the building probability of chips."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seg_core.bundle import Bundle, Weights, read_bundle, read_weights
from seg_core.errors import SegError
from seg_core.models import build_model, class_probability, fold_batchnorm, normalise

# The eight symmetries of a square: quarter turns, with and without a flip before. The first is the image as it is.
VIEWS = [(turns, flip) for flip in (False, True) for turns in range(4)]


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
    """The network of a bundle with its weights, ready for inference. Raises SegError where they don't fit."""
    model = build_model(bundle.architecture)
    try:
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    except RuntimeError as error:
        raise SegError(f"the weights are not those of {bundle.architecture}: {error}") from error
    return model.eval()


class Segmenter:
    """A model on a device.

    The precision `auto` is bfloat16 on a GPU and float32 on a CPU. There float32 is `exact`: a pixel's probability is
    the same to the last bit however the scene was cut. That takes channels first: for channels last, twice as fast,
    oneDNN has routines that add up in an order that depends on the chip's size, where its direct convolution (taken for
    channels first and two threads or more) does not. bfloat16 goes without, and is three times as fast on processors
    that have it (AVX-512 BF16, AMX).
    """

    def __init__(self, path: str, device: str = "auto", tta: bool = False, precision: str = "auto") -> None:
        """Load the bundle at `path`. With `tta` (test-time augmentation) a probability is the mean of eight views."""
        self.bundle = read_bundle(path)
        self.device = choose_device(device)
        model = fold_batchnorm(load_model(self.bundle, read_weights(path, self.bundle)))
        on_gpu = self.device.type == "cuda"
        self.bfloat16 = precision == "bfloat16" or (precision == "auto" and on_gpu)
        self.exact = not (on_gpu or self.bfloat16)
        self.views = VIEWS if tta else VIEWS[:1]
        self.layout = torch.contiguous_format if self.exact else torch.channels_last
        self.model = model.to(self.device).to(memory_format=self.layout)

    @torch.inference_mode()
    def __call__(
        self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_], halo: int, height: int, width: int
    ) -> NDArray[np.float32]:
        """Building probability `float32 (height, width)` of a chip's window.

        The chip is `uint8 (bands, h, w)` with `valid` `bool (h, w)`; the window begins `halo` px from its corner.
        """
        if not valid.any():
            return np.zeros((height, width), np.float32)
        x = torch.from_numpy(pixels).to(self.device).unsqueeze(0)
        mask = torch.from_numpy(valid).to(self.device).unsqueeze(0)
        x = normalise(x, mask, self.bundle.mean, self.bundle.std)
        inside = (..., slice(halo, halo + height), slice(halo, halo + width))
        each = [self._infer(x, turns, flip)[inside] for turns, flip in self.views]
        return np.asarray((sum(each[1:], each[0]) / len(each))[0].cpu().numpy())

    def free_memory(self) -> None:
        """Give back what the device keeps for later, after it has run out of memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _infer(self, x: Tensor, turns: int, flip: bool) -> Tensor:
        """Probability of building `(n, h, w)`, of the input seen after quarter turns and perhaps a flip."""
        seen = torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1)).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(seen)
        probability = torch.rot90(class_probability(logits, self.bundle.building), -turns, (-2, -1))
        return probability.flip(-1) if flip else probability
