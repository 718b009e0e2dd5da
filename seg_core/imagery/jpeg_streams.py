"""The JPEG streams inside a GeoTIFF, as they are: for a decoder that is faster than GDAL's, such as a GPU's.

    file ─▶ ┌───┬───┬───┐
            │ ┌─┼───┼─┐ │   the blocks that a chip touches are fetched whole, and not decoded;
            ├─┼─┼───┼─┼─┤   whoever decodes them pastes them together and cuts out the chip
            │ └─┼───┼─┘ │
            └───┴───┴───┘

Each block of such a file is a JPEG image whose tables, which all blocks share, are kept apart (TIFF Technical Note 2).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from rasterio.enums import Compression, Interleaving, MaskFlags
from rasterio.io import DatasetReader

from seg_core.chips import JpegStreams
from seg_core.grid import Window, expand_reflected_mask, reflect_window
from seg_core.imagery.raster import ask_again, open_scene
from seg_core.imagery.scene import Scene
from seg_core.imagery.valid import read_valid
from seg_core.storage.files import read_ranges

# px; larger or wider blocks are strips, of which a chip needs a small part.
MAX_BLOCK, MAX_WIDTH = 2**22, 2**13
MERGE_GAP = 2**16  # bytes between blocks that are fetched with them, rather than asked for apart
CACHE_BYTES = 2**25  # bytes of streams that a process keeps, for what is beside the chip that they were fetched for
START = b"\xff\xd8"  # of a JPEG stream
# Adobe's marker says whether three components are RGB (0) or YCbCr (1); without it, decoders guess. TIFF has a tag of
# its own for that, and what else the stream may say of it does not count.
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
MARK, SCAN, COLOUR_SEGMENTS = 0xFF, 0xDA, {0xE0, 0xEE}
COLOURS = {"RGB": b"\x00", "YCbCr": b"\x01"}


class PieceCache:
    """The pieces of files that were used last, up to so many bytes; for any thread."""

    def __init__(self, room: int) -> None:
        self.room, self.size = room, 0
        self.pieces: OrderedDict[tuple[Scene, tuple[int, int]], bytes] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, scene: Scene, ranges: Sequence[tuple[int, int]], fresh: bool = False) -> list[bytes]:
        """Pieces of a scene's file, each by its offset and size; those that are kept are not fetched, unless `fresh`.

        Raises what `seg_core.storage.files.read_ranges` does.
        """
        with self.lock:
            found = {} if fresh else {at: self.pieces[scene, at] for at in ranges if (scene, at) in self.pieces}
        missing = [at for at in ranges if at not in found]
        if missing:
            found |= zip(missing, read_ranges(scene.uri, missing, MERGE_GAP), strict=True)
        with self.lock:
            for at, piece in found.items():
                self.size += len(piece) - len(self.pieces.pop((scene, at), b""))
                self.pieces[scene, at] = piece
            while self.size > self.room:
                self.size -= len(self.pieces.popitem(last=False)[1])
        return [found[at] for at in ranges]


_cache = PieceCache(CACHE_BYTES)


def read_streams(scene: Scene, window: Window, rgb: bool = True) -> JpegStreams | None:
    """What `seg_core.imagery.raster.read_chip` would decode for a window; None of a file that it takes GDAL to read.

    Served are GeoTIFFs of one or three bands of 8 bits, pixel by pixel, with or without an internal mask; those whose
    three are stored as RGB unless `rgb` is off. Raises ReadError where the file can't be read, but for its streams.
    """
    if scene.is_resampled or scene.inverted or scene.nodata is not None or scene.nodata_color is not None:
        return None
    return ask_again(lambda fresh: _read_streams(scene, window, rgb, fresh))


def _read_streams(scene: Scene, window: Window, rgb: bool, fresh: bool) -> JpegStreams | None:
    box, rows, cols = reflect_window(window, scene.height, scene.width)
    with open_scene(scene, scene, fresh) as dataset:
        if not _is_served(dataset, rgb):
            return None
        valid = read_valid(dataset, box, scene)
        height, width = dataset.block_shapes[0]
        top, left = box.row_off // height * height, box.col_off // width * width
        found = list(_find_blocks(dataset, box)) if valid.any() else []
        head, components = _head(dataset), dataset.count
    content = _cache.read(scene, [at for _, at in found], fresh)
    if not all(stream.startswith(START) for stream in content):
        return None  # GDAL says what is wrong with it
    return JpegStreams(
        blocks=[np.frombuffer(bytearray().join([head, *_without_colour(stream)]), np.uint8) for stream in content],
        places=[(row * height - top, col * width - left) for (row, col), _ in found],
        block=(height, width),
        canvas=(box.bottom - top, box.right - left),
        components=components,
        bands=tuple(band - 1 for band in scene.bands),
        rows=rows + (box.row_off - top),
        cols=cols + (box.col_off - left),
        valid=expand_reflected_mask(valid, rows, cols),
    )


def _is_served(dataset: DatasetReader, rgb: bool) -> bool:
    height, width = dataset.block_shapes[0]
    flags = {flag for band in dataset.mask_flag_enums for flag in band}
    return (
        dataset.driver == "GTiff"
        and dataset.compression == Compression.jpeg
        and dataset.dtypes[0] == "uint8"
        and dataset.count in {1, 3}
        and (
            dataset.count == 1
            or (dataset.interleaving == Interleaving.pixel and (rgb or _colour_space(dataset) != "RGB"))
        )
        and _colour_space(dataset) in COLOURS
        and height * width <= MAX_BLOCK
        and width <= MAX_WIDTH
        and (height % 8 == 0 or height == dataset.height)  # else GDAL shows the rows of a strip as blocks
        and flags <= {MaskFlags.all_valid, MaskFlags.per_dataset}
    )


def _colour_space(dataset: DatasetReader) -> str:
    """What the components of a block are; RGB where GDAL names nothing else."""
    return str(dataset.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE", "RGB"))


def _head(dataset: DatasetReader) -> bytes:
    """What a block's stream lacks at its beginning to be an image of its own."""
    tables = bytes.fromhex(dataset.get_tag_item("JPEGTABLES", "TIFF", bidx=1) or "")
    colour = ADOBE + COLOURS[_colour_space(dataset)] if dataset.count == 3 else b""
    return b"".join([START, colour, *_without_colour(tables[:-2])])  # without the mark of their end


def _without_colour(stream: bytes) -> list[memoryview]:
    """A stream without the mark of its beginning, and without JFIF's and Adobe's segments before its first scan."""
    kept, whole, at = [], memoryview(stream), len(START)
    while at + 4 <= len(stream) and stream[at] == MARK and stream[at + 1] != SCAN:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] not in COLOUR_SEGMENTS:
            kept.append(whole[at:end])
        at = end
    return [*kept, whole[at:]]


def _find_blocks(dataset: DatasetReader, box: Window) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Row and column of each block that the box touches, and where in the file it is: offset and size.

    Those that a sparse file leaves out are not among them: no pixel of theirs is valid.
    """
    height, width = dataset.block_shapes[0]
    for row in range(box.row_off // height, -(-box.bottom // height)):
        for col in range(box.col_off // width, -(-box.right // width)):
            offset, size = (
                int(dataset.get_tag_item(f"BLOCK_{name}_{col}_{row}", "TIFF", bidx=1) or 0)
                for name in ("OFFSET", "SIZE")
            )
            if offset and size:
                yield (row, col), (offset, size)
