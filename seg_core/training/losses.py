"""Losses over valid pixels. Logits are `(n, classes, h, w)`; labels `(n, h, w)` class indices, 255 where missing.

With one logit the classes are background (0) and the positive class (1). Each loss raises nothing and is 0 where no
pixel is valid. They agree with segmentation-models-pytorch's DiceLoss and SoftBCEWithLogitsLoss and torch's
cross_entropy.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seg_core.chips import MISSING

Loss = Callable[[Tensor, Tensor], Tensor]


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice coefficient of the predicted probabilities, mean over classes (Milletari et al. 2016).

    One logit: of the positive class alone. Counts are summed over the batch before dividing; a class that the
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


def tversky(logits: Tensor, labels: Tensor) -> Tensor:
    """As `dice`, but a missed pixel of a class costs 0.7, one too many 0.3, where Dice has 0.5 (Salehi et al. 2017)."""
    from segmentation_models_pytorch.losses import TverskyLoss

    loss: Tensor = TverskyLoss(_mode(logits), ignore_index=MISSING, alpha=0.3, beta=0.7)(logits.float(), labels)
    return loss


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - IoU, continued to real numbers (Berman et al. 2018): hinge loss of one logit, softmax of several.

    Counts are those of the batch; of several classes it is the mean over those that the batch's labels have.
    """
    from segmentation_models_pytorch.losses import LovaszLoss

    loss: Tensor = LovaszLoss(_mode(logits), ignore_index=MISSING)(logits.float(), labels)
    return loss.sum()  # it is a number already, but for softmax without a valid pixel: there smp gives an empty tensor


def _mode(logits: Tensor) -> str:
    return "binary" if logits.shape[1] == 1 else "multiclass"


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0, edge_weight: float = 0.0) -> Tensor:
    """Mean cross-entropy over valid pixels; with one logit the binary one.

    Of each pixel's truth the share `smoothing` is spread evenly over the classes (Szegedy et al. 2016). Pixels near a
    border count 1 + `edge_weight` times in the mean.
    """
    valid = labels != MISSING
    if logits.shape[1] == 1:
        truth = (labels == 1).float() * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(logits.float().squeeze(1), truth, reduction="none")
    else:
        indices = torch.where(valid, labels, 0).long()
        each = F.cross_entropy(logits.float(), indices, reduction="none", label_smoothing=smoothing)
    weight = valid * (1 + edge_weight * near_border(labels)) if edge_weight else valid
    return (each * weight).sum() / weight.sum().clamp_min(1)


def near_border(labels: Tensor, reach: int = 2) -> Tensor:
    """Whether a pixel of another class is at most `reach` px away by row and column. A missing one is of no class."""
    pool = partial(F.max_pool2d, kernel_size=2 * reach + 1, stride=1, padding=reach)
    highest = pool(torch.where(labels == MISSING, -1, labels.float()))
    lowest = -pool(-labels.float())  # MISSING is above all classes
    return highest > lowest


TERMS: dict[str, Loss] = {"dice": dice, "lovasz": lovasz, "tversky": tversky}
LOSSES = ("cross-entropy", *TERMS, *(f"bce+{name}" for name in TERMS))


def make_loss(name: str, smoothing: float = 0.0, edge_weight: float = 0.0) -> Loss:
    """One of LOSSES: a term alone, or `bce+` a term: cross-entropy plus that term, equally weighted."""
    entropy = partial(cross_entropy, smoothing=smoothing, edge_weight=edge_weight)
    if name == "cross-entropy":
        return entropy
    term = TERMS[name.removeprefix("bce+")]
    if name in TERMS:
        return term
    return lambda logits, labels: entropy(logits, labels) + term(logits, labels)
