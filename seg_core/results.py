"""What a bulk run has found, in Python: frames, SQL, masks with their place, and areas."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer
from pyproj.exceptions import CRSError, ProjError

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, intersection
from seg_core.imagery.georef import Transform, pixel_at, window_transform
from seg_core.imagery.scene import Scene
from seg_core.run.export_masks import check_within, read_mask
from seg_core.run.query import query, summary
from seg_core.run.record import read_record
from seg_core.run.schema import TILES
from seg_core.run.stored_plan import num_missing, read_plan
from seg_core.run.verify import VerifyReport, verify
from seg_core.storage.files import absolute

if TYPE_CHECKING:
    import duckdb
    import geopandas
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

LONLAT = "OGC:CRS84"
DENSITY = 21  # points along each side of a rectangle that is converted to another CRS

Bounds = tuple[float, float, float, float]  # west, south, east, north


@dataclass(frozen=True)
class MaskWindow:
    """The mask of a window of a scene, and where it lies."""

    scene_id: str
    mask: NDArray[np.bool_]  # which pixels are building, `(height, width)`
    valid: NDArray[np.bool_]  # which pixels hold data and are known, `(height, width)`
    crs: str | None  # None: the scene does not say where it lies
    transform: Transform  # a, b, c, d, e, f from columns and rows of the arrays to x and y, as rasterio's

    @property
    def coverage(self) -> float | None:
        """The share of the valid pixels that is building; None where no pixel is valid."""
        num_valid = int(self.valid.sum())
        return int(self.mask.sum()) / num_valid if num_valid else None


class Run:
    """The result of `seg segment`: a folder of tables, one row a tile.

    run = seg_core.open_run("s3://bucket/run")
    run.summary()["coverage"]
    run.query("SELECT * FROM tiles WHERE coverage > 0.5").to_pandas()
    """

    def __init__(self, path: str) -> None:
        """Open the run at an absolute path. Raises SegError where there is none."""
        read_record(path)
        self.path = path

    def __repr__(self) -> str:
        return f"Run({self.path!r})"

    def summary(self) -> dict[str, Any]:
        """Counts of scenes and tiles, coverage and areas of the whole run, as `seg query RUN --json` has them."""
        return summary(self.path)

    def query(self, sql: str) -> "pa.Table":
        """All rows of the answer to a question in SQL, over `tiles` (done), `scenes` and `failures` (failed tiles).

        Logs a warning if parts of the run are not done yet. Raises SegError with the first line of what is wrong with
        the SQL.
        """
        self._warn_of_missing()
        return query(self.path, sql)

    @property
    def tiles(self) -> "pd.DataFrame":
        """The tiles that are done, without their images: a mask is read by `read_mask`, or by `query`."""
        names = [field.name for field in TILES if str(field.type) != "binary" or field.name == "geometry"]
        return self.query(f"SELECT {', '.join(names)} FROM tiles ORDER BY scene_id, row_off, col_off").to_pandas()

    @property
    def geo_tiles(self) -> "geopandas.GeoDataFrame":
        """The tiles that are done as a GeoDataFrame: outlines in longitude and latitude, without images."""
        import geopandas

        tiles = self.tiles
        outlines = geopandas.GeoSeries.from_wkb(tiles.pop("geometry"), crs=LONLAT)
        return geopandas.GeoDataFrame(tiles, geometry=outlines)

    def relation(self, sql: str = "FROM tiles") -> "duckdb.DuckDBPyRelation":
        """A DuckDB relation over `tiles`, `scenes` and `failures`, which is computed when it is asked for.

        It can be filtered and aggregated further. Each relation has a connection of its own, which reads no other file
        or frame: tables are joined within the SQL, and `query` gives a table that can be joined with others. Raises
        SegError for what is no run, and DuckDB's own errors.

            run.relation().filter("coverage > 0.5").aggregate("scene_id, sum(building_m2)").df()
        """
        from seg_core.run.sql import connect

        self._warn_of_missing()
        return connect(self.path).duckdb.sql(sql)

    @property
    def scenes(self) -> "pd.DataFrame":
        """The scenes, as they were when the run was made."""
        return query(self.path, "SELECT * FROM scenes").to_pandas()

    def verify(self) -> VerifyReport:
        """Check the files: `ok` where each planned tile has one row and all adds up, else see `problems`."""
        return verify(self.path)

    def measure_areas(
        self, areas: "str | os.PathLike[str] | geopandas.GeoDataFrame", id_column: str | None = None
    ) -> "geopandas.GeoDataFrame":
        """Building area and coverage of polygons, such as districts, as `seg query RUN --areas` has them.

        `areas` is the path of a local vector file, or a frame with a CRS. `id_column` is the attribute that names them,
        or the name of the frame's index; without it they are numbered from 1. The rows, their index and the CRS are
        those of the frame. The columns are the id, `area_m2`, `valid_m2`, `building_m2`, `coverage`, `covered`,
        `failed_tiles`, `missing_tiles` and the geometry. They are null for an area that no tile touches, but for its
        own size. Raises SegError for what holds no areas, and for a run with scenes without a CRS.

            run.measure_areas("districts.gpkg", "name").sort_values("coverage")
        """
        from seg_core.run.area_files import make_areas, read_areas
        from seg_core.run.areas import measure_areas

        if isinstance(areas, str | os.PathLike):
            return measure_areas(self.path, read_areas(absolute(areas), id_column))
        return measure_areas(self.path, make_areas(areas, id_column))

    def footprints(
        self, min_area: float = 0.0, simplify: float = 0.0, regularize: bool = False, crs: str | None = None
    ) -> "geopandas.GeoDataFrame":
        """The buildings as polygons, all of them in memory, as `seg export footprints` writes them.

        Buildings of less than `min_area` square metres are left out. `simplify` is in metres; `regularize` gives right
        angles. `crs` is by default that of the scenes. Logs a warning if parts of the run are not done yet. Raises
        SegError as `seg_core.footprints.shape.make_shape` does.
        """
        import geopandas
        import pyarrow as pa

        from seg_core.footprints.export import find_footprints
        from seg_core.footprints.shape import make_shape
        from seg_core.footprints.table import FOOTPRINTS

        self._warn_of_missing()
        shape = make_shape(read_plan(self.path).images, crs, min_area, simplify, regularize)
        table = pa.concat_tables([FOOTPRINTS.empty_table(), *find_footprints(self.path, shape)])
        frame = table.drop_columns(["bbox", "geometry"]).to_pandas()
        polygons = geopandas.GeoSeries.from_wkb(table["geometry"].to_numpy(), crs=shape.crs)
        return geopandas.GeoDataFrame(frame, geometry=polygons)

    def measure_grid(self, metres: float, crs: str | None = None) -> "geopandas.GeoDataFrame":
        """Building area and coverage of the cells of a square grid, with the columns of `measure_areas`.

        The sides measure `metres` in `crs`, by default EPSG:6933, where all cells have the same ground area. The id is
        `cell`, after the west and south edges. Raises SegError for a CRS that does not measure in metres.
        """
        from seg_core.run.area_grids import EQUAL_AREA, grid_areas
        from seg_core.run.areas import measure_areas

        return measure_areas(self.path, grid_areas(self.path, metres, crs or EQUAL_AREA))

    def measure_h3(self, resolution: int) -> "geopandas.GeoDataFrame":
        """Building area and coverage of H3 cells of a resolution from 0 to 15, with the columns of `measure_areas`.

        The id is `h3`, the name of the cell. Raises SegError if the package h3 is not installed.
        """
        from seg_core.run.area_grids import h3_areas
        from seg_core.run.areas import measure_areas

        return measure_areas(self.path, h3_areas(self.path, resolution))

    def measure_bbox(self, west: float, south: float, east: float, north: float) -> "geopandas.GeoDataFrame":
        """Building area and coverage of one rectangle in degrees, with the columns of `measure_areas`.

        It crosses the antimeridian if `west` exceeds `east`. Raises SegError if it is empty.
        """
        from seg_core.run.area_grids import bbox_area
        from seg_core.run.areas import measure_areas

        return measure_areas(self.path, bbox_area(west, south, east, north))

    def read_mask(self, scene_id: str, window: tuple[int, int, int, int] | None = None) -> NDArray[np.uint8]:
        """The mask of a scene or a window `(row_off, col_off, height, width)` of it, `uint8 (height, width)`.

        1 is building, 0 is not; 255 is where the scene holds no data, a tile failed, or is not done yet. The scene is
        read only for runs of older versions, whose rows don't say which pixels of a tile hold data. Raises SegError
        where there is no such scene, the window reaches beyond it, or the scene can't be read and is needed.
        """
        return read_mask(self.path, scene_id, None if window is None else Window(*window))

    def read_window(
        self,
        scene_id: str | None = None,
        *,
        window: tuple[int, int, int, int] | None = None,
        bounds: tuple[float, float, float, float] | None = None,
        crs: str | None = None,
    ) -> MaskWindow:
        """The mask and the valid pixels of a window of a scene, with their place.

        `scene_id` may be left out if the run has one image, or for the first image that the `bounds` touch. `window` is
        `(row_off, col_off, height, width)`. `bounds` are `(west, south, east, north)` in `crs`, by default the scene's;
        the window is then all pixels that they touch. Without either it is the whole image. Raises SegError if there is
        no such scene or window, and for bounds of a scene without a CRS.

            found = run.read_window(bounds=(-71.12, 42.33, -71.11, 42.34), crs="EPSG:4326")
            plt.imshow(found.mask), found.coverage, found.transform
        """
        if window is not None and bounds is not None:
            raise SegError("window, bounds: give one of them")
        image, at = choose_window(read_plan(self.path).images, scene_id, window, bounds, crs)
        pixels = read_mask(self.path, image.scene_id, at)
        transform = window_transform(image.transform, at)
        return MaskWindow(image.scene_id, pixels == 1, pixels != MISSING, image.crs, transform)

    def _warn_of_missing(self) -> None:
        """Log a warning if the run is not finished, and parts of it are not done yet."""
        if read_record(self.path).finished:
            return
        if missing := num_missing(self.path, read_plan(self.path)):
            log.warning("%s: %s parts are not done yet and missing from this result", self.path, f"{missing:,}")


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run at a local path or an `s3://` prefix. Raises SegError where there is none."""
    return Run(absolute(path))


