"""Networks whose answer turns with the image, before, while and after they are trained."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerial_seg.training.settings import TrainSettings, make_settings
from aerial_seg.training.worker import make_learner
from seg_core.errors import SegError
from seg_core.model.equivariance import make_equivariant
from seg_core.model.unet import UNet
from seg_core.training.loop import evaluate, step

ORIENTATIONS = [(flipped, turns) for flipped in (False, True) for turns in range(4)]
HEADER: dict[str, Any] = {"bands": 3, "mean": [90.0, 80.0, 70.0], "std": [40.0, 30.0, 20.0], "building": 0}


def turn(image: Tensor, flipped: bool, turns: int) -> Tensor:
    return torch.rot90(image.flip(-1) if flipped else image, turns, (-2, -1))


def largest_difference(network: nn.Module, bands: int = 3) -> float:
    """The largest difference between the answer turned and the answer of the turned image, by its deviation."""
    image = torch.randn(2, bands, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        answer = network.eval()(image)
        found = [(network(turn(image, *each)) - turn(answer, *each)).abs().max().item() for each in ORIENTATIONS]
    return max(found) / answer.std().item()


def randomize_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2.0)


@pytest.mark.parametrize(
    "shape",
    [
        {"width": 16, "depth": 3, "patch": 2},
        {"width": 8, "depth": 2, "patch": 1, "classes": 2},
        {"width": 8, "depth": 1, "patch": 4, "classes": 3, "in_channels": 4},
        {"width": 8, "depth": 0, "patch": 2},
    ],
)
def test_the_answer_turns_with_the_image(shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    network, bands = UNet(**shape), shape.get("in_channels", 3)
    randomize_statistics(network)
    assert largest_difference(network, bands) > 0.1
    make_equivariant(network)
    assert largest_difference(network, bands) < 1e-4


def test_random_weights_stay_as_large_as_they_were() -> None:
    torch.manual_seed(0)
    network = UNet(width=32, depth=2, patch=2)
    before = [weight.std().item() for weight in network.parameters() if weight.ndim == 4]
    make_equivariant(network)
    after = [weight.std().item() for weight in network.parameters() if weight.ndim == 4]
    assert after == pytest.approx(before, rel=0.15)


def learner_of(**changes: Any) -> Any:
    settings = replace(TrainSettings(), width=8, depth=2, crop=32, batch=4, lr=1e-2, precision="float32", **changes)
    torch.manual_seed(0)
    return make_learner(settings, HEADER, UNet(width=8, depth=2, patch=2), torch.device("cpu"), 10, 4)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return images, (images[..., 0] > 128).to(torch.uint8)


def test_it_still_does_after_training() -> None:
    for equivariant in (True, False):
        learner = learner_of(equivariant=equivariant)
        losses = [step(learner, batch(number)).item() for number in range(10)]
        assert losses[-1] < losses[0]
        evaluate(learner, [batch(0)])  # what is validated is what is kept
        assert (largest_difference(learner.kept) < 1e-4) == equivariant


def test_orientations_share_what_is_learnt() -> None:
    """One step on an image moves all weights as one step on the image in all orientations does."""
    images, labels = batch(0)
    weights = []
    for every in (False, True):
        learner = learner_of(equivariant=True, optimizer="adam", schedule="constant", ema=0.0, max_norm=0.0)
        learner.network.eval()  # batch norm would mix the images
        orientations = ORIENTATIONS if every else ORIENTATIONS[:1]
        for each in orientations:
            pixels = turn(images.permute(0, 3, 1, 2), *each).float() / 255
            loss = learner.loss(learner.network(pixels), turn(labels, *each)) / len(orientations)
            loss.backward()
        weights.append([weight.grad.clone() for weight in learner.network.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "smp:Unet/resnet18"}, "equivariant = true: is the U-Net's, and model = smp:Unet/resnet18"),
        ({"width": 12}, "equivariant = true: width = 12: use a multiple of 8"),
        ({"from": "built-in"}, "equivariant = true: is for random weights: leave out --from"),
    ],
)
def test_what_cannot_be_equivariant_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SegError, match=named):
        make_settings("small", None, [{"equivariant": True}, changes])
