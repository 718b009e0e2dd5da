"""What is prepared before the workers of a training run start: decoded images, and the fields of the bundle."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import torch
from torch import Tensor, nn

from seg_core.chips import PIXEL_DTYPE
from seg_core.errors import SegError
from seg_core.imagery.labels import describe_warps
from seg_core.model.bundle import Bundle, find_bundle
from seg_core.model.encoders import INSTALLED, INSTALLED_MEAN, INSTALLED_STD, SUFFIX
from seg_core.model.networks import build_model, check_sizes, measure_network, stride_of
from seg_core.storage.files import absolute, read_bytes, sha256
from seg_core.training.dataset import Classes, Pair, Sample, read_pair
from seg_core.training.statistics import Digest, check_bands, describe_imagery, digest, fingerprint, normalisation
from seg_core.version import code_version

from ..terminal import note
from .fine_tuning import read_initial_weights, take_over
from .settings import TrainSettings

WAY_OUT = ": look at its labels and label_class_dict.csv, or name another class with --class"
GSD_SPREAD = 1.1  # images of one training set may differ in resolution by this factor

Decoded = list[tuple["ray.ObjectRef[Sample]", Digest]]


def describe_model(
    settings: TrainSettings, classes: Classes, num_bands: int, origin: Bundle | None
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The fields of the bundle that are known before the pixels are read, and the weights to begin with.

    The weights are None where each worker draws them from the seed. Raises SegError for a network that can't be built,
    or does not take the sizes of the settings, and for weights that can't be had: so no worker fails for lack of them.
    """
    architecture = _describe_architecture(settings, classes, num_bands, origin)
    model = _build_model(settings, architecture)
    stride = stride_of(model)
    for name in ("crop", "pad_multiple"):
        if getattr(settings, name) % stride:
            raise SegError(f"{name} = {getattr(settings, name)}: the model's stride is {stride}: use a multiple of it")
    check_sizes(settings.model, model, num_bands, settings.crop)
    header = {
        "architecture": architecture,
        **asdict(measure_network(model, num_bands)),
        "bands": num_bands,
        "classes": classes.names,
        "building": classes.positive,
    }
    if origin is not None:
        return header, read_initial_weights(find_bundle(settings.begin_from), origin, model, header)
    return header, None if settings.encoder_weights == "none" else model.state_dict()


def _build_model(settings: TrainSettings, architecture: dict[str, Any]) -> nn.Module:
    """Build the network as each worker would from the seed, with the weights of its encoder where they are wanted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return build_model(architecture, None if settings.encoder_weights == "none" else settings.encoder_weights)
        except SegError as error:
            if not settings.begin_from:
                raise
            raise SegError(f"{settings.begin_from}: {error}") from None


def _describe_architecture(
    settings: TrainSettings, classes: Classes, num_bands: int, origin: Bundle | None
) -> dict[str, Any]:
    """What `build_model` takes."""
    outputs = 1 if len(classes.names) == 2 and classes.positive == 1 else len(classes.names)
    fitted: dict[str, Any] = {"name": settings.model, "in_channels": num_bands, "classes": outputs}
    if origin is not None:
        return origin.architecture | fitted
    own = ("width", "depth", "patch") if settings.model == "unet" else ()
    return fitted | {name: getattr(settings, name) for name in own}


def identify_files(settings: TrainSettings, origin: Bundle | None) -> TrainSettings:
    """Settings for the record, in which hashes stand for files: those may move, and change."""
    if origin is not None:
        settings = replace(settings, begin_from=origin.hash)
    path = settings.encoder_weights
    if path.endswith(SUFFIX):
        digest = sha256(read_bytes(absolute(path)) or b"")[:16]
        settings = replace(settings, encoder_weights=f"{os.path.basename(path)} {digest}")
    return settings


def decode(pairs: Sequence[Pair], classes: Classes) -> Decoded:
    """Decode pairs in parallel into Ray's object store, where all workers of a node read the one copy.

    Says which labels were warped to the grids of their images.
    """
    refs: list[Any] = [_decode.remote(pair, classes) for pair in pairs]
    try:
        digests: list[Digest] = ray.get([d for _, d in refs])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SegError):
            raise error.cause from error
        raise
    for line in describe_warps({pair.label: d.label_off_px for pair, d in zip(pairs, digests, strict=True)}):
        note(line)
    return list(zip([sample for sample, _ in refs], digests, strict=True))


@ray.remote(num_returns=2)
def _decode(pair: Pair, classes: Classes) -> tuple[Sample, Digest]:
    sample, scene, off_px = read_pair(pair, classes)
    return sample, digest(sample, scene, classes.positive, off_px)


def describe_data(
    samples: dict[str, Decoded], settings: TrainSettings, classes: Classes, origin: Bundle | None
) -> dict[str, Any]:
    """The fields of the bundle that come from the data. Raises SegError where nothing can be learnt from it.

    Where it begins from another bundle, the normalisation is that bundle's.
    """
    digests = {split: [d for _, d in decoded] for split, decoded in samples.items()}
    check_bands(digests["train"] + digests["val"])
    for split, found in digests.items():
        _check_split(split, found, classes.names[classes.positive])
    known = {d.content: os.path.basename(d.uri) for d in digests["train"]}
    for d in digests["val"]:
        if d.content in known:
            name = os.path.basename(d.uri)
            note(f"{known[d.content]} of train is {name} of val: what is learnt by heart counts as validated")
    gsd_m = _common_gsd(digests["train"] + digests["val"])
    mean, std = normalisation(digests["train"])
    if settings.encoder_weights == INSTALLED:
        mean, std = (INSTALLED_MEAN,) * len(mean), (INSTALLED_STD,) * len(std)
    measured = {"mean": mean, "std": std, "gsd_m": gsd_m}
    return {
        "dtype": PIXEL_DTYPE,
        **(measured if origin is None else take_over(origin, measured)),
        **describe_imagery(digests["train"]),
        "provenance": {
            **({} if origin is None else {"from": origin.hash}),
            "settings": asdict(settings),
            "data_fingerprint": fingerprint(classes, digests),
            "images": {split: len(found) for split, found in digests.items()},
            "code_version": code_version(),
            "torch_version": torch.__version__,
        },
    }


def _check_split(split: str, found: Sequence[Digest], name: str) -> None:
    """Raise SegError for a split without a valid pixel, without the class of this name, or without anything else."""
    labelled, positive = sum(d.num_labelled for d in found), sum(d.num_positive for d in found)
    if not labelled:
        raise SegError(f"split {split}: no image holds a pixel with data and a label")
    if not positive:
        raise SegError(f"split {split}: no label of its {len(found)} images holds a pixel of the class {name}{WAY_OUT}")
    if positive == labelled:
        raise SegError(
            f"split {split}: every labelled pixel of its {len(found)} images is of the class {name}: is the background "
            f"missing (nodata or alpha of the labels)?"
        )


def _common_gsd(digests: Sequence[Digest]) -> float | None:
    known = sorted(d.gsd_m for d in digests if d.gsd_m is not None)
    if not known:
        return None
    if known[-1] > GSD_SPREAD * known[0]:
        raise SegError(f"the images measure {known[0]:.3g} to {known[-1]:.3g} m a pixel: bring them to one")
    return known[len(known) // 2]
