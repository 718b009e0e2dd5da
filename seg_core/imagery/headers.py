"""Read the header of an image file."""

from functools import lru_cache

from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.io import DatasetReader

from seg_core.errors import ReadError, SegError
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
from seg_core.imagery.captured import read_capture_date
from seg_core.imagery.georef import Transform
from seg_core.imagery.open import MASK, choose_sidecars, files_beside, open_image
from seg_core.imagery.scene import Scene, mean_gsd
from seg_core.storage.files import stat, stat_beside

NOT_LISTED = "its folder can't be listed: files beside it (.aux.xml, .msk, world files) are not used"


def read_scene(uri: str, scene_id: str, alpha: int | None = None) -> Scene:
    """Read the header of one file.

    `alpha` is the number of the alpha band, 0 for none. By default it is the band that the file labels as alpha. Raises
    ReadError if the file is not an image, or its stored values are not those that it shows.
    """
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise ReadError(f"{uri}: its name is not UTF-8: rename it") from error
    status, neighbours = stat_beside(uri)
    if status is None:
        raise ReadError(f"{uri}: no such file")
    sidecars = choose_sidecars(uri, neighbours or ())
    with open_image(uri, sidecars=sidecars) as dataset:
        check_pixels(uri, dataset)
        if alpha is not None and alpha > dataset.count:
            raise ReadError(f"{uri}: --alpha {alpha}: it has only {dataset.count} bands")
        masks = [stat(path) for path in files_beside(uri, dataset, sidecars, MASK)]
        crs, transform = _crs_text(dataset), tuple(dataset.transform)[:6]
        gsd_m = _checked_gsd(uri, crs, transform, dataset)
        same_nodata = len(set(map(repr, dataset.nodatavals))) == 1
        return Scene(
            scene_id=scene_id,
            uri=uri,
            size=status.size,
            version=" ".join(each.version for each in (status, *masks) if each),
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
            captured=read_capture_date(uri, dataset, neighbours or ()),
            maybe_alpha=find_unlabelled_alpha(uri, dataset) if alpha is None else None,
            doubts=(*find_doubts(uri, dataset, alpha), *([NOT_LISTED] if neighbours is None else [])),
        )


def _crs_text(dataset: DatasetReader) -> str | None:
    return None if not dataset.crs or dataset.transform.is_identity else _epsg_or_wkt(dataset.crs.to_wkt())


@lru_cache(maxsize=64)
def _epsg_or_wkt(wkt: str) -> str:
    """Return the EPSG code of a CRS if it has exactly this code's definition, else its own text.

    If the CRS's datum has no name, PROJ finds codes of countries that use its ellipsoid, some 100 m apart.
    """
    crs = CRS.from_wkt(wkt)
    code = crs.to_epsg()
    try:
        return f"EPSG:{code}" if code and CRS.from_epsg(code) == crs else wkt
    except CRSError:  # this version of PROJ does not know the code
        return wkt


def _checked_gsd(uri: str, crs: str | None, transform: Transform, dataset: DatasetReader) -> float | None:
    try:
        return mean_gsd(crs, transform, dataset.height, dataset.width)
    except SegError as error:
        way_out = "correct it (gdal_edit.py -a_srs, -a_ullr), or remove it (gdal_edit.py -a_srs None)"
        raise ReadError(f"{uri}: {error}: {way_out}") from error
