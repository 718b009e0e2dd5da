"""Scenes: what the header of an image says, whether a model can be served with it, and why not."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.io import DatasetReader

from seg_core.errors import ReadError, SegError
from seg_core.grid import Window
from seg_core.imagery.bands import (
    alpha_band,
    bits_per_sample,
    check_pixels,
    color_bands,
    find_doubts,
    find_unlabelled_alpha,
    has_mask,
    is_inverted,
    is_premultiplied,
)
from seg_core.imagery.georef import Transform, ground_size
from seg_core.imagery.open import MASK, choose_sidecars, files_beside, open_image
from seg_core.storage.files import stat, stat_beside

GSD_TOLERANCE = 0.1  # a model serves scenes whose GSD is within 10 % of its own
NOT_LISTED = "its folder can't be listed: files beside it (.aux.xml, .msk, world files) are not looked for"
RESAMPLE_TOLERANCE = 0.01  # with resampling asked for, less than 1 % is left as it is


PLANNING = {"planning": True}  # marks fields of a scene that are not part of a run's record


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
    alpha: int | None = None  # the alpha band, where it is another than the file's labels say; 0: none
    nodata_color: tuple[float | None, ...] | None = None  # a nodata value for each band of the file, if they differ
    inverted: bool = False  # 0 is white in the file
    premultiplied: bool = False  # the colours are multiplied by the alpha band
    bits: int | None = None  # of a value, where they are fewer than its dtype holds
    sidecars: tuple[str, ...] = ()  # paths of files beside a remote image that say more of it
    # What is no part of a run's record:
    # Blocks that the file leaves out are 0, as in a label, and not missing.
    blank_is_data: bool = field(default=False, metadata=PLANNING)
    maybe_alpha: int | None = field(default=None, metadata=PLANNING)  # a band without a label that looks like alpha
    doubts: tuple[str, ...] = field(default=(), metadata=PLANNING)  # what may be meant otherwise, a line each

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Scene":
        """The scene of `to_plain`, after JSON or Parquet made lists of its tuples and null of what was left out."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{k: v for k, v in known.items() if v is not None or k not in LATER})

    def to_plain(self) -> dict[str, Any]:
        """As plain values, without fields that runs did not always have where those hold their default.

        So a run that is older than a field keeps its fingerprint.
        """
        left_out = {f.name for f in fields(self) if f.metadata == PLANNING or getattr(self, f.name) == f.default}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def window(self) -> Window:
        """The whole scene."""
        return Window(0, 0, self.height, self.width)

    @property
    def is_resampled(self) -> bool:
        """Whether the grid is another than the file's."""
        return self.gsd_m != self.source_gsd_m

    @property
    def is_mosaic(self) -> bool:
        """Whether it is the image that several files make together: that is no file, and has no version."""
        return not self.version


# Fields of a run's record that older runs lack.
LATER = {f.name for f in fields(Scene) if f.default is not NO_DEFAULT and f.metadata != PLANNING}


def read_scene(uri: str, scene_id: str, alpha: int | None = None) -> Scene:
    """Read one header. `alpha` is the number of the alpha band, 0 for none; by default the file's labels say.

    Raises ReadError for what is not an image, or means something else than it seems.
    """
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise ReadError(f"{uri}: its name is not UTF-8: rename it") from error
    found, beside = stat_beside(uri)
    if found is None:
        raise ReadError(f"{uri}: no such file")
    sidecars = choose_sidecars(uri, beside or ())
    with open_image(uri, sidecars=sidecars) as dataset:
        check_pixels(uri, dataset)
        if alpha is not None and alpha > dataset.count:
            raise ReadError(f"{uri}: --alpha {alpha}: it has {dataset.count} bands")
        masks = [stat(path) for path in files_beside(uri, dataset, sidecars, MASK)]
        crs, transform = _crs_text(dataset), tuple(dataset.transform)[:6]
        gsd_m = _checked_gsd(uri, crs, transform, dataset)
        same_nodata = len(set(map(repr, dataset.nodatavals))) == 1
        return Scene(
            scene_id=scene_id,
            uri=uri,
            size=found.size,
            version=" ".join(each.version for each in (found, *masks) if each),
            height=dataset.height,
            width=dataset.width,
            bands=color_bands(dataset, alpha),
            dtype=dataset.dtypes[0],
            nodata=dataset.nodata if same_nodata else None,
            masked=has_mask(dataset, alpha),
            crs=crs,
            transform=transform,
            gsd_m=gsd_m,
            source_gsd_m=gsd_m,
            alpha=alpha,
            nodata_color=None if same_nodata else dataset.nodatavals,
            inverted=is_inverted(dataset),
            premultiplied=alpha in {None, alpha_band(dataset, None)} and is_premultiplied(uri, dataset),
            bits=bits_per_sample(dataset),
            sidecars=sidecars,
            maybe_alpha=find_unlabelled_alpha(uri, dataset) if alpha is None else None,
            doubts=(*find_doubts(uri, dataset, alpha), *([NOT_LISTED] if beside is None else [])),
        )


