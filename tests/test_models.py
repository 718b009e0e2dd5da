"""Memory of a training step is counted before the step is taken; folding batch norm changes nothing but speed."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seg_core.losses import make_loss
from seg_core.models import build_model, fold_batchnorm, training_bytes_per_px
from seg_core.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = 4  # bytes
SPARE = 5 / 4  # for what both passes hold for a moment


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 3),  # its input
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)), 3 + 8),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1)), 3 + 8),
        # The input, what is normalised, and what the ReLU leaves behind, which the last convolution needs as well.
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1)), 3 + 8 + 8),
        # A pooling keeps its input and, in int64, where in it the maxima were; the next convolution keeps the maxima.
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 1, 1)), 3 + 8 + 8 * 2 / 4 + 8 / 4),
    ],
    ids=["convolution", "relu", "relu in place", "batch norm", "pooling"],
)
def test_memory_of_a_small_network_is_that_counted_by_hand(network: nn.Module, channels: float) -> None:
    assert training_bytes_per_px(network, 3) == int(FLOAT * channels * SPARE)


def kept_in_training(model: nn.Module, side: int) -> float:
    """Bytes a pixel that autograd keeps of a whole training step, the loss's included, each memory counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[Tensor] = []

    def note(saved: Tensor) -> Tensor:
        held.append(saved)  # alive, so that no two have the same place
        return saved

    labels = torch.ones(2, side, side, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        make_loss("bce+dice")(model.train()(torch.zeros(2, 3, side, side)), labels)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for place, size in sizes.items() if place not in own) / (2 * side**2)


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "width": 8, "depth": 3},
        {"name": "unet", "width": 16, "depth": 2, "patch": 2},
        {"name": "smp:Unet/resnet18"},
    ],
    ids=lambda architecture: architecture["name"],
)
def test_a_training_step_keeps_no_more_than_is_planned_for_it(architecture: dict[str, Any]) -> None:
    model = build_model({**architecture, "in_channels": 3, "classes": 1})
    planned = training_bytes_per_px(model, 3)
    kept = kept_in_training(model, 128)
    assert kept <= planned < 1.5 * kept


def test_a_network_of_twice_the_width_takes_twice_the_memory() -> None:
    narrow, wide = (training_bytes_per_px(UNet(width=width, depth=2), 3) for width in (16, 32))
    assert 1.8 * narrow < wide <= 2 * narrow


def test_a_network_of_patches_takes_much_less_memory() -> None:
    plain, patched = (training_bytes_per_px(UNet(width=16, depth=2, patch=patch), 3) for patch in (1, 2))
    assert patched < plain / 3


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_as_it_was(training: bool) -> None:
    model = UNet(width=4, depth=2).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_bytes_per_px(model, 3)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def randomised(model: nn.Module) -> nn.Module:
    """As if trained: batch norms with statistics and weights of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "in_channels": 3, "classes": 1, "width": 8, "depth": 2, "patch": 2},
        {"name": "smp:Unet/resnet18", "in_channels": 3, "classes": 2},
        {"name": "smp:PSPNet/resnet18", "in_channels": 3, "classes": 2},
    ],
    ids=lambda architecture: architecture["name"],
)
@torch.inference_mode()
def test_a_network_with_its_batch_norms_folded_answers_the_same(architecture: dict[str, Any]) -> None:
    model = randomised(build_model(architecture))
    folded = fold_batchnorm(deepcopy(model))
    for module in folded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: pytest.fail("a batch norm was called"))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert expected.std() > 0
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


class Twice(nn.Sequential):
    """What comes before the batch norm is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        before = self[0](x)
        out: Tensor = self[1](before) + before
        return out


class Shared(nn.Sequential):
    """One batch norm after two convolutions."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules, nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[1](self[2](self[1](self[0](x))))
        return out


class Wayward(nn.Sequential):
    """Its way depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[0](x)
        return self[1](out) if x.mean() > 0 else out


class Named(nn.Sequential):
    """It hands its layers what they take by name."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[1](input=self[0](input=x))
        return out


@pytest.mark.parametrize("kind", [Backwards, Twice, Shared, Wayward, Named])
@torch.inference_mode()
def test_a_batch_norm_that_is_not_a_convolution_s_alone_is_left(kind: type[nn.Sequential]) -> None:
    model = randomised(kind(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    folded = fold_batchnorm(deepcopy(model))
    assert isinstance(folded[1], nn.BatchNorm2d)
    for x in (torch.rand(1, 3, 8, 8), -torch.rand(1, 3, 8, 8)):
        assert torch.equal(folded(x), model(x))


class Either(nn.ModuleList):
    """One of two ways, by the input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[int(x.mean() > 0)](x)
        return out


@torch.inference_mode()
def test_ways_that_share_a_convolution_keep_it() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = randomised(Either([nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2)]))
    folded = fold_batchnorm(deepcopy(model))
    for x in (torch.rand(1, 3, 8, 8), -torch.rand(1, 3, 8, 8)):
        torch.testing.assert_close(folded(x), model(x))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 2
