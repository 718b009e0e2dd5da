"""A network learns, is scored over the valid pixels of all images, and resumes as if it had never stopped."""

import copy
import io
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seg_core.chips import UNLABELLED
from seg_core.errors import JobError
from seg_core.model.networks import class_probability, normalise
from seg_core.model.unet import UNet
from seg_core.training.calibration import scale_probability
from seg_core.training.loop import (
    CHECK_EVERY,
    Batch,
    Learner,
    _scale_threshold,
    epochs,
    evaluate,
    make_average,
    make_optimizer,
    make_schedule,
    step,
)
from seg_core.training.losses import LOSSES, MISSING, make_loss
from seg_core.training.metrics import Histogram, histogram, scores

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
EPOCHS = 4
MEAN, STD = (110.0, 110.0, 110.0), (50.0, 50.0, 50.0)


def draw_squares(seed: int, n: int = 8, side: int = 32, missing: int = 4) -> Batch:
    """Noisy images in which bright squares are the buildings, with a missing strip that looks like one."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, side, side), np.uint8)
    for label in labels:
        for _ in range(3):
            row, col = rng.integers(0, side - 6, 2)
            size = rng.integers(5, 11)
            label[row : row + size, col : col + size] = 1
    images = rng.normal(90 + 60 * labels[..., None], 15, (n, side, side, 3)).clip(0, 255).astype(np.uint8)
    images[:, side - missing :], labels[:, side - missing :] = 200, MISSING
    return torch.from_numpy(images), torch.from_numpy(labels)


def batches(first: int = 1) -> Iterator[Batch]:
    """One batch after the other, from epoch `first` on."""
    return map(draw_squares, itertools.count((first - 1) * STEPS))


def validation() -> Iterable[Batch]:
    return [draw_squares(10_000 + seed, n=1) for seed in range(5)]


def make_plain() -> nn.Module:
    """A network without batch norm: what it does with one crop depends on no other."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))


def make_forgetful() -> nn.Module:
    """A network that draws random numbers while it trains."""
    return nn.Sequential(UNet(width=4, depth=2), nn.Dropout(0.2))


def make_learner(
    make_network: Callable[[], nn.Module] = lambda: UNet(width=4, depth=2),
    *,
    seed: int = 0,
    optimizer: str = "adamw",
    schedule: str = "constant",
    lr: float = 0.01,
    ema: float | None = None,
    **fields: Any,
) -> Learner:
    torch.manual_seed(seed)
    network = make_network()
    average = None if ema is None else make_average(network, ema)
    adam = make_optimizer(optimizer, network, lr, 0.01)
    options: dict[str, Any] = {
        "network": network,
        "model": network,
        "optimizer": adam,
        "schedule": make_schedule(schedule, adam, lr, EPOCHS * STEPS),
        "loss": make_loss("bce+dice"),
        "mean": MEAN,
        "std": STD,
        "positive": 1,
        "threshold": 0.5,
        "device": torch.device("cpu"),
        "bfloat16": False,
        "max_norm": 1.0,
        "micro_batch": 8,
        "seed": 0,
        "average": average,
    }
    return Learner(**{**options, **fields})


def make_descent(**fields: Any) -> Learner:
    """A learner whose step changes the weights of a network without batch norm by the gradient itself."""
    learner = make_learner(make_plain, **{"loss": make_loss("cross-entropy"), "max_norm": None, **fields})
    learner.optimizer = torch.optim.SGD(learner.network.parameters(), lr=1.0)
    learner.schedule = make_schedule("constant", learner.optimizer, 1.0, 1)
    return learner


def train(learner: Learner, first: int = 1, last: int = EPOCHS, patience: int = 0) -> list[dict[str, Any]]:
    run = epochs(learner, batches(first), validation, steps=STEPS, first=first, last=last, patience=patience)
    return list(run)


