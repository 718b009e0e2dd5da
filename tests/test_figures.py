"""Figures are pictures with something in them, whatever is missing from the figures they are drawn from."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from seg_core.plots.figures import draw_calibration, draw_curves, draw_scale, draw_thresholds
from seg_core.plots.pictures import (
    GREEN,
    MISSING_GREY,
    RED,
    WHITE,
    Panel,
    assemble_mask,
    assemble_panels,
    coverage_panel,
    paint_errors,
    paint_mask,
)
from seg_core.run.rows import encode_mask
from seg_core.training.metrics import Histogram, histogram

Rgb = NDArray[np.uint8]


def decode(png: bytes) -> Rgb:
    """A PNG's pixels, RGB."""
    assert png.startswith(b"\x89PNG\r\n")
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels[..., ::-1]


def coloured(pixels: Rgb) -> int:
    """Number of pixels that are not grey: those of the lines, for frames and letters are black."""
    return int(np.count_nonzero(np.ptp(pixels.astype(int), axis=2) > 40))


def epoch(number: int, **changes: float | None) -> dict[str, Any]:
    scores = {"val_iou": 0.1 * number, "val_precision": 0.8, "val_recall": 0.1 * number}
    return {"epoch": number, "loss": 1 / number, "lr": 1e-3 / number, **scores, **changes}


def random_histogram(seed: int = 0) -> Histogram:
    rng = np.random.default_rng(seed)
    probability = rng.random(5000).astype(np.float32)
    return histogram(probability, rng.random(5000) < probability, np.ones(5000, np.bool_))


NOTHING = dict.fromkeys(("val_iou", "val_precision", "val_recall"))


@pytest.mark.parametrize(
    "epochs",
    [
        [epoch(1)],
        [epoch(n) for n in range(1, 6)],
        [epoch(n, **NOTHING) for n in range(1, 4)],
        [epoch(1, **NOTHING), epoch(2), epoch(3, val_precision=None)],
    ],
    ids=["one epoch", "five epochs", "no scores", "some scores"],
)
def test_the_curves_of_a_training_run_are_drawn(epochs: list[dict[str, Any]]) -> None:
    pixels = decode(draw_curves(epochs))
    assert pixels.shape == (400, 1300, 3)
    assert coloured(pixels) > 100


def test_curves_show_what_the_epochs_were_like() -> None:
    one, other = ([epoch(n, loss=loss) for n in range(1, 4)] for loss in (1.0, 2.0))
    one[2]["loss"] = 1.5
    assert not np.array_equal(decode(draw_curves(one)), decode(draw_curves(other)))
    scored, unscored = ([epoch(n, **scores) for n in range(1, 4)] for scores in ({}, NOTHING))
    assert coloured(decode(draw_curves(scored))) > coloured(decode(draw_curves(unscored))) + 100


NO_BUILDING = histogram(np.array([0.2, 0.9], np.float32), np.zeros(2, np.bool_), np.ones(2, np.bool_))
ALL_BUILDING = histogram(np.array([0.2, 0.9], np.float32), np.ones(2, np.bool_), np.ones(2, np.bool_))


@pytest.mark.parametrize(
    "pixels",
    [random_histogram(), Histogram.empty(), NO_BUILDING, ALL_BUILDING],
    ids=["random", "empty", "no building", "all building"],
)
@pytest.mark.parametrize(
    "draw",
    [lambda h: draw_thresholds(h, 0.5), lambda h: draw_calibration(h, None), lambda h: draw_calibration(h, h)],
    ids=["thresholds", "calibration", "calibration with temperature"],
)
def test_histograms_are_drawn(draw: Callable[[Histogram], bytes], pixels: Histogram) -> None:
    picture = decode(draw(pixels))
    assert min(picture.shape[:2]) > 400
    assert np.count_nonzero(picture.min(axis=2) < 128) > 500


def test_the_threshold_that_is_used_is_in_the_figure() -> None:
    first, second = (decode(draw_thresholds(random_histogram(), threshold)) for threshold in (0.25, 0.75))
    assert not np.array_equal(first, second)


def test_errors_are_painted_in_the_colours_of_their_kind() -> None:
    truth = np.array([[True, False, True, False]])
    predicted = np.array([[True, True, False, False]])
    image = np.full((1, 4, 3), (90, 90, 90), np.uint8)
    found = paint_errors(image, predicted, truth)
    expected = [(0.35 * 45 + 0.65 * np.array(colour)).astype(np.uint8) for colour in (WHITE, GREEN, RED)]
    assert np.abs(found[0, :3].astype(int) - expected).max() <= 1
    assert found[0, 3].tolist() == [45, 45, 45]
    hit, false, missed, _ = found[0].astype(int)
    assert np.ptp(hit) == 0
    assert hit[0] > 150
    assert false.argmax() == 1
    assert missed.argmax() == 0


