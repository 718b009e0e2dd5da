"""Areas in vector files: polygons such as districts, read to be measured, and written with their figures."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import geopandas
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError

from seg_core.errors import SegError
from seg_core.imagery.vector_formats import PARQUET
from seg_core.imagery.vectors import Tally, open_vectors, reading_errors, repair_polygons
from seg_core.run.zonal import Areas
from seg_core.storage.disk import check_new_file, staged_file

DEFAULT_ID = "area"  # name of the column of numbers that areas have without --id
WRITERS = {".gpkg": "GPKG", ".parquet": "Parquet", ".geojson": "GeoJSON", ".fgb": "FlatGeobuf", ".csv": "CSV"}


def read_areas(path: str, id_column: str | None = None) -> Areas:
    """Read polygons of a GeoPackage, GeoJSON, GeoParquet, Shapefile or FlatGeobuf, all of them into memory.

    `id_column` is as for `make_areas`. Raises SegError for a file that can't be read, and as `make_areas` does.
    """
    source = open_vectors(path)
    with reading_errors(path):
        if source.driver == PARQUET:
            frame = geopandas.read_parquet(path)
        else:
            frame = geopandas.read_file(source.gdal_name, layer=source.layer, engine="pyogrio")
    return make_areas(frame.set_crs(source.crs) if frame.crs is None else frame, id_column, path)


def make_areas(frame: geopandas.GeoDataFrame, id_column: str | None = None, name: str = "areas") -> Areas:
    """Take the polygons of a frame for areas. `name` is what messages call it.

    `id_column` names an attribute that tells them from each other; by default they are numbered from 1. Polygons that
    are invalid are repaired. Raises SegError for a frame without a CRS or with something else than polygons, and for an
    id that is missing, or that two areas have.
    """
    if frame.crs is None:
        raise SegError(f"{name}: has no CRS: set it, as by set_crs of geopandas")
    if frame.empty:
        raise SegError(f"{name}: holds no areas")
    tally = Tally()
    polygons = repair_polygons(frame.geometry.to_numpy(), tally)
    if lost := tally.dropped.most_common(1)[0] if +tally.dropped else None:
        raise SegError(f"{name}: areas are polygons, and {lost[1]:,} of {len(frame):,} features are {lost[0]}")
    ids = _ids(frame, name, id_column)
    return Areas(geopandas.GeoDataFrame(ids, frame.index, geometry=polygons, crs=frame.crs), tally.repaired)


def _ids(frame: geopandas.GeoDataFrame, name: str, column: str | None) -> dict[str, Any]:
    """Return the id column of the areas."""
    if column is None:
        return {DEFAULT_ID: np.arange(1, len(frame) + 1)}
    attributes = frame.drop(columns=frame.geometry.name)
    if frame.index.name is not None and frame.index.name not in attributes:  # as after a dissolve
        attributes = attributes.assign(**{str(frame.index.name): frame.index})
    columns = [str(each) for each in attributes.columns]
    if column not in columns:
        raise SegError(f"id {column}: {name} has no such attribute: it has {', '.join(columns) or 'none'}")
    ids = attributes[column]
    if ids.isna().any():
        raise SegError(f"id {column}: {int(ids.isna().sum()):,} areas of {name} have none: choose another attribute")
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        raise SegError(f"id {column}: two areas of {name} have {twice}: choose another attribute, or dissolve them")
    return {column: ids.to_numpy()}


def check_id(areas: Areas, figures: Sequence[str]) -> None:
    """Raise SegError if the id of areas has the name of one of the figures that are asked for."""
    if areas.id_column in figures:
        raise SegError(f"id {areas.id_column}: the answer has a column of that name: choose another attribute")


def area_table(areas: Areas, figures: Mapping[str, NDArray[Any]], reached: NDArray[np.bool_]) -> geopandas.GeoDataFrame:
    """Return the id of each area, its size on the ground as `area_m2`, its figures `(areas,)`, and its geometry.

    The rows have the index of the areas. Figures are null for areas that are not reached. Whole numbers stay whole.
    """
    known = {
        name: pd.Series(values, dtype="Int64" if np.issubdtype(values.dtype, np.integer) else None).where(reached).array
        for name, values in figures.items()
    }
    ids = areas.frame[areas.id_column].to_numpy()
    columns = {areas.id_column: ids, "area_m2": areas.ground_m2, **known}
    geometry = areas.frame.geometry.to_numpy()
    return geopandas.GeoDataFrame(columns, areas.frame.index, geometry=geometry, crs=areas.frame.crs)


def write_areas(frame: geopandas.GeoDataFrame, path: str) -> None:
    """Write measured areas with their geometries to a new file, in the format of its suffix.

    Raises SegError for a suffix that is not known, if the file exists, or if it can't be written.
    """
    check_new_areas(path)
    stem, suffix = os.path.splitext(os.path.basename(path))
    try:
        with staged_file(path) as draft:
            if suffix.lower() == ".csv":
                frame.drop(columns="geometry").to_csv(draft, index=False)
            elif suffix.lower() == ".parquet":
                frame.to_parquet(draft, index=False, schema_version="1.1.0", write_covering_bbox=True)
            else:
                if suffix.lower() == ".geojson":
                    frame = frame.to_crs("OGC:CRS84")  # the only CRS that RFC 7946 has
                frame.to_file(draft, driver=WRITERS[suffix.lower()], layer=stem, engine="pyogrio", index=False)
    except (OSError, DataSourceError, DataLayerError) as error:
        raise SegError(f"--out {path}: can't be written: {error}") from error


def check_new_areas(path: str) -> None:
    """Raise SegError unless `path` is a new file with a suffix that areas are written in."""
    check_new_file(path, WRITERS, "areas are")
