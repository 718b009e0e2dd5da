"""Tiles, windows and parts partition a scene and nest; chips keep the network's grid; reflection is numpy's."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seg_core.grid import (
    Window,
    bounding_window,
    chip_window,
    expand_reflection,
    num_splits,
    reflect,
    reflect_window,
    round_up,
    split,
    unreflected_view,
)

seeded = settings(derandomize=True, deadline=None, max_examples=100)

offsets = st.integers(-(10**7), 10**7)
lengths = st.integers(1, 40)
windows = st.builds(Window, offsets, offsets, lengths, lengths)


def visits(window: Window, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """How many of the splits hold each pixel of the window, with a margin of 2 px that none may hold."""
    found = np.zeros((window.height + 4, window.width + 4), np.int64)
    for row_off, col_off, height, width in split(window, size):
        top, left = row_off - window.row_off + 2, col_off - window.col_off + 2
        assert min(top, left, height, width) > 0
        found[top : top + height, left : left + width] += 1
    return found


@seeded
@given(windows, st.integers(1, 50))
@example(Window(0, 0, 1, 1), 1)
@example(Window(0, 0, 1, 1), 256)
@example(Window(0, 0, 16, 16), 16)
@example(Window(0, 0, 17, 15), 16)
@example(Window(0, 0, 33, 1), 16)
@example(Window(3, 5, 31, 32), 16)
def test_split_holds_every_pixel_once_and_no_other(window: Window, size: int) -> None:
    expected = np.pad(np.ones((window.height, window.width), np.int64), 2)
    assert np.array_equal(visits(window, size), expected)


@seeded
@given(windows, st.integers(1, 50))
def test_split_yields_squares_row_by_row_cut_short_only_at_the_right_and_bottom(window: Window, size: int) -> None:
    found = list(split(window, size))
    bottom, right = window.row_off + window.height, window.col_off + window.width
    assert found == sorted(found)
    assert all(w.height == size or w.row_off + w.height == bottom for w in found)
    assert all(w.width == size or w.col_off + w.width == right for w in found)


@seeded
@given(windows, st.integers(1, 50))
def test_num_splits_is_the_number_of_splits(window: Window, size: int) -> None:
    assert num_splits(window, size) == len(list(split(window, size)))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (200_000, 150_001, 1024),
        (1, 10_000_001, 512),
        (9_999_999, 1, 512),
        (65_537, 65_535, 256),
        (40_000, 40_000, 1000),
    ],
)
def test_splits_of_a_huge_window_add_up(height: int, width: int, size: int) -> None:
    window = Window(0, 0, height, width)
    found = np.array(list(split(window, size)), dtype=np.int64)
    row_off, col_off, heights, widths = found.T
    assert len(found) == num_splits(window, size)
    assert int((heights * widths).sum()) == height * width
    # Each on a knot of the grid of its own and none larger than the grid's mesh: with the sum, nothing overlaps.
    assert not (row_off % size).any()
    assert not (col_off % size).any()
    assert len(np.unique(found[:, :2], axis=0)) == len(found)
    assert min(heights.min(), widths.min()) >= 1
    assert max(heights.max(), widths.max()) <= size
    assert ((row_off + heights).max(), (col_off + widths).max()) == (height, width)


def test_num_splits_counts_what_could_never_be_listed() -> None:
    assert num_splits(Window(0, 0, 10**9, 10**9 + 1), 1000) == 10**6 * (10**6 + 1)


@seeded
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
def test_parts_windows_and_tiles_nest(height: int, width: int, tile: int, tiles: int, windows: int) -> None:
    scene = Window(0, 0, height, width)
    window, part = tile * tiles, tile * tiles * windows
    nested = [t for p in split(scene, part) for w in split(p, window) for t in split(w, tile)]
    assert sorted(nested) == list(split(scene, tile))


@seeded
@given(st.integers(0, 10**9), st.integers(1, 10**4))
def test_round_up_gives_the_least_multiple(length: int, multiple: int) -> None:
    found = round_up(length, multiple)
    assert found % multiple == 0
    assert 0 <= found - length < multiple


@seeded
@given(
    st.sampled_from([1, 2, 4, 16, 32]),
    st.tuples(st.integers(0, 100), st.integers(0, 100)),
    st.integers(0, 8),
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
)
@example(16, (1, 2), 6, (2048, 2047))
@example(16, (1, 2), 6, (2048 - 192, 2049 - 192))
def test_chips_lie_on_the_stride_and_hold_the_halo(
    stride: int, place: tuple[int, int], halo: int, size: tuple[int, int]
) -> None:
    window, halo = Window(place[0] * stride, place[1] * stride, *size), halo * stride
    chip = chip_window(window, halo, stride)
    assert not any(length % stride for length in chip)
    assert (chip.row_off, chip.col_off) == (window.row_off - halo, window.col_off - halo)
    least = chip_window(Window(0, 0, 1, 1), 0, 1)
    for length, within, shortest in zip(chip.shape, size, least.shape, strict=True):
        assert 0 <= length - max(within + 2 * halo, shortest) < stride


@seeded
@given(st.integers(1, 30), st.integers(-100, 100), st.integers(1, 100))
@example(1, -100, 100)
@example(1, 0, 1)
@example(2, -7, 20)
@example(2, 50, 3)
@example(3, -3, 100)
def test_reflection_is_that_of_numpy_pad(size: int, start: int, length: int) -> None:
    stop = start + length
    before = max(0, -start)
    continued = np.pad(np.arange(size), (before, max(0, stop - size)), mode="reflect")
    assert np.array_equal(reflect(start, stop, size), continued[start + before : stop + before])


@seeded
@given(st.integers(2, 10**6), st.integers(-(10**7), 10**7))
def test_reflection_repeats_no_edge_and_moves_pixel_by_pixel(size: int, start: int) -> None:
    found = reflect(start, start + 50, size)
    assert found.min() >= 0
    assert found.max() < size
    assert set(np.abs(np.diff(found))) == {1}


def test_inside_the_scene_reflection_changes_nothing() -> None:
    assert reflect(0, 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert reflect(-2, 7, 5).tolist() == [2, 1, 0, 1, 2, 3, 4, 3, 2]


@given(st.lists(st.builds(Window, *[st.integers(-60, 60)] * 2, *[st.integers(1, 90)] * 2), min_size=1, max_size=5))
def test_the_hull_of_windows_touches_them_on_every_side(windows: list[Window]) -> None:
    found = bounding_window(windows)
    assert bounding_window([found, *windows]) == found
    for side, furthest in (("row_off", min), ("col_off", min), ("bottom", max), ("right", max)):
        assert getattr(found, side) == furthest(getattr(at, side) for at in windows)


def test_an_axis_of_one_pixel_repeats_it() -> None:
    assert reflect(-96, 97, 1).tolist() == [0] * 193


SIDES = st.integers(1, 70)


@given(SIDES, SIDES, st.integers(-60, 60), st.integers(-60, 60), st.integers(1, 90), st.integers(1, 90))
def test_a_folded_window_unfolds_to_what_numpy_pads(
    height: int, width: int, top: int, left: int, rows: int, cols: int
) -> None:
    image = np.arange(2 * height * width).reshape(2, height, width)
    box, down, across = reflect_window(Window(top, left, rows, cols), height, width)
    read = image[:, *box.slices(Window(0, 0, height, width))].copy()
    found = expand_reflection(read, down, across)
    expected = image[:, reflect(top, top + rows, height)[:, None], reflect(left, left + cols, width)]
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous
    assert found is read or box != Window(top, left, rows, cols)


@given(SIDES, SIDES, st.integers(-60, 60), st.integers(-60, 60), st.integers(1, 90), st.integers(1, 90))
@example(70, 70, -16, -16, 86, 40)  # a scene's corner
@example(20, 70, -30, 0, 70, 30)  # more than once across it
def test_a_window_unfolds_around_what_was_read_into_its_place(
    height: int, width: int, top: int, left: int, rows: int, cols: int
) -> None:
    image = np.arange(2 * height * width).reshape(2, height, width)
    box, down, across = reflect_window(Window(top, left, rows, cols), height, width)
    read = image[:, *box.slices(Window(0, 0, height, width))]
    found = np.full((2, rows, cols), -1)
    place = unreflected_view(found, down, across)
    if place is not None:
        place[...] = read
        read = place
    assert expand_reflection(read, down, across, found) is found
    expected = image[:, reflect(top, top + rows, height)[:, None], reflect(left, left + cols, width)]
    assert np.array_equal(found, expected)
    # In one piece it is wherever the window reaches no further beyond the scene than into it.
    reach = ((top, rows, height), (left, cols, width))
    if all(max(-at, at + long - side, 0) < min(at + long, side) - max(at, 0) for at, long, side in reach):
        assert place is not None
