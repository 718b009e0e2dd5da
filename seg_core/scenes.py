"""Scenes: read the headers of images, refuse what can't be segmented, and say why."""

import math
import os
import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from seg_core.errors import ReadError, SegError, UnansweredError
from seg_core.geometry import Transform, corner_distance, ground_size
from seg_core.storage import (
    gdal_path,
    gdal_settings,
    is_remote,
    stat,
)
from seg_core.tiling import Window

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
UNANSWERED = re.compile(r"CURL error|HTTP response code: (429|5\d\d)|got \d+ bytes, expected")  # GDAL's words for it
# A scene without georeference is served; the command line says so itself, once a scene and not once a read.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

MAX_BLOCK = 2**28  # bytes; a block, the file's tile or strip, is decoded whole, by each reader one of its own
MAX_PIXELS = 2**42  # of a scene; a header that says more is damaged, and to plan it would take for ever
MASK = ".msk"
BESIDE = (MASK, ".ovr")  # what files beside an image end with that GDAL opens with it
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how they begin

GSD_TOLERANCE = 0.1  # a model serves scenes whose GSD is within 10 % of its own
APART = 0.1  # of its diagonal, by which the corners of an image and its label may differ
RESAMPLE_TOLERANCE = 0.01  # with resampling asked for, less than 1 % is left as it is


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The header of one image file, or the grid that it is to be resampled to."""

    scene_id: str  # path relative to the region's common folder, unique in a run
    uri: str
    size: int  # bytes
    version: str  # what tells one state of the file from another, and of a mask beside it: see storage.Stat
    height: int  # pixels
    width: int
    bands: tuple[int, ...]  # the colour bands, numbered from 1: all but alpha
    dtype: str
    nodata: float | None
    masked: bool  # whether an alpha band or mask of the file says which pixels hold data
    crs: str | None
    transform: Transform
    gsd_m: float | None  # ground sampling distance in metres a pixel, at the scene's centre
    source_gsd_m: float | None  # the file's own; differs from gsd_m where the scene is resampled

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Scene":
        """The scene of `dataclasses.asdict`, after JSON or Parquet made lists of its tuples."""
        return cls(**{**values, "bands": tuple(values["bands"]), "transform": tuple(values["transform"])})

    @property
    def window(self) -> Window:
        """The whole scene."""
        return Window(0, 0, self.height, self.width)

    @property
    def resampled(self) -> bool:
        """Whether the grid is another than the file's."""
        return self.gsd_m != self.source_gsd_m


@contextmanager
def open_image(uri: str, fresh: bool = False, overview: int | None = None) -> Iterator[DatasetReader]:
    """Open an image, or one of its overviews. Raises ReadError where it is none, or reading it fails.

    GDAL's settings are in force meanwhile. It keeps what it has fetched of a remote file for the next one to open it,
    but not of a `fresh` one.
    """
    kept = {"CPL_VSIL_CURL_NON_CACHED": gdal_path(uri)} if fresh else {}
    options = {} if overview is None else {"overview_level": overview}
    with rasterio.Env(**gdal_settings(uri), **kept):
        try:
            dataset = rasterio.open(gdal_path(uri), driver=DRIVERS[posixpath.splitext(uri)[1].lower()], **options)
        except RasterioError as error:
            raise _read_error(uri, error, _why_unreadable(uri)) from error
        except (KeyError, UnicodeDecodeError) as error:  # of another suffix; of a CRS that is no text
            raise ReadError(_why_unreadable(uri)) from error
        with dataset:
            opened = False
            try:
                _check_header(uri, dataset)
                opened = True
                yield dataset
            except (RasterioError, CPLE_BaseError) as error:  # GDAL's own, where rasterio has no name for it
                found = _read_error(uri, error)
                tiled = dataset.driver == DRIVERS[".tif"]  # others are decoded from their top
                found.in_places = opened and tiled and not isinstance(found, UnansweredError)
                raise found from error


