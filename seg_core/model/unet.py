"""The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), with padded convolutions and batch norm.

    x ─▶ DownBlock ─▶ DownBlock ─▶ ... ─▶ bottleneck ─▶ UpBlock ─▶ ... ─▶ 1 x 1 head ─▶ logits
            └── skip ────────────────────────────────────▲

At the default width and depth the blocks have 64, 128, 256, 512 and 1024 channels: 37.0 million parameters.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from seg_core.errors import SegError
from seg_core.grid import round_up


class ConvBlock(nn.Sequential):
    """A 3 x 3 convolution, batch norm and ReLU, repeated `num_convs` times. It keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, num_convs: int = 2) -> None:
        layers: list[nn.Module] = []
        for channels in [in_channels] + [out_channels] * (num_convs - 1):
            # A bias is useless here, because batch norm subtracts it.
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class DownBlock(nn.Module):
    """A ConvBlock, then 2 x 2 max pooling. It returns the pooled tensor, and the skip from before the pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = ConvBlock(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return tensors `(n, out_channels, height / 2, width / 2)` and `(n, out_channels, height, width)`."""
        skip = self.convs(x)
        return self.pool(skip), skip


class UpBlock(nn.Module):
    """A 2 x 2 transposed convolution with unchanged channels, concatenation with the skip, and a ConvBlock."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels, kernel_size=2, stride=2)
        self.convs = ConvBlock(in_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return a tensor `(n, out_channels, height, width)` of the skip's height and width."""
        out: Tensor = self.convs(torch.cat([self.up(x), skip], dim=1))
        return out


class UNet(nn.Module):
    """U-Net: `(n, in_channels, height, width)` to logits `(n, classes, height, width)`.

    `width` is the number of channels of the first block. Each of the `depth` further levels has twice as many. With a
    `patch` above 1, the pixels of each square of `patch` x `patch` px become channels at the input, and pixels again at
    the output, as in Shi et al. 2016 (arXiv:1609.05158). No pixel is lost, and the costliest level, at full resolution,
    is saved.
    """

    def __init__(self, in_channels: int = 3, classes: int = 1, width: int = 64, depth: int = 4, patch: int = 1) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        first = in_channels * patch**2
        self.patch = patch
        self.stride: int = patch * 2**depth
        self.down = nn.ModuleList(DownBlock(i, o) for i, o in pairwise([first, *channels[:-1]]))
        self.bottleneck = ConvBlock(channels[-2] if depth else first, channels[-1])
        self.up = nn.ModuleList(UpBlock(i, o, o) for i, o in pairwise(reversed(channels)))
        self.head = nn.Conv2d(width, classes * patch**2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits. Raises SegError if height or width is not a multiple of the stride."""
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            wanted = f"{round_up(height, self.stride)} x {round_up(width, self.stride)}"
            raise SegError(f"{height} x {width} px: the network's stride is {self.stride}: pad to {wanted}")
        skips = []
        x = pixel_unshuffle(x, self.patch)
        for block in self.down:
            x, skip = block(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(x, skip)
        return pixel_shuffle(self.head(x), self.patch)
