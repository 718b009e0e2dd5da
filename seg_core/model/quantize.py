"""Quantise a network to int8 with NNCF, which measures the ranges of its values on images."""

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from seg_core.environment import environment, log_errors_only
from seg_core.errors import SegError
from seg_core.model.openvino_network import convert, serialize
from seg_core.model.quantized import QuantizedNetwork

NO_STATISTICS = "NNCF_CI"  # with this variable set, NNCF sends no usage statistics


def import_nncf() -> Any:
    """Return the package nncf. Raises SegError if it is not installed."""
    logger_class = logging.getLoggerClass()
    try:
        with environment({NO_STATISTICS: "1"}), log_errors_only("torch.utils.cpp_extension"):
            import nncf
    except ImportError as error:
        raise SegError(f"{error.name} is not installed: pip install 'aerial-seg[int8]'") from error
    finally:
        logging.setLoggerClass(logger_class)  # NNCF leaves its own
    return nncf


def quantize_network(model: nn.Module, images: Sequence[NDArray[np.float32]], side: int) -> QuantizedNetwork:
    """Quantise the weights and the values between the layers of a network in eval mode.

    `images` are normalised, `float32 (1, bands, h, w)`; the ranges of values are measured on them. The network is
    traced with an image of `side` px.
    """
    nncf = import_nncf()
    converted = convert(model, images[0].shape[1], side)
    with redirect_stdout(io.StringIO()), log_errors_only("nncf"):  # it draws bars
        quantized = nncf.quantize(converted, nncf.Dataset(images), subset_size=len(images))
    return serialize(quantized)
