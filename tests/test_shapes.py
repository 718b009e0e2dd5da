"""Buildings are matched as SpaceNet does, boundaries compared as Cheng et al. do, however an image comes in blocks."""

import cv2
import numpy as np
import pytest
import rasterio.features
import shapely
import shapely.geometry
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seg_core.grid import Window, buffered, intersection, split
from seg_core.training.shapes import (
    BOUNDARY_PX,
    MIN_BUILDING_PX,
    ShapeCounter,
    ShapeCounts,
    count_shapes,
    find_boundary,
    shape_scores,
)

Mask = NDArray[np.bool_]


def draw(*boxes: tuple[int, int, int, int]) -> Mask:
    """A mask of 40 x 60 px that holds boxes: row, column, height, width."""
    mask = np.zeros((40, 60), np.bool_)
    for row, col, height, width in boxes:
        mask[row : row + height, col : col + width] = True
    return mask


def town(seed: int, shape: tuple[int, int] = (70, 90)) -> tuple[Mask, Mask]:
    """Prediction and truth: boxes that are moved a little, some of which touch."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, *shape), np.bool_)
    for _ in range(40):
        row, col, height, width = rng.integers(0, [*shape, 16, 16])
        for mask in masks[: 1 + (rng.random() < 0.8)] if rng.random() < 0.9 else masks[1:]:
            down, right = rng.integers(0, 3, 2)
            mask[row + down : row + down + height, col + right : col + right + width] = True
    return masks[0], masks[1]


def buildings(predicted: Mask, truth: Mask) -> tuple[int, ...]:
    return count_shapes(predicted, truth)[:3]


BOX = (5, 5, 10, 10)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([], [], (0, 0, 0)),
        ([BOX], [], (0, 1, 0)),
        ([], [BOX], (0, 0, 1)),
        ([BOX], [BOX], (1, 0, 0)),
        ([BOX], [(5, 5, 10, 5)], (1, 0, 0)),  # IoU 0.5
        ([BOX], [(5, 5, 10, 4)], (0, 1, 1)),  # IoU 0.4
        ([(5, 5, 10, 4)], [BOX], (0, 1, 1)),
        ([BOX], [(5, 5, 10, 5), (5, 11, 10, 4)], (1, 0, 1)),
        ([(5, 5, 10, 12)], [(5, 5, 10, 5), (5, 11, 10, 6)], (1, 0, 1)),  # the second has 0.5
        ([(5, 5, 10, 5), (5, 11, 10, 4)], [BOX], (1, 1, 0)),  # halves
        ([BOX, (25, 25, 10, 10)], [BOX, (25, 26, 10, 10), (5, 40, 6, 6)], (2, 0, 1)),
        ([(0, 0, 10, 10), (30, 50, 10, 10)], [(0, 0, 10, 10), (30, 50, 10, 10)], (2, 0, 0)),  # at the edge
        ([(5, 5, 4, 5)], [(5, 5, 4, 5)], (1, 0, 0)),  # 20 px
        ([(5, 5, 1, 19)], [(5, 5, 1, 19)], (0, 0, 0)),  # 19 px: too small to be a building
        ([(5, 5, 1, 19)], [(5, 5, 1, 20)], (0, 0, 1)),
        ([BOX, (15, 15, 10, 10)], [BOX], (1, 1, 0)),  # corners do not connect
        ([BOX, (15, 14, 10, 10)], [BOX], (1, 0, 0)),  # sides do, and 100 of 200 px are right
        ([BOX, (15, 14, 10, 11)], [BOX], (0, 1, 1)),
    ],
)
def test_buildings_are_found_from_an_iou_of_a_half(
    predicted: list[tuple[int, int, int, int]], truth: list[tuple[int, int, int, int]], expected: tuple[int, ...]
) -> None:
    assert buildings(draw(*predicted), draw(*truth)) == expected


def polygons(mask: Mask) -> list[shapely.Polygon]:
    found = rasterio.features.shapes(mask.astype(np.uint8), mask, connectivity=4)
    shapes = [shapely.geometry.shape(shape) for shape, _ in found]
    return [shape for shape in shapes if shape.area >= MIN_BUILDING_PX]


def spacenet(predicted: Mask, truth: Mask) -> tuple[int, int, int]:
    """The counts by polygons: each proposal takes the truth with the best IoU that is left."""
    proposals, left, matched = polygons(predicted), polygons(truth), 0
    num_truth = len(left)
    for proposal in proposals:
        ious = [proposal.intersection(each).area / proposal.union(each).area for each in left]
        if ious and max(ious) >= 0.5:
            del left[int(np.argmax(ious))]
            matched += 1
    return matched, len(proposals) - matched, num_truth - matched


@pytest.mark.parametrize("seed", range(6))
def test_buildings_are_those_of_the_polygons(seed: int) -> None:
    predicted, truth = town(seed)
    found = buildings(predicted, truth)
    assert found == spacenet(predicted, truth)
    assert min(found) > 0


def reference_boundary(mask: Mask, distance: int) -> Mask:
    """As the authors of boundary IoU compute it."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return mask & (eroded == 0)


