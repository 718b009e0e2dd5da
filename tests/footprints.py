"""Polygons on a tiny scene, and vector files that hold them."""

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
from conftest import NORTH_UP, UTM

from seg_core.imagery.headers import read_scene
from seg_core.imagery.scene import Scene
from seg_core.imagery.vectors import PolygonIndex, index_polygons, open_vectors

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile", ".fgb": "FlatGeobuf"}


def to_map(geometry: Any) -> Any:
    """A geometry in pixels of a scene (x is the column, y the row) where it lies in the scene's CRS."""
    return shapely.transform(geometry, lambda points: points * (1, -1) + (NORTH_UP[2], NORTH_UP[5]))


def write_vectors(path: Path, geometries: Any, crs: str = UTM, **columns: Any) -> str:
    """Write geometries in pixels of a scene as a vector file; its suffix says which format."""
    frame = geopandas.GeoDataFrame(columns, geometry=to_map(np.array(geometries, object)), crs=UTM)
    frame = frame.to_crs(crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path, write_covering_bbox=True)
    else:
        frame.to_file(path, driver=DRIVERS[path.suffix])
    return str(path)


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def index(path: str, scene: str, folder: Path, column: str | None = None) -> tuple[PolygonIndex, Scene]:
    """The polygons of a file near a scene."""
    folder.mkdir(exist_ok=True)
    header = read_scene(scene, "scene.tif")
    return index_polygons(open_vectors(path), [header], str(folder), column), header
