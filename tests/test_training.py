"""A network learns, is scored over the valid pixels of all images, and resumes as if it had never stopped."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from seg_core.losses import LOSSES, MISSING
from seg_core.metrics import count
from seg_core.models import class_probability, normalise
from seg_core.training import Batch, Learner, epochs, evaluate, make_optimizer, make_schedule
from seg_core.unet import UNet

STEPS = 12
EPOCHS = 4
MEAN, STD = (110.0, 110.0, 110.0), (50.0, 50.0, 50.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads would only wait for each other over networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def squares(seed: int, n: int = 8, side: int = 32) -> Batch:
    """Noisy images in which bright squares are the buildings, with a missing strip that looks like one."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, side, side), np.uint8)
    for label in labels:
        for _ in range(3):
            row, col = rng.integers(0, side - 6, 2)
            size = rng.integers(5, 11)
            label[row : row + size, col : col + size] = 1
    images = rng.normal(90 + 60 * labels[..., None], 15, (n, side, side, 3)).clip(0, 255).astype(np.uint8)
    images[:, -4:], labels[:, -4:] = 200, MISSING
    return images, labels


def batches(epoch: int, step: int) -> Batch:
    return squares(1000 * epoch + step)


def validation() -> Iterable[Batch]:
    return [squares(seed, n=1) for seed in range(5)]


def make_learner(*, seed: int = 0, optimizer: str = "adamw", schedule: str = "constant", **fields: Any) -> Learner:
    torch.manual_seed(seed)
    model = UNet(width=4, depth=2)
    adam = make_optimizer(optimizer, model, 0.01, 0.01)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": adam,
        "schedule": make_schedule(schedule, adam, 0.01, EPOCHS * STEPS),
        "loss": LOSSES["bce+dice"],
        "mean": MEAN,
        "std": STD,
        "building": 1,
        "threshold": 0.5,
        "device": torch.device("cpu"),
        "bfloat16": False,
        "max_norm": 1.0,
    }
    return Learner(**{**options, **fields})


def train(learner: Learner, first: int, last: int) -> list[dict[str, Any]]:
    return list(epochs(learner, batches, validation, steps=STEPS, first=first, last=last))


def checkpoint(learner: Learner) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save({"weights": learner.network.state_dict(), **learner.state()}, stream)
    stream.seek(0)
    return stream


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


@pytest.mark.parametrize("loss", LOSSES)
def test_bright_squares_are_learnt(loss: str) -> None:
    figures = train(make_learner(loss=LOSSES[loss]), 1, EPOCHS)
    assert [f["epoch"] for f in figures] == [1, 2, 3, 4]
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"]
    assert figures[-1]["val_iou"] > 0.8
    assert all(f["train_mpx_s"] > 0 and f["seconds"] > 0 for f in figures)


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "one-cycle"), ("adam", "constant")], ids=["adamw", "adam"]
)
def test_training_in_two_goes_gives_the_weights_of_one(optimizer: str, schedule: str) -> None:
    at_once = make_learner(optimizer=optimizer, schedule=schedule)
    expected = train(at_once, 1, EPOCHS)

    before = make_learner(optimizer=optimizer, schedule=schedule)
    train(before, 1, 2)
    state = torch.load(checkpoint(before), weights_only=True)

    after = make_learner(seed=1, optimizer=optimizer, schedule=schedule)
    after.network.load_state_dict(state["weights"])
    after.load_state(state)
    found = train(after, 3, EPOCHS)

    assert all(torch.equal(value, weights(at_once)[name]) for name, value in weights(after).items())
    for name in ("epoch", "loss", "lr", "val_iou"):
        assert [f[name] for f in found] == [f[name] for f in expected[2:]]


def test_training_repeats_itself() -> None:
    first, second = make_learner(), make_learner()
    train(first, 1, 1)
    train(second, 1, 1)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_batches_are_asked_for_by_epoch_and_step_and_used_in_order() -> None:
    asked: list[tuple[int, int]] = []
    used: list[float] = []

    def numbered(epoch: int, step: int) -> Batch:
        asked.append((epoch, step))
        images, labels = squares(0, n=1)
        images[:, 0, 0, 0] = 10 * epoch + step
        return images, labels

    learner = make_learner(mean=(0.0,) * 3, std=(1.0,) * 3)
    learner.network.register_forward_pre_hook(lambda _, args: used.append(float(args[0][0, 0, 0, 0])))
    list(epochs(learner, numbered, list, steps=7, first=2, last=3))
    assert sorted(asked) == [(epoch, step) for epoch in (2, 3) for step in range(7)]
    assert used == [10.0 * epoch + step for epoch in (2, 3) for step in range(7)]


def test_an_error_of_a_batch_comes_out() -> None:
    def broken(_epoch: int, step: int) -> Batch:
        if step == 3:
            raise OSError("disk on fire")
        return squares(step)

    with pytest.raises(OSError, match="disk on fire"):
        list(epochs(make_learner(), broken, validation, steps=STEPS, first=1, last=1))


def test_scores_are_of_the_valid_pixels_of_all_images() -> None:
    learner = make_learner(building=2, model=UNet(classes=3, width=4, depth=2).eval())
    images = list(validation())
    for _, labels in images:
        labels[labels == 1] = 2
    pixels, labels = (np.concatenate(kind) for kind in zip(*images, strict=True))
    valid = labels != MISSING
    with torch.inference_mode():
        x = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(valid), MEAN, STD)
        probability = class_probability(learner.network(x), 2).numpy()
    values = np.sort(probability[valid])[valid.sum() // 4 : -valid.sum() // 4]
    gap = np.diff(values).argmax()
    learner.threshold = float(values[gap : gap + 2].mean())  # where rounding does not decide
    found = evaluate(learner, images)
    assert found == count(probability >= learner.threshold, labels == 2, valid)
    assert sum(found) == valid.sum()
    assert min(found) > 0


def test_validation_changes_neither_weights_nor_batch_norms() -> None:
    learner = make_learner()
    before = weights(learner)
    evaluate(learner, validation())
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())


def test_what_missing_pixels_hold_teaches_nothing() -> None:
    def whitened(epoch: int, step: int) -> Batch:
        images, labels = batches(epoch, step)
        return np.where((labels == MISSING)[..., None], 255, images).astype(np.uint8), labels

    first, second = make_learner(), make_learner()
    list(epochs(first, batches, validation, steps=STEPS, first=1, last=1))
    list(epochs(second, whitened, validation, steps=STEPS, first=1, last=1))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_gradients_are_clipped_where_asked_for() -> None:
    taken = {}
    for max_norm in (None, 1e-3):
        learner = make_learner(max_norm=max_norm)
        learner.optimizer = torch.optim.SGD(learner.network.parameters(), lr=1.0)
        learner.schedule = make_schedule("constant", learner.optimizer, 1.0, 1)
        before = torch.nn.utils.parameters_to_vector(learner.network.parameters()).detach().clone()
        list(epochs(learner, batches, validation, steps=1, first=1, last=1))
        step = torch.nn.utils.parameters_to_vector(learner.network.parameters()).detach() - before
        taken[max_norm] = float(step.norm())
    assert taken[1e-3] == pytest.approx(1e-3, rel=0.01)
    assert taken[None] > 0.01


def test_one_cycle_warms_up_and_ends_near_zero() -> None:
    learner = make_learner(schedule="one-cycle")
    rates = [f["lr"] for f in train(learner, 1, EPOCHS)]
    assert max(rates) <= 0.01
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 / 100
