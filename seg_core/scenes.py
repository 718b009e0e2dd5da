"""Scenes: find the images of a region, read their headers, refuse what can't be segmented, and say why."""

import glob
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from seg_core.errors import ReadError, SegError
from seg_core.geometry import Transform, ground_size
from seg_core.storage import absolute, gdal_settings
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
MANIFESTS = (".csv", ".parquet", ".txt")
# A scene without georeference is served; the command line says so itself, once a scene and not once a read.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

GSD_TOLERANCE = 0.1  # a model serves scenes whose GSD is within 10 % of its own
RESAMPLE_TOLERANCE = 0.01  # with resampling asked for, less than 1 % is left as it is


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The header of one image file, or the grid that it is to be resampled to."""

    scene_id: str  # path relative to the region's common folder, unique in a run
    uri: str
    size: int  # bytes
    mtime_ns: int
    height: int  # pixels
    width: int
    bands: tuple[int, ...]  # the colour bands, numbered from 1: all but alpha
    dtype: str
    nodata: float | None
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
def open_image(uri: str) -> Iterator[DatasetReader]:
    """Open an image with GDAL's settings in force. Raises ReadError where it is none."""
    with rasterio.Env(**gdal_settings()):
        try:
            dataset = rasterio.open(uri, driver=DRIVERS[Path(uri).suffix.lower()])
        except (KeyError, RasterioError) as error:
            raise ReadError(_why_unreadable(uri)) from error
        with dataset:
            yield dataset


def _why_unreadable(uri: str) -> str:
    if not os.path.exists(uri):
        return f"{uri}: no such file"
    if not os.access(uri, os.R_OK):
        return f"{uri}: not allowed to read it"
    return f"{uri}: not an image, or a damaged one (read: {', '.join(SUFFIXES)})"


def read_scene(uri: str, scene_id: str) -> Scene:
    """Read one header. Raises ReadError for what is not an image."""
    with open_image(uri) as dataset:
        crs = _crs_text(dataset)
        transform: Transform = tuple(dataset.transform)[:6]
        gsd_m = _mean_gsd(crs, transform, dataset.height, dataset.width)
        status = os.stat(uri)
        return Scene(
            scene_id=scene_id,
            uri=uri,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            height=dataset.height,
            width=dataset.width,
            bands=tuple(i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c != ColorInterp.alpha),
            dtype=dataset.dtypes[0],
            nodata=dataset.nodata,
            crs=crs,
            transform=transform,
            gsd_m=gsd_m,
            source_gsd_m=gsd_m,
        )


def _crs_text(dataset: DatasetReader) -> str | None:
    if not dataset.crs or dataset.transform.is_identity:
        return None
    code = dataset.crs.to_epsg()
    return f"EPSG:{code}" if code else str(dataset.crs.to_wkt())


def _mean_gsd(crs: str | None, transform: Transform, height: int, width: int) -> float | None:
    if crs is None:
        return None
    along_column, along_row = ground_size(crs, transform, height, width)
    return round(float((along_column * along_row) ** 0.5), 6)


def read_region(sources: Sequence[str]) -> tuple[list[Scene], list[str]]:
    """Scenes of a region in the order of their ids, and one line for each file that is no readable image.

    A source is a file, a folder (searched with its subfolders), a glob, or a manifest (`.txt`: a path a line;
    `.csv` and `.parquet`: a column `uri`, `path` or `scene`). Raises SegError where nothing is found.
    """
    uris = sorted({uri for source in sources for uri in find_images(source)})
    root = os.path.commonpath([os.path.dirname(uri) for uri in uris])

    def read(uri: str) -> Scene | str:
        try:
            return read_scene(uri, os.path.relpath(uri, root))
        except ReadError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, uris))
    return [s for s in found if isinstance(s, Scene)], [line for line in found if isinstance(line, str)]


def find_images(source: str) -> list[str]:
    """Absolute paths of the images that a source names. Raises SegError where it names none."""
    path = absolute(source)
    if os.path.isdir(path):
        found = _images_below(path)
        if not found:
            raise SegError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        return found
    if os.path.exists(path):
        return _read_manifest(path) if path.lower().endswith(MANIFESTS) else [path]
    found = [p for p in glob.glob(path, recursive=True) if p.lower().endswith(SUFFIXES)]
    if not found:
        raise SegError(f"{source}: no such file or folder")
    return found


def _images_below(folder: str) -> list[str]:
    return [
        os.path.join(parent, name)
        for parent, folders, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]


def _read_manifest(path: str) -> list[str]:
    base = os.path.dirname(path)
    uris = [absolute(uri, base) for uri in _manifest_entries(path)]
    if not uris:
        raise SegError(f"{path}: this manifest names no scene")
    missing = next((uri for uri in uris if not os.path.exists(uri)), None)
    if missing:
        raise SegError(f"{path}: it names {missing}, which is no file")
    return uris


def _manifest_entries(path: str) -> list[str]:
    try:
        if path.lower().endswith(".txt"):
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
            return [line for line in lines if line and not line.startswith("#")]
        read = pd.read_parquet if path.lower().endswith(".parquet") else pd.read_csv
        table = read(path)
    except (ValueError, OSError) as error:  # what is no text, no table or no Parquet is a ValueError to pandas
        raise SegError(f"{path}: not a manifest that can be read: {error}") from error
    column = next((name for name in table.columns if str(name).lower() in {"uri", "path", "scene"}), None)
    if column is None:
        names = ", ".join(map(str, table.columns))
        raise SegError(f"{path}: a manifest needs a column uri, path or scene; it has {names or 'none'}")
    return [str(uri) for uri in table[column].dropna()]


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


def _fit_grid(scene: Scene, gsd_m: float | None, resample: bool) -> Scene:
    if gsd_m is None or scene.gsd_m is None:
        return scene
    off = abs(scene.gsd_m / gsd_m - 1)
    if resample and off > RESAMPLE_TOLERANCE:
        return resample_grid(scene, gsd_m)
    if off > GSD_TOLERANCE:
        raise SegError(
            f"{scene.scene_id}: {scene.gsd_m:.3g} m a pixel, the model was trained at {gsd_m:.3g} m: "
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
    )