def resume(before: Learner, after: Learner) -> Learner:
    """Put a fresh learner where another one is, by way of a file."""
    stream = io.BytesIO()
    torch.save({"kept": before.kept.state_dict(), **before.state()}, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    after.load_state(state, state.pop("kept"))
    return after


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def taken_step(learner: Learner, batch: Batch) -> Tensor:
    """What one step adds to the weights."""
    before = nn.utils.parameters_to_vector(learner.network.parameters()).detach().clone()
    step(learner, batch)
    return nn.utils.parameters_to_vector(learner.network.parameters()).detach() - before


# Learning


@pytest.mark.parametrize("loss", LOSSES)
def test_bright_squares_are_learnt(loss: str) -> None:
    figures = train(make_learner(loss=make_loss(loss)))
    assert [f["epoch"] for f in figures] == [1, 2, 3, 4]
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"]
    assert figures[-1]["val_iou"] > 0.8
    assert all(f["train_mpx_s"] > 0 and f["seconds"] > 0 for f in figures)


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps() -> None:
    values = iter([1.0, 2.0, 6.0])
    learner = make_descent(loss=lambda logits, _: 0 * logits.sum() + next(values))
    assert [f["loss"] for f in epochs(learner, batches(), list, steps=3, first=1, last=1)] == [3.0]


def test_training_repeats_itself() -> None:
    first, second = make_learner(make_forgetful), make_learner(make_forgetful)
    train(first, 1, 1)
    train(second, 1, 1)
    assert same(weights(first.network), weights(second.network))


def test_seed_epoch_and_process_have_random_numbers_of_their_own() -> None:
    def trained(first: int = 1, **fields: Any) -> dict[str, Tensor]:
        learner = make_learner(make_forgetful, **fields)
        list(epochs(learner, batches(), list, steps=1, first=first, last=first))
        return weights(learner.network)

    assert same(trained(), trained())
    assert not any(same(trained(), other) for other in (trained(rank=1), trained(first=2)))
    learner, other = make_learner(make_forgetful), make_learner(make_forgetful)
    other.seed = 1
    train(learner, 1, 1)
    train(other, 1, 1)
    assert not same(weights(learner.network), weights(other.network))


def test_batches_are_used_in_order_and_no_more_than_are_needed() -> None:
    used: list[float] = []

    def numbered() -> Iterator[Batch]:
        for number in itertools.count():
            images, labels = draw_squares(0, n=1)
            images[:, 0, 0, 0] = number
            yield images, labels

    learner = make_learner(mean=(0.0,) * 3, std=(1.0,) * 3)
    learner.network.register_forward_pre_hook(lambda _, args: used.append(float(args[0][0, 0, 0, 0])))
    feed = numbered()
    found = epochs(learner, feed, list, steps=7, first=2, last=3)
    assert next(found)["epoch"] == 2
    assert used == list(range(7))
    assert next(found)["epoch"] == 3
    assert used == list(range(14))
    assert not list(found)
    assert next(feed)[0][0, 0, 0, 0] == 14


def test_an_error_of_a_batch_comes_out() -> None:
    def broken() -> Iterator[Batch]:
        yield from map(draw_squares, range(3))
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        list(epochs(make_learner(), broken(), validation, steps=STEPS, first=1, last=1))


def test_what_missing_pixels_hold_teaches_nothing() -> None:
    def whitened() -> Iterator[Batch]:
        for images, labels in batches():
            yield images.masked_fill((labels == MISSING).unsqueeze(-1), 255), labels

    first, second = make_learner(), make_learner()
    list(epochs(first, batches(), validation, steps=STEPS, first=1, last=1))
    list(epochs(second, whitened(), validation, steps=STEPS, first=1, last=1))
    assert same(weights(first.network), weights(second.network))


def test_one_cycle_warms_up_and_ends_near_zero() -> None:
    learner = make_learner(schedule="one-cycle")
    rates = []
    for batch in itertools.islice(batches(), EPOCHS * STEPS):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        step(learner, batch)
    highest = int(np.argmax(rates))
    assert max(rates) == pytest.approx(0.01, rel=1e-3)
    assert highest == pytest.approx(EPOCHS * STEPS / 10, abs=1)
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert rates[-1] < 0.01 / 100


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 50])
def test_cosine_warms_up_in_a_line_and_falls_by_a_cosine(total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = make_schedule("cosine", optimizer, 0.01, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warm_up = max(1, total // 10)
    assert rates[:warm_up] == pytest.approx(np.arange(1, warm_up + 1) / warm_up * 0.01)
    fall = np.linspace(0, np.pi, total - warm_up + 2)
    assert [*rates[warm_up - 1 :], optimizer.param_groups[0]["lr"]] == pytest.approx(0.005 * (1 + np.cos(fall)))
    assert min(rates) > 0


# A step


def test_gradients_are_clipped_where_asked_for() -> None:
    clipped, whole = (taken_step(make_descent(max_norm=norm), draw_squares(0)) for norm in (1e-3, None))
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=0.01)
    assert float(whole.norm()) > 0.01
    torch.testing.assert_close(clipped / clipped.norm(), whole / whole.norm())


@pytest.mark.parametrize("max_norm", [None, 1e-3])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7])
def test_a_batch_in_pieces_gives_the_gradient_of_one_piece(micro_batch: int, max_norm: float | None) -> None:
    batch = draw_squares(0, missing=0)
    whole = taken_step(make_descent(max_norm=max_norm), batch)
    pieces = taken_step(make_descent(max_norm=max_norm, micro_batch=micro_batch), batch)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        step(make_descent(micro_batch=micro_batch), batch), step(make_descent(micro_batch=8), batch)
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 99])
def test_no_more_crops_than_the_micro_batch_go_through_the_network_at_once(micro_batch: int) -> None:
    seen: list[int] = []
    learner = make_descent(micro_batch=micro_batch)
    learner.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    step(learner, draw_squares(0))
    assert sum(seen) == 8
    assert max(seen) == min(micro_batch, 8)
    assert len(seen) == -(-8 // micro_batch)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "sizes"), [(16, 3, [3, 3, 3, 3, 2, 2]), (13, 6, [5, 4, 4]), (16, 16, [16])]
)
def test_pieces_are_even_so_that_no_crop_is_left_alone(batch: int, micro_batch: int, sizes: list[int]) -> None:
    seen: list[int] = []
    learner = make_descent(micro_batch=micro_batch)
    learner.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    step(learner, draw_squares(0, n=batch))
    assert seen == sizes


