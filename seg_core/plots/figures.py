"""Figures of a training run and of a model's scores, as PNG."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seg_core.plots.style import BLUE, GREEN, GREY, ORANGE, to_png
from seg_core.training.metrics import STEPS, Histogram


def draw_curves(epochs: Sequence[dict[str, Any]]) -> bytes:
    """Loss, scores on validation and learning rate of each epoch of a training run, from its metrics."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, score, rate = figure.subplots(1, 3)
    numbers = [e["epoch"] for e in epochs]
    loss.plot(numbers, [e["loss"] for e in epochs], color=BLUE, marker=".")
    for name in ("iou", "precision", "recall"):
        score.plot(numbers, [_or_nan(e[f"val_{name}"]) for e in epochs], marker=".", label=name)
    score.set_ylim(0, 1)
    score.legend(loc="lower right")
    rate.plot(numbers, [e["lr"] for e in epochs], color=GREY, marker=".")
    titles = ("loss on training crops", "buildings on validation images", "learning rate at the epoch's end")
    for axes, title in zip((loss, score, rate), titles, strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return to_png(figure)


def draw_thresholds(histogram: Histogram, threshold: float) -> bytes:
    """IoU, precision and recall by threshold, with the one that is used."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    at = np.arange(1, STEPS) / STEPS
    counts = [histogram.counts(float(t)) for t in at]
    axes.plot(at, histogram.ious()[1:], label="IoU", color=ORANGE, linewidth=2)
    axes.plot(at, [c.tp / (c.tp + c.fp) if c.tp + c.fp else np.nan for c in counts], label="precision", color=BLUE)
    axes.plot(at, [c.tp / (c.tp + c.fn) if c.tp + c.fn else np.nan for c in counts], label="recall", color=GREEN)
    axes.axvline(threshold, color=GREY, linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel="threshold", xlim=(0, 1), ylim=(0, 1), title="buildings, by threshold")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center")
    return to_png(figure)


def draw_calibration(histogram: Histogram, uncalibrated: Histogram | None) -> bytes:
    """How often a pixel of a predicted probability is building, and below, how many pixels there are of each.

    `uncalibrated` are the probabilities without the temperature of the bundle, if it has one.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    predicted, observed, pixels = histogram.reliability()
    above.plot((0, 1), (0, 1), color=GREY, linestyle="--")
    if uncalibrated is not None:
        above.plot(*uncalibrated.reliability()[:2], color=ORANGE, marker=".", label="without temperature")
    above.plot(predicted, observed, color=BLUE, marker="o", label="as it is")
    above.legend(loc="upper left")
    error = histogram.calibration_error()
    title = "no valid pixel" if error is None else f"expected calibration error {error:.4f}"
    above.set(ylabel="share that is building", xlim=(0, 1), ylim=(0, 1), title=title)
    below.bar(predicted, pixels, width=0.05, color=BLUE)
    below.set(xlabel="predicted probability", ylabel="pixels", yscale="log")
    return to_png(figure)


def draw_scale(points: Sequence[dict[str, Any]]) -> bytes:
    """Rate, efficiency and memory by the number of windows, a line for each number of actors and size of windows."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    titles = {"pipe_mpx_s": "useful Mpx/s", "efficiency": "share of the slower stage", "host_peak_mb": "memory, MB"}
    lines = sorted({(p["actors"], p["window"]) for p in points})
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for actors, window in lines:
            line = sorted((p["windows"], p[name]) for p in points if (p["actors"], p["window"]) == (actors, window))
            axes.plot(*zip(*line, strict=True), marker="o", label=f"{actors} actors, windows of {window} px")
        axes.set(title=title, xlabel="windows", xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    return to_png(figure)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
