"""Rows of tiles: their figures against the stored masks, their areas against other ways to compute them."""

import math
import struct
import zlib
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from conftest import NORTH_UP, UTM, window_figures
from numpy.typing import NDArray
from pyproj import Proj
from rasterio.io import MemoryFile
from runs import bare_scene

from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.georef import Transform
from seg_core.imagery.scene import Scene
from seg_core.run.rows import (
    Failure,
    Row,
    _write_png,
    decode_bits,
    decode_mask,
    decode_valid,
    encode_mask,
    failed_rows,
    measure,
    tile_rows,
)

MAJOR, FLATTENING = 6_378_137.0, 1 / 298.257223563  # WGS 84
SQUARED = FLATTENING * (2 - FLATTENING)  # its eccentricity
FIGURES = ("valid_px", "building_px", "coverage", "area_m2", "building_m2", "mean_probability")
FIGURES += ("mask", "valid", "probability")

Probability = NDArray[np.float32]
Valid = NDArray[np.bool_]


def draw(height: int, width: int) -> tuple[Probability, Valid]:
    """Random probabilities, and a validity with a block and single pixels missing."""
    rng = np.random.default_rng(5)
    valid = rng.random((height, width)) > 0.1
    valid[: height // 2, width // 3 : 2 * width // 3] = False
    return rng.random((height, width), dtype=np.float32), valid


def rows_of(
    scene: Scene,
    probability: Probability,
    valid: Valid,
    *,
    tile_size: int = 32,
    window: Window | None = None,
    threshold: float = 0.5,
    keep: bool = False,
) -> list[Row]:
    window = window or scene.window
    figures = window_figures(probability, valid, tile_size, threshold, keep=keep)
    return list(tile_rows(scene, window, tile_size, figures))


def inside(row: Row) -> tuple[slice, slice]:
    """Where a row's tile is in its scene."""
    return np.s_[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]]


def test_figures_recomputed_from_the_stored_masks_are_the_stored_ones() -> None:
    probability, valid = draw(100, 120)
    for row in rows_of(bare_scene(100, 120), probability, valid):
        mask = decode_mask(row["mask"], row["height"], row["width"])
        at = inside(row)
        assert np.array_equal(mask, (probability[at] >= 0.5) & valid[at])
        assert row["building_px"] == mask.sum()
        assert row["valid_px"] == valid[at].sum()
        assert (row["valid"] is None) == (valid[at].all() or not valid[at].any())
        assert np.array_equal(decode_valid(row), valid[at])
        assert row["coverage"] == (mask.sum() / valid[at].sum() if valid[at].any() else None)
        if valid[at].any():
            assert row["mean_probability"] == pytest.approx(probability[at][valid[at]].astype(float).mean())
            assert row["building_m2"] / row["area_m2"] == pytest.approx(row["coverage"])


def test_missing_pixels_count_neither_as_building_nor_as_background() -> None:
    probability, valid = draw(64, 64)
    building = probability >= 0.5
    counted = building & valid
    figures = measure(np.packbits(counted, axis=-1), 64, int(valid.sum()), int(counted.sum()), 100.0)
    assert figures["valid_px"] == valid.sum() < 64 * 64
    assert figures["building_px"] == (building & valid).sum() < building.sum()
    assert figures["coverage"] == (building & valid).sum() / valid.sum()
    assert figures["mean_probability"] == 100.0 / valid.sum()


def test_a_tile_of_missing_pixels_has_no_coverage_and_no_mask() -> None:
    nothing = np.zeros((32, 32), np.bool_)
    for probability in (np.zeros((32, 32), np.float32), np.ones((32, 32), np.float32)):
        (row,) = rows_of(bare_scene(32, 32), probability, nothing)
        assert row["status"] == "done"
        assert (row["valid_px"], row["building_px"]) == (0, 0)
        assert (row["coverage"], row["mean_probability"], row["mask"]) == (None, None, None)
        assert (row["area_m2"], row["building_m2"]) == (0.0, 0.0)


def test_a_tile_without_building_has_coverage_0_and_no_mask() -> None:
    (row,) = rows_of(bare_scene(32, 32), np.full((32, 32), 0.25, np.float32), np.ones((32, 32), np.bool_))
    assert (row["valid_px"], row["building_px"], row["coverage"]) == (1024, 0, 0.0)
    assert (row["mask"], row["building_m2"], row["mean_probability"]) == (None, 0.0, 0.25)


