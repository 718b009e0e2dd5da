"""A run is scored against labels as they mean it, and only against those."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeBundle, MakeScene
from numpy.typing import NDArray
from test_failures import SETTINGS, Made, made, rows_of, work  # noqa: F401 - made is a fixture

from seg_core.bundle import read_bundle
from seg_core.coverage import decode_mask
from seg_core.dataset import Classes
from seg_core.errors import SegError
from seg_core.metrics import Counts, count
from seg_core.plan import make_plan
from seg_core.region import read_region
from seg_core.results import part_path
from seg_core.run import open_run
from seg_core.scoring import score_run

GREY = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
TRUTH = np.random.default_rng(7).random((256, 500)) < 0.3


@pytest.fixture
def run(made: Made) -> str:  # noqa: F811
    work(made)
    return made[2]


@pytest.fixture
def expected(run: str, made: Made) -> Counts:  # noqa: F811, ARG001
    mask = np.zeros(TRUTH.shape, np.bool_)
    for row in rows_of(made):
        at = np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]
        mask[at] = decode_mask(row["mask"], row["height"], row["width"])
    return count(mask, TRUTH, np.ones_like(TRUTH))


def label(*values: int) -> NDArray[np.uint8]:
    """One band: the first value where there is no building, the second where there is one."""
    return np.where(TRUTH, values[1], values[0]).astype(np.uint8)[None]


@pytest.mark.parametrize(
    ("pixels", "classes", "options"),
    [
        (label(0, 1), None, {}),
        (label(0, 1), None, {"nodata": 255}),
        (label(0, 255), GREY, {}),
        (np.repeat(label(0, 255), 3, axis=0), GREY, {}),
        (label(1, 2), Classes(GREY.names, ((1, 1, 1), (2, 2, 2))), {}),
    ],
)
def test_labels_mean_what_their_classes_say_or_1_is_building(
    run: str, expected: Counts, make_scene: MakeScene, pixels: Any, classes: Classes | None, options: dict[str, Any]
) -> None:
    assert score_run(run, make_scene("label.tif", pixels=pixels, **options), classes) == (expected, 0)
    assert expected.tp > 0


@pytest.mark.parametrize(
    ("pixels", "classes", "options", "reason"),
    [
        (label(0, 255), None, {}, "holds no 1, but 255: in a label of one band 1 is building.* --data; "),
        (label(1, 2), None, {}, "holds 2: in a label of one band"),
        (label(0, 1), None, {"nodata": 0}, "its nodata value is 0, which is a class: gdal_edit -unsetnodata"),
        (label(0, 255), GREY, {"nodata": 0}, "its nodata value is 0, which is a class"),
        (np.repeat(label(0, 255), 3, axis=0), None, {}, "a label in colours: name its label_class_dict.csv's folder"),
        (label(0, 7), GREY, {}, r"colour \(7, 7, 7\) at row 0, column \d+ is not in"),
        (label(0, 1), None, {"transform": (1.0, 0.0, 500_000.0, 0.0, -1.0, 5_800_000.0)}, "lies elsewhere"),
    ],
)
def test_labels_that_could_mean_something_else_are_refused(
    run: str, make_scene: MakeScene, pixels: Any, classes: Classes | None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SegError, match=rf"label\.tif: .*{reason}"):
        score_run(run, make_scene("label.tif", pixels=pixels, **options), classes)


def test_missing_pixels_of_a_label_are_not_scored(run: str, make_scene: MakeScene) -> None:
    pixels = label(0, 1)
    pixels[:, :100] = 255
    found, _ = score_run(run, make_scene("label.tif", pixels=pixels), None)
    assert sum(found) == 156 * 500
    pixels = np.full_like(pixels, 255)
    found, _ = score_run(run, make_scene("label.tif", pixels=pixels, nodata=255), None)  # it says itself what 255 is
    assert sum(found) == 0


def test_a_scene_without_a_building_may_have_missing_pixels(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make_scene(f"two/{name}.tif", 64, 64)
    plan, _ = make_plan(read_region([str(tmp_path / "two")])[0], read_bundle(model := make_bundle()), SETTINGS)
    open_run(run := str(tmp_path / "both"), plan, model)
    work((plan, model, run))
    with_building, without = np.zeros((2, 1, 64, 64), np.uint8)
    with_building[:, :9], without[:, :5] = 1, 255
    make_scene("labels/a.tif", pixels=with_building)
    make_scene("labels/b.tif", pixels=without)
    found, _ = score_run(run, str(tmp_path / "labels"), None)
    assert sum(found) == 64 * 64 + 59 * 64


def test_failed_tiles_are_counted_and_left_out(made: Made, make_scene: MakeScene) -> None:  # noqa: F811
    Path(made[0].scenes[0].uri).rename(f"{made[0].scenes[0].uri}.away")
    work(made)
    Path(f"{made[0].scenes[0].uri}.away").rename(made[0].scenes[0].uri)
    found, failed = score_run(made[2], make_scene("label.tif", pixels=label(0, 1)), None)
    assert (sum(found), failed) == (0, 32)


def test_a_run_that_is_not_finished_is_not_scored(made: Made, run: str, make_scene: MakeScene) -> None:  # noqa: F811
    Path(part_path(run, next(iter(made[0].parts())).key)).unlink()
    with pytest.raises(SegError, match=r"run: 1 of 2 parts are not done yet: finish the run"):
        score_run(run, make_scene("label.tif", pixels=label(0, 1)), None)
