"""The bands of an image: its colours, its alpha band or mask, the meaning of its values, and what is doubtful."""

import posixpath
import struct
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError, StoreUnavailableError
from seg_core.imagery.open import is_unanswered
from seg_core.storage.files import read_ranges

SAMPLE_SIDE = 512  # px: largest side of what is read from a block to look at its values
SAMPLE_POSITIONS = (0.5, 0.25, 0.75, 0.0, 0.999)  # of sampled blocks, relative to a file's rows and columns of blocks
MAX_MIXED_SHARE = 0.1  # largest share of an alpha band's pixels between transparent and opaque
LOSSY_CODECS = ("JPEG", "WEBP", "JPEG2000")  # how GDAL's names of lossy codecs end
EXTRA_SAMPLES = 338  # number of this TIFF tag
MAX_TAGS = 4096  # of an image in a TIFF; more are a sign of damage


def check_pixels(uri: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image whose stored values differ from the values that it shows."""
    if ColorInterp.palette in dataset.colorinterp:
        raise ReadError(f"{uri}: its pixels are palette indices: expand them (gdal_translate -expand rgb)")
    if pages := len(dataset.subdatasets):
        raise ReadError(
            f"{uri}: holds {pages} images, and only the first would be read: write each to a file of its own "
            f"(gdal_translate GTIFF_DIR:1:{posixpath.basename(uri)})"
        )
    if is_inverted(dataset) and not dataset.dtypes[0].startswith("uint"):
        raise ReadError(f"{uri}: 0 means white, and its pixels are {dataset.dtypes[0]}: invert them (gdal_calc)")
    if any(scale != 1 for scale in dataset.scales) or any(offset != 0 for offset in dataset.offsets):
        raise ReadError(
            f"{uri}: a stored value v means v * {dataset.scales[0]:g} {dataset.offsets[0]:+g}: apply this "
            "(gdal_translate -unscale -ot Float32), or remove it (gdal_edit.py -scale 1 -offset 0)"
        )


def is_inverted(dataset: DatasetReader) -> bool:
    """Whether 0 is white, as in a TIFF of photometric interpretation MINISWHITE. GDAL returns the values as stored."""
    return bool(dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES")


def is_premultiplied(uri: str, dataset: DatasetReader) -> bool:
    """Whether the colours of a TIFF are multiplied by its alpha band. GDAL 3.10 does not report it.

    The first value of the tag ExtraSamples is then 1 (TIFF 6.0, section 18). The tag is read from the first image of
    the file.
    """
    if dataset.driver != "GTiff" or alpha_band(dataset, None) is None:
        return False
    try:
        order, is_big, offset = _first_directory(uri)
        count_size, entry_size = (8, 20) if is_big else (2, 12)
        (num_tags,) = struct.unpack(order + ("Q" if is_big else "H"), read_ranges(uri, [(offset, count_size)], 0)[0])
        (entries,) = read_ranges(uri, [(offset + count_size, min(num_tags, MAX_TAGS) * entry_size)], 0)
    except StoreUnavailableError:
        raise
    except (struct.error, ReadError):  # GDAL has opened the file: it tolerates more than this function
        return False
    value = 12 if is_big else 8  # offset of the value in an entry, in bytes
    tags = {
        struct.unpack_from(order + "H", entries, start)[0]: struct.unpack_from(order + "H", entries, start + value)[0]
        for start in range(0, len(entries), entry_size)
    }
    return bool(tags.get(EXTRA_SAMPLES) == 1)


def _first_directory(uri: str) -> tuple[str, bool, int]:
    """Return the byte order, whether the file is a BigTIFF, and the offset of its first directory in bytes."""
    (head,) = read_ranges(uri, [(0, 16)], 0)
    order = "<" if head[:2] == b"II" else ">"
    is_big = struct.unpack_from(order + "H", head, 2)[0] == 43
    return order, is_big, int(struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)[0])


def bits_per_sample(dataset: DatasetReader) -> int | None:
    """Return the bits of a value if they are fewer than its dtype holds, else None.

    GDAL reports them for 1 to 7 and for 9 to 15 bits.
    """
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    return int(bits) if bits else None


def alpha_band(dataset: DatasetReader, alpha: int | None) -> int | None:
    """Return the number of the alpha band, which says which pixels hold data; None if there is none.

    It is `alpha` if that is given (0: no alpha band), else the band that the file labels as alpha.
    """
    if alpha is not None:
        return alpha or None
    return next((i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha), None)


def has_own_mask(dataset: DatasetReader) -> bool:
    """Whether a mask inside or beside the file says which pixels hold data, as far as GDAL could find out.

    GDAL looks for masks silently: if a store does not answer, it reports none.
    """
    flags = dataset.mask_flag_enums[0]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def has_mask(dataset: DatasetReader, alpha: int | None) -> bool:
    """Whether an alpha band or a mask says which pixels hold data."""
    return alpha_band(dataset, alpha) is not None or has_own_mask(dataset)


def color_bands(dataset: DatasetReader, alpha: int | None) -> tuple[int, ...]:
    """Return the numbers of all bands except alpha. Red, green and blue come first if the file labels them."""
    excluded = alpha_band(dataset, alpha)
    labels = {i: c for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if i != excluded}
    colors = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    count = Counter(labels.values())
    if all(count[color] == 1 for color in colors):
        by_color = {color: band for band, color in labels.items()}
        first = [by_color[color] for color in colors]
        return (*first, *(band for band in labels if band not in first))
    return tuple(labels)


def find_doubts(uri: str, dataset: DatasetReader, alpha: int | None) -> list[str]:
    """Return a line for each property of the file that may be misread, with the way out."""
    doubts = []
    labelled = alpha_band(dataset, None)
    if labelled is not None and alpha is None and _looks_like_imagery(_sample(uri, dataset, labelled)):
        doubts.append(
            f"band {labelled} is labelled alpha, but holds many values, as infrared does: if it is not alpha, "
            "add --alpha none"
        )
    if dataset.transform.is_identity and (dataset.gcps[0] or dataset.rpcs):
        doubts.append("only control points or RPCs say where it is, and they are not used: warp it (gdalwarp)")
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    codec = structure.get("COMPRESSION", "")
    lossy = codec.endswith(LOSSY_CODECS) and not structure.get("COMPRESSION_REVERSIBILITY", "").startswith("LOSSLESS")
    has_nodata = any(value is not None for value in dataset.nodatavals)
    if lossy and not has_own_mask(dataset) and (has_nodata or alpha_band(dataset, alpha) is not None):
        doubts.append(
            f"its {'nodata value' if has_nodata else 'alpha band'} is stored with {codec}, which blurs it: some empty "
            "pixels may count as data: add a mask (nearblack -setmask)"
        )
    return doubts


def find_unlabelled_alpha(uri: str, dataset: DatasetReader) -> int | None:
    """Return the number of the last band if it looks like an unlabelled alpha band, else None.

    It does if it has no label and holds only transparent and opaque values. Three bands or one are taken for colours.
    """
    last = dataset.count
    if last in {1, 3} or dataset.colorinterp[last - 1] not in {ColorInterp.undefined, ColorInterp.gray}:
        return None
    values = set()
    for pixels in _sample(uri, dataset, last):
        values |= set(np.unique(pixels).tolist())
        if len(values) > 2:
            return None
    opaque = {1, 255, np.iinfo(dataset.dtypes[0]).max if dataset.dtypes[0].startswith("uint") else 1}
    return last if max(values, default=0) in opaque and values <= {0, max(values)} else None


def _looks_like_imagery(samples: Iterable[NDArray[np.generic]]) -> bool:
    """Whether the first sample that is not empty holds many values between transparent and opaque."""
    for pixels in samples:
        if pixels.any():
            opacity = pixels.astype(np.float64) / pixels.max()
            return bool(((opacity > 1 / 16) & (opacity < 15 / 16)).mean() > MAX_MIXED_SHARE)
    return False


def _sample(uri: str, dataset: DatasetReader, band: int) -> Iterator[NDArray[np.generic]]:
    """Yield pixels of one band from some of its blocks, the middle block first. Unreadable blocks are left out."""
    height, width = dataset.block_shapes[band - 1]
    rows, cols = -(-dataset.height // height), -(-dataset.width // width)
    blocks = dict.fromkeys((int(rows * y), int(cols * x)) for y in SAMPLE_POSITIONS for x in SAMPLE_POSITIONS)
    for row, col in blocks:
        top, left = row * height, col * width
        size = min(SAMPLE_SIDE, width, dataset.width - left), min(SAMPLE_SIDE, height, dataset.height - top)
        try:
            yield dataset.read(band, window=RasterioWindow(left, top, *size))
        except (RasterioError, CPLE_BaseError) as error:
            if is_unanswered(uri, error):
                raise
