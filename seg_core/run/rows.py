"""Make the rows of a window's tiles: figures, areas and masks."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from seg_core.chips import WindowFigures
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.georef import area_m2, footprints, split_at_antimeridian
from seg_core.imagery.scene import Scene

Row = dict[str, Any]
PNG = b"\x89PNG\r\n\x1a\n"


class Failure(NamedTuple):
    """Why a window has no figures."""

    error_class: str  # the type of the exception, or Crash if the process died
    error: str
    attempts: int = 1


class PartialFailure(Failure):
    """Why a window has no figures, if smaller windows of it may still be readable."""


def tile_rows(scene: Scene, window: Window, tile_size: int, figures: WindowFigures) -> Iterator[Row]:
    """Yield the rows of a window's tiles, with status `done`."""
    for row, polygon in locate_tiles(scene, window, tile_size):
        top, left = row["row_off"] - window.row_off, row["col_off"] - window.col_off
        at = np.s_[top : top + row["height"], left : left + row["width"]]
        place = top // tile_size, left // tile_size
        bits = at[0], place[1], slice(-(-row["width"] // 8))
        mask, valid = figures.building_bits[bits], figures.valid_bits
        num_valid, num_building = int(figures.num_valid[place]), int(figures.num_building[place])
        measured = measure(mask, row["width"], num_valid, num_building, float(figures.probability_sums[place]))
        is_partial = valid is not None and 0 < num_valid < row["height"] * row["width"]
        kept = {
            "valid": encode_bits(valid[bits], row["width"]) if valid is not None and is_partial else None,
            "probability": None if figures.levels is None else encode_png(figures.levels[at]),
        }
        yield {"status": "done", **row, **measured, **_areas(row, polygon, measured), **kept}


def failed_rows(scene: Scene, window: Window, tile_size: int, failure: Failure) -> Iterator[Row]:
    """Yield the rows of a window that could not be segmented: status `failed`, positions, and no figures."""
    for row, _ in locate_tiles(scene, window, tile_size):
        yield {"status": "failed", **failure._asdict(), **row}


def locate_tiles(scene: Scene, window: Window, tile_size: int) -> Iterator[tuple[Row, shapely.Polygon | None]]:
    """Yield the position columns of each tile, and its footprint in lon/lat (None without a CRS)."""
    tiles = list(split(window, tile_size))
    polygons = np.full(len(tiles), None) if scene.crs is None else footprints(scene.crs, scene.transform, tiles)
    split_polygons, boxes = split_at_antimeridian(polygons)
    for tile, polygon, geometry, box in zip(tiles, polygons, shapely.to_wkb(split_polygons), boxes, strict=True):
        row = {
            "scene_id": scene.scene_id,
            "tile_row": tile.row_off // tile_size,
            "tile_col": tile.col_off // tile_size,
            **tile._asdict(),
            "geometry": geometry,
            "bbox": None if geometry is None else dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
        }
        yield row, polygon


def measure(bits: NDArray[np.uint8], width: int, num_valid: int, num_building: int, probability_sum: float) -> Row:
    """Return the figures of one tile. Pixels that are not valid are neither building nor background, and not counted.

    `bits` is the packed mask, `uint8 (height, bytes)`. The numbers count pixels, and `probability_sum` is over valid
    pixels.
    """
    if not num_valid:
        return {"valid_px": 0, "building_px": 0, **dict.fromkeys(("coverage", "mean_probability", "mask"))}
    return {
        "valid_px": num_valid,
        "building_px": num_building,
        "coverage": num_building / num_valid,
        "mean_probability": probability_sum / num_valid,
        "mask": encode_bits(bits, width) if num_building else None,
    }


def _areas(row: Row, polygon: shapely.Polygon | None, figures: Row) -> Row:
    """Return the ground areas in square metres. All pixels of a tile count as equally large."""
    if polygon is None:
        return {"area_m2": None, "building_m2": None}
    pixel_m2 = area_m2(polygon) / (row["height"] * row["width"])
    return {"area_m2": figures["valid_px"] * pixel_m2, "building_m2": figures["building_px"] * pixel_m2}


def encode_mask(building: NDArray[np.bool_]) -> bytes:
    """Encode `bool (height, width)` as a 1-bit greyscale PNG (https://www.w3.org/TR/png-3)."""
    return encode_bits(np.packbits(building, axis=-1), building.shape[1])


def encode_bits(bits: NDArray[np.uint8], width: int) -> bytes:
    """Encode packed lines, `uint8 (height, bytes)`, as a 1-bit greyscale PNG. libpng would need a byte per pixel."""
    height = len(bits)
    lines = np.zeros((height, 1 + bits.shape[1]), np.uint8)  # each line begins with its filter type: none
    lines[:, 1:] = bits
    deflate = zlib.compressobj(zlib.Z_BEST_SPEED, strategy=zlib.Z_RLE)
    return _write_png(width, height, deflate.compress(lines.data) + deflate.flush())


def _write_png(width: int, height: int, content: bytes) -> bytes:
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", content), (b"IEND", b"")
    return PNG + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_bits(png: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Decode what `encode_bits` wrote to packed lines, `uint8 (height, bytes)`, several times as fast as OpenCV does.

    Returns None for any other PNG, and for one of another size.
    """
    encoded = png[len(PNG) + 25 : -12]  # between the chunks IHDR and IEND
    try:
        content = zlib.decompress(encoded[8:-4])
    except zlib.error:
        return None
    lines, num_bytes = np.frombuffer(content, np.uint8), 1 + -(-width // 8)
    if len(lines) != height * num_bytes or png != _write_png(width, height, encoded[8:-4]):
        return None
    lines = lines.reshape(height, num_bytes)
    has_other_filters = lines[:, 0].any()
    has_bits_beyond = width % 8 and (lines[:, -1] & (0xFF >> width % 8)).any()
    return None if has_other_filters or has_bits_beyond else lines[:, 1:]


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode `uint8` pixels, greyscale `(height, width)` or BGR `(height, width, 3)`, as PNG."""
    written, content = cv2.imencode(".png", pixels)
    assert written
    return content.tobytes()


def decode_mask(png: bytes | None, height: int, width: int, name: str = "mask") -> NDArray[np.bool_]:
    """Decode the mask of a row to `bool (height, width)`. Raises SegError if it is no PNG or has another size.

    `name` is what the error calls it.
    """
    return np.zeros((height, width), np.bool_) if png is None else _decode(png, height, width, name) > 0


def decode_valid(row: Row) -> NDArray[np.bool_] | None:
    """Return which pixels of a tile that is done hold data, `bool (height, width)`.

    None if only some do and the row does not say which, as in runs of older versions. Raises SegError if the row's
    `valid` is no PNG or has another size.
    """
    height, width = row["height"], row["width"]
    if row["valid"] is not None:
        return _decode(row["valid"], height, width, "column valid") > 0
    if row["valid_px"] in {0, height * width}:
        return np.full((height, width), row["valid_px"] > 0)
    return None


def decode_probability(row: Row) -> NDArray[np.uint8]:
    """Return the probabilities of a tile that is done in 255ths, `uint8 (height, width)`; 0 where a pixel is not valid.

    Raises SegError if the row's `probability` is no PNG or has another size.
    """
    return _decode(row["probability"] or b"", row["height"], row["width"], "column probability")


def _decode(png: bytes, height: int, width: int, name: str) -> NDArray[np.uint8]:
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) if png else None
    if pixels is None:
        raise SegError(f"the {name} is not a PNG")
    if pixels.shape != (height, width):
        raise SegError(f"the {name} has {pixels.shape[1]} x {pixels.shape[0]} px, the tile has {width} x {height}")
    return np.asarray(pixels, np.uint8)