def test_tiles_are_numbered_on_the_scenes_grid_and_cut_short_at_its_edge() -> None:
    scene = bare_scene(100, 75)
    probability, valid = draw(100, 75)
    rows = rows_of(scene, probability, valid)
    assert [(r["tile_row"], r["tile_col"]) for r in rows] == [(i, j) for i in range(4) for j in range(3)]
    assert {(r["row_off"], r["height"]) for r in rows} == {(0, 32), (32, 32), (64, 32), (96, 4)}
    assert {(r["col_off"], r["width"]) for r in rows} == {(0, 32), (32, 32), (64, 11)}
    assert sum(r["height"] * r["width"] for r in rows) == 100 * 75
    assert sum(r["valid_px"] for r in rows) == valid.sum()


def test_rows_of_a_window_are_those_of_the_whole_scene() -> None:
    scene = bare_scene(100, 120)
    probability, valid = draw(100, 120)
    whole = {(r["tile_row"], r["tile_col"]): r for r in rows_of(scene, probability, valid, keep=True)}
    for window in (Window(64, 32, 36, 88), Window(32, 96, 64, 24)):
        at = np.s_[window.row_off : window.row_off + window.height, window.col_off : window.col_off + window.width]
        rows = rows_of(scene, probability[at], valid[at], window=window, keep=True)
        assert rows
        assert all(row == whole[row["tile_row"], row["tile_col"]] for row in rows)


def band(south: float, north: float) -> float:
    """Area of WGS 84's ellipsoid between two latitudes in degrees, per degree of longitude, in square metres."""

    def below(latitude: float) -> float:
        sine, e = math.sin(math.radians(latitude)), math.sqrt(SQUARED)
        return sine / (2 * (1 - SQUARED * sine**2)) + math.atanh(e * sine) / (2 * e)

    return MAJOR**2 * (1 - SQUARED) * math.radians(1) * (below(north) - below(south))


def area_of_one_tile(crs: str, transform: Transform) -> float:
    (row,) = rows_of(bare_scene(32, 32, crs, transform), np.ones((32, 32), np.float32), np.ones((32, 32), np.bool_))
    assert row["building_m2"] == row["area_m2"]
    return float(row["area_m2"])


