"""Scenes: what the header of an image says, whether a model can segment it, and if not, why. Loads no GDAL."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any

import numpy as np

from seg_core.errors import SegError
from seg_core.grey_levels import Normalization
from seg_core.grid import Window
from seg_core.imagery.georef import Transform, ground_size

GSD_TOLERANCE = 0.1  # a model segments scenes whose GSD is within 10 % of its own
RESAMPLE_TOLERANCE = 0.01  # a smaller difference of GSD is not resampled
NOT_STORED = {"stored": False}  # metadata of the fields of a scene that are not stored in a run
NOT_IN_VERSION = {"in_version": False}  # and of those that are, but that change no row, and so no version of a part


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The header of one image file, or the grid to which the file is to be resampled."""

    scene_id: str  # path relative to the region's common folder, unique in a run
    uri: str
    size: int  # bytes
    version: str  # identifies the state of the file and of a mask beside it: see seg_core.storage.files.Stat
    height: int  # pixels
    width: int
    bands: tuple[int, ...]  # the bands to read, numbered from 1: all except alpha, or those of the model
    dtype: str
    nodata: float | None
    masked: bool  # whether the file has an alpha band or mask, which says which pixels hold data
    crs: str | None
    transform: Transform
    gsd_m: float | None  # ground sampling distance in metres per pixel, at the scene's centre
    source_gsd_m: float | None  # the file's own; it differs from gsd_m if the scene is resampled
    alpha: int | None = None  # the alpha band, if it is not the one that the file labels; 0: none
    nodata_color: tuple[float | None, ...] | None = None  # the nodata value of each band of the file, if they differ
    inverted: bool = False  # 0 is white in the file
    premultiplied: bool = False  # the colours are multiplied by the alpha band
    bits: int | None = None  # of a value, if they are fewer than its dtype holds
    sidecars: tuple[str, ...] = ()  # paths of files beside a remote image that describe it
    # Mean and deviation of each band, if the run normalizes each scene by its own; None: those of the run.
    normalize_mean: tuple[float, ...] | None = None
    normalize_std: tuple[float, ...] | None = None
    captured: datetime | None = field(default=None, metadata=NOT_IN_VERSION)  # when it was taken: UTC, or camera's time
    # The fields below are not stored in a run.
    # Whether blocks that a sparse file leaves out are 0, as in a label, rather than missing.
    blank_is_data: bool = field(default=False, metadata=NOT_STORED)
    maybe_alpha: int | None = field(default=None, metadata=NOT_STORED)  # an unlabelled band that looks like alpha
    doubts: tuple[str, ...] = field(default=(), metadata=NOT_STORED)  # properties that may be misread, a line each

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Scene":
        """Return the scene from the values of `to_plain`, or from a row of the scenes table.

        JSON or Parquet may have made lists of its tuples, and null of fields that were left out.
        """
        names = {each.name for each in fields(cls)}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return cls(**{k: v for k, v in known.items() if v is not None or k not in ADDED_FIELDS})

    def to_plain(self) -> dict[str, Any]:
        """Return the scene as plain values. Fields that older runs lack are left out if they hold their default.

        A run that is older than a field therefore keeps its fingerprint.
        """
        left_out = {
            f.name
            for f in fields(self)
            if f.metadata in (NOT_STORED, NOT_IN_VERSION) or getattr(self, f.name) == f.default
        }
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def to_row(self) -> dict[str, Any]:
        """Return the scene's row of the scenes table."""
        return {**self.to_plain(), "captured": self.captured}

    @property
    def window(self) -> Window:
        """The window of the whole scene."""
        return Window(0, 0, self.height, self.width)

    @property
    def normalization(self) -> Normalization | None:
        """Mean and deviation by which the run normalizes this scene; None if those of the run apply."""
        if self.normalize_mean is None or self.normalize_std is None:
            return None
        return Normalization(self.normalize_mean, self.normalize_std)

    def normalized(self, normalization: Normalization | None) -> "Scene":
        """Return the scene with this normalization."""
        mean, std = normalization or (None, None)
        return replace(self, normalize_mean=mean, normalize_std=std)

    @property
    def is_resampled(self) -> bool:
        """Whether the grid differs from the file's grid."""
        return self.gsd_m != self.source_gsd_m

    @property
    def is_mosaic(self) -> bool:
        """Whether it is the image that several files make together: that is no file, and has no version."""
        return not self.version


# Stored fields that older runs may lack.
ADDED_FIELDS = {f.name for f in fields(Scene) if f.default is not NO_DEFAULT and f.metadata != NOT_STORED}


def mean_gsd(crs: str | None, transform: Transform, height: int, width: int) -> float | None:
    """Return the ground sampling distance at the centre of a grid, in metres per pixel; None without a CRS."""
    if crs is None:
        return None
    along_column, along_row = ground_size(crs, transform, height, width)
    return round(float((along_column * along_row) ** 0.5), 6)


