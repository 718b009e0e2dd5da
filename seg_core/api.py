"""The public interface: segment an image without Ray, and read what a bulk run has found (see `results`).

    import seg_core

    found = seg_core.segment_file("scene.tif")
    found.mask, found.coverage, found.building_m2

    run = seg_core.open_run("run")
    run.query("SELECT scene_id, sum(building_m2) FROM tiles GROUP BY scene_id").to_pandas()

Regions are segmented by the command `seg segment`, which resumes, reports failures and spreads over a cluster.
"""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grey_levels import Normalization, count_levels
from seg_core.grid import Window, split
from seg_core.imagery.georef import Transform, area_m2, footprints, window_transform
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.scene import fit_to_model
from seg_core.inference.scenes import segment_pixels, segment_scene
from seg_core.model.bundle import BUILT_IN
from seg_core.model.cpu_threads import at_least_two_threads
from seg_core.model.loading import choose_precision_on
from seg_core.model.segmenter import Segmenter
from seg_core.run.export_masks import check_within
from seg_core.run.imagery_fit import choose_normalization
from seg_core.run.normalization import normalizations_of
from seg_core.run.plan import check_threshold
from seg_core.storage.files import absolute

log = logging.getLogger(__name__)

NORMALIZE_MODES = ("auto", "scene", "region", "model")
AREA_TILE = 512  # px; ground areas are taken as even over a tile, as in a run
IDENTITY: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Model = str | os.PathLike[str] | Segmenter | None
"""The path of a bundle, what `load_model` returned, or None for the model that comes with the package."""


