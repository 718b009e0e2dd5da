"""Image files: open one with GDAL, refuse what is dangerous or means something else than it seems, name what is wrong.

A file is read in the same way wherever it lies and whatever GDAL settings the environment holds: see
`seg_core.storage.gdal_settings`.
"""

import math
import os
import posixpath
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError, SegError, UnansweredError
from seg_core.storage import gdal_path, gdal_settings, is_remote, read_ranges, stat

# Formats that hold pixels and nothing else, each opened with its own driver: VRT and its kind name further files,
# so that a scene could read what its sender can't.
DRIVERS = {
    ".tif": "GTiff",
    ".tiff": "GTiff",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jp2": "JP2OpenJPEG",
}
SUFFIXES = tuple(DRIVERS)
TIFF_SUFFIXES = (".tif", ".tiff")
UNANSWERED = re.compile(r"CURL error|HTTP response code: (429|5\d\d)|got \d+ bytes, expected")  # GDAL's words for it
DAMAGED_BLOCK = re.compile(r"IReadBlock failed at X offset (\d+), Y offset (\d+)")
MISSING_CODEC = re.compile(r"missing codec (?:of code )?(\w+)")
# A scene without georeference is served; the command line says so itself, once a scene and not once a read.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

MAX_BLOCK = 2**28  # bytes; a block, the file's tile or strip, is decoded whole, by each reader one of its own
MAX_PIXELS = 2**42  # of a scene; a header that says more is damaged, and to plan it would take for ever
MASK = ".msk"
# Files beside an image from which GDAL takes what the image does not say; those of .tfw's kind are world files.
SIDECARS = (
    ".xml",
    ".msk",
    ".ovr",
    ".tab",
    ".wld",
    ".tfw",
    ".tifw",
    ".tiffw",
    ".pgw",
    ".pngw",
    ".jgw",
    ".jpgw",
    ".jpegw",
    ".j2w",
    ".jp2w",
)
# Where an image is, by the first that says so: GDAL's defaults, whatever GDAL_GEOREF_SOURCES says.
GEOREF_SOURCES = {
    "GTiff": {"GDAL_GEOREF_SOURCES": "PAM,INTERNAL,TABFILE,WORLDFILE,XML"},
    "JP2OpenJPEG": {"GDAL_GEOREF_SOURCES": "PAM,GEOJP2,GMLJP2,WORLDFILE"},
}
BESIDE = (MASK, ".ovr")  # what files beside an image end with that GDAL opens with it
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how they begin

SAMPLE = 512  # px a side of what is read of a block to look at its values
SAMPLED = (0.5, 0.25, 0.75, 0.0, 0.999)  # where sampled blocks lie in a file's rows and columns of blocks
EXTRA_SAMPLES = 338  # tag of a TIFF
LOSSY = ("JPEG", "WEBP", "JPEG2000")  # what GDAL's names of codecs end with that may not keep a value as it was
MANY = 0.1  # share of pixels between transparent and opaque, from which on a band is unlike an alpha band