def test_what_is_no_building_is_painted_in_grey_and_the_image_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    before = image.copy()
    none = np.zeros((30, 40), np.bool_)
    found = paint_errors(image, none, none)
    assert found.shape == image.shape
    assert (np.ptp(found, axis=2) == 0).all()
    assert np.abs(found[..., 0] * 2.0 - cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)).max() <= 1
    paint_errors(image, ~none, none)
    paint_mask(image, ~none)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("number", "columns", "rows"), [(4, 2, 2), (4, 4, 1), (12, 4, 3), (1, 1, 1)])
def test_panels_stand_side_by_side_so_many_in_a_row(number: int, columns: int, rows: int) -> None:
    panels = [Panel(f"panel {i}", np.full((50, 70, 3), (10 * i, 100, 200), np.uint8)) for i in range(number)]
    pixels = decode(assemble_panels(panels, columns))
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    for i in range(number):
        row, col = divmod(i, columns)
        middle = pixels[row * height + height // 2, col * width + width // 2]
        assert middle.tolist() == [10 * i, 100, 200]
        title = pixels[row * height : row * height + 35, col * width : (col + 1) * width]
        assert (title.min(axis=2) < 100).any()


def test_a_picture_keeps_its_proportions() -> None:
    pixels = decode(assemble_panels([Panel("wide", np.full((50, 200, 3), (10, 100, 200), np.uint8))], 1))
    rows, cols = np.nonzero((pixels == (10, 100, 200)).all(axis=2))
    assert np.ptp(cols) == pytest.approx(640, abs=3)
    assert np.ptp(rows) == pytest.approx(160, abs=3)


def tile(row_off: int, col_off: int, coverage: float | None, side: int = 100) -> dict[str, Any]:
    mask = None if not coverage else encode_mask(np.ones((side, side), np.bool_))
    return {
        "row_off": row_off, "col_off": col_off, "height": side, "width": side, "coverage": coverage, "mask": mask,
    }  # fmt: skip


def test_tiles_have_the_colour_of_their_coverage_and_its_figure_in_them() -> None:
    rows = [tile(0, 0, 0.0), tile(0, 100, 0.5), tile(100, 0, None)]
    panel = coverage_panel("coverage", rows, 200, 200)
    assert panel.picture[50, 50].tolist() == [68, 1, 84]  # viridis from its lowest
    assert panel.picture[50, 150].tolist() == [253, 231, 37]  # to its highest
    assert panel.picture[150, 50].tolist() == panel.picture[150, 150].tolist() == [MISSING_GREY] * 3
    assert panel.picture[0, 0].tolist() == list(WHITE)
    found = [(label.row, label.col, label.text, label.color) for label in panel.labels]
    assert found == [(50, 50, "0 %", "white"), (50, 150, "50 %", "black")]
    plain = decode(assemble_panels([panel._replace(labels=())], 1))
    lettered = decode(assemble_panels([panel], 1))
    rows_of_text, cols_of_text = np.nonzero((plain != lettered).any(axis=2))
    assert (rows_of_text.min() > 40 + 640 * 0.15) & (rows_of_text.max() < 40 + 640 * 0.35)
    assert (cols_of_text.min() > 10) & (cols_of_text.max() < 10 + 640)


def test_masks_of_tiles_are_put_together() -> None:
    mask = assemble_mask([tile(0, 0, 0.0), tile(0, 100, 1.0)], 100, 200)
    assert not mask[:, :100].any()
    assert mask[:, 100:].all()


def test_growth_is_drawn_with_a_line_for_each_crew_and_window() -> None:
    def point(windows: int, window: int) -> dict[str, Any]:
        return {
            "windows": windows, "window": window, "actors": 1, "pipe_mpx_s": 2.0, "efficiency": 0.9,
            "host_peak_mb": 900 + windows,
        }  # fmt: skip

    one = coloured(decode(draw_scale([point(10, 512), point(100, 512)])))
    assert one > 500
    assert (
        coloured(decode(draw_scale([*(point(n, w) for n in (10, 100) for w in (512, 1024)), point(1000, 512)]))) > one
    )
