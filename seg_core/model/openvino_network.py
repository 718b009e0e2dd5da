"""A network in OpenVINO, which computes on the CPU. Loaded late: the package is only needed there.

OpenVINO 2026.4 sends usage statistics when it is imported, without a question, except in continuous integration. So
it is imported here alone, as if this were one. `openvino.convert_model` would send them too. So networks are converted
by the front end that it wraps.
"""

import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg_core.environment import environment
from seg_core.model.quantized import QuantizedNetwork

with environment({"CI": "true"}):
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # of what is not in int8
HINT = "INFERENCE_PRECISION_HINT"
# No pinning: several actors of a machine would all be pinned to its first cores.
OPTIONS: Mapping[str, Any] = {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "PERFORMANCE_HINT": "LATENCY"}

log = logging.getLogger(__name__)


@cache
def keep_core() -> openvino.Core:
    """Return the one core of this process, which is never freed.

    OpenVINO's plugin for CPUs gives the thread that loads it another stack for signals, and frees that stack with
    itself. If it is freed in another thread, or after a second core was made, the first thread keeps the address. Its
    next signal with a handler, such as Ctrl-C, then ends the process without a word (seen in OpenVINO 2026.4.1).
    """
    return openvino.Core()


class OpenVinoNetwork:
    """A network in OpenVINO, with as many threads as torch has when it is first called."""

    def __init__(self, model: openvino.Model, precision: str) -> None:
        """Take a model of images of any size. `precision` is a key of PRECISIONS."""
        self.model, self.precision = model, precision
        self.name = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        self.lock = threading.Lock()
        self.request: openvino.InferRequest | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images. Raises RuntimeError if OpenVINO can't compile or run the network."""
        array = images.contiguous().numpy()
        with self.lock:
            self.request = self.request or self._compile()
            self.request.infer([openvino.Tensor(array, shared_memory=True)])
            return torch.from_numpy(np.array(self.request.get_output_tensor(0).data, dtype=np.float32))

    def _compile(self) -> openvino.InferRequest:
        options = {
            **OPTIONS,
            HINT: PRECISIONS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = keep_core().compile_model(self.model, "CPU", options)
        if self.precision == "bfloat16" and compiled.get_property(HINT) != openvino.Type.bf16:
            log.warning("this processor has no instructions for bfloat16: the network computes in float32, and slower")
        return compiled.create_infer_request()


def convert(model: nn.Module, bands: int, side: int) -> openvino.Model:
    """Convert a network in eval mode to a model of images of any number and size.

    It is traced with an image of `side` px. Raises exceptions of any type if it can't be converted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each comparison of sizes, which tracing takes for a constant
        traced = torch.jit.trace(model, torch.zeros(1, bands, side, side), check_trace=False)
        decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
        front_end = FrontEndManager().load_by_framework("pytorch")
        return front_end.convert(front_end.load(decoder))


def read_model(network: QuantizedNetwork) -> openvino.Model:
    """Return the model of a bundle's int8 network."""
    weights = openvino.Tensor(np.frombuffer(network.weights, np.uint8))
    return keep_core().read_model(network.model, weights)


def serialize(model: openvino.Model) -> QuantizedNetwork:
    """Return the content of the files of a model: the same for the same network.

    Operations are named by their place, because their own names count what a process has made before.
    """
    model.set_friendly_name("int8")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "int8.xml")
        openvino.save_model(model, path, compress_to_fp16=False)
        return QuantizedNetwork(Path(path).read_bytes(), Path(path).with_suffix(".bin").read_bytes())
