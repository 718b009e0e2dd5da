"""Figures of a dataset, from what each pair contributes: normalisation, fingerprint, and whether the pairs agree."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.imagery.scene import Scene
from seg_core.training.dataset import Classes, Sample


@dataclass(frozen=True)
class Digest:
    """What a decoded pair contributes to the figures of its dataset; small, where the pair is large."""

    uri: str  # of the image
    content: str  # SHA-256 of pixels and label
    num_valid: int
    num_positive: int  # pixels of the positive class
    sums: tuple[float, ...]  # over valid pixels, a value a band
    square_sums: tuple[float, ...]  # of the squared values
    gsd_m: float | None
    label_off_px: float = 0.0  # by how much the label was off before it was warped to the image's grid
    maybe_alpha: int | None = None  # band that is not labelled alpha, but looks like it


def digest(sample: Sample, scene: Scene, positive: int, label_off_px: float = 0.0) -> Digest:
    """Sum up a decoded pair; `positive` is the index of the positive class."""
    content = hashlib.sha256(sample.image.data)
    content.update(sample.label.data)
    sums, square_sums = np.zeros((2, sample.image.shape[2]))
    for row, label in zip(sample.image, sample.label, strict=True):  # one by one: float64 is eight times as large
        pixels = row[label != MISSING].astype(np.float64)
        sums += pixels.sum(axis=0)
        square_sums += (pixels**2).sum(axis=0)
    return Digest(
        scene.uri,
        content.hexdigest(),
        int((sample.label != MISSING).sum()),
        int((sample.label == positive).sum()),
        tuple(sums.tolist()),
        tuple(square_sums.tolist()),
        scene.gsd_m,
        label_off_px,
        scene.maybe_alpha,
    )


def check_bands(digests: Sequence[Digest]) -> None:
    """Raise SegError for images of different numbers of bands, or whose last band is an alpha band without its label.

    A band of one image may look like alpha by chance, as the infrared band of an image that holds no data does; that of
    every image does not.
    """
    first = digests[0]
    count = len(first.sums)
    other = next((d for d in digests if len(d.sums) != count), None)
    if other is not None:
        raise SegError(
            f"{other.uri}: {len(other.sums)} bands besides alpha, where {first.uri} has {count}: the images of a "
            f"dataset have the same bands (gdal_translate -b, or gdal_edit.py -colorinterp_N)"
        )
    if all(d.maybe_alpha for d in digests):
        band = first.maybe_alpha
        others = " ".join(f"-b {i}" for i in range(1, count + 1) if i != band)
        raise SegError(
            f"{first.uri}: band {band} may be alpha, for it holds only 0 and opaque, as in every image: label it "
            f"(gdal_edit.py -colorinterp_{band} alpha), or leave it out (gdal_translate {others})"
        )


def normalisation(digests: Sequence[Digest]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band over all valid pixels, in grey levels."""
    count = sum(d.num_valid for d in digests)
    mean = np.sum([d.sums for d in digests], axis=0) / count
    variance = np.sum([d.square_sums for d in digests], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # a constant band is no reason to divide by zero
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def fingerprint(classes: Classes, splits: Mapping[str, Sequence[Digest]]) -> str:
    """A hash of a dataset's classes and of what its splits hold, whatever the order and the names of the files."""
    contents = {name: sorted(d.content for d in digests) for name, digests in splits.items()}
    return hashlib.sha256(json.dumps([classes.names, contents], sort_keys=True).encode()).hexdigest()
