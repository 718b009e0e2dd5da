"""Figures of a dataset, from what each pair contributes: normalisation, fingerprint, and whether the pairs agree."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grey_levels import Levels, count_levels, distance, normalization_of, shares_of
from seg_core.imagery.scene import Scene
from seg_core.training.dataset import Classes, Sample, is_labelled

SPREAD_PERCENTILE = 95  # of the training images, which Bundle.spread is for


@dataclass(frozen=True)
class Digest:
    """What a decoded pair contributes to the figures of its dataset; small, where the pair is large."""

    uri: str  # of the image
    content: str  # SHA-256 of pixels and label
    num_labelled: int  # pixels
    num_positive: int  # pixels of the positive class
    levels: tuple[tuple[int, ...], ...]  # valid pixels of each band by grey level: see seg_core.grey_levels
    gsd_m: float | None
    label_off_px: float = 0.0  # by how much the label was off before it was warped to the image's grid
    maybe_alpha: int | None = None  # band that is not labelled alpha, but looks like it


def digest(sample: Sample, scene: Scene, positive: int, label_off_px: float = 0.0) -> Digest:
    """Sum up a decoded pair; `positive` is the index of the positive class."""
    content = hashlib.sha256(sample.image.data)
    content.update(sample.label.data)
    levels = count_levels(np.moveaxis(sample.image, -1, 0), sample.label != MISSING)
    return Digest(
        scene.uri,
        content.hexdigest(),
        int(is_labelled(sample.label).sum()),
        int((sample.label == positive).sum()),
        tuple(map(tuple, levels.tolist())),
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
    count = len(first.levels)
    other = next((d for d in digests if len(d.levels) != count), None)
    if other is not None:
        raise SegError(
            f"{other.uri}: {len(other.levels)} bands besides alpha, where {first.uri} has {count}: the images of a "
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
    mean, std = normalization_of(_sum_levels(digests))
    return mean, std


def describe_imagery(digests: Sequence[Digest]) -> dict[str, Any]:
    """Return the fields of a bundle that say what its training images look like: `levels` and `spread`."""
    total = _sum_levels(digests)
    reference, std = shares_of(total), normalization_of(total).std
    apart = [distance(shares_of(np.array(d.levels)), reference, std) for d in digests if d.num_labelled]
    return {"levels": reference, "spread": round(float(np.percentile(apart, SPREAD_PERCENTILE)), 3)}


def _sum_levels(digests: Sequence[Digest]) -> Levels:
    return np.asarray(sum(np.array(d.levels, np.int64) for d in digests))


def fingerprint(classes: Classes, splits: Mapping[str, Sequence[Digest]]) -> str:
    """A hash of a dataset's classes and of what its splits hold, whatever the order and the names of the files."""
    contents = {name: sorted(d.content for d in digests) for name, digests in splits.items()}
    return hashlib.sha256(json.dumps([classes.names, contents], sort_keys=True).encode()).hexdigest()
