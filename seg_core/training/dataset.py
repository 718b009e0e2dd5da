"""Training pairs in the layout of the Massachusetts Buildings dataset, and the crops that a network learns from.

    DATA/label_class_dict.csv         name,r,g,b: one line a class, in the order of the class indices
    DATA/train/NAME.tiff              images            (any split: train, val, test, ...)
    DATA/train_labels/NAME.tif        labels: RGB, coloured by class; `.tif` or the image's own suffix

Source: V. Mnih, *Machine Learning for Aerial Image Labeling*, PhD thesis, University of Toronto, 2013.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.environment import environment
from seg_core.errors import SegError
from seg_core.grid import Window, intersection, round_up, split
from seg_core.imagery.labels import AlignedLabel, open_label
from seg_core.imagery.open import SUFFIXES
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import GSD_TOLERANCE, Scene, compare_gsd, read_scene

ROWS = 512  # of a label that are decoded at once
SCALE = 1.25  # strong augmentation enlarges or shrinks by up to this factor
MAX_TURN = 30.0  # and turns by up to so many degrees, beyond the quarter turns

Image = NDArray[np.uint8]  # (height, width, bands)
Label = NDArray[np.uint8]  # (height, width), class indices and MISSING


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset and the colours that stand for them in its labels."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    @property
    def greys(self) -> list[int]:
        """Values that are the colour of a class in a label of one band."""
        return [red for red, green, blue in self.colours if red == green == blue]

    @property
    def building(self) -> int:
        """Index of the class that is scored. Raises SegError where it can't be told."""
        named = [i for i, name in enumerate(self.names) if name.lower().startswith("building")]
        if len(named) == 1:
            return named[0]
        raise SegError(f"classes {', '.join(self.names)}: one of them, and only one, must be named building")


@dataclass(frozen=True)
class Pair:
    """Paths of an image and its label."""

    image: str
    label: str


class Sample(NamedTuple):
    """A decoded pair."""

    image: Image
    label: Label


def read_classes(data: str) -> Classes:
    """Read `label_class_dict.csv` of a dataset. Raises SegError where it is absent or not of that form."""
    path = Path(data, "label_class_dict.csv")
    if not path.is_file():
        raise SegError(f"{path}: no such file: a dataset names its classes and their colours there (name,r,g,b)")
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", skipinitialspace=True, keep_default_na=False)
        colours = [(int(r), int(g), int(b)) for r, g, b in table[["r", "g", "b"]].to_numpy()]
    except (KeyError, ValueError) as error:
        raise SegError(f"{path}: no table of classes with the header name,r,g,b: {error}") from error
    if list(table.columns) != ["name", "r", "g", "b"] or not 2 <= len(table) < MISSING:
        raise SegError(f"{path}: expected the header name,r,g,b and 2 to {MISSING - 1} classes")
    for what, values in (("name", list(table["name"])), ("colour", colours)):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise SegError(f"{path}: two classes have the same {what}, {twice}")
    if not all(0 <= value <= 255 for colour in colours for value in colour):
        raise SegError(f"{path}: a colour is three numbers from 0 to 255")
    return Classes(tuple(map(str, table["name"])), tuple(colours))


def find_pairs(data: str, split: str) -> list[Pair]:
    """Pairs of one split, by name. Raises SegError where there are none, or an image has no label."""
    folder, labels = Path(data, split), Path(data, f"{split}_labels")
    for needed in (folder, labels):
        if not needed.is_dir():
            raise SegError(f"{needed}: no such folder: a dataset has {split}/ and {split}_labels/ side by side")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not images:
        raise SegError(f"{folder}: no images in this folder (looked for {', '.join(SUFFIXES)})")
    found = {image: _label_of(image, labels) for image in images}
    missing = [image.name for image, label in found.items() if label is None]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise SegError(
            f"{labels}: lacks the labels of {len(missing)} of {len(images)} images: {', '.join(missing[:10])}{more} "
            f"(a label has its image's name, or that with .tif)"
        )
    return [Pair(str(image), str(label)) for image, label in found.items()]


