"""What the bands of an image are: colours, alpha or masks, how their values are meant, and what of it is doubtful."""

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

SAMPLE = 512  # px a side of what is read of a block to look at its values
SAMPLED = (0.5, 0.25, 0.75, 0.0, 0.999)  # where sampled blocks lie in a file's rows and columns of blocks
MIXED_ALPHA_SHARE = 0.1  # share of pixels between transparent and opaque, from which on a band is unlike an alpha band
LOSSY = ("JPEG", "WEBP", "JPEG2000")  # codecs that may not keep a value as it was: how GDAL's names of them end
EXTRA_SAMPLES = 338  # tag of a TIFF
MAX_TAGS = 4096  # of an image in a TIFF; more are damage


def check_pixels(uri: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image whose stored values are not what a picture of it shows."""
    if ColorInterp.palette in dataset.colorinterp:
        raise ReadError(f"{uri}: its pixels are numbers of colours: give it those (gdal_translate -expand rgb)")
    if pages := len(dataset.subdatasets):
        raise ReadError(
            f"{uri}: holds {pages} images, of which only the first would be read: write each to a file of its own "
            f"(gdal_translate GTIFF_DIR:1:{posixpath.basename(uri)})"
        )
    if is_inverted(dataset) and not dataset.dtypes[0].startswith("uint"):
        raise ReadError(f"{uri}: 0 is white in it, and its pixels are {dataset.dtypes[0]}: invert it (gdal_calc)")
    if any(scale != 1 for scale in dataset.scales) or any(offset != 0 for offset in dataset.offsets):
        raise ReadError(
            f"{uri}: a stored value v means v * {dataset.scales[0]:g} {dataset.offsets[0]:+g} in it: apply that "
            "(gdal_translate -unscale -ot Float32), or take it out (gdal_edit.py -scale 1 -offset 0)"
        )


def is_inverted(dataset: DatasetReader) -> bool:
    """Whether 0 is white (a TIFF's photometric interpretation MINISWHITE): GDAL gives the values as they are stored."""
    return bool(dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES")


def is_premultiplied(uri: str, dataset: DatasetReader) -> bool:
    """Whether the colours of a TIFF are multiplied by its alpha band, which GDAL 3.10 does not say.

    From the tag ExtraSamples of its first image (TIFF 6.0, section 18), whose first value is then 1.
    """
    if dataset.driver != "GTiff" or alpha_band(dataset, None) is None:
        return False
    try:
        order, big, at = _first_directory(uri)
        count_size, entry_size = (8, 20) if big else (2, 12)
        (number,) = struct.unpack(order + ("Q" if big else "H"), read_ranges(uri, [(at, count_size)], 0)[0])
        (entries,) = read_ranges(uri, [(at + count_size, min(number, MAX_TAGS) * entry_size)], 0)
    except StoreUnavailableError:
        raise
    except (struct.error, ReadError):  # GDAL, which has opened it, reads on where this does not
        return False
    value = 12 if big else 8  # bytes from the beginning of an entry
    tags = {
        struct.unpack_from(order + "H", entries, start)[0]: struct.unpack_from(order + "H", entries, start + value)[0]
        for start in range(0, len(entries), entry_size)
    }
    return bool(tags.get(EXTRA_SAMPLES) == 1)


def _first_directory(uri: str) -> tuple[str, bool, int]:
    """Byte order, whether it is a BigTIFF, and where its first directory begins."""
    (head,) = read_ranges(uri, [(0, 16)], 0)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    return order, big, int(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0])


def bits_per_sample(dataset: DatasetReader) -> int | None:
    """Bits of a value where they are fewer than its type holds, as GDAL says of 1 to 7 and of 9 to 15 bits."""
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    return int(bits) if bits else None


def alpha_band(dataset: DatasetReader, alpha: int | None) -> int | None:
    """The band that says which pixels hold data: the one labelled so, or `alpha` where that is given (0: none)."""
    if alpha is not None:
        return alpha or None
    return next((i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha), None)


def has_own_mask(dataset: DatasetReader) -> bool:
    """Whether a mask inside or beside the file says which pixels hold data, so far as GDAL could find out.

    It looks for masks quietly: where a store does not answer, there is none.
    """
    flags = dataset.mask_flag_enums[0]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def has_mask(dataset: DatasetReader, alpha: int | None) -> bool:
    """Whether an alpha band or a mask says which pixels hold data."""
    return alpha_band(dataset, alpha) is not None or has_own_mask(dataset)


def color_bands(dataset: DatasetReader, alpha: int | None) -> tuple[int, ...]:
    """All bands but alpha, by their number in the file; red, green and blue first, where they are labelled so."""
    excluded = alpha_band(dataset, alpha)
    labels = {i: c for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if i != excluded}
    colors = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    number = Counter(labels.values())
    if all(number[color] == 1 for color in colors):
        by_color = {color: band for band, color in labels.items()}
        first = [by_color[color] for color in colors]
        return (*first, *(band for band in labels if band not in first))
    return tuple(labels)


def find_doubts(uri: str, dataset: DatasetReader, alpha: int | None) -> list[str]:
    """What may be meant otherwise than it is taken, and the way out, a line each."""
    found = []
    labelled = alpha_band(dataset, None)
    if labelled is not None and alpha is None and _looks_like_imagery(_sample(uri, dataset, labelled)):
        found.append(
            f"band {labelled} is labelled alpha and holds many values, as infrared does: if it is not alpha, "
            "add --alpha none"
        )
    if dataset.transform.is_identity and (dataset.gcps[0] or dataset.rpcs):
        found.append("only control points or RPCs say where it is, which are not used: warp it (gdalwarp)")
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    codec = structure.get("COMPRESSION", "")
    lossy = codec.endswith(LOSSY) and not structure.get("COMPRESSION_REVERSIBILITY", "").startswith("LOSSLESS")
    has_nodata = any(value is not None for value in dataset.nodatavals)
    if lossy and not has_own_mask(dataset) and (has_nodata or alpha_band(dataset, alpha) is not None):
        found.append(
            f"its {'nodata value' if has_nodata else 'alpha band'} is stored with {codec}, which blurs it: some empty "
            "pixels may count as data: give it a mask (nearblack -setmask)"
        )
    return found


def find_unlabelled_alpha(uri: str, dataset: DatasetReader) -> int | None:
    """The last band, where it is not labelled and holds nothing but transparent and opaque, as an alpha band does.

    Three bands or one are colours.
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
            share = pixels.astype(np.float64) / pixels.max()
            return bool(((share > 1 / 16) & (share < 15 / 16)).mean() > MIXED_ALPHA_SHARE)
    return False


def _sample(uri: str, dataset: DatasetReader, band: int) -> Iterator[NDArray[np.generic]]:
    """Pixels of one band from some of its blocks, from the middle on; a block that can't be read is left out."""
    height, width = dataset.block_shapes[band - 1]
    rows, cols = -(-dataset.height // height), -(-dataset.width // width)
    places = dict.fromkeys((int(rows * down), int(cols * across)) for down in SAMPLED for across in SAMPLED)
    for row, col in places:
        top, left = row * height, col * width
        size = min(SAMPLE, width, dataset.width - left), min(SAMPLE, height, dataset.height - top)
        try:
            yield dataset.read(band, window=RasterioWindow(left, top, *size))
        except (RasterioError, CPLE_BaseError) as error:
            if is_unanswered(uri, error):
                raise
