"""A training run that begins from a bundle: what it takes over, and what it fits to other data."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg_core.errors import SegError
from seg_core.imagery.scene import GSD_TOLERANCE
from seg_core.model.adapt import Change, adapt_weights
from seg_core.model.bundle import Bundle, find_bundle, read_bundle, read_weights
from seg_core.model.unet import UNet
from seg_core.training.class_names import is_building
from seg_core.training.dataset import Classes, read_classes

from ..terminal import note

OF_UNET = ("width", "depth", "patch")


def read_origin(begin_from: str) -> Bundle | None:
    """Read what `model.json` says of the bundle to begin from; None where training begins from scratch."""
    return read_bundle(find_bundle(begin_from)) if begin_from else None


def settings_of(bundle: Bundle) -> dict[str, Any]:
    """Return the settings that the architecture of a bundle decides."""
    defaults = inspect.signature(UNet).parameters
    is_unet = bundle.architecture["name"] == "unet"
    own = {name: bundle.architecture.get(name, defaults[name].default) for name in OF_UNET} if is_unet else {}
    return {"model": bundle.architecture["name"], **own}


def choose_classes(data: str, wanted: str, origin: Bundle | None) -> Classes:
    """Read a dataset's classes. Where none is wanted, it is the class of the bundle, if the dataset has it."""
    classes = read_classes(data, wanted)
    if not wanted and origin is not None and origin.class_name in classes.names:
        return replace(classes, wanted=origin.class_name)
    return classes


def match_classes(before: Sequence[str], now: Sequence[str]) -> tuple[int | None, ...]:
    """For each class of now, the index of the same class before, or None. All words for buildings are the same."""
    same = {name: i for i, name in enumerate(before)}
    alike = {_plain(name): i for i, name in enumerate(before)}
    return tuple(same.get(name, alike.get(_plain(name))) for name in now)


def _plain(name: str) -> str:
    return "building" if is_building(name) else name.lower()


def read_initial_weights(path: str, origin: Bundle, model: nn.Module, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the weights of the bundle at `path`, fitted to `model`, whose bundle is to have the fields `header`.

    Says what is other than it was. Raises SegError for weights that are not finite, or not of the architecture.
    """
    arrays = read_weights(path, origin)
    odd = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if odd is not None:
        raise SegError(f"{path}: {odd} holds values that are not finite: nothing can be trained from these weights")
    change = Change(
        bands=(origin.bands, header["bands"]),
        outputs=(origin.architecture["classes"], header["architecture"]["classes"]),
        positive=origin.building,
        sources=match_classes(origin.classes, header["classes"]),
    )
    try:
        weights = adapt_weights({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, model, change)
    except SegError as error:
        raise SegError(f"{path}: {error}: it is of another version, or damaged") from None
    for line in describe_change(change, origin.classes, header["classes"]):
        note(line)
    return weights


def describe_change(change: Change, before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Lines on what of the network is other than it was; none where nothing is."""
    lines, (old, new) = [], change.bands
    if new > old:
        lines.append(f"{new} bands, the model had {old}: the first {old} are taken for those, the others begin at 0")
    if new < old:
        number = "1 band" if new == 1 else f"{new} bands"
        lines.append(f"{number}, the model had {old}: the weights of the last {old - new} are added to the others'")
    if change.sources != tuple(range(len(before))):
        fresh = [name for name, source in zip(now, change.sources, strict=True) if source is None]
        begin = f"new, with random weights: {', '.join(fresh)}" if fresh else "each with its weights"
        lines.append(f"classes {', '.join(now)}, the model had {', '.join(before)}: {begin}")
    return lines


def take_over(origin: Bundle, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a bundle that begins from another, from the measured normalisation and GSD of its data.

    The weights know imagery that is normalised as before, so that the mean and deviation stay. Bands that are new have
    their own. The GSD is that of the data, and a line says so where it is another. Threshold and temperature are those
    to begin with.
    """
    known = len(origin.mean)
    fields = {name: (getattr(origin, name) + measured[name][known:])[: len(measured[name])] for name in ("mean", "std")}
    gsd_m = measured["gsd_m"] or origin.gsd_m
    if origin.gsd_m and gsd_m and abs(gsd_m / origin.gsd_m - 1) > GSD_TOLERANCE:
        note(f"the data measures {gsd_m:.3g} m a pixel, the model was trained at {origin.gsd_m:.3g} m: it learns that")
    return {**fields, "gsd_m": gsd_m, "threshold": origin.threshold, "temperature": origin.temperature}
