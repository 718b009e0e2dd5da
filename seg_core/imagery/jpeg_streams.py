"""The JPEG streams inside a GeoTIFF, without decoding, for a decoder that is faster than GDAL's, such as a GPU's.

    file ─▶ ┌───┬───┬───┐
            │ ┌─┼───┼─┐ │   the blocks that a chip touches are fetched whole, and not decoded;
            ├─┼─┼───┼─┼─┤   the decoder joins their pixels and crops the chip
            │ └─┼───┼─┘ │
            └───┴───┴───┘

Each block of such a file is a JPEG image. The tables that all blocks share are stored apart from them (TIFF Technical
Note 2).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from rasterio.enums import Compression, Interleaving, MaskFlags
from rasterio.io import DatasetReader

from seg_core.chips import JpegStreams
from seg_core.grid import Window, expand_reflected_mask, reflect_window
from seg_core.imagery.raster import open_scene, retry
from seg_core.imagery.scene import Scene
from seg_core.imagery.valid import read_valid
from seg_core.storage.files import read_ranges

# Larger or wider blocks are strips, and a chip needs only a small part of them.
MAX_BLOCK_PIXELS, MAX_BLOCK_WIDTH = 2**22, 2**13
MERGE_GAP = 2**16  # bytes: blocks with a smaller gap between them are fetched in one request
CACHE_BYTES = 2**25  # of streams that a process keeps for neighbouring chips
START_OF_IMAGE = b"\xff\xd8"  # the marker at the beginning of a JPEG stream
# Adobe's segment says whether three components are RGB (0) or YCbCr (1). Decoders guess without it. TIFF has a tag of
# its own for the colour space, which overrides what the stream says.
ADOBE_SEGMENT = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
MARKER_PREFIX, START_OF_SCAN, COLOUR_SEGMENTS = 0xFF, 0xDA, {0xE0, 0xEE}
ADOBE_TRANSFORMS = {"RGB": b"\x00", "YCbCr": b"\x01"}


class ByteRangeCache:
    """The most recently used byte ranges of files, up to `max_bytes` in total. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self.ranges: OrderedDict[tuple[Scene, tuple[int, int]], bytes] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, scene: Scene, ranges: Sequence[tuple[int, int]], fresh: bool = False) -> list[bytes]:
        """Return byte ranges of a scene's file, each given by its offset and size.

        Cached ranges are not fetched again, unless `fresh`. Raises the errors of `seg_core.storage.files.read_ranges`.
        """
        with self.lock:
            found = {} if fresh else {part: self.ranges[scene, part] for part in ranges if (scene, part) in self.ranges}
        missing = [part for part in ranges if part not in found]
        if missing:
            found |= zip(missing, read_ranges(scene.uri, missing, MERGE_GAP), strict=True)
        with self.lock:
            for part, content in found.items():
                self.size += len(content) - len(self.ranges.pop((scene, part), b""))
                self.ranges[scene, part] = content
            while self.size > self.max_bytes:
                self.size -= len(self.ranges.popitem(last=False)[1])
        return [found[part] for part in ranges]


_cache = ByteRangeCache(CACHE_BYTES)


def read_streams(scene: Scene, window: Window, rgb: bool = True) -> JpegStreams | None:
    """Read the JPEG blocks of a window; None if only GDAL can read the file.

    Supported are GeoTIFFs of one or three 8-bit bands, interleaved by pixel, with or without an internal mask. Files
    that store RGB without conversion to YCbCr are supported only with `rgb`. Raises ReadError if the file can't be
    read. Errors within the streams are left to the decoder.
    """
    if scene.is_resampled or scene.inverted or scene.nodata is not None or scene.nodata_color is not None:
        return None
    return retry(lambda fresh: _read_streams(scene, window, rgb, fresh))


def _read_streams(scene: Scene, window: Window, rgb: bool, fresh: bool) -> JpegStreams | None:
    box, rows, cols = reflect_window(window, scene.height, scene.width)
    with open_scene(scene, scene, fresh) as dataset:
        if not _is_supported(dataset, rgb):
            return None
        valid = read_valid(dataset, box, scene)
        height, width = dataset.block_shapes[0]
        top, left = box.row_off // height * height, box.col_off // width * width
        blocks = list(_find_blocks(dataset, box)) if valid.any() else []
        head, components = _stream_head(dataset), dataset.count
    streams = _cache.read(scene, [byte_range for _, byte_range in blocks], fresh)
    if not all(stream.startswith(START_OF_IMAGE) for stream in streams):
        return None  # GDAL reports what is wrong with the file
    return JpegStreams(
        blocks=[np.frombuffer(bytearray().join([head, *_without_colour(stream)]), np.uint8) for stream in streams],
        block_offsets=[(row * height - top, col * width - left) for (row, col), _ in blocks],
        block_shape=(height, width),
        canvas_shape=(box.bottom - top, box.right - left),
        components=components,
        bands=tuple(band - 1 for band in scene.bands),
        rows=rows + (box.row_off - top),
        cols=cols + (box.col_off - left),
        valid=expand_reflected_mask(valid, rows, cols),
    )


def _is_supported(dataset: DatasetReader, rgb: bool) -> bool:
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
        and _colour_space(dataset) in ADOBE_TRANSFORMS
        and height * width <= MAX_BLOCK_PIXELS
        and width <= MAX_BLOCK_WIDTH
        and (height % 8 == 0 or height == dataset.height)  # else GDAL reports the rows of a strip as blocks
        and flags <= {MaskFlags.all_valid, MaskFlags.per_dataset}
    )


def _colour_space(dataset: DatasetReader) -> str:
    """Return the colour space of a block's components, which is RGB unless GDAL names another."""
    return str(dataset.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE", "RGB"))


def _stream_head(dataset: DatasetReader) -> bytes:
    """Return the beginning that a block's stream lacks to be a JPEG image: start marker, colour space and tables."""
    tables = bytes.fromhex(dataset.get_tag_item("JPEGTABLES", "TIFF", bidx=1) or "")
    colour = ADOBE_SEGMENT + ADOBE_TRANSFORMS[_colour_space(dataset)] if dataset.count == 3 else b""
    return b"".join([START_OF_IMAGE, colour, *_without_colour(tables[:-2])])  # the last 2 bytes are the end marker


def _without_colour(stream: bytes) -> list[memoryview]:
    """Return a stream without its start marker, and without JFIF's and Adobe's segments before its first scan."""
    kept, content, start = [], memoryview(stream), len(START_OF_IMAGE)
    while start + 4 <= len(stream) and stream[start] == MARKER_PREFIX and stream[start + 1] != START_OF_SCAN:
        end = start + 2 + int.from_bytes(stream[start + 2 : start + 4], "big")
        if stream[start + 1] not in COLOUR_SEGMENTS:
            kept.append(content[start:end])
        start = end
    return [*kept, content[start:]]


def _find_blocks(dataset: DatasetReader, box: Window) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the row and column of each block that the box touches, and its offset and size in the file.

    Blocks that a sparse file leaves out are skipped: none of their pixels is valid.
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