@pytest.mark.parametrize("distance", [1, 3, 8])
def test_boundaries_are_those_of_the_authors(distance: int) -> None:
    for mask in (*town(0), np.ones((9, 30), np.bool_), np.zeros((5, 5), np.bool_)):
        assert np.array_equal(find_boundary(mask, distance), reference_boundary(mask, distance))


def test_boundary_iou_by_hand() -> None:
    """A box of 20 x 20 px has a rim of 400 - 14 * 14 px, 3 px wide. Of one moved by a column, 170 px coincide.

    Those are 6 rows of 19 px, and 14 rows of twice 2 px.
    """
    found = count_shapes(draw((10, 10, 20, 20)), draw((10, 11, 20, 20)))
    assert found == ShapeCounts(1, 0, 0, 6 * 19 + 14 * 4, 2 * 204 - 170)


def count_in_blocks(predicted: Mask, truth: Mask, size: int, order: list[int] | None = None) -> ShapeCounts:
    whole = Window(0, 0, *truth.shape)
    counter = ShapeCounter(whole)
    blocks = list(split(whole, size))
    for number in order or range(len(blocks)):
        block = blocks[number]
        frame = intersection(buffered(block, BOUNDARY_PX), whole)
        counter.add(predicted[frame.slices(whole)], truth[frame.slices(whole)], frame, block)
    return counter.finish()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.randoms())
@settings(max_examples=60, deadline=None)
def test_an_image_in_blocks_counts_as_in_one_piece(seed: int, height: int, width: int, size: int, rng: object) -> None:
    predicted, truth = town(seed, (height, width))
    order = list(range(len(list(split(Window(0, 0, height, width), size)))))
    rng.shuffle(order)  # type: ignore[attr-defined]
    assert count_in_blocks(predicted, truth, size, order) == count_shapes(predicted, truth)


def test_a_building_that_winds_through_blocks_is_one() -> None:
    """A spiral of 2 px comes back to blocks that it has left long before."""
    spiral = np.zeros((64, 64), np.bool_)
    for k in range(0, 28, 4):
        spiral[k : k + 2, max(0, k - 4) : 64 - k] = spiral[62 - k : 64 - k, k : 64 - k] = True
        spiral[k : 64 - k, 62 - k : 64 - k] = spiral[k + 4 : 64 - k, k : k + 2] = True
    number, _ = cv2.connectedComponents(spiral.astype(np.uint8), connectivity=4)
    assert number == 2
    for order in (range(64), reversed(range(64))):
        assert count_in_blocks(spiral, spiral, 8, list(order))[:3] == (1, 0, 0)


def test_a_building_is_compared_when_all_of_it_is_known() -> None:
    """In the first block of 20 px the boxes are nearly equal. One ends there, and one goes on in the second."""
    small, large = draw((5, 9, 10, 10)), draw((5, 9, 10, 30))
    for masks, expected in (((small, large), (0, 1, 1)), ((large, small), (0, 1, 1)), ((large, large), (1, 0, 0))):
        assert count_in_blocks(*masks, 20)[:3] == expected
    assert count_in_blocks(small, draw((5, 9, 10, 20)), 20)[:3] == (1, 0, 0)


def test_what_is_kept_of_an_image_does_not_grow_with_its_height() -> None:
    predicted, truth = town(3, (48, 48))
    counter, kept = ShapeCounter(Window(0, 0, 40 * 48, 48)), []
    for row in range(40):
        block = Window(48 * row, 0, 48, 48)
        counter.add(predicted, truth, block, block)
        held = counter._predicted.sizes, counter._truth.sizes, counter._overlaps, counter._predicted._parents
        kept.append(sum(map(len, held)))
    assert max(kept[20:]) <= 2 * max(kept[1:5])


def test_images_are_summed_before_anything_is_divided() -> None:
    total = ShapeCounts(1, 0, 0, 1, 4).plus(ShapeCounts(1, 4, 2, 1, 1))
    assert total == ShapeCounts(2, 4, 2, 2, 5)
    assert shape_scores(total) == {
        "building_precision": 2 / 6,
        "building_recall": 0.5,
        "building_f1": 4 / 10,
        "boundary_iou": 0.4,
    }
    assert set(shape_scores(ShapeCounts()).values()) == {None}