def _check_header(uri: str, dataset: DatasetReader) -> None:
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
    for path in files_beside(uri, dataset, BESIDE):
        if not _begins(path, TIFF):
            raise ReadError(f"{uri}: {path}, which is beside it, is no TIFF: remove it")
        with rasterio.open(path, driver="GTiff") as beside:
            _check_overviews(path, beside)


def _check_overviews(path: str, dataset: DatasetReader) -> None:
    """Raise ReadError for an image that names a file for its overviews: any could be read through it."""
    if named := dataset.tags(ns="OVERVIEWS").get("OVERVIEW_FILE"):
        raise ReadError(f"{path}: its overviews are in a file of its choice, {named}: take that out of its metadata")


def files_beside(uri: str, dataset: DatasetReader, endings: str | tuple[str, ...]) -> list[str]:
    """The files beside an image on disk, with one of those endings, that GDAL opens with it.

    Of one in a store not even their names are asked for: GDAL would send a request for each.
    """
    return [] if is_remote(uri) else [path for path in dataset.files[1:] if path.lower().endswith(endings)]


def _begins(path: str, with_any: tuple[bytes, ...]) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith(with_any)


def _read_error(uri: str, error: BaseException, reason: str | None = None) -> ReadError:
    """What GDAL says of its first cause, for rasterio's own error only says that there is one."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if is_remote(uri) and any(UNANSWERED.search(str(cause)) for cause in causes):
        return UnansweredError(f"{uri}: {causes[-1]}")
    return ReadError(reason or f"{uri}: {causes[-1]}")


def _why_unreadable(uri: str) -> str:
    try:
        if stat(uri) is None:
            return f"{uri}: no such file"
    except SegError as error:
        return str(error)
    if not is_remote(uri) and not os.access(uri, os.R_OK):
        return f"{uri}: not allowed to read it"
    return f"{uri}: not an image, or a damaged one (read: {', '.join(SUFFIXES)})"


def read_scene(uri: str, scene_id: str) -> Scene:
    """Read one header. Raises ReadError for what is not an image."""
    found = stat(uri)
    if found is None:
        raise ReadError(f"{uri}: no such file")
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise ReadError(f"{uri}: its name is not UTF-8: rename it") from error
    with open_image(uri) as dataset:
        if ColorInterp.palette in dataset.colorinterp:
            raise ReadError(f"{uri}: its pixels are numbers of colours: give it those (gdal_translate -expand rgb)")
        masks = [stat(path) for path in files_beside(uri, dataset, MASK)]
        crs = _crs_text(dataset)
        transform: Transform = tuple(dataset.transform)[:6]
        try:
            gsd_m = mean_gsd(crs, transform, dataset.height, dataset.width)
        except SegError as error:
            way_out = "mend it (gdal_edit -a_srs, -a_ullr), or take it away (gdal_edit -a_srs None)"
            raise ReadError(f"{uri}: {error}: {way_out}") from error
        return Scene(
            scene_id=scene_id,
            uri=uri,
            size=found.size,
            version=" ".join(each.version for each in (found, *masks) if each),
            height=dataset.height,
            width=dataset.width,
            bands=tuple(i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c != ColorInterp.alpha),
            dtype=dataset.dtypes[0],
            nodata=dataset.nodata,
            masked=has_mask(dataset),
            crs=crs,
            transform=transform,
            gsd_m=gsd_m,
            source_gsd_m=gsd_m,
        )


def has_mask(dataset: DatasetReader) -> bool:
    """Whether an alpha band or mask says which pixels hold data, so far as GDAL could find out.

    It looks for masks quietly: where a store does not answer, there is none.
    """
    return ColorInterp.alpha in dataset.colorinterp or MaskFlags.per_dataset in dataset.mask_flag_enums[0]


def _crs_text(dataset: DatasetReader) -> str | None:
    if not dataset.crs or dataset.transform.is_identity:
        return None
    code = dataset.crs.to_epsg()
    return f"EPSG:{code}" if code else str(dataset.crs.to_wkt())


def mean_gsd(crs: str | None, transform: Transform, height: int, width: int) -> float | None:
    """Ground sampling distance in metres a pixel at the centre of a grid; None without a CRS."""
    if crs is None:
        return None
    along_column, along_row = ground_size(crs, transform, height, width)
    return round(float((along_column * along_row) ** 0.5), 6)


def lie_apart(one: Scene, other: Scene) -> bool:
    """Whether corners of two images lie far from each other for their size; False where they don't say where."""
    if one.crs is None or other.crs is None:
        return False
    ours, theirs = ((str(s.crs), s.transform, s.height, s.width) for s in (one, other))
    return corner_distance(ours, theirs) > APART