@contextmanager
def open_image(
    uri: str, fresh: bool = False, overview: int | None = None, sidecars: Sequence[str] = ()
) -> Iterator[DatasetReader]:
    """Open an image, or one of its overviews. Raises ReadError where it is none, or reading it fails.

    GDAL's settings are in force meanwhile. It keeps what it has fetched of a remote file for the next one to open it,
    but not of a `fresh` one. `sidecars` are the paths of the files beside a remote image that belong to it; those of an
    image on disk are found by GDAL.
    """
    suffix, options = posixpath.splitext(uri)[1].lower(), {} if overview is None else {"overview_level": overview}
    # As a setting: beside another one, GTIFF_POINT_GEO_IGNORE, GDAL 3.10 does not heed the open option for it.
    settings = gdal_settings(uri) | GEOREF_SOURCES.get(DRIVERS.get(suffix, ""), {})
    if is_remote(uri):
        settings["CPL_VSIL_CURL_ALLOWED_EXTENSIONS"] = ",".join((*SUFFIXES, *SIDECARS))
    if fresh:
        settings["CPL_VSIL_CURL_NON_CACHED"] = gdal_path(uri)
    if sidecars:
        settings["GDAL_DISABLE_READDIR_ON_OPEN"] = "TRUE"  # no listing: GDAL asks for each of them by its name
    with rasterio.Env(**settings):
        try:
            dataset = rasterio.open(gdal_path(uri), driver=DRIVERS[suffix], **options)
        except RasterioError as error:
            raise _read_error(uri, error, _why_unreadable(uri, error)) from error
        except (KeyError, UnicodeDecodeError) as error:  # of another suffix; of a CRS that is no text
            raise ReadError(_why_unreadable(uri, error)) from error
        with dataset:
            opened = False
            try:
                _check_header(uri, dataset, sidecars)
                opened = True
                yield dataset
            except (RasterioError, CPLE_BaseError) as error:  # GDAL's own, where rasterio has no name for it
                found = _read_error(uri, error, _damaged_block(uri, dataset, error))
                tiled = dataset.driver == DRIVERS[".tif"]  # others are decoded from their top
                found.in_places = opened and tiled and not isinstance(found, UnansweredError)
                raise found from error


def _check_header(uri: str, dataset: DatasetReader, sidecars: Sequence[str]) -> None:
    """Raise ReadError for an image that needs more memory than there may be, before any is taken, or other files."""
    dtype = dataset.dtypes[0]
    if dtype.startswith("complex"):
        raise ReadError(f"{uri}: its pixels are {dtype}, this program reads real numbers")
    if dataset.width * dataset.height > MAX_PIXELS:
        raise ReadError(f"{uri}: says it measures {dataset.width} x {dataset.height} px: its header is damaged")
    height, width = max(dataset.block_shapes, key=math.prod)
    together = dataset.count if dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
    size = height * width * np.dtype(dtype).itemsize * together
    if size > MAX_BLOCK:
        raise ReadError(
            f"{uri}: its blocks of {width} x {height} px are {size / 2**20:,.0f} MiB each, more than "
            f"{MAX_BLOCK // 2**20}: write it in tiles (gdal_translate -co TILED=YES)"
        )
    _check_overviews(uri, dataset)  # before GDAL is asked which files it opens: they would be opened
    for path in files_beside(uri, dataset, sidecars, BESIDE):
        if not _is_tiff(path):
            raise ReadError(f"{uri}: {path}, which is beside it, is no TIFF: remove it")
        with rasterio.open(gdal_path(path), driver="GTiff") as beside:
            _check_overviews(path, beside)


def _is_tiff(path: str) -> bool:
    """Whether a file begins as a TIFF does. Raises UnansweredError where an object store does not say."""
    try:
        return read_ranges(path, [(0, 4)], 0)[0].startswith(TIFF)
    except UnansweredError:
        raise
    except ReadError:
        return False