def test_gradients_of_one_step_do_not_reach_the_next() -> None:
    learner = make_descent(lr=0.0)
    learner.optimizer.param_groups[0]["lr"] = 0.0
    taken_step(learner, draw_squares(1))
    learner.optimizer.param_groups[0]["lr"] = 1.0
    torch.testing.assert_close(taken_step(learner, draw_squares(0)), taken_step(make_descent(), draw_squares(0)))


def test_the_gradients_of_a_greater_share_count_more() -> None:
    mean, more = (taken_step(make_descent(share=share), draw_squares(0)) for share in (1.0, 1.5))
    torch.testing.assert_close(more, 1.5 * mean)
    torch.testing.assert_close(step(make_descent(share=1.5), draw_squares(0)), step(make_descent(), draw_squares(0)))


# The moving average


def test_the_average_is_the_one_computed_by_hand() -> None:
    decay = 0.3  # reached by the third step of 2/11, 3/12, 4/13, ...
    learner = make_learner(ema=decay)
    expected: dict[str, Tensor] = {}
    for num_averaged, batch in enumerate(itertools.islice(batches(), 6)):
        step(learner, batch)
        share = min(decay, (1 + num_averaged) / (10 + num_averaged))
        for name, now in weights(learner.network).items():
            old = expected.get(name, now)
            expected[name] = share * old + (1 - share) * now if now.is_floating_point() else now
    found = weights(learner.kept)
    assert any("running_var" in name for name in found)
    assert found["bottleneck.1.num_batches_tracked"] == 6
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert not same(found, weights(learner.network))


