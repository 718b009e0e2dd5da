"""The int8 network of a bundle: OpenVINO's model in two files beside the weights.

`int8.xml` holds the operations with the ranges of their values, and `int8.bin` the weights. Reading them runs no code.
"""

from dataclasses import dataclass

from seg_core.errors import SegError
from seg_core.storage.files import read_bytes, sha256

FILES = MODEL, WEIGHTS = "int8.xml", "int8.bin"


@dataclass(frozen=True)
class QuantizedNetwork:
    """The content of the two files."""

    model: bytes
    weights: bytes

    @property
    def sha256(self) -> str:
        """Hash of both, hexadecimal."""
        return sha256((sha256(self.model) + sha256(self.weights)).encode())

    def files(self) -> dict[str, bytes]:
        """Return the content of each file by its name."""
        return {MODEL: self.model, WEIGHTS: self.weights}


def read_quantized(path: str, expected: str) -> QuantizedNetwork:
    """Read the int8 network of the bundle at `path`, and check it against the hash that the bundle states.

    Raises SegError if it is missing or damaged.
    """
    found = [read_bytes(f"{path}/{name}") for name in FILES]
    model, weights = (content or b"" for content in found)
    network = QuantizedNetwork(model, weights)
    if None in found or network.sha256 != expected:
        raise SegError(f"{path}: damaged: {MODEL} and {WEIGHTS} are not what the bundle was written with")
    return network
