"""Weights of a U-Net with which a flipped or turned image has the flipped or turned answer.

The channels of each layer are groups of eight, one for each orientation of a square: four quarter turns, and those of
its mirror image. The kernel of one orientation is that of another one, turned. Such networks are group-equivariant:
Cohen & Welling 2016 (arXiv:1602.07576). They learn a building once, not eight times.

The network stays an ordinary U-Net, which is stored and run as any other: only its weights are alike. So they are while
it is trained, too, if its gradients are averaged over the orientations, because optimizers treat equal weights equally.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

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
            mean = _average_channels(module.running_mean)
            square = _average_channels(module.running_var + module.running_mean**2)
            module.running_mean.copy_(mean)
            module.running_var.copy_(square - mean**2)


def _averages(network: UNet) -> Iterator[tuple[Tensor, Average]]:
    """Yield each parameter of a network, with the function that averages a tensor of its kind over the orientations."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    for module in network.modules():
        averages: tuple[Average, Average]
        if module is first:
            averages = partial(_average_first, patch=network.patch), _average_channels
        elif module is network.head:
            averages = partial(_average_last, patch=network.patch), partial(_average_last_bias, patch=network.patch)
        elif isinstance(module, nn.ConvTranspose2d):
            averages = _average_transposed, _average_channels
        elif isinstance(module, nn.Conv2d):
            averages = _average_kernels, _average_channels
        elif isinstance(module, nn.BatchNorm2d):
            averages = _average_channels, _average_channels
        else:
            continue
        for parameter, average in zip((module.weight, module.bias), averages, strict=True):
            if isinstance(parameter, Tensor):
                yield parameter, average


def _average_channels(values: Tensor) -> Tensor:
    """Average a value for each channel `(channels,)` over the orientations."""
    return _average(values.reshape(-1, ORIENTATIONS, 1, 1)).reshape(values.shape)


def _average_kernels(weight: Tensor) -> Tensor:
    """Average the weights `(out, in, k, k)` of a convolution between two layers of orientations."""
    kernels = weight.unflatten(1, (-1, ORIENTATIONS)).unflatten(0, (-1, ORIENTATIONS)).transpose(1, 2)
    return _average(kernels, num_axes=2).transpose(1, 2).reshape(weight.shape)


def _average_transposed(weight: Tensor) -> Tensor:
    return _average_kernels(weight.transpose(0, 1)).transpose(0, 1)


def _average_first(weight: Tensor, patch: int) -> Tensor:
    """Average the weights `(out, bands * patch**2, k, k)` of a convolution of an image, as a kernel of its pixels."""
    kernels = pixel_shuffle(weight, patch).unflatten(0, (-1, ORIENTATIONS)).transpose(1, 2)
    return pixel_unshuffle(_average(kernels).transpose(1, 2).flatten(0, 1), patch)


def _average_last(weight: Tensor, patch: int) -> Tensor:
    """Average the weights `(classes * patch**2, in, 1, 1)` of the head, as a kernel of the pixels of its answer."""
    kernels = pixel_shuffle(weight.transpose(0, 1), patch).unflatten(0, (-1, ORIENTATIONS)).transpose(1, 2)
    return pixel_unshuffle(_average(kernels).transpose(1, 2).flatten(0, 1), patch).transpose(0, 1)


def _average_last_bias(bias: Tensor, patch: int) -> Tensor:
    return _average(bias.reshape(-1, patch, patch), num_axes=0).reshape(bias.shape)


def _average(values: Tensor, num_axes: int = 1) -> Tensor:
    """Average over the orientations; the last dimensions are `num_axes` of orientations, then square pixels."""
    members, orbit = _orbits(num_axes, values.shape[-1], values.device)
    flat = values.flatten(-num_axes - 2).movedim(-1, 0).contiguous()  # whole rows are picked faster than numbers
    return flat[members].mean(dim=1)[orbit].movedim(0, -1).reshape(values.shape)


@cache
def _orbits(num_axes: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which positions change places as an image turns, `(orbits, 8)`, and the orbit of each position.

    Positions are counted through all axes of orientations and pixels.
    """
    positions = torch.arange(ORIENTATIONS**num_axes * side**2).reshape(*[ORIENTATIONS] * num_axes, side, side)
    turned = torch.stack([_turn_all(positions, turn, num_axes).flatten() for turn in range(ORIENTATIONS)])
    first, orbit = turned.amin(dim=0).unique(return_inverse=True)
    return turned[:, first].T.to(device), orbit.to(device)


def _turn_all(values: Tensor, orientation: int, num_axes: int) -> Tensor:
    """Turn pixels, and give each orientation the values of the one that comes to it."""
    origins = torch.tensor([_product(_inverse(orientation), of) for of in range(ORIENTATIONS)])
    for axis in range(num_axes):
        values = values.index_select(axis, origins)
    flipped = values.flip(-1) if orientation >= 4 else values
    return torch.rot90(flipped, orientation % 4, (-2, -1))


def _product(one: int, other: int) -> int:
    """Return the orientation after turning by `other`, then by `one`."""
    quarters = one % 4 + (-other if one >= 4 else other) % 4
    return quarters % 4 + 4 * ((one >= 4) != (other >= 4))


def _inverse(orientation: int) -> int:
    """Return the orientation that undoes one. A flip undoes itself."""
    return orientation if orientation >= 4 else -orientation % 4