def _check_overviews(path: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image that names a file for its overviews: any could be read through it."""
    if named := dataset.tags(ns="OVERVIEWS").get("OVERVIEW_FILE"):
        raise ReadError(f"{path}: its overviews are in a file of its choice, {named}: take that out of its metadata")


def files_beside(
    uri: str, dataset: DatasetReader, sidecars: Sequence[str], endings: str | tuple[str, ...]
) -> list[str]:
    """The files beside an image, with one of those endings, that GDAL opens with it.

    Those of a remote one are among its `sidecars`: to ask GDAL would send a request for each.
    """
    found = sidecars if is_remote(uri) else dataset.files[1:]
    return [path for path in found if path.lower().endswith(endings)]


def _read_error(uri: str, error: BaseException, reason: str | None = None) -> ReadError:
    """What GDAL says of its first cause, for rasterio's own error only says that there is one."""
    causes = _causes(error)
    if is_remote(uri) and any(UNANSWERED.search(str(cause)) for cause in causes):
        return UnansweredError(f"{uri}: {causes[-1]}")
    return ReadError(reason or f"{uri}: {causes[-1]}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the first cause last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes


def _damaged_block(uri: str, dataset: DatasetReader, error: BaseException) -> str | None:
    """Which block of the file can't be decoded, where GDAL says so: tiles that touch it all fail."""
    causes = _causes(error)
    found = next((match for cause in causes if (match := DAMAGED_BLOCK.search(str(cause)))), None)
    if found is None:
        return None
    col, row = map(int, found.groups())
    height, width = dataset.block_shapes[0]
    return (
        f"{uri}: its block of {width} x {height} px at row {row * height}, column {col * width} can't be decoded: "
        f"{causes[-1]}"
    )


def _why_unreadable(uri: str, error: BaseException) -> str:
    try:
        if stat(uri) is None:
            return f"{uri}: no such file"
    except SegError as refused:
        return str(refused)
    if not is_remote(uri) and not os.access(uri, os.R_OK):
        return f"{uri}: not allowed to read it"
    if codec := next((match[1] for cause in _causes(error) if (match := MISSING_CODEC.search(str(cause)))), None):
        return (
            f"{uri}: its pixels are compressed with {codec}, which this GDAL lacks: write it with another codec "
            "(gdal_translate -co COMPRESS=DEFLATE)"
        )
    return f"{uri}: not an image, or a damaged one (read: {', '.join(SUFFIXES)})"


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
    if dataset.driver != DRIVERS[".tif"] or alpha_band(dataset, None) is None:
        return False
    try:
        order, big, at = _first_directory(uri)
        count_size, entry_size = (8, 20) if big else (2, 12)
        (number,) = struct.unpack(order + ("Q" if big else "H"), read_ranges(uri, [(at, count_size)], 0)[0])
        (entries,) = read_ranges(uri, [(at + count_size, number * entry_size)], 0)
    except (struct.error, ReadError):  # GDAL, which has opened it, reads on where this does not
        return False
    for start in range(0, len(entries), entry_size):
        tag, first = (
            struct.unpack_from(order + "H", entries, start)[0],
            entries[start + entry_size - (8 if big else 4) :],
        )
        if tag == EXTRA_SAMPLES:
            return bool(struct.unpack_from(order + "H", first)[0] == 1)
    return False


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


def doubts(dataset: DatasetReader, alpha: int | None) -> list[str]:
    """What may be meant otherwise than it is taken, and the way out, a line each."""
    found = []
    labelled = alpha_band(dataset, None)
    if labelled is not None and alpha is None and _looks_like_imagery(_sample(dataset, labelled)):
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


def find_unlabelled_alpha(dataset: DatasetReader) -> int | None:
    """The last band, where it is not labelled and holds nothing but transparent and opaque, as an alpha band does.

    Three bands or one are colours.
    """
    last = dataset.count
    if last in {1, 3} or dataset.colorinterp[last - 1] not in {ColorInterp.undefined, ColorInterp.gray}:
        return None
    values = set()
    for pixels in _sample(dataset, last):
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
            return bool(((share > 1 / 16) & (share < 15 / 16)).mean() > MANY)
    return False


def _sample(dataset: DatasetReader, band: int) -> Iterator[NDArray[np.generic]]:
    """Pixels of one band from some of its blocks, from the middle on; a block that can't be read is left out."""
    height, width = dataset.block_shapes[band - 1]
    rows, cols = -(-dataset.height // height), -(-dataset.width // width)
    places = dict.fromkeys((int(rows * down), int(cols * across)) for down in SAMPLED for across in SAMPLED)
    for row, col in places:
        top, left = row * height, col * width
        size = min(SAMPLE, width, dataset.width - left), min(SAMPLE, height, dataset.height - top)
        try:
            yield dataset.read(band, window=RasterioWindow(left, top, *size))
        except (RasterioError, CPLE_BaseError):
            continue
