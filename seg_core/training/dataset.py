"""Training pairs in the layout of the Massachusetts Buildings dataset: their files, classes and pixels.

    DATA/label_class_dict.csv         name,r,g,b: one line a class, in the order of the class indices
    DATA/train/NAME.tiff              images            (any split: train, val, test, ...)
    DATA/train_labels/NAME.tif        labels: RGB, coloured by class; `.tif` or the image's own suffix

Images are uint8, of any number of bands, the same in all of them. A band that is labelled alpha says which pixels hold
data and is no band of the model: as GDAL labels the fourth of four bands so by default, an infrared band needs another
label (`gdal_edit.py -colorinterp_4 undefined`).

Source: V. Mnih, *Machine Learning for Aerial Image Labeling*, PhD thesis, University of Toronto, 2013.
"""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg_core.chips import MISSING, PIXEL_DTYPE, UNLABELLED
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.headers import read_scene
from seg_core.imagery.labels import AlignedLabel, open_label
from seg_core.imagery.open import SUFFIXES
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import GSD_TOLERANCE, Scene, compare_gsd
from seg_core.training.class_names import is_building

ROWS = 512  # of a label that are decoded at once

Image = NDArray[np.uint8]  # (height, width, bands)
Label = NDArray[np.uint8]  # (height, width), class indices, UNLABELLED and MISSING


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset and the colours that stand for them in its labels."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    wanted: str = ""  # name of the positive class; empty: the class whose name begins with "building"

    @property
    def greys(self) -> list[int]:
        """Values that are the colour of a class in a label of one band."""
        return [red for red, green, blue in self.colours if red == green == blue]

    @property
    def positive(self) -> int:
        """Index of the positive class, which a model finds and is scored on; each other class counts as background.

        Raises SegError where the dataset lacks the class that is wanted, or none is wanted and the names do not tell.
        """
        names = ", ".join(self.names)
        if self.wanted:
            if self.wanted not in self.names:
                raise SegError(f"--class {self.wanted}: the dataset has no such class: its classes are {names}")
            return self.names.index(self.wanted)
        buildings = [i for i, name in enumerate(self.names) if is_building(name)]
        if len(buildings) == 1:
            return buildings[0]
        number = "several names begin" if buildings else "no name begins"
        raise SegError(f"classes {names}: {number} with building: choose one with --class, such as --class {self._any}")

    @property
    def _any(self) -> str:
        """The name of a class, not the background where there is another."""
        return next((name for name in self.names if not name.lower().startswith("background")), self.names[0])


@dataclass(frozen=True)
class Pair:
    """Paths of an image and its label."""

    image: str
    label: str


class Sample(NamedTuple):
    """A decoded pair."""

    image: Image
    label: Label


def read_classes(data: str, wanted: str = "") -> Classes:
    """Read `label_class_dict.csv` of a dataset; `wanted` is the name of the positive class (see Classes).

    Raises SegError where the file is absent or not of that form.
    """
    path = Path(data, "label_class_dict.csv")
    if not path.is_file():
        raise SegError(f"{path}: no such file: a dataset names its classes and their colours there (name,r,g,b)")
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", skipinitialspace=True, keep_default_na=False, dtype=str)
        table = table.rename(columns=str.strip).map(str.strip)
        colours = [(_whole(r), _whole(g), _whole(b)) for r, g, b in table[["r", "g", "b"]].to_numpy()]
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
    return Classes(tuple(table["name"]), tuple(colours), wanted)


def _whole(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(value)


def find_pairs(data: str, split: str) -> list[Pair]:
    """Pairs of one split, by name. Hidden files are left out, such as those that macOS puts beside others.

    Raises SegError where there are none, where an image has no label, or where two images would have the same one.
    """
    folder, labels = Path(data, split), Path(data, f"{split}_labels")
    for needed in (folder, labels):
        if not needed.is_dir():
            raise SegError(f"{needed}: no such folder: a dataset has {split}/ and {split}_labels/ side by side")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not images:
        raise SegError(f"{folder}: no images in this folder (looked for {', '.join(SUFFIXES)})")
    for one, other in pairwise(sorted(images, key=lambda image: image.stem)):
        if one.stem == other.stem:
            raise SegError(f"{one}: {other.name} beside it has the same label: leave one of the two in {split}/")
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
    """Decode a pair: the image with its label as class indices, its header, and by how much the label is off.

    The label is MISSING where the image holds no data, and UNLABELLED where the image alone does.
    The label is warped to the image's grid where it lies on another: off by so many px, as AlignedLabel has it. Raises
    SegError where they don't overlap, the image is not uint8, or a colour stands for no class.
    """
    scene = read_header(pair)
    label = open_label(pair.label, scene, classes.greys)
    pixels, valid = read_chip(scene, scene.window)
    found = read_label(label, scene.window, classes, valid)
    label.check_labelled(int(valid.sum()), int((found != MISSING).sum()))
    found = np.where(valid & (found == MISSING), np.uint8(UNLABELLED), found)
    return Sample(np.ascontiguousarray(pixels.transpose(1, 2, 0)), found), scene, label.off_px


def is_labelled(label: Label) -> NDArray[np.bool_]:
    """Return which pixels have a class."""
    return np.asarray(label < UNLABELLED)


def read_header(pair: Pair) -> Scene:
    """Read the header of a pair's image. Raises SegError for one that can't be trained on."""
    scene = read_scene(pair.image, os.path.basename(pair.image))
    check_trainable(scene)
    return scene


def check_trainable(scene: Scene) -> None:
    """Raise SegError for an image that can't be trained on: not uint8 of 8 bits, without bands, or of oblong pixels."""
    if scene.dtype != PIXEL_DTYPE:
        raise SegError(
            f"{scene.uri}: its pixels are {scene.dtype}: a dataset's are {PIXEL_DTYPE} (gdal_translate -ot Byte -scale)"
        )
    if scene.bits is not None:
        raise SegError(
            f"{scene.uri}: its pixels have {scene.bits} bits: a dataset's have 8 "
            f"(gdal_translate -ot Byte -scale 0 {2**scene.bits - 1} 0 255)"
        )
    if not scene.bands:
        raise SegError(f"{scene.uri}: it has no band besides alpha: remove it, or relabel the band (gdal_edit.py)")
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
