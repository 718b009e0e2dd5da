"""Fit a network's weights to imagery of other bands and to other classes, so that training begins from them.

The first layer that sees the bands is the stem, the layer that answers with a value per class is the head. Both are
changed so that the network keeps the answers that it can keep. All other weights stay as they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seg_core.errors import SegError

NAMES_SHOWN = 3  # of tensors that are missing, in a message


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a network met before, and what it is to meet now."""

    bands: tuple[int, int]  # number of bands before and now
    outputs: tuple[int, int]  # of the head, before and now
    positive: int  # class whose logit a head of one output gave before; now it is class 1
    sources: tuple[int | None, ...]  # index before of each class of now; None: the class is new


def adapt_weights(weights: Mapping[str, Tensor], model: nn.Module, change: Change) -> dict[str, Tensor]:
    """Return a state for `model` from the weights of a network of the same architecture before the change.

    What is new keeps the values that it has in `model`. Raises SegError where the weights are not of that architecture.
    """
    state, head = model.state_dict(), _head_names(model)
    check_names(weights, state)
    adapted = {}
    for name, fresh in state.items():
        old = weights[name].to(fresh.dtype)
        if name in head and len(old) * change.outputs[1] == len(fresh) * change.outputs[0]:
            old = adapt_head(old, fresh, change)
        elif old.shape != fresh.shape and old.ndim > 1 and old.shape[1] % change.bands[0] == 0:
            old = adapt_stem(old, *change.bands)
        check_shape(name, old, fresh)
        adapted[name] = old
    return adapted


def _head_names(model: nn.Module) -> set[str]:
    """Names of the weights that give a value per class."""
    name, conv = find_head(model)
    return {f"{name}.{parameter}" for parameter, _ in conv.named_parameters()}


def find_head(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the name of the head and the head, which is the last convolution."""
    *_, head = ((name, each) for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    return head


@torch.no_grad()
def divide_logits(model: nn.Module, temperature: float) -> None:
    """Change the head of a network so that its logits are divided by a temperature."""
    for parameter in find_head(model)[1].parameters():
        parameter.div_(temperature)


def check_names(weights: Iterable[str], expected: Iterable[str]) -> None:
    """Raise SegError where the names of weights are not those that are expected."""
    there, wanted = set(weights), set(expected)
    for what, names in (("lacks", wanted - there), ("does not know", there - wanted)):
        if names:
            subject = "the file" if what == "lacks" else "the architecture"
            raise SegError(f"{subject} {what} {list_names(names)}")


def check_shape(name: str, weight: Tensor, expected: Tensor) -> None:
    """Raise SegError where a weight has another shape than the architecture's."""
    if weight.shape != expected.shape:
        there, here = (" x ".join(map(str, tensor.shape)) for tensor in (weight, expected))
        raise SegError(f"{name} measures {there}, that of the architecture {here}")


def list_names(names: Iterable[str]) -> str:
    """Return the first names in alphabetical order, and how many more there are."""
    first, more = sorted(names)[:NAMES_SHOWN], len(set(names)) - NAMES_SHOWN
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def adapt_stem(weight: Tensor, before: int, now: int) -> Tensor:
    """Fit the weight `(outputs, before * n, height, width)` of a convolution to `now` bands.

    Further bands begin with weights of 0: the answer is the same as without them, and training finds what they are
    worth (as the channels that Brooks et al. 2023, arXiv:2211.09800, add to a network). Bands that are no longer there
    are replaced by the mean of the others: their weights are shared out among these. So one band instead of three gets
    their sum, as in timm's `adapt_input_conv`.
    """
    per_band = weight.unflatten(1, (before, -1))
    if now > before:
        new = per_band.new_zeros(len(weight), now - before, *per_band.shape[2:])
        return torch.cat([per_band, new], dim=1).flatten(1, 2)
    kept, gone = per_band.split([now, before - now], dim=1)
    fitted: Tensor = kept + gone.sum(dim=1, keepdim=True) / now
    return fitted.flatten(1, 2)


def adapt_head(old: Tensor, fresh: Tensor, change: Change) -> Tensor:
    """Return the weight or bias `(outputs * n, ...)` of the head for the classes of now; `fresh` is that of a new head.

    A head of one output stands for two classes: it answers with the logit of one of them, and the other one has the
    logit 0. The softmax of both is the sigmoid of the one, so that a change between one and two outputs keeps the
    probabilities.
    """
    before, now = change.outputs
    rows = _logits(old.unflatten(0, (before, -1)), change.positive)
    own = _logits(fresh.unflatten(0, (now, -1)), 1)
    found = [own[i] if source is None else rows[source] for i, source in enumerate(change.sources)]
    return found[1] - found[0] if now == 1 else torch.cat(found)


def _logits(per_output: Tensor, positive: int) -> Tensor:
    """The weights of a logit per class, from those of a head's outputs."""
    if len(per_output) > 1:
        return per_output
    zeros = torch.zeros_like(per_output)
    return torch.cat([per_output, zeros] if positive == 0 else [zeros, per_output])