def choose_bands(scene: Scene, num_needed: int, bands: Sequence[int] | None) -> tuple[int, ...]:
    """Return the bands to read. Raises SegError unless the file or `bands` gives as many as the model needs."""
    count, name = len(scene.bands), scene.scene_id
    example = ",".join(str(scene.bands[min(i, count - 1)]) for i in range(num_needed)) if count else ""
    if bands is None and count != num_needed:
        ways_out = _band_options(scene, example)
        if 1 < count == num_needed - 1 and scene.maybe_alpha is None:
            ways_out = f"add --alpha none if its alpha band is one like the others, or {ways_out}"
        raise SegError(f"{name}: {count} bands besides alpha, the model needs {num_needed}: {ways_out}")
    if bands is not None and len(bands) != num_needed:
        raise SegError(f"--bands {','.join(map(str, bands))}: names {len(bands)} bands, the model needs {num_needed}")
    chosen = scene.bands if bands is None else tuple(bands)
    absent = [b for b in chosen if b not in scene.bands]
    if absent:
        raise SegError(f"{name}: no colour band {absent[0]} (it has {', '.join(map(str, scene.bands))})")
    if scene.maybe_alpha is not None and scene.maybe_alpha not in chosen:
        raise SegError(f"{name}: {_band_options(scene, ','.join(map(str, chosen)))}")
    return chosen


def _band_options(scene: Scene, example: str) -> str:
    """Return how to choose the bands, with the bands in `example` as an example."""
    band = scene.maybe_alpha
    if band is None:
        return f"choose with --bands, such as --bands {example}"
    ways_out = f"--alpha {band}, or --alpha none --bands {example}"
    return f"band {band} may be alpha, because it holds only 0 and opaque: add {ways_out}"


def fit_to_model(
    scene: Scene,
    *,
    num_bands: int,
    dtype: str,
    gsd_m: float | None,
    bands: Sequence[int] | None = None,
    scale: tuple[float, float] | None = None,
    resample: bool = False,
) -> Scene:
    """Return the scene with the bands and the grid that a model needs.

    `gsd_m` is the model's ground sampling distance in metres. `scale` holds the two values that become 0 and 255.
    Raises SegError if the model can't segment the scene.
    """
    chosen = choose_bands(scene, num_bands, bands)
    _check_scale(scene, dtype, scale)
    return replace(_fit_grid(scene, gsd_m, resample), bands=chosen)


def _check_scale(scene: Scene, trained_on: str, scale: tuple[float, float] | None) -> None:
    """Raise SegError if the values of a scene are not of the dtype trained on, and are not scaled to it either."""
    name, dtype = scene.scene_id, np.dtype(scene.dtype)
    if scale is None and dtype != np.dtype(trained_on):
        raise SegError(
            f"{name}: its pixels are {dtype}, the model was trained on {trained_on}: "
            "set with --scale MIN MAX which values become 0 and 255"
        )
    if scale is None and scene.bits is not None:
        raise SegError(f"{name}: its pixels have {scene.bits} bits, not 8: add --scale 0 {2**scene.bits - 1}")
    if scale is not None and np.issubdtype(dtype, np.integer):
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if scale[0] < least or scale[1] > most:
            raise SegError(
                f"{name}: --scale {scale[0]:g} {scale[1]:g}: its pixels are {dtype}, {least} to {most}: segment "
                "it in a separate run"
            )


def compare_gsd(scene: Scene, gsd_m: float) -> tuple[float, str]:
    """Compare the sides of a scene's pixels with a GSD.

    Returns the larger relative difference, and the measures of a pixel as text. The scene must have a CRS.
    """
    assert scene.crs is not None
    height_m, width_m = ground_size(scene.crs, scene.transform, scene.height, scene.width)
    is_oblong = abs(width_m / height_m - 1) > GSD_TOLERANCE  # such as a lon/lat pixel, which is narrower than high
    size = f"{width_m:.3g} x {height_m:.3g} m" if is_oblong else f"{scene.gsd_m:.3g} m"
    return max(abs(height_m / gsd_m - 1), abs(width_m / gsd_m - 1)), size


def _fit_grid(scene: Scene, gsd_m: float | None, resample: bool) -> Scene:
    if gsd_m is None or scene.gsd_m is None:
        return scene
    difference, size = compare_gsd(scene, gsd_m)
    if resample and difference > RESAMPLE_TOLERANCE:
        return resample_grid(scene, gsd_m)
    if difference > GSD_TOLERANCE:
        raise SegError(
            f"{scene.scene_id}: {size} per pixel, the model was trained at {gsd_m:.3g} m: "
            "add --resample to segment it at the model's resolution"
        )
    return scene


def resample_grid(scene: Scene, gsd_m: float) -> Scene:
    """Return the scene on a grid of square pixels of `gsd_m` metres on the ground, with the same corners."""
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
        # The mean of oblong pixels may equal the new GSD, but their longer side does not.
        source_gsd_m=max(along_column, along_row) if scene.gsd_m == gsd_m else scene.source_gsd_m,
    )
