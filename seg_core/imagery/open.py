"""Image files: open one with GDAL, refuse what is dangerous, and say what is wrong.

A file is read in the same way wherever it lies and whatever GDAL settings the environment holds: see
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

MAX_BLOCK = 2**28  # bytes; a block, the file's tile or strip, is decoded whole, by each reader one of its own
MAX_PIXELS = 2**42  # of a scene; a header that says more is damaged, and to plan it would take for ever
MASK = ".msk"
# Endings of files beside an image from which GDAL takes what the image does not say: after the image's whole name, and
# after its stem, where those of .tfw's kind are world files.
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
# Where an image is, by the first that says so: GDAL's defaults, whatever GDAL_GEOREF_SOURCES says.
GEOREF_SOURCES = {
    "GTiff": {"GDAL_GEOREF_SOURCES": "PAM,INTERNAL,TABFILE,WORLDFILE,XML"},
    "JP2OpenJPEG": {"GDAL_GEOREF_SOURCES": "PAM,GEOJP2,GMLJP2,WORLDFILE"},
}
REMOTE_FILES_SETTING = "CPL_VSIL_CURL_ALLOWED_EXTENSIONS"  # GDAL's setting for which remote files there are
COMPANION_SUFFIXES = (MASK, ".ovr")  # what files beside an image end with that GDAL opens with it
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how they begin


@contextmanager
def open_image(
    uri: str, fresh: bool = False, overview: int | None = None, sidecars: Sequence[str] = ()
) -> Iterator[DatasetReader]:
    """Open an image, or one of its overviews. Raises ReadError where it is none, or reading it fails.

    Of one without georeference rasterio warns.

    GDAL's settings are in force meanwhile. It keeps what it has fetched of a remote file for the next one to open it,
    but not of a `fresh` one. `sidecars` are the paths of the files beside a remote image that belong to it; those of an
    image on disk are found by GDAL.
    """
    suffix, options = posixpath.splitext(uri)[1].lower(), {} if overview is None else {"overview_level": overview}
    # As a setting: beside another one, GTIFF_POINT_GEO_IGNORE, GDAL 3.10 does not heed the open option for it.
    settings = gdal_settings(uri) | GEOREF_SOURCES.get(DRIVERS.get(suffix, ""), {})
    if (
        REMOTE_FILES_SETTING in os.environ
    ):  # else it is left alone: GDAL takes what follows a ? in a name for no part of it
        settings[REMOTE_FILES_SETTING] = ",".join((*SUFFIXES, *SIDECARS))
    if fresh:
        settings["CPL_VSIL_CURL_NON_CACHED"] = gdal_path(uri)
    if sidecars:
        settings["GDAL_DISABLE_READDIR_ON_OPEN"] = "TRUE"  # no listing: GDAL asks for each of them by its name
    with gdal_environment(settings):
        try:
            dataset = rasterio.open(gdal_path(uri), driver=DRIVERS[suffix], **options)
        except RasterioError as error:
            raise _read_error(uri, error, _why_unreadable(uri, error)) from error
        except (KeyError, UnicodeDecodeError) as error:  # of another suffix; of a CRS that is no text
            raise ReadError(_why_unreadable(uri, error)) from error
        with dataset:
            opened = False
            try:
                _check_header(uri, dataset, sidecars, overview is not None)
                opened = True
                yield dataset
            except (RasterioError, CPLE_BaseError) as error:  # GDAL's own, where rasterio has no name for it
                found = _read_error(uri, error, _damaged_block(uri, dataset, error))
                tiled = dataset.driver == DRIVERS[".tif"]  # others are decoded from their top
                found.is_partial = opened and tiled and not isinstance(found, StoreUnavailableError)
                raise found from error


def as_rasterio(window: Window) -> RasterioWindow:
    """A window in rasterio's own type."""
    return RasterioWindow(window.col_off, window.row_off, window.width, window.height)


def _check_header(uri: str, dataset: DatasetReader, sidecars: Sequence[str], overview: bool) -> None:
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
    for path in files_beside(uri, dataset, sidecars, COMPANION_SUFFIXES):
        if not _is_tiff(path):
            raise ReadError(f"{uri}: {path}, which is beside it, is no TIFF: remove it")
        with rasterio.open(gdal_path(path), driver="GTiff") as beside:
            _check_overviews(path, beside)
            if path.lower().endswith(MASK) and not overview and beside.shape != dataset.shape:
                size = f"{beside.width} x {beside.height} px, the image {dataset.width} x {dataset.height}"
                raise ReadError(f"{uri}: {path}, which is beside it, measures {size}: remove it")


def _is_tiff(path: str) -> bool:
    """Whether a file begins as a TIFF does. Raises StoreUnavailableError where an object store does not say."""
    try:
        return read_ranges(path, [(0, 4)], 0)[0].startswith(TIFF)
    except StoreUnavailableError:
        raise
    except ReadError:
        return False


def _check_overviews(path: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image that names a file for its overviews: any could be read through it."""
    if named := dataset.tags(ns="OVERVIEWS").get("OVERVIEW_FILE"):
        raise ReadError(
            f"{path}: its metadata names another file for its overviews, {named}: remove OVERVIEW_FILE from it"
        )


def choose_sidecars(uri: str, beside: Iterable[str]) -> tuple[str, ...]:
    """Of the paths of files beside a remote image, those that GDAL takes for its own."""
    stem = posixpath.splitext(uri)[0]
    names = {f"{uri}{ending}" for ending in NAME_SIDECARS} | {f"{stem}{ending}" for ending in STEM_SIDECARS}
    lower = {name.lower() for name in names}
    return tuple(path for path in beside if path.lower() in lower)


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
    cause = _causes(error)[-1]
    return (
        StoreUnavailableError(f"{uri}: {cause}")
        if is_unanswered(uri, error)
        else ReadError(reason or f"{uri}: {cause}")
    )


def is_unanswered(uri: str, error: BaseException) -> bool:
    """Whether GDAL's error is that an object store did not answer, or broke off."""
    return is_remote(uri) and any(UNANSWERED.search(str(cause)) for cause in _causes(error))


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
    if found is None or dataset.driver != DRIVERS[".tif"]:  # other formats have no blocks of their own
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
