"""Losses are those of segmentation-models-pytorch and torch, and pixels without data have no part in them."""

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss, SoftBCEWithLogitsLoss
from torch import Tensor

from seg_core.losses import LOSSES, MISSING, bce_dice, cross_entropy, dice


def random_batch(classes: int, *, seed: int = 0, missing: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits of `classes` channels, and labels of as many classes (two for one channel) with missing pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, classes, 12, 17, generator=generator)
    labels = torch.randint(0, max(classes, 2), (3, 12, 17), generator=generator).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < missing] = MISSING
    return logits, labels


def gradient(loss: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a loss."""
    logits = logits.clone().requires_grad_()
    value = LOSSES[loss](logits, labels)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


every_loss = pytest.mark.parametrize("loss", LOSSES)
one_logit_or_more = pytest.mark.parametrize("classes", [1, 2, 4])


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_dice_of_one_logit_is_that_of_smp(missing: float, seed: int) -> None:
    logits, labels = random_batch(1, seed=seed, missing=missing)
    expected = DiceLoss("binary", from_logits=True, ignore_index=MISSING)(logits, labels.unsqueeze(1).long())
    torch.testing.assert_close(dice(logits, labels), expected)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_dice_of_several_logits_is_that_of_smp(classes: int, missing: float) -> None:
    logits, labels = random_batch(classes, missing=missing)
    expected = DiceLoss("multiclass", from_logits=True, ignore_index=MISSING)(logits, labels.long())
    torch.testing.assert_close(dice(logits, labels), expected)


def test_dice_of_a_batch_that_lacks_a_class_is_that_of_smp() -> None:
    logits, labels = random_batch(4)
    labels[labels == 2] = 1
    expected = DiceLoss("multiclass", from_logits=True, ignore_index=MISSING)(logits, labels.long())
    torch.testing.assert_close(dice(logits, labels), expected)


def test_dice_without_any_building_is_zero() -> None:
    logits, labels = random_batch(1)
    labels[labels == 1] = 0
    value, slope = gradient("dice", logits, labels)
    assert value == 0
    assert not slope.any()


def test_cross_entropy_of_one_logit_is_that_of_smp() -> None:
    logits, labels = random_batch(1, missing=0.0)
    expected = SoftBCEWithLogitsLoss()(logits, labels.unsqueeze(1).float())
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_cross_entropy_of_one_logit_is_the_mean_over_valid_pixels_alone() -> None:
    logits, labels = random_batch(1)
    # smp masks missing pixels too, but would divide by the number of all pixels.
    total = SoftBCEWithLogitsLoss(ignore_index=MISSING, reduction="sum")(logits, labels.unsqueeze(1).float())
    torch.testing.assert_close(cross_entropy(logits, labels), total / (labels != MISSING).sum())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_cross_entropy_of_several_logits_is_that_of_torch(classes: int, missing: float) -> None:
    logits, labels = random_batch(classes, missing=missing)
    expected = F.cross_entropy(logits, labels.long(), ignore_index=MISSING)
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


@one_logit_or_more
def test_bce_dice_is_the_sum_of_both(classes: int) -> None:
    logits, labels = random_batch(classes)
    torch.testing.assert_close(bce_dice(logits, labels), cross_entropy(logits, labels) + dice(logits, labels))


@every_loss
@one_logit_or_more
def test_logits_of_missing_pixels_change_neither_loss_nor_gradient(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    missing = (labels == MISSING).unsqueeze(1).expand_as(logits)
    changed = torch.where(missing, 30 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)), logits)
    value, slope = gradient(loss, logits, labels)
    value_changed, slope_changed = gradient(loss, changed, labels)
    assert value > 0
    assert torch.equal(value, value_changed)
    assert torch.equal(slope, slope_changed)
    assert not slope[missing].any()
    assert slope[~missing].any()


@every_loss
@one_logit_or_more
def test_a_batch_without_valid_pixels_gives_zero_and_no_gradient(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    value, slope = gradient(loss, logits, torch.full_like(labels, MISSING))
    assert value == 0
    assert not slope.any()


@every_loss
@one_logit_or_more
def test_a_step_down_the_gradient_lowers_the_loss(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    value, slope = gradient(loss, logits, labels)
    assert LOSSES[loss](logits - 10 * slope, labels) < value


@every_loss
@one_logit_or_more
def test_losses_of_perfect_and_of_opposite_logits_are_their_extremes(loss: str, classes: int) -> None:
    _, labels = random_batch(classes)
    valid = torch.where(labels == MISSING, 0, labels).long()
    truth = valid.unsqueeze(1).float() if classes == 1 else F.one_hot(valid, classes).permute(0, 3, 1, 2).float()
    right = 200 * truth - 100
    assert LOSSES[loss](right, labels) == pytest.approx(0, abs=1e-6)
    assert LOSSES[loss](-right, labels) > 0.9


@every_loss
@one_logit_or_more
def test_losses_of_bfloat16_logits_are_computed_in_float32(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    coarse = logits.bfloat16()
    value = LOSSES[loss](coarse, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[loss](coarse.float(), labels))
