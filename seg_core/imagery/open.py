"""Open image files with GDAL, refuse dangerous ones, and say what is wrong with unreadable ones.

A file is read in the same way wherever it is, and whatever GDAL settings are in the environment: see
`seg_core.storage.files.gdal_settings`.
"""

import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterioWindow

from seg_core.errors import ReadError, SegError, StoreUnavailableError
from seg_core.grid import Window
from seg_core.imagery.data_files import gdal_environment
from seg_core.storage.files import gdal_path, gdal_settings, is_remote, read_ranges, stat

# Formats that contain only pixels, each opened with its own driver. Formats such as VRT name further files, so that a
# scene could read files that its author can't.
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
# In GDAL's messages, if an object store does not answer.
UNANSWERED = re.compile(r"CURL error|HTTP response code: (429|5\d\d)|got \d+ bytes, expected")
DAMAGED_BLOCK = re.compile(r"IReadBlock failed at X offset (\d+), Y offset (\d+)")
MISSING_CODEC = re.compile(r"missing codec (?:of code )?(\w+)")

MAX_BLOCK = 2**28  # bytes; a block (tile or strip of a file) is decoded as a whole, and each reader holds one
MAX_PIXELS = 2**42  # of a scene; a header with more is damaged, and planning it would take forever
MASK = ".msk"
# Suffixes of files beside an image from which GDAL reads what the image lacks. Those of the first kind follow the
# image's whole name, the others its stem. Those like .tfw are world files.
NAME_SIDECARS = (".aux.xml", ".xml", ".msk", ".ovr")
STEM_SIDECARS = (
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
SIDECARS = (*NAME_SIDECARS, *STEM_SIDECARS)
# Sources of the georeference in order of priority. These are GDAL's defaults, whatever the environment says.
GEOREF_SOURCES = {
    "GTiff": {"GDAL_GEOREF_SOURCES": "PAM,INTERNAL,TABFILE,WORLDFILE,XML"},
    "JP2OpenJPEG": {"GDAL_GEOREF_SOURCES": "PAM,GEOJP2,GMLJP2,WORLDFILE"},
}
REMOTE_FILES_SETTING = "CPL_VSIL_CURL_ALLOWED_EXTENSIONS"  # GDAL's setting for which remote files exist
COMPANION_SUFFIXES = (MASK, ".ovr")  # of files beside an image that GDAL opens as images too
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a TIFF


@contextmanager
def open_image(
    uri: str, fresh: bool = False, overview: int | None = None, sidecars: Sequence[str] = ()
) -> Iterator[DatasetReader]:
    """Open an image, or one of its overviews (numbered from 0). Its GDAL settings apply until the block ends.

    GDAL caches what it fetches of a remote file. With `fresh`, the cache is not used. `sidecars` are the paths of the
    files beside a remote image that belong to it. GDAL itself finds those of an image on disk. rasterio warns if the
    image has no georeference. Raises ReadError if the file is not an image or reading it fails, in the block too.
    """
    suffix, options = posixpath.splitext(uri)[1].lower(), {} if overview is None else {"overview_level": overview}
    # As a setting, because GDAL 3.10 ignores the open option if the setting GTIFF_POINT_GEO_IGNORE is given too.
    settings = gdal_settings(uri) | GEOREF_SOURCES.get(DRIVERS.get(suffix, ""), {})
    # Only if it is in the environment: with this setting, GDAL ignores what follows a ? in a name.
    if REMOTE_FILES_SETTING in os.environ:
        settings[REMOTE_FILES_SETTING] = ",".join((*SUFFIXES, *SIDECARS))
    if fresh:
        settings["CPL_VSIL_CURL_NON_CACHED"] = gdal_path(uri)
    if sidecars:
        settings["GDAL_DISABLE_READDIR_ON_OPEN"] = "TRUE"  # no listing: GDAL asks for each of them by name
    with gdal_environment(settings):
        try:
            dataset = rasterio.open(gdal_path(uri), driver=DRIVERS[suffix], **options)
        except RasterioError as error:
            raise _read_error(uri, error, _why_unreadable(uri, error)) from error
        except (KeyError, UnicodeDecodeError) as error:  # an unknown suffix; a CRS that is not text
            raise ReadError(_why_unreadable(uri, error)) from error
        with dataset:
            opened = False
            try:
                _check_header(uri, dataset, sidecars, overview is not None)
                opened = True
                yield dataset
            except (RasterioError, CPLE_BaseError) as error:  # the latter is GDAL's, for which rasterio has no type
                found = _read_error(uri, error, _damaged_block(uri, dataset, error))
                tiled = dataset.driver == DRIVERS[".tif"]  # other formats are decoded from the top
                found.is_partial = opened and tiled and not isinstance(found, StoreUnavailableError)
                raise found from error


def as_rasterio(window: Window) -> RasterioWindow:
    """Convert a window to rasterio's type."""
    return RasterioWindow(window.col_off, window.row_off, window.width, window.height)


def _check_header(uri: str, dataset: DatasetReader, sidecars: Sequence[str], overview: bool) -> None:
    """Raise ReadError for an image that would need too much memory, or that names other files."""
    dtype = dataset.dtypes[0]
    if dtype.startswith("complex"):
        raise ReadError(f"{uri}: its pixels are {dtype}, but this program reads only real numbers")
    if dataset.width * dataset.height > MAX_PIXELS:
        raise ReadError(f"{uri}: its header gives {dataset.width} x {dataset.height} px: it is damaged")
    height, width = max(dataset.block_shapes, key=math.prod)
    bands_together = dataset.count if dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
    size = height * width * np.dtype(dtype).itemsize * bands_together
    if size > MAX_BLOCK:
        raise ReadError(
            f"{uri}: its blocks of {width} x {height} px are {size / 2**20:,.0f} MiB each, more than "
            f"{MAX_BLOCK // 2**20}: write it in tiles (gdal_translate -co TILED=YES)"
        )
    _check_overviews(uri, dataset)  # before `files_beside`, which lets GDAL open them
    for path in files_beside(uri, dataset, sidecars, COMPANION_SUFFIXES):
        if not _is_tiff(path):
            raise ReadError(f"{uri}: {path}, which is beside it, is not a TIFF: remove it")
        with rasterio.open(gdal_path(path), driver="GTiff") as beside:
            _check_overviews(path, beside)
            if path.lower().endswith(MASK) and not overview and beside.shape != dataset.shape:
                size = f"{beside.width} x {beside.height} px, the image has {dataset.width} x {dataset.height}"
                raise ReadError(f"{uri}: {path}, which is beside it, has {size}: remove it")


def _is_tiff(path: str) -> bool:
    """Return whether a file begins like a TIFF. Raises StoreUnavailableError if an object store does not answer."""
    try:
        return read_ranges(path, [(0, 4)], 0)[0].startswith(TIFF)
    except StoreUnavailableError:
        raise
    except ReadError:
        return False


def _check_overviews(path: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image that names a file with its overviews: it could name any file."""
    if named := dataset.tags(ns="OVERVIEWS").get("OVERVIEW_FILE"):
        raise ReadError(
            f"{path}: its metadata names another file for its overviews, {named}: remove OVERVIEW_FILE from it"
        )


def choose_sidecars(uri: str, beside: Iterable[str]) -> tuple[str, ...]:
    """Return those paths beside a remote image that GDAL reads as parts of it."""
    stem = posixpath.splitext(uri)[0]
    names = {f"{uri}{ending}" for ending in NAME_SIDECARS} | {f"{stem}{ending}" for ending in STEM_SIDECARS}
    lower = {name.lower() for name in names}
    return tuple(path for path in beside if path.lower() in lower)


def files_beside(
    uri: str, dataset: DatasetReader, sidecars: Sequence[str], endings: str | tuple[str, ...]
) -> list[str]:
    """Return the files beside an image that GDAL opens with it and whose names have one of these endings.

    For a remote image they are taken from `sidecars`, because asking GDAL would send a request for each.
    """
    found = sidecars if is_remote(uri) else dataset.files[1:]
    return [path for path in found if path.lower().endswith(endings)]


def _read_error(uri: str, error: BaseException, reason: str | None = None) -> ReadError:
    """Return the error with GDAL's message, because rasterio's own one only refers to it."""
    cause = _causes(error)[-1]
    return (
        StoreUnavailableError(f"{uri}: {cause}")
        if is_unanswered(uri, error)
        else ReadError(reason or f"{uri}: {cause}")
    )


def is_unanswered(uri: str, error: BaseException) -> bool:
    """Return whether GDAL failed because an object store did not answer, or closed the connection."""
    return is_remote(uri) and any(UNANSWERED.search(str(cause)) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the first cause last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes


def _damaged_block(uri: str, dataset: DatasetReader, error: BaseException) -> str | None:
    """Return which block of the file can't be decoded, if GDAL says so. All tiles that touch it fail."""
    causes = _causes(error)
    found = next((match for cause in causes if (match := DAMAGED_BLOCK.search(str(cause)))), None)
    if found is None or dataset.driver != DRIVERS[".tif"]:  # other formats have no independent blocks
        return None
    col, row = map(int, found.groups())
    height, width = dataset.block_shapes[0]
    return (
        f"{uri}: its block of {width} x {height} px at row {row * height}, column {col * width} can't be decoded: "
        f"{causes[-1]}"
    )


def _why_unreadable(uri: str, error: BaseException) -> str:
    """Return a line on why GDAL could not open a file."""
    try:
        if stat(uri) is None:
            return f"{uri}: no such file"
    except SegError as reason:
        return str(reason)
    if not is_remote(uri) and not os.access(uri, os.R_OK):
        return f"{uri}: no permission to read it"
    if codec := next((match[1] for cause in _causes(error) if (match := MISSING_CODEC.search(str(cause)))), None):
        return (
            f"{uri}: its pixels are compressed with {codec}, which this GDAL does not support: write it with another "
            "codec (gdal_translate -co COMPRESS=DEFLATE)"
        )
    return f"{uri}: not an image, or a damaged one (supported: {', '.join(SUFFIXES)})"
