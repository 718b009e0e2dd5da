"""A bundle as one file for other programs: ONNX, or torch's exported program.

Both take unnormalised imagery and contain everything that the bundle specifies:

    pixels  uint8   (n, bands, height, width)
    valid   bool    (n, height, width)           ─▶   probability  float32 (n, height, width)

Heights and widths are multiples of the stride. In torch's program they are at least two strides, because torch.export
treats a size of one as a constant. `model.json` is inside the file, as ONNX metadata or as an extra file.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from seg_core.errors import SegError
from seg_core.model.bundle import HEADER, Bundle, describe, read_bundle, read_weights
from seg_core.model.loading import load_model
from seg_core.model.networks import normalise
from seg_core.storage.disk import staged_file
from seg_core.storage.files import make_folder

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}  # by kind


class _ProbabilityNetwork(nn.Module):
    """A network with the bundle's normalisation before it, and the probability of building after it."""

    def __init__(self, network: nn.Module, bundle: Bundle) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std, self.building = bundle.mean, bundle.std, bundle.building

    def forward(self, pixels: Tensor, valid: Tensor) -> Tensor:
        logits: Tensor = self.network(normalise(pixels, valid, self.mean, self.std))
        if logits.shape[1] == 1:
            positive = torch.sigmoid(logits[:, 0])
            return positive if self.building == 1 else 1 - positive
        return torch.softmax(logits, dim=1)[:, self.building]


def export_model(path: str, kind: str, out: str) -> Bundle:
    """Write the bundle at `path` to the file `out`, of a kind in SUFFIXES, and return it.

    Raises SegError if `out` exists, or the packages that ONNX needs are not installed.
    """
    if os.path.exists(out):
        raise SegError(f"{out}: already exists: choose another name with --out")
    if kind == "onnx":
        _check_onnx()
    bundle = read_bundle(path)
    program = _export_program(load_model(bundle, read_weights(path, bundle)), bundle)
    make_folder(os.path.dirname(out))
    header = json.dumps(describe(bundle))
    with staged_file(out, SUFFIXES[kind]) as draft:
        if kind == "onnx":
            _save_onnx(program, header, draft)
        else:
            torch.export.save(program, draft, extra_files={HEADER: header})
    return bundle


def _export_program(network: nn.Module, bundle: Bundle) -> ExportedProgram:
    side = 8 * bundle.stride
    pixels = torch.zeros(2, bundle.bands, side, side + bundle.stride, dtype=torch.uint8)
    valid = torch.ones(2, side, side + bundle.stride, dtype=torch.bool)
    wrapped = _ProbabilityNetwork(network, bundle).eval().requires_grad_(requires_grad=False)
    number, rows, cols = Dim("n", min=1), Dim("rows", min=2), Dim("cols", min=2)
    height, width = bundle.stride * rows, bundle.stride * cols
    shapes: dict[str, Any] = {
        "pixels": {0: number, 2: height, 3: width},
        "valid": {0: number, 1: height, 2: width},
    }
    return torch.export.export(wrapped, (pixels, valid), dynamic_shapes=shapes)


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 - torch's exporter imports it late
    except ImportError as error:
        raise SegError(f"--to onnx: {error.name} is not installed: pip install 'aerial-seg[onnx]'") from error


def _save_onnx(program: ExportedProgram, header: str, path: str) -> None:
    import onnx

    exported = torch.onnx.export(
        program, input_names=["pixels", "valid"], output_names=["probability"], dynamo=True, verbose=False
    )
    assert exported is not None
    model = exported.model_proto
    onnx.helper.set_model_props(model, {HEADER: header})
    onnx.save(model, path)