def _crs_text(dataset: DatasetReader) -> str | None:
    return None if not dataset.crs or dataset.transform.is_identity else _shortest_name(dataset.crs.to_wkt())


@lru_cache(maxsize=64)
def _shortest_name(wkt: str) -> str:
    """The EPSG code of a CRS where it is exactly that, else its own text.

    Of a CRS whose datum has no name, PROJ finds codes of countries that use its ellipsoid, some 100 m apart.
    """
    crs = CRS.from_wkt(wkt)
    code = crs.to_epsg()
    try:
        return f"EPSG:{code}" if code and CRS.from_epsg(code) == crs else wkt
    except CRSError:  # a code that this PROJ does not know
        return wkt


def _checked_gsd(uri: str, crs: str | None, transform: Transform, dataset: DatasetReader) -> float | None:
    try:
        return mean_gsd(crs, transform, dataset.height, dataset.width)
    except SegError as error:
        way_out = "correct it (gdal_edit.py -a_srs, -a_ullr), or remove it (gdal_edit.py -a_srs None)"
        raise ReadError(f"{uri}: {error}: {way_out}") from error


def mean_gsd(crs: str | None, transform: Transform, height: int, width: int) -> float | None:
    """Ground sampling distance in metres a pixel at the centre of a grid; None without a CRS."""
    if crs is None:
        return None
    along_column, along_row = ground_size(crs, transform, height, width)
    return round(float((along_column * along_row) ** 0.5), 6)


def choose_bands(scene: Scene, wanted: int, bands: Sequence[int] | None) -> tuple[int, ...]:
    """The bands to read. Raises SegError where the model's number of bands doesn't follow from the file."""
    count, name = len(scene.bands), scene.scene_id
    example = ",".join(str(scene.bands[min(i, count - 1)]) for i in range(wanted)) if count else ""
    if bands is None and count != wanted:
        raise SegError(f"{name}: {count} bands besides alpha, the model wants {wanted}: {_way_out(scene, example)}")
    if bands is not None and len(bands) != wanted:
        raise SegError(f"--bands {','.join(map(str, bands))}: names {len(bands)} bands, the model wants {wanted}")
    chosen = scene.bands if bands is None else tuple(bands)
    absent = [b for b in chosen if b not in scene.bands]
    if absent:
        raise SegError(f"{name}: no colour band {absent[0]} (it has {', '.join(map(str, scene.bands))})")
    if scene.maybe_alpha is not None and scene.maybe_alpha not in chosen:
        raise SegError(f"{name}: {_way_out(scene, ','.join(map(str, chosen)))}")
    return chosen


def _way_out(scene: Scene, example: str) -> str:
    """How to say which bands to read, such as those of the example."""
    band = scene.maybe_alpha
    if band is None:
        return f"choose with --bands, such as --bands {example}"
    ways_out = f"--alpha {band}, or --alpha none --bands {example}"
    return f"band {band} may be alpha, for it holds only 0 and opaque: add {ways_out}"


def fit_to_model(
    scene: Scene,
    *,
    num_bands: int,
    gsd_m: float | None,
    bands: Sequence[int] | None,
    scale: tuple[float, float] | None,
    resample: bool,
) -> Scene:
    """The scene with the bands and on the grid that a model reads it in. Raises SegError for what can't be served."""
    chosen = choose_bands(scene, num_bands, bands)
    _check_scale(scene, scale)
    return replace(_fit_grid(scene, gsd_m, resample), bands=chosen)


def _check_scale(scene: Scene, scale: tuple[float, float] | None) -> None:
    """Raise SegError where the values of a scene are not 0 to 255, and are not scaled to that either."""
    name, dtype = scene.scene_id, np.dtype(scene.dtype)
    if scale is None and dtype != np.uint8:
        raise SegError(
            f"{name}: its pixels are {dtype}, the model was trained on uint8: "
            "say with --scale MIN MAX which values become 0 and 255"
        )
    if scale is None and scene.bits is not None:
        raise SegError(f"{name}: its pixels have {scene.bits} bits, not 8: add --scale 0 {2**scene.bits - 1}")
    if scale is not None and np.issubdtype(dtype, np.integer):
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if scale[0] < least or scale[1] > most:
            raise SegError(
                f"{name}: --scale {scale[0]:g} {scale[1]:g}: its pixels are {dtype}, {least} to {most}: make a run of "
                "its own"
            )


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