def test_the_average_is_what_is_validated_and_kept() -> None:
    learner = make_learner(ema=0.9)
    (figures,) = train(learner, 1, 1)
    assert learner.average is not None
    assert learner.kept is learner.average.module
    alone = make_learner(network=copy.deepcopy(learner.average.module))
    assert figures["val_iou"] == scores(evaluate(alone, validation()).counts(0.5))["iou"]
    bare = make_learner(network=copy.deepcopy(learner.network))
    assert not np.array_equal(evaluate(learner, validation()).pixels, evaluate(bare, validation()).pixels)
    assert same(learner.state()["network"], weights(learner.network))


def test_without_an_average_the_network_is_kept() -> None:
    learner = make_learner()
    assert learner.kept is learner.network
    assert learner.state()["averaged"] is None


def test_the_average_changes_nothing_of_what_is_learnt() -> None:
    with_one, without = make_learner(make_forgetful, ema=0.9), make_learner(make_forgetful)
    train(with_one, 1, 2)
    train(without, 1, 2)
    assert same(weights(with_one.network), weights(without.network))


# Going on


@pytest.mark.parametrize(
    ("optimizer", "schedule", "ema"),
    [("adamw", "one-cycle", 0.95), ("adam", "constant", None), ("adam", "cosine", 0.95)],
)
def test_training_in_two_goes_gives_the_weights_of_one(optimizer: str, schedule: str, ema: float | None) -> None:
    def fresh(seed: int = 0) -> Learner:
        learner = make_learner(make_forgetful, seed=seed, optimizer=optimizer, schedule=schedule, ema=ema)
        learner.micro_batch, learner.threshold = 5, None
        return learner

    at_once, before = fresh(), fresh()
    expected = train(at_once)
    train(before, 1, 2)
    after = resume(before, fresh(seed=1))
    found = train(after, 3, EPOCHS)

    assert same(weights(after.network), weights(at_once.network))
    assert same(weights(after.kept), weights(at_once.kept))
    assert after.history == [*before.history[:2], *found]
    for name in ("epoch", "loss", "lr", "threshold", "val_iou"):
        assert [f[name] for f in found] == [f[name] for f in expected[2:]]


def test_training_stops_after_so_many_epochs_without_a_better_iou() -> None:
    assert len(train(make_learner(make_plain, lr=0.0), patience=2)) == 3
    assert len(train(make_learner(make_plain, lr=0.0), patience=1)) == 2
    assert len(train(make_learner(make_plain, lr=0.0), patience=0)) == EPOCHS


def test_a_learner_remembers_the_figures_of_all_epochs() -> None:
    learner = make_learner()
    seen = list(epochs(learner, batches(), validation, steps=2, first=1, last=4))
    assert learner.history == learner.state()["history"] == seen


def test_patience_goes_on_counting_after_a_resume() -> None:
    before = make_learner(make_plain, lr=0.0)
    assert len(train(before, 1, 2, patience=2)) == 2
    after = resume(before, make_learner(make_plain, seed=1, lr=0.0))
    assert [f["epoch"] for f in train(after, 3, EPOCHS, patience=2)] == [3]
    assert train(resume(after, make_learner(make_plain, lr=0.0)), 4, EPOCHS, patience=2) == []