def _label_of(image: Path, labels: Path) -> Path | None:
    names = (f"{image.stem}{suffix}" for suffix in (".tif", image.suffix, *SUFFIXES))
    return next((labels / name for name in names if (labels / name).is_file()), None)


def read_pair(pair: Pair, classes: Classes) -> tuple[Sample, Scene, float]:
    """Decode a pair: the image with its label as class indices (MISSING where one of them holds no data), its header.

    The label is warped to the image's grid where it lies on another: off by so many px, as AlignedLabel has it. Raises
    SegError where they don't overlap, the image is not uint8, or a colour stands for no class.
    """
    scene = read_scene(pair.image, os.path.basename(pair.image))
    _check_image(scene)
    label = open_label(pair.label, scene, classes.greys)
    pixels, valid = read_chip(scene, scene.window)
    found = read_label(label, scene.window, classes, valid)
    label.check_labelled(int(valid.sum()), int((found != MISSING).sum()))
    return Sample(np.ascontiguousarray(pixels.transpose(1, 2, 0)), found), scene, label.off_px


def _check_image(scene: Scene) -> None:
    """Raise SegError for an image that nothing is learnt from: a model of it would not be served its like."""
    if scene.dtype != "uint8":
        raise SegError(
            f"{scene.uri}: its pixels are {scene.dtype}: a dataset's are uint8 (gdal_translate -ot Byte -scale)"
        )
    if scene.gsd_m is not None:
        off, size = compare_gsd(scene, scene.gsd_m)
        if off > GSD_TOLERANCE:
            raise SegError(f"{scene.uri}: {size} a pixel: a dataset's are square (gdalwarp -t_srs, -tr)")


def read_label(label: AlignedLabel, window: Window, classes: Classes, valid: NDArray[np.bool_]) -> Label:
    """Class indices of a window of an image, `(height, width)`; MISSING where not valid, or the label holds no data.

    A label of one band is read as grey: the value v stands for the colour (v, v, v). Raises SegError for a colour that
    stands for no class.
    """
    pixels, labelled = label.read(window)
    rgb = pixels[:3] if len(pixels) >= 3 else np.broadcast_to(pixels[:1], (3, *valid.shape))
    known, found = labelled & valid, np.empty(valid.shape, np.uint8)
    for top in range(0, len(valid), ROWS):  # a few rows at a time, for it takes many bytes a pixel
        rows = slice(top, top + ROWS)
        corner = window.row_off + top, window.col_off
        found[rows] = _decode_colours(rgb[:, rows], classes, known[rows], label, corner)
    return found


def _decode_colours(
    rgb: NDArray[np.uint8], classes: Classes, valid: NDArray[np.bool_], label: AlignedLabel, corner: tuple[int, int]
) -> Label:
    packed = _pack(rgb[0], rgb[1], rgb[2])
    known = np.array([_pack(*np.array(colour)) for colour in classes.colours])
    order = np.argsort(known)
    nearest = order[np.searchsorted(known, packed, sorter=order).clip(max=len(known) - 1)]
    unknown = (known[nearest] != packed) & valid
    if unknown.any():
        row, col = np.argwhere(unknown)[0]
        colour = ", ".join(str(int(v)) for v in rgb[:, row, col])
        where = f"row {row + corner[0]}, column {col + corner[1]}{' of its image' if label.warped else ''}"
        raise SegError(f"{label.file.uri}: colour ({colour}) at {where} is not in label_class_dict.csv")
    return np.where(valid, nearest, MISSING).astype(np.uint8)


def _pack(r: Any, g: Any, b: Any) -> NDArray[np.int32]:
    return np.asarray(r).astype(np.int32) << 16 | np.asarray(g).astype(np.int32) << 8 | np.asarray(b).astype(np.int32)


@dataclass(frozen=True)
class Digest:
    """What a decoded pair contributes to the figures of its dataset; small, where the pair is large."""

    name: str  # of the image
    content: str  # SHA-256 of pixels and label
    num_valid: int
    num_building: int
    sums: tuple[float, ...]  # over valid pixels, a value a band
    read_blocks: tuple[float, ...]
    gsd_m: float | None
    label_off_px: float = 0.0  # by how much the label was off before it was warped to the image's grid


