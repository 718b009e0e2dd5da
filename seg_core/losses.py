"""Losses over valid pixels. Logits are `(n, classes, h, w)`; labels `(n, h, w)` class indices, 255 where missing.

With one logit the classes are background (0) and building (1). Each loss raises nothing and is 0 where no pixel is
valid. They agree with segmentation-models-pytorch's DiceLoss and SoftBCEWithLogitsLoss and torch's cross_entropy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MISSING = 255

Loss = Callable[[Tensor, Tensor], Tensor]


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice coefficient of the predicted probabilities, mean over classes (Milletari et al. 2016).

    One logit: of the building class alone. Counts are summed over the batch before dividing; a class that the
    batch's labels lack adds 0.
    """
    valid = (labels != MISSING).unsqueeze(1)
    if logits.shape[1] == 1:
        probability = logits.float().sigmoid()
        truth = (labels == 1).unsqueeze(1).float()
    else:
        probability = logits.float().softmax(dim=1)
        indices = torch.where(valid.squeeze(1), labels, 0).long()
        truth = F.one_hot(indices, logits.shape[1]).permute(0, 3, 1, 2).float() * valid
    probability = probability * valid
    overlap = (probability * truth).sum(dim=(0, 2, 3))
    total = (probability + truth).sum(dim=(0, 2, 3))
    present = truth.sum(dim=(0, 2, 3)) > 0
    return ((1 - 2 * overlap / total.clamp_min(1e-7)) * present).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over valid pixels; with one logit the binary one."""
    valid = labels != MISSING
    if logits.shape[1] == 1:
        each = F.binary_cross_entropy_with_logits(logits.float().squeeze(1), (labels == 1).float(), reduction="none")
    else:
        each = F.cross_entropy(logits.float(), torch.where(valid, labels, 0).long(), reduction="none")
    return (each * valid).sum() / valid.sum().clamp_min(1)


def bce_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus Dice, equally weighted."""
    return cross_entropy(logits, labels) + dice(logits, labels)


LOSSES: dict[str, Loss] = {"dice": dice, "bce+dice": bce_dice, "cross-entropy": cross_entropy}