# Losses that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3, CHECK_EVERY, CHECK_EVERY + 11, 2 * CHECK_EVERY + 5])
def test_a_loss_that_is_no_number_names_epoch_and_step(at: int, value: float) -> None:
    steps, taken = 2 * CHECK_EVERY + 10, itertools.count(1)
    fed: list[int] = []

    def loss(logits: Tensor, _labels: Tensor) -> Tensor:
        return logits.sum() * (value if next(taken) == steps + at else 1e-9)

    def feed() -> Iterator[Batch]:
        batch = draw_squares(0, n=1, side=16)
        for number in itertools.count(1):
            fed.append(number)
            yield batch

    found = epochs(make_descent(loss=loss), feed(), list, steps=steps, first=4, last=6)
    assert next(found)["epoch"] == 4
    with pytest.raises(JobError, match=rf"^epoch 5, step {at}: the loss is not finite") as caught:
        next(found)
    assert "\n" not in str(caught.value)
    assert len(fed) - steps - at <= CHECK_EVERY


# Scores


def probabilities(network: nn.Module, images: Iterable[Batch], building: int) -> tuple[Any, Any, Any]:
    """Probability, truth and validity of images of one size, without the learner."""
    pixels, labels = (torch.cat(kind) for kind in zip(*images, strict=True))
    valid = labels != MISSING
    with torch.inference_mode():
        x = normalise(pixels.permute(0, 3, 1, 2), valid, MEAN, STD)
        probability = class_probability(network.eval()(x), building)
    return probability.numpy(), (labels == building).numpy(), valid.numpy()


def test_scores_are_of_the_valid_pixels_of_all_images() -> None:
    learner = make_learner(lambda: UNet(classes=3, width=4, depth=2), positive=2)
    images = [(image, torch.where(labels == 1, 2, labels)) for image, labels in validation()]
    found = evaluate(learner, images)
    probability, truth, valid = probabilities(learner.network, images, 2)
    expected = histogram(probability, truth, valid)
    assert found.pixels.sum() == valid.sum() == 5 * 28 * 32
    assert np.abs(found.pixels - expected.pixels).sum() <= 4  # two pixels may fall on the other side of a step
    assert (found.pixels.sum(axis=1) > 0).all()