def choose_window(
    images: Sequence[Scene],
    scene_id: str | None,
    window: tuple[int, int, int, int] | None,
    bounds: Bounds | None,
    crs: str | None,
) -> tuple[Scene, Window]:
    """Return the image and the window that arguments of `Run.read_window` mean. Raises SegError as it does."""
    chosen = [image for image in images if scene_id in {None, image.scene_id}]
    if not chosen:
        raise SegError(f"{scene_id}: no scene of this run: it has {_name_some(images)}")
    if bounds is not None:
        for image in chosen:
            found = _window_of_bounds(image, bounds, crs or image.crs)
            if found is not None:
                return image, found
        raise SegError(f"bounds {bounds}: not within {_name_some(chosen)}: are they in {crs or chosen[0].crs}?")
    if len(chosen) > 1:
        raise SegError(f"scene_id: say which scene: {_name_some(images)}")
    (image,) = chosen
    at = image.window if window is None else Window(*window)
    check_within(at, image)
    return image, at


def _name_some(images: Sequence[Scene]) -> str:
    return ", ".join(image.scene_id for image in images[:3]) + (" ..." if len(images) > 3 else "")


def _window_of_bounds(image: Scene, bounds: Bounds, crs: str | None) -> Window | None:
    """Return the pixels of an image that bounds touch, None if there are none."""
    if image.crs is None or crs is None:
        raise SegError(f"{image.scene_id}: has no CRS, so that bounds say nothing: give a window of pixels")
    west, south, east, north = bounds
    if not (west < east and south < north):
        raise SegError(f"bounds {bounds}: hold nothing: give west, south, east, north")
    try:
        to_scene = Transformer.from_crs(crs, image.crs, always_xy=True)
        left, bottom, right, top = to_scene.transform_bounds(*bounds, densify_pts=DENSITY)
    except (CRSError, ProjError) as error:
        raise SegError(f"crs {crs}: PROJ knows no way from there to {image.crs}") from error
    if not np.isfinite([left, bottom, right, top]).all():
        return None
    corners = [pixel_at(image.transform, x, y) for x in (left, right) for y in (bottom, top)]
    first, last = np.floor(np.min(corners, axis=0)), np.ceil(np.max(corners, axis=0))
    wanted = Window(int(first[0]), int(first[1]), int(last[0] - first[0]), int(last[1] - first[1]))
    found = intersection(wanted, image.window)
    return found if min(found.height, found.width) > 0 else None
