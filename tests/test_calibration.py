"""Probabilities are calibrated by a temperature that is found on validation, and masks stay as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeBundle
from numpy.typing import NDArray
from scipy.special import expit

from aerial_seg.cli.main import main
from seg_core.model.bundle import BUILT_IN, read_bundle, read_weights, write_bundle
from seg_core.model.loading import load_model
from seg_core.model.networks import build_model, class_logit, class_probability
from seg_core.training.calibration import (
    BINS_PER_LOGIT,
    MAX_LOGIT,
    NUM_BINS,
    fit_temperature,
    scale_histogram,
    scale_probability,
)
from seg_core.training.metrics import STEPS, Histogram, histogram

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = NDArray[np.float64]


def count_logits(logits: Floats, truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    bins = ((logits + MAX_LOGIT) * BINS_PER_LOGIT).astype(np.int64).clip(0, NUM_BINS - 1)
    return np.stack([np.bincount(bins[truth == kind], minlength=NUM_BINS) for kind in (False, True)])


def draw_logits(temperature: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Logits that are `temperature` times as large as the labels deserve."""
    rng = np.random.default_rng(0)
    deserved = rng.normal(-2, 2.5, 200_000)
    return deserved * temperature, rng.random(200_000) < expit(deserved)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_by_which_a_network_is_too_sure(temperature: float) -> None:
    pixels = count_logits(*draw_logits(temperature))
    assert fit_temperature(pixels) == pytest.approx(temperature, rel=0.02)


def test_calibrated_probabilities_are_true() -> None:
    logits, truth = draw_logits(3.0)
    probability = expit(logits).astype(np.float32)
    everywhere = np.ones(len(truth), np.bool_)
    found = Histogram(histogram(probability, truth, everywhere).pixels, count_logits(logits, truth))
    calibrated = found.calibrated(found.temperature())
    before, after = found.calibration_error(), calibrated.calibration_error()
    assert before is not None
    assert after is not None
    assert before > 0.05
    assert after < 0.004
    predicted, observed, _ = calibrated.reliability()
    assert predicted == pytest.approx(observed, abs=0.03)


@pytest.mark.parametrize("kind", [0, 1])
def test_pixels_of_one_kind_say_nothing_of_how_sure_to_be(kind: int) -> None:
    pixels = np.zeros((2, NUM_BINS), np.int64)
    pixels[kind, 10:3000] = 5
    assert fit_temperature(pixels) == 1.0
    assert fit_temperature(np.zeros_like(pixels)) == 1.0


def test_without_logits_nothing_is_calibrated() -> None:
    found = histogram(np.array([0.1, 0.9], np.float32), np.array([False, True]), np.array([True, True]))
    assert found.temperature() == 1.0
    assert found.calibrated(2.0) is found


def test_a_scaled_histogram_is_that_of_the_scaled_probabilities() -> None:
    logits, truth = draw_logits(2.0)
    found = scale_histogram(count_logits(logits, truth), 2.0, STEPS)
    expected = histogram(expit(logits / 2).astype(np.float32), truth, np.ones(len(truth), np.bool_)).pixels
    assert found.sum() == expected.sum() == len(truth)
    assert np.abs(found.cumsum(axis=1) - expected.cumsum(axis=1)).max() < 0.005 * len(truth)


def test_a_temperature_moves_probabilities_and_not_their_order() -> None:
    probability = np.linspace(0, 1, 101)
    scaled = scale_probability(probability, 2.5)
    assert (np.diff(scaled) > 0).all()
    assert scaled[[0, 50, 100]] == pytest.approx([0, 0.5, 1])
    assert scale_probability(scaled, 1 / 2.5) == pytest.approx(probability)


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "in_channels": 3, "classes": 1, "width": 4, "depth": 2, "patch": 2},
        {"name": "unet", "in_channels": 3, "classes": 2, "width": 4, "depth": 1},
        {"name": "smp:Unet/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:FPN/resnet18", "in_channels": 3, "classes": 2},
        {"name": "smp:DeepLabV3Plus/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:Segformer/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:UPerNet/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:Linknet/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:PSPNet/resnet18", "in_channels": 3, "classes": 1},
        {"name": "smp:MAnet/resnet18", "in_channels": 3, "classes": 1},
    ],
    ids=lambda each: f"{each['name']}-{each['classes']}",
)
def test_a_bundle_with_a_temperature_answers_with_calibrated_probabilities(
    architecture: dict[str, Any], make_bundle: MakeBundle
) -> None:
    torch.manual_seed(0)
    network = build_model(architecture).eval()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    bundle = replace(read_bundle(make_bundle()), architecture=architecture, temperature=2.5)
    image = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        before, after = network(image), load_model(bundle, weights)(image)
    torch.testing.assert_close(after, before / 2.5, rtol=1e-4, atol=1e-6)
    for index in range(2):
        expected = class_probability(after, index)
        torch.testing.assert_close(class_logit(after, index).sigmoid(), expected, rtol=1e-5, atol=1e-6)


def test_an_evaluation_says_what_the_temperature_does(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, weights, found = read_bundle(BUILT_IN), read_weights(BUILT_IN, read_bundle(BUILT_IN)), {}
    for name, temperature in (("raw", 1.0), ("calibrated", 3.0)):
        path = str(tmp_path / name)
        write_bundle(path, replace(bundle, temperature=temperature, threshold=0.5), weights)
        assert main(["evaluate", path, "--data", str(dataset), "--figures", f"{path}-figures", "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    raw, calibrated = found["raw"], found["calibrated"]
    assert raw["uncalibrated_error"] is None
    assert calibrated["uncalibrated_error"] == pytest.approx(raw["calibration_error"], abs=1e-4)
    assert calibrated["calibration_error"] > raw["calibration_error"] + 0.01  # it is not too sure of itself
    assert calibrated["iou"] == pytest.approx(raw["iou"], abs=1e-5)  # the threshold is 0.5, where nothing moves
    pictures = [Path(tmp_path, f"{name}-figures", "calibration.png").read_bytes() for name in found]
    assert pictures[0] != pictures[1]
