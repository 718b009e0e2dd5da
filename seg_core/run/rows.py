"""One row for each tile of a window: what of it is building, and of what is valid."""

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

    error_class: str  # the exception's, or Crash where the process died
    error: str
    attempts: int = 1


class PartialFailure(Failure):
    """Why a window has no figures, of which smaller windows may well be readable."""


def tile_rows(scene: Scene, window: Window, tile_size: int, figures: WindowFigures) -> Iterator[Row]:
    """Rows of a window's tiles, status `done`."""
    for row, polygon in _places(scene, window, tile_size):
        top, left = row["row_off"] - window.row_off, row["col_off"] - window.col_off
        at = np.s_[top : top + row["height"], left : left + row["width"]]
        place = top // tile_size, left // tile_size
        mask = figures.building_bits[at[0], place[1], : -(-row["width"] // 8)]
        num_valid, num_building = int(figures.num_valid[place]), int(figures.num_building[place])
        measured = measure(mask, row["width"], num_valid, num_building, float(figures.probability_sums[place]))
        kept = {"probability": None if figures.levels is None else encode_png(figures.levels[at])}
        yield {"status": "done", **row, **measured, **_areas(row, polygon, measured), **kept}


def failed_rows(scene: Scene, window: Window, tile_size: int, failure: Failure) -> Iterator[Row]:
    """Rows of a window that could not be segmented, status `failed`: where the tiles are, and no figures."""
    for row, _ in _places(scene, window, tile_size):
        yield {"status": "failed", **failure._asdict(), **row}


def _places(scene: Scene, window: Window, tile_size: int) -> Iterator[tuple[Row, shapely.Polygon | None]]:
    """Where each tile is, and its footprint."""
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
    """Figures of one tile. A pixel that is not valid is neither building nor background: it counts nowhere."""
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
    """Ground areas. A pixel's share of the tile's area is taken as even over the tile."""
    if polygon is None:
        return {"area_m2": None, "building_m2": None}
    pixel_m2 = area_m2(polygon) / (row["height"] * row["width"])
    return {"area_m2": figures["valid_px"] * pixel_m2, "building_m2": figures["building_px"] * pixel_m2}


def encode_mask(building: NDArray[np.bool_]) -> bytes:
    """A 1-bit grey PNG (https://www.w3.org/TR/png-3) of pixels `(height, width)`."""
    return encode_bits(np.packbits(building, axis=-1), building.shape[1])


def encode_bits(bits: NDArray[np.uint8], width: int) -> bytes:
    """A 1-bit grey PNG of lines that are packed already, `(height, bytes)`. libpng would need a byte a pixel."""
    height = len(bits)
    lines = np.zeros((height, 1 + bits.shape[1]), np.uint8)  # each begins with a byte that says: not filtered
    lines[:, 1:] = bits
    deflate = zlib.compressobj(zlib.Z_BEST_SPEED, strategy=zlib.Z_RLE)
    content = deflate.compress(lines.data) + deflate.flush()
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", content), (b"IEND", b"")
    return PNG + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of `(height, width)` grey or `(height, width, 3)` BGR pixels."""
    written, content = cv2.imencode(".png", pixels)
    assert written
    return content.tobytes()


def decode_mask(png: bytes | None, height: int, width: int) -> NDArray[np.bool_]:
    """The mask of a row, `(height, width)`. Raises SegError where it is no PNG or of another size."""
    if png is None:
        return np.zeros((height, width), np.bool_)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) if png else None
    if pixels is None:
        raise SegError("the mask is no PNG")
    if pixels.shape != (height, width):
        raise SegError(f"the mask measures {pixels.shape[1]} x {pixels.shape[0]} px, the tile {width} x {height}")
    return np.asarray(pixels > 0)
