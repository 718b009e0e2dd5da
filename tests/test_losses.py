"""Losses are those of segmentation-models-pytorch and torch, and pixels without data have no part in them."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss, SoftBCEWithLogitsLoss
from torch import Tensor

from aerial_seg.training.settings import TrainSettings
from seg_core.training.losses import (
    LOSSES,
    MISSING,
    TERMS,
    cross_entropy,
    dice,
    lovasz,
    make_loss,
    near_border,
    tversky,
)


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
    value = make_loss(loss)(logits, labels)
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


@pytest.mark.parametrize("term", TERMS)
@one_logit_or_more
def test_bce_and_a_term_are_the_sum_of_both(term: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    expected = cross_entropy(logits, labels, 0.1, 2.0) + TERMS[term](logits, labels)
    assert torch.equal(make_loss(f"bce+{term}", 0.1, 2.0)(logits, labels), expected)


def test_the_settings_offer_every_loss() -> None:
    (choices,) = (f.metadata["choices"] for f in fields(TrainSettings) if f.name == "loss")
    assert sorted(choices) == sorted(LOSSES)


def tversky_of(probability: Tensor, truth: Tensor) -> Tensor:
    """1 - Tversky index of one class, by its definition: 0.3 for one too many, 0.7 for one missed."""
    right, over, missed = (
        (a * b).sum() for a, b in ((probability, truth), (probability, 1 - truth), (1 - probability, truth))
    )
    return 1 - right / (right + 0.3 * over + 0.7 * missed)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_tversky_weighs_a_missed_pixel_more_than_one_too_many(missing: float) -> None:
    logits, labels = random_batch(1, missing=missing)
    valid = labels != MISSING
    expected = tversky_of(logits.squeeze(1)[valid].sigmoid(), labels[valid].float())
    torch.testing.assert_close(tversky(logits, labels), expected)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_tversky_of_several_logits_is_the_mean_over_classes(missing: float) -> None:
    logits, labels = random_batch(3, missing=missing)
    valid = labels != MISSING
    probability = logits.softmax(1).movedim(1, -1)[valid]
    each = [tversky_of(probability[:, c], (labels[valid] == c).float()) for c in range(3)]
    torch.testing.assert_close(tversky(logits, labels), torch.stack(each).mean())


def lovasz_of(errors: Tensor, truth: Tensor) -> float:
    """The Lovasz extension of 1 - IoU, by its definition: each error weighs what its pixel, once wrong, adds to it."""

    def lost(wrong: set[int]) -> float:
        missed = sum(bool(truth[i]) for i in wrong)
        buildings = int(truth.sum())
        return 1 - (buildings - missed) / (buildings + len(wrong) - missed) if wrong else 0.0

    order = errors.argsort(descending=True).tolist()
    return sum(float(errors[i]) * (lost({*order[: n + 1]}) - lost({*order[:n]})) for n, i in enumerate(order))


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_lovasz_of_one_logit_is_the_extension_over_hinge_errors(missing: float) -> None:
    logits, labels = random_batch(1, missing=missing)
    valid = labels != MISSING
    truth = labels[valid].float()
    errors = (1 - logits.squeeze(1)[valid] * (2 * truth - 1)).clamp_min(0)
    assert float(lovasz(logits, labels)) == pytest.approx(lovasz_of(errors, truth), rel=1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_lovasz_of_several_logits_is_the_mean_over_the_classes_that_are_there(missing: float) -> None:
    logits, labels = random_batch(4, missing=missing)
    labels[labels == 2] = 1
    valid = labels != MISSING
    probability = logits.softmax(1).movedim(1, -1)[valid]
    truths = {c: (labels[valid] == c).float() for c in (0, 1, 3)}
    each = [lovasz_of((truth - probability[:, c]).abs(), truth) for c, truth in truths.items()]
    assert float(lovasz(logits, labels)) == pytest.approx(np.mean(each), rel=1e-4)


def test_lovasz_of_hard_answers_is_one_minus_iou() -> None:
    logits, labels = random_batch(2)
    answer, valid = logits.argmax(1), labels != MISSING
    hard = 200 * F.one_hot(answer, 2).movedim(-1, 1).float()
    both = [((answer == c) & (labels == c)).sum() / (((answer == c) | (labels == c)) & valid).sum() for c in range(2)]
    torch.testing.assert_close(lovasz(hard, labels), 1 - torch.stack(both).mean())


@pytest.mark.parametrize("classes", [2, 4])
def test_label_smoothing_of_several_logits_is_that_of_torch(classes: int) -> None:
    logits, labels = random_batch(classes)
    expected = F.cross_entropy(logits, labels.long(), ignore_index=MISSING, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, labels, smoothing=0.1), expected)


def test_label_smoothing_of_one_logit_is_that_of_two_classes() -> None:
    logits, labels = random_batch(1)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = F.cross_entropy(both, labels.long(), ignore_index=MISSING, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, labels, smoothing=0.1), expected)


@one_logit_or_more
def test_pixels_near_a_border_weigh_more_in_a_mean(classes: int) -> None:
    logits, labels = random_batch(classes, missing=0.1)
    labels[:, :, :9] = torch.where(labels[:, :, :9] == MISSING, MISSING, 0)  # an area without a border
    near = near_border(labels) & (labels != MISSING)
    far = ~near & (labels != MISSING)
    assert near.any()
    assert far.any()
    sums = [cross_entropy(logits, torch.where(part, labels, MISSING)) * part.sum() for part in (near, far)]
    expected = (3.5 * sums[0] + sums[1]) / (3.5 * near.sum() + far.sum())
    torch.testing.assert_close(cross_entropy(logits, labels, edge_weight=2.5), expected)


def test_two_pixels_on_either_side_of_a_border_are_near_it() -> None:
    labels = torch.zeros(1, 9, 9, dtype=torch.uint8)
    labels[:, 3:, 3:] = 2
    expected = torch.zeros(1, 9, 9, dtype=torch.bool)
    expected[:, 1:, 1:] = True
    expected[:, 5:, 5:] = False
    assert torch.equal(near_border(labels), expected)


def test_missing_pixels_have_no_border_and_hide_none() -> None:
    labels = torch.zeros(1, 3, 12, dtype=torch.uint8)
    labels[:, :, 3], labels[:, :, 8], labels[:, :, 9:] = MISSING, MISSING, 1
    assert near_border(labels)[0, 1].tolist() == [False] * 7 + [True] * 3 + [False] * 2


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
    assert make_loss(loss)(logits - 10 * slope, labels) < value


@every_loss
@one_logit_or_more
def test_losses_of_perfect_and_of_opposite_logits_are_their_extremes(loss: str, classes: int) -> None:
    _, labels = random_batch(classes)
    valid = torch.where(labels == MISSING, 0, labels).long()
    truth = valid.unsqueeze(1).float() if classes == 1 else F.one_hot(valid, classes).permute(0, 3, 1, 2).float()
    right = 200 * truth - 100
    assert make_loss(loss)(right, labels) == pytest.approx(0, abs=1e-6)
    assert make_loss(loss)(-right, labels) > 0.9


@every_loss
@one_logit_or_more
def test_losses_of_bfloat16_logits_are_computed_in_float32(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    coarse = logits.bfloat16()
    value = make_loss(loss)(coarse, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, make_loss(loss)(coarse.float(), labels))


@every_loss
@one_logit_or_more
def test_losses_are_computed_in_float32_beside_a_network_in_bfloat16(loss: str, classes: int) -> None:
    logits, labels = random_batch(classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = make_loss(loss, edge_weight=1.0)(logits, labels)
    assert torch.equal(value, make_loss(loss, edge_weight=1.0)(logits, labels))