@pytest.mark.parametrize("easting", [200_000.0, 500_000.0, 800_000.0])
def test_area_of_a_utm_tile_is_that_of_the_map_over_its_areal_scale(easting: float) -> None:
    northing = 5_800_000.0
    proj = Proj(UTM)
    lon, lat = proj(easting + 16, northing - 16, inverse=True)
    expected = 32 * 32 / proj.get_factors(lon, lat).areal_scale
    assert area_of_one_tile(UTM, (1.0, 0.0, easting, 0.0, -1.0, northing)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("latitude", [-70.0, 0.0, 45.0])
def test_area_of_a_lonlat_tile_is_that_of_its_zone_of_the_ellipsoid(latitude: float) -> None:
    step = 1e-4
    expected = band(latitude - 32 * step, latitude) * 32 * step
    found = area_of_one_tile("EPSG:4326", (step, 0.0, 13.0, 0.0, -step, latitude))
    assert found == pytest.approx(expected, rel=1e-5)


def test_area_of_a_web_mercator_tile_at_60_degrees_is_a_quarter_of_its_nominal_one() -> None:
    north = MAJOR * math.log(math.tan(math.pi / 4 + math.radians(60) / 2))
    found = area_of_one_tile("EPSG:3857", (1.0, 0.0, 1_500_000.0, 0.0, -1.0, north))

    def latitude(y: float) -> float:
        return math.degrees(2 * math.atan(math.exp(y / MAJOR)) - math.pi / 2)

    expected = band(latitude(north - 32), latitude(north)) * math.degrees(32 / MAJOR)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(32 * 32 / 4, rel=0.01)


@pytest.mark.parametrize(
    "transform",
    [
        (1.0, 0.0, 5e5, 0.0, 1.0, 5.8e6),  # rows go north
        (-1.0, 0.0, 5e5, 0.0, -1.0, 5.8e6),
        (math.sqrt(0.5), math.sqrt(0.5), 5e5, math.sqrt(0.5), -math.sqrt(0.5), 5.8e6),  # turned by 45 degrees
    ],
)
def test_area_does_not_depend_on_how_the_image_lies(transform: Transform) -> None:
    expected = area_of_one_tile(UTM, (1.0, 0.0, 5e5, 0.0, -1.0, 5.8e6))
    assert area_of_one_tile(UTM, transform) == pytest.approx(expected, rel=1e-5)


def test_area_is_that_of_valid_pixels_only() -> None:
    probability = np.ones((32, 32), np.float32)
    valid = np.ones((32, 32), np.bool_)
    (whole,) = rows_of(bare_scene(32, 32), probability, valid)
    valid[:8] = False
    probability[8:16] = 0
    (row,) = rows_of(bare_scene(32, 32), probability, valid)
    assert row["area_m2"] == pytest.approx(0.75 * whole["area_m2"])
    assert row["building_m2"] == pytest.approx(0.5 * whole["area_m2"])


def test_areas_of_tiles_add_up_to_that_of_the_scene() -> None:
    ones = np.ones((100, 120), np.float32), np.ones((100, 120), np.bool_)
    tiles = rows_of(bare_scene(100, 120), *ones)
    (whole,) = rows_of(bare_scene(100, 120), *ones, tile_size=128)
    assert sum(row["area_m2"] for row in tiles) == pytest.approx(whole["area_m2"], rel=1e-6)


@pytest.mark.parametrize("down", [-1.0, 1.0])  # rows go south, or north
@pytest.mark.parametrize("crs", [UTM, "EPSG:3857"])
def test_geometry_is_the_tile_in_lonlat_counter_clockwise_and_bbox_its_bounds(crs: str, down: float) -> None:
    proj = Proj(crs)
    scene = bare_scene(100, 120, crs, (1.0, 0.0, NORTH_UP[2], 0.0, down, NORTH_UP[5]))
    for row in rows_of(scene, *draw(100, 120)):
        polygon = shapely.from_wkb(row["geometry"])
        assert polygon.is_valid
        assert polygon.exterior.is_ccw
        assert row["bbox"] == dict(zip(("xmin", "ymin", "xmax", "ymax"), polygon.bounds, strict=True))
        left, top = NORTH_UP[2] + row["col_off"], NORTH_UP[5] + down * row["row_off"]
        corners = [(left + x, top + down * y) for x in (0, row["width"]) for y in (0, row["height"])]
        expected = sorted(proj(x, y, inverse=True) for x, y in corners)
        assert np.allclose(sorted(polygon.exterior.coords[:-1]), expected, atol=1e-9)


def test_neighbouring_tiles_share_their_corners_exactly() -> None:
    rows = rows_of(bare_scene(96, 96), *draw(96, 96))
    corners = [point for row in rows for point in shapely.from_wkb(row["geometry"]).exterior.coords[:-1]]
    assert len(set(corners)) == 4 * 4


def test_without_a_crs_geometry_and_areas_are_null_and_the_figures_are_not() -> None:
    probability, valid = draw(64, 64)
    there, here = rows_of(bare_scene(64, 64, None), probability, valid), rows_of(bare_scene(64, 64), probability, valid)
    for row, placed in zip(there, here, strict=True):
        assert (row["geometry"], row["bbox"], row["area_m2"], row["building_m2"]) == (None,) * 4
        same = ("valid_px", "building_px", "coverage", "mean_probability", "mask")
        assert {k: row[k] for k in same} == {k: placed[k] for k in same}


def test_a_failed_row_says_where_and_why_and_has_no_figures() -> None:
    scene = bare_scene(100, 75)
    failed = list(failed_rows(scene, scene.window, 32, Failure("ReadError", "the disk said no")))
    done = rows_of(scene, *draw(100, 75))
    for row, other in zip(failed, done, strict=True):
        assert row["status"] == "failed"
        assert (row["error_class"], row["error"], row["attempts"]) == ("ReadError", "the disk said no", 1)
        assert not {k for k in FIGURES if row.get(k) is not None}
        place = ("scene_id", "tile_row", "tile_col", "row_off", "col_off", "height", "width", "geometry", "bbox")
        assert {k: row[k] for k in place} == {k: other[k] for k in place}


def png_header(png: bytes) -> tuple[int, int, int, int]:
    """Width, height, bit depth and colour type, from the IHDR chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    return width, height, depth, colour


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 8), (32, 32), (33, 31), (512, 512)])
def test_a_mask_is_a_png_of_1_bit_grey_and_comes_back(height: int, width: int) -> None:
    mask = np.random.default_rng(height * width).random((height, width)) > 0.5
    mask.flat[-1] = True
    png = encode_mask(mask)
    assert png_header(png) == (width, height, 1, 0)
    assert np.array_equal(decode_mask(png, height, width), mask)
    assert set(np.unique(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED))) <= {0, 255}
    with MemoryFile(png) as file, file.open() as image:
        assert np.array_equal(image.read(1) > 0, mask)


def test_the_stored_masks_are_of_1_bit() -> None:
    rows = [row for row in rows_of(bare_scene(100, 75), *draw(100, 75)) if row["mask"]]
    assert len(rows) > 6
    for row in rows:
        assert png_header(row["mask"]) == (row["width"], row["height"], 1, 0)


def test_no_mask_is_an_empty_one() -> None:
    assert not decode_mask(None, 3, 4).any()
    assert decode_mask(None, 3, 4).shape == (3, 4)


@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 8), (4, 16), (1, 1)])
def test_a_mask_of_another_size_is_refused(height: int, width: int) -> None:
    png = encode_mask(np.ones((8, 8), np.bool_))
    with pytest.raises(SegError, match=rf"the mask has 8 x 8 px, the tile has {width} x {height}"):
        decode_mask(png, height, width)


@pytest.mark.parametrize("png", [b"", b"\x89PNG", b"no picture at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_mask_that_is_no_png_is_refused(png: bytes) -> None:
    with pytest.raises(SegError, match="the mask is not a PNG"):
        decode_mask(png, 8, 8)


def test_a_truncated_mask_is_refused() -> None:
    png = encode_mask(np.random.default_rng(0).random((64, 64)) > 0.5)
    with pytest.raises(SegError):
        decode_mask(png[: len(png) // 2], 64, 64)


def test_the_probability_is_kept_in_8_bits_only_where_asked_for() -> None:
    probability, valid = draw(40, 40)
    assert all(row["probability"] is None for row in rows_of(bare_scene(40, 40), probability, valid))
    for row in rows_of(bare_scene(40, 40), probability, valid, keep=True):
        assert png_header(row["probability"]) == (row["width"], row["height"], 8, 0)
        kept: NDArray[Any] = cv2.imdecode(np.frombuffer(row["probability"], np.uint8), cv2.IMREAD_UNCHANGED)
        held = np.where(valid, probability, 0.0)
        assert np.abs(kept / 255 - held[inside(row)]).max() <= 0.5 / 255 + 1e-6


def test_the_same_window_gives_the_same_rows_again() -> None:
    probability, valid = draw(100, 75)
    scene = bare_scene(100, 75)
    assert rows_of(scene, probability, valid, keep=True) == rows_of(replace(scene), probability, valid, keep=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (64, 61), (7, 129)])
def test_packed_lines_are_read_as_opencv_reads_them(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(shape) > 0.5
    png = encode_mask(mask)
    found = decode_bits(png, *shape)
    assert found is not None
    assert np.array_equal(found, np.packbits(decode_mask(png, *shape), axis=-1))
    assert decode_bits(png, shape[0] + 1, shape[1]) is None
    assert decode_bits(png, shape[0], shape[1] + 8) is None
    for at in range(len(png)):  # damage is not read
        bad = bytearray(png)
        bad[at] ^= 1 << int(rng.integers(8))
        assert decode_bits(bytes(bad), *shape) is None
        assert decode_bits(png[:at], *shape) is None


def test_packed_lines_of_other_programs_are_left_to_opencv() -> None:
    mask = np.random.default_rng(0).random((16, 16)) > 0.5
    _, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    assert decode_bits(png.tobytes(), 16, 16) is None
    lines = np.zeros((16, 3), np.uint8)
    lines[:, 0] = 2  # a filter, of which the values are differences
    assert decode_bits(_write_png(16, 16, zlib.compress(lines.tobytes())), 16, 16) is None
    lines[:, 0], lines[3, 2] = 0, 1  # a bit beyond the width
    assert decode_bits(_write_png(15, 16, zlib.compress(lines.tobytes())), 16, 15) is None