@dataclass(frozen=True)
class Segmentation:
    """What a model says of an image, or of a window of it."""

    probability: NDArray[np.float32]  # of building, `(height, width)`; 0 where a pixel is not valid
    valid: NDArray[np.bool_]  # which pixels hold data, `(height, width)`
    threshold: float  # probability from which on a pixel is building
    crs: str | None = None  # None: the image does not say where it lies
    transform: Transform = IDENTITY  # a, b, c, d, e, f from columns and rows of the arrays to x and y, as rasterio's

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which valid pixels are building, `(height, width)`."""
        return np.asarray((self.probability >= np.float32(self.threshold)) & self.valid)

    @property
    def coverage(self) -> float | None:
        """The share of the valid pixels that is building; None where no pixel is valid."""
        num_valid = int(self.valid.sum())
        return int(self.mask.sum()) / num_valid if num_valid else None

    @property
    def area_m2(self) -> float | None:
        """Ground area of the valid pixels in square metres, geodesic; None without a CRS."""
        return self._ground_area(self.valid)

    @property
    def building_m2(self) -> float | None:
        """Ground area of the building pixels in square metres, geodesic; None without a CRS."""
        return self._ground_area(self.mask)

    def _ground_area(self, pixels: NDArray[np.bool_]) -> float | None:
        if self.crs is None:
            return None
        whole = Window(0, 0, *pixels.shape)
        tiles = list(split(whole, AREA_TILE))
        polygons = footprints(self.crs, self.transform, tiles)
        if any(polygon is None for polygon in polygons):
            return None
        counts = [int(pixels[tile.slices(whole)].sum()) for tile in tiles]
        each = zip(tiles, polygons, counts, strict=True)
        return math.fsum(count * area_m2(polygon) / (tile.height * tile.width) for tile, polygon, count in each)

    def save_mask(self, path: str) -> None:
        """Write the mask as a GeoTIFF of one `uint8` band: 1 is building, 0 is not, 255 (nodata) holds no data."""
        pixels = np.where(self.valid, self.mask, np.uint8(MISSING)).astype(np.uint8)
        write_geotiff(path, pixels[np.newaxis], crs=self.crs, transform=self.transform, nodata=MISSING)


def load_model(
    path: str | os.PathLike[str] | None = None, *, device: str = "auto", precision: str = "auto"
) -> Segmenter:
    """A model, loaded once to be used for many images.

    `path` is a bundle's folder or `s3://` prefix, by default the model that comes with the package. `device` is `auto`
    (a GPU where there is one), `cpu` or `cuda`; `precision` is one of `seg_core.processor.PRECISIONS`. Raises SegError
    where there is no bundle, no such device or precision, or where it can't compute in this precision.
    """
    precision = choose_precision_on(device, precision)
    return Segmenter(BUILT_IN if path is None else absolute(path), device, precision=precision)


def segment_array(
    image: NDArray[np.uint8],
    model: Model = None,
    *,
    valid: NDArray[np.bool_] | None = None,
    threshold: float | None = None,
    normalize: str = "auto",
) -> Segmentation:
    """Segment an image in memory, at the resolution that the model was trained at.

    `image` is `uint8 (height, width, bands)`, as Pillow and matplotlib have it. `valid` `bool (height, width)` says
    which pixels hold data, by default all: then those of a nodata value count as imagery. With rasterio,
    `dataset.dataset_mask() > 0` says it. So does a masked array, in which a pixel holds data unless all of its bands
    are masked. `threshold` is the model's own by default. `normalize` is as for `segment_file`. Raises SegError for an
    array of another type or shape, and for a threshold that is not between 0 and 1.

        found = seg_core.segment_array(np.asarray(Image.open("scene.png").convert("RGB")))
        plt.imshow(found.mask)
    """
    segmenter = _as_segmenter(model)
    threshold = _choose_threshold(segmenter, threshold)
    _check_image(image, segmenter.bundle.bands)
    unmasked: NDArray[np.bool_] = np.asarray(~np.broadcast_to(np.ma.getmask(image), image.shape).all(axis=-1))
    valid = unmasked if valid is None else valid
    if valid.shape != image.shape[:2] or valid.dtype != np.bool_:
        raise SegError(f"valid: is {_describe(valid)}: give bool {image.shape[:2]}, as the image has pixels")
    valid = valid & unmasked
    pixels = np.moveaxis(np.ma.getdata(image), -1, 0)
    normalization = choose_normalization(_check_mode(normalize), count_levels(pixels, valid), segmenter.bundle)
    _report_normalization("the image", normalization, normalize)
    with at_least_two_threads():
        found = segment_pixels(segmenter, pixels, valid, normalization)
    return Segmentation(*found, threshold)


def segment_file(
    path: str | os.PathLike[str],
    model: Model = None,
    *,
    window: tuple[int, int, int, int] | None = None,
    bands: Sequence[int] | None = None,
    alpha: int | None = None,
    scale: tuple[float, float] | None = None,
    resample: bool = False,
    threshold: float | None = None,
    normalize: str = "auto",
) -> Segmentation:
    """Segment an image file, or a window of it. The values are those that `seg segment` finds.

    `path` is local or an `s3://` URI. `window` is `(row_off, col_off, height, width)` in pixels. `bands`, `alpha`,
    `scale` and `resample` are as the options of `seg segment`: the bands to read, counted from 1, the alpha band (0 for
    none), the two values that become 0 and 255, and whether to segment at the model's resolution; then `window` and the
    result are on that grid. `normalize` is `auto`, `scene`, `region` or `model`; the region is this file, so that
    `seg segment` finds the same values if it is given this file alone. Pixels are read as far as they are needed:
    memory goes by the window. Raises SegError for an image that the model does not serve, for a threshold that is not
    between 0 and 1, and its child ReadError where the file can't be read.

        found = seg_core.segment_file("scene.tif", window=(0, 0, 2048, 2048))
        found.save_mask("mask.tif")
    """
    segmenter = _as_segmenter(model)
    bundle = segmenter.bundle
    threshold = _choose_threshold(segmenter, threshold)
    path = os.fspath(path)
    header = read_scene(absolute(path), path, alpha)
    for doubt in header.doubts:
        warnings.warn(f"{path}: {doubt}", stacklevel=2)
    scene = fit_to_model(
        header,
        num_bands=bundle.bands,
        dtype=bundle.dtype,
        gsd_m=bundle.gsd_m,
        bands=bands,
        scale=scale,
        resample=resample,
    )
    if scene.crs is None:
        log.warning("%s: no CRS: its resolution is assumed to be the model's, and areas are not known", path)
    at = scene.window if window is None else Window(*window)
    check_within(at, scene)
    with at_least_two_threads():
        (normalization,) = normalizations_of([scene], bundle, _check_mode(normalize), scale)
        _report_normalization(path, normalization, normalize)
        found = segment_scene(segmenter, scene, at, scale, normalization)
    transform = window_transform(scene.transform, at)
    return Segmentation(*found, threshold, scene.crs, transform)


def _report_normalization(image: str, normalization: Normalization | None, mode: str) -> None:
    """Say that an image was normalized without being asked for."""
    if normalization is not None and mode == "auto":
        log.warning("%s looks unlike what the model was trained on: its brightness and contrast are adapted", image)


def _as_segmenter(model: Model) -> Segmenter:
    return model if isinstance(model, Segmenter) else load_model(model)


def _choose_threshold(segmenter: Segmenter, threshold: float | None) -> float:
    if threshold is None:
        return segmenter.bundle.threshold
    check_threshold(threshold)
    return threshold


def _check_mode(normalize: str) -> str:
    if normalize not in NORMALIZE_MODES:
        raise SegError(f"normalize = {normalize!r}: say one of {', '.join(NORMALIZE_MODES)}")
    return normalize


def _check_image(image: NDArray[np.generic], bands: int) -> None:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == bands and image.size:
        return
    turned = image.ndim == 3 and image.shape[0] == bands and image.dtype == np.uint8
    way_out = "np.moveaxis(image, 0, -1) turns it" if turned else "0 is dark and 255 is bright"
    raise SegError(f"image: is {_describe(image)}: give uint8 (height, width, {bands}): {way_out}")


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"
