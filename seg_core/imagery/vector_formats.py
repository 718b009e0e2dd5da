"""The formats of vector files that are read, and how their content is checked before a library opens it."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from seg_core.errors import SegError

PARQUET = "Parquet"


class Format(NamedTuple):
    """A vector format: the driver that reads it, and how its files begin."""

    driver: str
    begins: bytes


# Formats that hold geometries and nothing else. GDAL chooses a driver by content, and some drivers open further files
# that a file names, as those for OGR VRT and GDALG do.
FORMATS = {
    ".gpkg": Format("GPKG", b"SQLite format 3\0"),
    ".geojson": Format("GeoJSON", b"{"),
    ".json": Format("GeoJSON", b"{"),
    ".shp": Format("ESRI Shapefile", b"\x00\x00\x27\x0a"),
    ".fgb": Format("FlatGeobuf", b"fgb"),
    ".parquet": Format(PARQUET, b"PAR1"),
    ".geoparquet": Format(PARQUET, b"PAR1"),
}
SUFFIXES = tuple(FORMATS)


def is_vector(path: str) -> bool:
    """Whether a path has the suffix of a vector file."""
    return path.lower().endswith(SUFFIXES)


def check_format(path: str) -> str:
    """Return the name of the driver for a file, by its suffix. Raises SegError unless its content is of that format."""
    known = FORMATS.get(Path(path).suffix.lower())
    if known is None:
        raise SegError(f"{path}: not a vector file (read: {', '.join(SUFFIXES)}): convert it (ogr2ogr polygons.gpkg)")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise SegError(f"{path}: can't be read: {error.strerror}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip() if known.driver == "GeoJSON" else head
    if not text.startswith(known.begins):
        raise SegError(f"{path}: its content is not {known.driver}, as its suffix says")
    if known.driver == "GPKG":
        _refuse_virtual_tables(path)
    return known.driver


def _refuse_virtual_tables(path: str) -> None:
    """Raise SegError for a GeoPackage with a virtual table that is no spatial index: it may name another file."""
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            made = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql LIKE '%virtual%'")]
    except sqlite3.DatabaseError as error:
        raise SegError(f"{path}: a damaged GeoPackage: {error}") from error
    for sql in made:
        if re.match(r"\s*create\s+virtual", sql, re.IGNORECASE) and not re.search(
            r"using\W+rtree\b", sql, re.IGNORECASE
        ):
            raise SegError(f"{path}: holds a virtual table, which may name another file: {sql.splitlines()[0]}")
