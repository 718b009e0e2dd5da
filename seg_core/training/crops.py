"""Crops that a network learns from: their places, their augmentation, and batches of them; windows to validate on."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from seg_core.chips import MISSING, UNLABELLED
from seg_core.environment import environment
from seg_core.grid import Window, intersection, round_up, split
from seg_core.training.dataset import Label, Sample, is_labelled

SCALE = 1.25  # strong augmentation enlarges or shrinks by up to this factor
MAX_TURN = 30.0  # and turns by up to so many degrees, beyond the quarter turns
MAX_GAIN = 1.25  # colour augmentation multiplies or divides each band by up to this factor


def choose_crop(rng: np.random.Generator, label: Label, size: int, min_valid: float) -> tuple[int, int]:
    """A random corner (row, column) of a `size` px crop of which at least the share `min_valid` is labelled.

    Of 20 tries the first that suffices, or else the best one.
    """
    height, width = label.shape
    corners = [(int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))) for _ in range(20)]
    best, best_share = corners[0], -1.0
    for row, col in corners:
        share = float(is_labelled(label[row : row + size, col : col + size]).mean())
        if share >= min_valid:
            return row, col
        if share > best_share:
            best, best_share = (row, col), share
    return best


def pad(sample: Sample, multiple: int, least: int = 0) -> Sample:
    """Pad at the bottom and right with MISSING pixels to a multiple, and to at least `least` px a side."""
    height, width = sample.label.shape
    below = round_up(max(height, least), multiple) - height
    beside = round_up(max(width, least), multiple) - width
    if not below and not beside:
        return sample
    image = np.pad(sample.image, ((0, below), (0, beside), (0, 0)))
    return Sample(image, np.pad(sample.label, ((0, below), (0, beside)), constant_values=MISSING))


def iter_windows(sample: Sample, size: int, halo: int) -> Iterator[Sample]:
    """A sample in windows of `size` px with a halo that is not labelled: together they score each pixel once."""
    whole = Window(0, 0, *sample.label.shape)
    for window in split(whole, size):
        grown = Window(window.row_off - halo, window.col_off - halo, window.height + 2 * halo, window.width + 2 * halo)
        chip = intersection(grown, whole)
        label = np.where(sample.label[chip.slices(whole)] == MISSING, np.uint8(MISSING), np.uint8(UNLABELLED))
        label[window.slices(chip)] = sample.label[window.slices(whole)]
        yield Sample(np.ascontiguousarray(sample.image[chip.slices(whole)]), label)


def augmentation(kind: str, size: int, num_bands: int = 3) -> Any:
    """An albumentations pipeline that ends in crops of `size` px; `kind` is one of those below.

    `none`: nothing. `exposure`: brightness and contrast. `light`: further, flips and quarter turns. `colour`: further,
    white balance (a factor for each band), gamma, and haze (added light that takes contrast away). `strong`: further,
    hue and saturation, and for half of the crops scale and rotation, for which it takes a source of `source_size` px.
    Hue and saturation are left out unless there are three bands, which are taken for red, green, blue.
    """
    with environment({"NO_ALBUMENTATIONS_UPDATE": "1"}):  # it asks the package index at import otherwise
        import albumentations as alb

    steps = []
    if kind == "strong":
        warp = alb.Affine(
            scale=(1 / SCALE, SCALE), keep_ratio=True, rotate=(-MAX_TURN, MAX_TURN), fill_mask=MISSING, p=0.5
        )
        steps += [warp, alb.CenterCrop(size, size)]
    if kind in {"light", "colour", "strong"}:
        steps += [alb.D4(p=1)]
    if kind != "none":
        steps += [alb.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5)]
    if kind == "strong" and num_bands == 3:
        steps += [alb.HueSaturationValue(8, 25, 0, p=0.5)]
    if kind in {"colour", "strong"}:
        white_balance = alb.MultiplicativeNoise((1 / MAX_GAIN, MAX_GAIN), per_channel=True, p=0.5)
        haze = alb.RandomBrightnessContrast(brightness_limit=(0, 0.25), contrast_limit=(-0.3, 0), p=0.3)
        steps += [white_balance, alb.RandomGamma((75, 135), p=0.5), haze]
    return alb.Compose(steps)


def source_size(kind: str, size: int) -> int:
    """Side of the square from which a crop of `size` px is made: a turned and shrunk one must still fill the crop."""
    if kind != "strong":
        return size
    angle = math.radians(MAX_TURN)
    return size + 2 * math.ceil(size * ((math.cos(angle) + math.sin(angle)) * SCALE - 1) / 2)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Batches of random crops. The same seed, epoch and step give the same batch, however many workers share it."""

    samples: Sequence[Sample]
    size: int  # px a side
    batch: int  # over all workers
    min_valid: float
    augment: str  # see `augmentation`
    seed: int

    def __call__(self, epoch: int, step: int, rank: int, world: int) -> Sample:
        """The share of worker `rank` of a batch: image `(n, size, size, bands)`, label `(n, size, size)`."""
        first, last = (step * self.batch + self.batch * worker // world for worker in (rank, rank + 1))
        crops = [self._crop(epoch, position) for position in range(first, last)]
        return Sample(np.stack([c.image for c in crops]), np.stack([c.label for c in crops]))

    @cached_property
    def _pipeline(self) -> Any:
        return augmentation(self.augment, self.size, self.samples[0].image.shape[2])

    def _crop(self, epoch: int, position: int) -> Sample:
        turn, index = divmod(position, len(self.samples))
        order = np.random.default_rng([self.seed, epoch, turn]).permutation(len(self.samples))
        rng = np.random.default_rng([self.seed, epoch, position, 1])
        sample = pad(self.samples[order[index]], 1, self.size)
        row, col = choose_crop(rng, sample.label, self.size, self.min_valid)
        margin = (source_size(self.augment, self.size) - self.size) // 2
        source = _surroundings(sample, row - margin, col - margin, self.size + 2 * margin)
        # One generator for all transforms: seeds would make them draw the same numbers, each from its own start.
        self._pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        changed = self._pipeline(image=source.image, mask=source.label)
        return Sample(changed["image"], changed["mask"])


def _surroundings(sample: Sample, row: int, col: int, side: int) -> Sample:
    """A square of a sample as a copy of its own, MISSING beyond the image's edges."""
    height, width = sample.label.shape
    inside = np.s_[max(row, 0) : min(row + side, height), max(col, 0) : min(col + side, width)]
    image = np.zeros((side, side, sample.image.shape[2]), np.uint8)
    label = np.full((side, side), MISSING, np.uint8)
    rows, cols = (slice(at.start - start, at.stop - start) for at, start in zip(inside, (row, col), strict=True))
    image[rows, cols], label[rows, cols] = sample.image[inside], sample.label[inside]
    return Sample(image, label)