def test_the_network_sees_what_is_not_labelled() -> None:
    learner = make_learner()
    train(learner, 1, 1)
    images = list(validation())
    half = torch.zeros(images[0][1].shape, dtype=torch.bool)
    half[..., : half.shape[-1] // 2] = True
    found = [
        evaluate(learner, [(image, labels.where(kept | (labels == MISSING), UNLABELLED)) for image, labels in images])
        for kept in (half, ~half)
    ]
    assert min(each.pixels.sum() for each in found) > 0
    assert np.array_equal(found[0].pixels + found[1].pixels, evaluate(learner, images).pixels)
    holes = evaluate(learner, [(image, labels.where(half, MISSING)) for image, labels in images])
    assert not np.array_equal(found[0].pixels, holes.pixels)


def test_a_step_learns_nothing_of_what_is_not_labelled() -> None:
    def learn(unlabelled: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        learner = make_learner()
        image, labels = next(iter(validation()))
        labels = labels.clone()
        labels[..., :8] = unlabelled
        step(learner, (image, labels))
        return learner.network.state_dict()

    both = [learn(code) for code in (UNLABELLED, 253)]
    assert all(weights.isfinite().all() for weights in both[0].values())
    assert any(not torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_without_a_threshold_the_best_one_is_chosen() -> None:
    learner = make_learner(threshold=None)
    for figures in epochs(learner, batches(), validation, steps=STEPS, first=1, last=2):
        found = evaluate(learner, validation())
        assert figures["temperature"] == found.temperature() != 1
        scaled = scale_probability(np.float64(found.best_threshold()), figures["temperature"])
        assert figures["threshold"] == round(float(scaled), 4)
        assert figures["val_iou"] == found.ious()[1:].max()
        assert learner.confidence == found.calibrated(figures["temperature"]).confidence() != found.confidence()
    assert figures["threshold"] != 0.5


@pytest.mark.parametrize(("classes", "calibrated"), [(1, True), (2, True), (3, False)])
def test_networks_of_up_to_two_outputs_are_calibrated(classes: int, calibrated: bool) -> None:
    learner = make_learner(lambda: UNet(classes=classes, width=4, depth=2))
    (figures,) = train(learner, 1, 1)
    assert (figures["temperature"] != 1) == calibrated
    network = learner.network.eval()
    with torch.no_grad():
        network.head.weight.mul_(1e20)  # so sure that bins overflow
    found = evaluate(learner, validation())
    assert found.logits is not None
    if calibrated:
        assert found.logits.sum() == found.pixels.sum()
        assert found.logits[:, 0].sum() == found.pixels[:, 0].sum()
        assert found.logits[:, -1].sum() == found.pixels[:, -1].sum()


@pytest.mark.parametrize("temperature", [0.25, 0.5, 3.0, 16.0])
def test_the_scaled_threshold_gives_the_mask_of_the_one_before(temperature: float) -> None:
    probability = np.linspace(0.01, 0.99, 99)
    assert 0 < _scale_threshold(1 / 256, temperature) < _scale_threshold(255 / 256, temperature) < 1
    for threshold in (0.25, 0.5, 0.75):
        scaled = _scale_threshold(threshold, temperature)
        mask = scale_probability(probability, temperature) >= scaled
        assert np.count_nonzero(mask != (probability >= threshold)) <= 1


def test_a_threshold_that_is_given_is_used() -> None:
    learner = make_learner(threshold=0.75)
    (figures,) = train(learner, 1, 1)
    probability, truth, valid = probabilities(learner.network, validation(), 1)
    assert figures["threshold"] == 0.75
    calibrated = scale_probability(probability, figures["temperature"])
    expected = scores(histogram(calibrated, truth, valid).counts(0.75))
    assert figures["val_precision"] == pytest.approx(expected["precision"], abs=4e-3)  # of bins of logits
    assert figures["val_recall"] == pytest.approx(expected["recall"], abs=4e-3)


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.75])
def test_a_threshold_that_is_kept_moves_with_the_temperature_so_that_its_mask_stays(kept: float) -> None:
    learner = make_learner(threshold=None, kept_threshold=kept)
    (figures,) = train(learner, 1, 1)
    probability, truth, valid = probabilities(learner.network, validation(), 1)
    assert figures["temperature"] != 1
    assert figures["threshold"] == round(float(scale_probability(kept, figures["temperature"])), 4)
    assert figures["val_iou"] == scores(histogram(probability, truth, valid).counts(kept))["iou"]


def test_validation_changes_neither_weights_nor_batch_norms() -> None:
    learner = make_learner(ema=0.9)
    before, kept = weights(learner.network), weights(learner.kept)
    evaluate(learner, validation())
    assert same(weights(learner.network), before)
    assert same(weights(learner.kept), kept)


def test_no_validation_image_gives_no_score() -> None:
    (figures,) = epochs(make_learner(threshold=None), batches(), list, steps=1, first=1, last=1)
    assert [figures[name] for name in ("val_iou", "val_f1", "val_accuracy", "threshold")] == [None, None, None, 0.5]


def test_weights_that_have_overflown_are_not_scored() -> None:
    learner = make_learner(make_plain)
    with torch.no_grad():
        learner.network[0].weight.fill_(torch.nan)
    with pytest.raises(JobError, match="epoch 7: on validation the network's answer is not finite"):
        evaluate(learner, validation(), 7)


# Several processes

WORLDS = (3, 2)


def uneven(rank: int, world: int, n: int = 5) -> slice:
    """A process's part of a batch of `n`, as even as can be."""
    return slice(n * rank // world, n * (rank + 1) // world)


def train_share(rank: int, world: int, make: Callable[..., Learner], missing: int) -> dict[str, Any]:
    """Train two epochs on this process's share of each batch and validation image."""
    part = uneven(rank, world)
    learner = make(micro_batch=2, rank=rank, share=(part.stop - part.start) * world / 5)
    if world > 1:
        learner.model = nn.parallel.DistributedDataParallel(learner.network)
    feed = (tuple(kind[part] for kind in draw_squares(seed, n=5, missing=missing)) for seed in itertools.count())
    shares = [batch for number, batch in enumerate(validation()) if number % world == rank]
    figures = list(epochs(learner, feed, lambda: shares, steps=4, first=1, last=2))
    timeless = [{k: v for k, v in f.items() if k not in ("seconds", "train_mpx_s")} for f in figures]
    return {
        "figures": timeless,
        "parameters": dict(learner.network.named_parameters()),
        "kept": weights(learner.kept),
    }


def make_averaged(**fields: Any) -> Learner:
    return make_learner(make_forgetful, ema=0.9, **fields)


def scored_share(rank: int, world: int, number: int) -> Histogram:
    """Score this process's share of some images, with batch norms that differ from those of the others."""
    learner = make_learner()
    for name, value in learner.network.named_buffers():
        if "running" in name:
            value.add_(0.1 * rank)
    return evaluate(learner, [batch for i, batch in enumerate(validation()) if i < number and i % world == rank])


def be_process(rank: int, folder: str) -> None:
    """Be one of three processes, then, but for the last, one of two; leave behind what was found."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous-{world}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
            found: dict[str, Any] = {f"scored {n}": scored_share(rank, world, n).pixels for n in (5, 1)}
            if world == 2:
                found["plain"] = train_share(rank, world, make_descent, missing=0)
                found["averaged"] = train_share(rank, world, make_averaged, missing=4)
            torch.save(found, f"{folder}/{world}-{rank}.pt")
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def be_processes(folder: str) -> None:
    """Start three processes that are forked, so that torch is imported once, and none outlives this one."""
    torch.set_num_threads(1)
    train_share(0, 1, make_averaged, missing=4)  # what torch imports only now
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=be_process, args=(rank, folder), daemon=True) for rank in range(max(WORLDS))]
    for process in started:
        process.start()
    for process in started:
        process.join()
    sys.exit([process.exitcode for process in started] != [0, 0, 0])  # daemons end with it


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What each process of a world of two and of three found, by the world's size and the process's rank."""
    folder = tmp_path_factory.mktemp("processes")
    parent = multiprocessing.get_context("spawn").Process(target=be_processes, args=(str(folder),))
    parent.start()
    parent.join(timeout=200)
    code = parent.exitcode
    parent.kill()
    parent.join()
    assert code == 0
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world in WORLDS
        for rank in range(world)
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("images", [5, 1])
def test_several_processes_score_as_one_does(
    processes: dict[tuple[int, int], dict[str, Any]], world: int, images: int
) -> None:
    expected = scored_share(0, 1, images).pixels
    assert expected.sum() == images * 28 * 32
    for rank in range(world):
        assert np.array_equal(processes[world, rank][f"scored {images}"], expected)


@pytest.mark.parametrize("kind", ["plain", "averaged"])
def test_processes_that_train_together_have_the_same_weights_and_figures(
    processes: dict[tuple[int, int], dict[str, Any]], kind: str
) -> None:
    first, second = (processes[2, rank][kind] for rank in range(2))
    assert first["figures"] == second["figures"]
    assert same(first["parameters"], second["parameters"])
    assert same(first["kept"], second["kept"])
    assert [f["epoch"] for f in first["figures"]] == [1, 2]


def test_unequal_shares_of_a_batch_teach_what_the_whole_would(
    processes: dict[tuple[int, int], dict[str, Any]],
) -> None:
    alone = train_share(0, 1, make_descent, missing=0)
    for name, value in processes[2, 0]["plain"]["parameters"].items():
        torch.testing.assert_close(value, alone["parameters"][name], rtol=1e-4, atol=1e-5)