def choose_bands(scene: Scene, wanted: int, bands: Sequence[int] | None) -> tuple[int, ...]:
    """The bands to read. Raises SegError where the model's number of bands doesn't follow from the file."""
    if bands is None:
        count = len(scene.bands)
        if count != wanted:
            example = ",".join(str(min(i, count)) for i in range(1, wanted + 1))
            raise SegError(
                f"{scene.scene_id}: {count} bands besides alpha, the model wants {wanted}: "
                f"choose with --bands, such as --bands {example}"
            )
        return scene.bands
    if len(bands) != wanted:
        raise SegError(f"--bands {','.join(map(str, bands))}: names {len(bands)} bands, the model wants {wanted}")
    absent = [b for b in bands if b not in scene.bands]
    if absent:
        raise SegError(f"{scene.scene_id}: no colour band {absent[0]} (it has {', '.join(map(str, scene.bands))})")
    return tuple(bands)


def fit_to_model(
    scene: Scene, *, num_bands: int, gsd_m: float | None, bands: Sequence[int] | None, scaled: bool, resample: bool
) -> Scene:
    """The scene with the bands and on the grid that a model reads it in. Raises SegError for what can't be served."""
    chosen = choose_bands(scene, num_bands, bands)
    if scene.dtype != "uint8" and not scaled:
        raise SegError(
            f"{scene.scene_id}: its pixels are {scene.dtype}, the model was trained on uint8: "
            "say with --scale MIN MAX which values become 0 and 255"
        )
    return replace(_fit_grid(scene, gsd_m, resample), bands=chosen)


def compare_gsd(scene: Scene, gsd_m: float) -> tuple[float, str]:
    """By what share the sides of a scene's pixels differ from a GSD at most, and what they measure, in words."""
    assert scene.crs is not None
    high, wide = ground_size(scene.crs, scene.transform, scene.height, scene.width)
    oblong = abs(wide / high - 1) > GSD_TOLERANCE  # a lon/lat pixel is narrower than high
    size = f"{wide:.3g} x {high:.3g} m" if oblong else f"{scene.gsd_m:.3g} m"
    return max(abs(high / gsd_m - 1), abs(wide / gsd_m - 1)), size


def _fit_grid(scene: Scene, gsd_m: float | None, resample: bool) -> Scene:
    if gsd_m is None or scene.gsd_m is None:
        return scene
    off, size = compare_gsd(scene, gsd_m)
    if resample and off > RESAMPLE_TOLERANCE:
        return resample_grid(scene, gsd_m)
    if off > GSD_TOLERANCE:
        raise SegError(
            f"{scene.scene_id}: {size} a pixel, the model was trained at {gsd_m:.3g} m: "
            "add --resample to segment it at the model's resolution"
        )
    return scene


def resample_grid(scene: Scene, gsd_m: float) -> Scene:
    """The scene on a grid of square ground pixels of `gsd_m` metres, with the same corners."""
    assert scene.crs is not None
    along_column, along_row = ground_size(scene.crs, scene.transform, scene.height, scene.width)
    height = max(1, round(scene.height * along_column / gsd_m))
    width = max(1, round(scene.width * along_row / gsd_m))
    a, b, c, d, e, f = scene.transform
    across, down = scene.width / width, scene.height / height
    return replace(
        scene,
        height=height,
        width=width,
        transform=(a * across, b * down, c, d * across, e * down, f),
        gsd_m=gsd_m,
        # Of oblong pixels the mean may be the same; their longer side is not.
        source_gsd_m=max(along_column, along_row) if scene.gsd_m == gsd_m else scene.source_gsd_m,
    )
