"""Load the network of a bundle for inference, and choose the device that it runs on."""

import numpy as np
import torch

from seg_core.errors import SegError
from seg_core.model.adapt import divide_logits
from seg_core.model.bundle import Bundle, Weights
from seg_core.model.networks import build_model, check_sizes
from seg_core.processor import choose_precision


def choose_device(name: str) -> torch.device:
    """Return the device of this name: `auto` (a GPU if there is one, else the CPU), `cpu`, `cuda`, ...

    Raises SegError if the name is not that of a device, or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SegError(f"--device {name}: not a device: say auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SegError(f"--device {name}: this machine has no GPU that torch {torch.__version__} can use")
    return device


def choose_precision_on(device: str, precision: str) -> str:
    """Return the precision to compute in on the device of this name. Raises SegError as `choose_device` does."""
    return choose_precision(precision, on_gpu=choose_device(device).type == "cuda")


def load_model(bundle: Bundle, weights: Weights) -> torch.nn.Module:
    """Build the network of a bundle on the CPU, in eval mode and with these weights. Its logits are calibrated.

    Raises SegError if the weights do not fit, or if the network does not accept the sizes of chips.
    """
    model = build_model(bundle.architecture)
    try:
        model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    except RuntimeError as error:
        raise SegError(f"the weights are not those of {bundle.architecture}: {error}") from error
    check_sizes(bundle.architecture["name"], model, bundle.bands)
    if bundle.temperature != 1:
        divide_logits(model, bundle.temperature)
    return model.eval()
