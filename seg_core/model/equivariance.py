"""Weights of a U-Net with which a flipped or turned image has the flipped or turned answer.

The channels of each layer are groups of eight, one for each orientation of a square: four quarter turns, and those of
its mirror image. The kernel of one orientation is that of another one, turned. Such networks are group-equivariant:
Cohen & Welling 2016 (arXiv:1602.07576). They learn a building once, not eight times.

The network stays an ordinary U-Net, which is stored and run as any other: only its weights are alike. So they are while
it is trained, too, if its gradients are averaged over the orientations, because optimizers treat equal weights equally.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from seg_core.model.unet import UNet

ORIENTATIONS = 8  # 0 to 3: quarter turns; 4 to 7: flipped first

Average = Callable[[Tensor], Tensor]


def make_equivariant(network: UNet) -> None:
    """Make a network of random weights equivariant, now and while it is trained.

    Its width must be a multiple of ORIENTATIONS.
    """
    for parameter, average in _averages(network):
        is_kernel = parameter.ndim == 4
        with torch.no_grad():  # an average of random numbers is smaller than they are
            parameter.copy_(average(parameter) * (math.sqrt(ORIENTATIONS) if is_kernel else 1.0))
        parameter.register_hook(partial(_average_like, average))
    average_statistics(network)


def _average_like(average: Average, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient).copy_(average(gradient))  # in the memory format that it has


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Average the statistics of batch norm, which differ a little between orientations, as batches do."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            mean = _average_groups(module.running_mean, ORIENTATIONS)
            square = _average_groups(module.running_var + module.running_mean**2, ORIENTATIONS)
            module.running_mean.copy_(mean)
            module.running_var.copy_(square - mean**2)


def _averages(network: UNet) -> Iterator[tuple[Tensor, Average]]:
    """Yield each parameter of a network, with the function that averages a tensor of its kind over the orientations."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    of_group = partial(_average_groups, size=ORIENTATIONS)
    of_patch = partial(_average_groups, size=network.patch**2)
    for module in network.modules():
        averages: tuple[Average, Average]
        if module is first:
            averages = partial(_average_first, patch=network.patch), of_group
        elif module is network.head:
            averages = partial(_average_last, patch=network.patch), of_patch
        elif isinstance(module, nn.ConvTranspose2d):
            averages = _average_transposed, of_group
        elif isinstance(module, nn.Conv2d):
            averages = _average_kernels, of_group
        elif isinstance(module, nn.BatchNorm2d):
            averages = of_group, of_group
        else:
            continue
        for parameter, average in zip((module.weight, module.bias), averages, strict=True):
            if isinstance(parameter, Tensor):
                yield parameter, average


def _average_groups(values: Tensor, size: int) -> Tensor:
    return values.reshape(-1, size).mean(dim=1).repeat_interleave(size)


def _average_kernels(weight: Tensor) -> Tensor:
    """Average the weights `(out, in, k, k)` of a convolution between two layers of orientations."""
    out, inside, k, _ = weight.shape
    kernels = weight.reshape(out // ORIENTATIONS, ORIENTATIONS, inside // ORIENTATIONS, ORIENTATIONS, k, k)
    upright = torch.stack(
        [
            _turn(kernels[:, turn][:, :, [_product(turn, of) for of in range(ORIENTATIONS)]], _inverse(turn))
            for turn in range(ORIENTATIONS)
        ]
    ).mean(dim=0)
    turned = [
        _turn(upright[:, :, [_product(_inverse(turn), of) for of in range(ORIENTATIONS)]], turn)
        for turn in range(ORIENTATIONS)
    ]
    return torch.stack(turned, dim=1).reshape(weight.shape)


def _average_transposed(weight: Tensor) -> Tensor:
    return _average_kernels(weight.transpose(0, 1)).transpose(0, 1)


def _average_first(weight: Tensor, patch: int) -> Tensor:
    """Average the weights `(out, bands * patch**2, k, k)` of a convolution of an image, as a kernel of its pixels."""
    kernels = pixel_shuffle(weight, patch)
    return pixel_unshuffle(_average_turned(kernels.unflatten(0, (-1, ORIENTATIONS)), dim=1).flatten(0, 1), patch)


def _average_last(weight: Tensor, patch: int) -> Tensor:
    """Average the weights `(classes * patch**2, in, 1, 1)` of the head, as a kernel of the pixels of its answer."""
    pixels = pixel_shuffle(weight.transpose(0, 1), patch)
    return pixel_unshuffle(
        _average_turned(pixels.unflatten(0, (-1, ORIENTATIONS)), dim=1).flatten(0, 1), patch
    ).transpose(0, 1)


def _average_turned(kernels: Tensor, dim: int) -> Tensor:
    """Average kernels of the orientations, which are along a dimension."""
    each = kernels.unbind(dim)
    upright = torch.stack([_turn(kernel, _inverse(turn)) for turn, kernel in enumerate(each)]).mean(dim=0)
    return torch.stack([_turn(upright, turn) for turn in range(ORIENTATIONS)], dim)


def _turn(pixels: Tensor, orientation: int) -> Tensor:
    """Bring the last two dimensions into an orientation."""
    flipped = pixels.flip(-1) if orientation >= 4 else pixels
    return torch.rot90(flipped, orientation % 4, (-2, -1))


def _product(one: int, other: int) -> int:
    """Return the orientation after turning by `other`, then by `one`."""
    quarters = one % 4 + (-other if one >= 4 else other) % 4
    return quarters % 4 + 4 * ((one >= 4) != (other >= 4))


def _inverse(orientation: int) -> int:
    """Return the orientation that undoes one. A flip undoes itself."""
    return orientation if orientation >= 4 else -orientation % 4