def digest(sample: Sample, scene: Scene, building: int, label_off_px: float = 0.0) -> Digest:
    """Sum up a decoded pair, in which buildings have that index."""
    content = hashlib.sha256(sample.image.data)
    content.update(sample.label.data)
    sums, read_blocks = np.zeros((2, sample.image.shape[2]))
    for row, label in zip(sample.image, sample.label, strict=True):  # one by one: float64 is eight times as large
        pixels = row[label != MISSING].astype(np.float64)
        sums += pixels.sum(axis=0)
        read_blocks += (pixels**2).sum(axis=0)
    return Digest(
        scene.scene_id,
        content.hexdigest(),
        int((sample.label != MISSING).sum()),
        int((sample.label == building).sum()),
        tuple(sums.tolist()),
        tuple(read_blocks.tolist()),
        scene.gsd_m,
        label_off_px,
    )


def normalisation(digests: Sequence[Digest]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band over all valid pixels, in grey levels."""
    count = sum(d.num_valid for d in digests)
    mean = np.sum([d.sums for d in digests], axis=0) / count
    variance = np.sum([d.read_blocks for d in digests], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # a constant band is no reason to divide by zero
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def fingerprint(classes: Classes, splits: Mapping[str, Sequence[Digest]]) -> str:
    """A hash of a dataset's classes and of what its splits hold, whatever the order and the names of the files."""
    contents = {name: sorted(d.content for d in digests) for name, digests in splits.items()}
    return hashlib.sha256(json.dumps([classes.names, contents], sort_keys=True).encode()).hexdigest()


def choose_crop(rng: np.random.Generator, label: Label, size: int, min_valid: float) -> tuple[int, int]:
    """A random corner (row, column) of a `size` px crop of which at least the share `min_valid` is valid.

    Of 20 tries the first that suffices, or else the best one.
    """
    height, width = label.shape
    corners = [(int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))) for _ in range(20)]
    best, best_share = corners[0], -1.0
    for row, col in corners:
        share = float((label[row : row + size, col : col + size] != MISSING).mean())
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


def cut(sample: Sample, size: int, halo: int) -> Iterator[Sample]:
    """A sample in windows of `size` px with a halo, whose labels are MISSING: together they score each pixel once."""
    whole = Window(0, 0, *sample.label.shape)
    for window in split(whole, size):
        grown = Window(window.row_off - halo, window.col_off - halo, window.height + 2 * halo, window.width + 2 * halo)
        chip = intersection(grown, whole)
        label = np.full((chip.height, chip.width), MISSING, np.uint8)
        label[window.slices(chip)] = sample.label[window.slices(whole)]
        yield Sample(np.ascontiguousarray(sample.image[chip.slices(whole)]), label)


def augmentation(kind: str, size: int) -> Any:
    """An albumentations pipeline that ends in crops of `size` px; `kind` is `none`, `exposure`, `light` or `strong`.

    `exposure`: brightness and contrast. `light`: further, flips and quarter turns. `strong`: further, for half of the
    crops, scale and rotation, for which it takes a source of `source_size` px, and gamma, hue, saturation and a shift
    of each band.
    """
    with environment({"NO_ALBUMENTATIONS_UPDATE": "1"}):  # it asks the package index at import otherwise
        import albumentations as alb

    steps = []
    if kind == "strong":
        warp = alb.Affine(
            scale=(1 / SCALE, SCALE), keep_ratio=True, rotate=(-MAX_TURN, MAX_TURN), fill_mask=MISSING, p=0.5
        )
        steps += [warp, alb.CenterCrop(size, size)]
    if kind in {"light", "strong"}:
        steps += [alb.D4(p=1)]
    if kind != "none":
        steps += [alb.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5)]
    if kind == "strong":
        steps += [alb.RandomGamma((75, 135), p=0.5), alb.HueSaturationValue(8, 25, 0, p=0.5), alb.RGBShift(p=0.5)]
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
        return augmentation(self.augment, self.size)

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
