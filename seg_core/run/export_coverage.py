"""Export the coverage of a run as a grid: how much of the valid ground of each cell is building.

scenes ─▶ cells of a square grid ─▶ figures of each ─┬─▶ .parquet: a row for each cell
                                                     └─▶ .tif: a pixel for each cell, with a style for QGIS

What is not known is not counted as background.
"""

import math
from collections.abc import Callable, Iterator

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray

from seg_core.errors import SegError
from seg_core.grid import Window, intersection
from seg_core.imagery.geotiff import BLOCK, Bands, PixelGrid, write_cog
from seg_core.imagery.qgis_style import share_stops, style_path, write_ramp_style
from seg_core.run.area_files import write_areas
from seg_core.run.area_grids import EQUAL_AREA, grid_areas
from seg_core.run.areas import Spread, measure_areas, spread_over_threads
from seg_core.storage.disk import check_new_file

# Nodata is NaN, which GDAL, QGIS and rasterio all leave out. A number such as -9999 enters the sums of whoever does not
# look at the nodata value.
BANDS = Bands(nodata=math.nan, dtype="float32", names=("coverage", "known"), overviews="average")
STOPS = share_stops((0, 0.05, 0.1, 0.2, 0.4, 1))  # few places are built up by more than a quarter
MAX_PIXELS = 100_000_000  # of a raster, most of them between scenes that lie far apart


def export_coverage(
    run: str,
    metres: float,
    out: str,
    crs: str = EQUAL_AREA,
    report: Callable[[str], None] = lambda _: None,
    spread: Spread = spread_over_threads,
) -> geopandas.GeoDataFrame:
    """Write the coverage of the cells of a square grid to a new file. Returns the cells as `measure_areas` does.

    The cells are those of `grid_areas` for `metres` and `crs`. `.parquet` is GeoParquet with a row for each cell.
    `.tif` is a cloud-optimised GeoTIFF in `crs`, float32: band 1, `coverage`, is building_m2 / valid_m2; band 2,
    `known`, is valid_m2 / area_m2 of the whole cell, at most 1. Both are NaN in pixels without ground of the run, and
    `coverage` also where nothing is known. Beside it is a style for QGIS.

    Memory depends on the number of cells and on the size of a part. `report` and `spread` are those
    of `measure_areas`. Raises SegError for another suffix, for a file that exists or can't be written, and as
    `grid_areas` and `measure_areas` do.
    """
    check_new_coverage(out)
    is_raster = out.lower().endswith(".tif")
    cells = grid_areas(run, metres, crs, option="--cell")
    if is_raster:
        _raster_grid(cells.frame, metres)  # raises SegError for one that is too large, before all is measured
    found = measure_areas(run, cells, report, spread)
    if is_raster:
        _write_raster(found, metres, out)
    else:
        write_areas(found, out)
    return found


def check_new_coverage(out: str) -> None:
    """Raise SegError unless `out` is a new file with a suffix that coverage is written in, and so is its style."""
    beside = [style_path(out)] if out.lower().endswith(".tif") else []
    check_new_file(out, (".tif", ".parquet"), "coverage is", *beside)


def _write_raster(cells: geopandas.GeoDataFrame, metres: float, path: str) -> None:
    grid, rows, cols = _raster_grid(cells, metres)
    # Where scenes overlap, their ground counts twice, so that more than all of a cell may be known.
    known = np.minimum(cells["covered"].to_numpy(float), 1)
    values = np.stack([cells["coverage"].to_numpy(float), known]).astype(np.float32)
    write_cog(path, grid, _blocks(grid, rows, cols, values), BANDS)
    write_ramp_style(path, STOPS)


def _raster_grid(
    cells: geopandas.GeoDataFrame, metres: float
) -> tuple[PixelGrid, NDArray[np.int64], NDArray[np.int64]]:
    """Return the grid of the raster that holds all cells, and the row and column of each cell, `(cells,)`."""
    left, bottom, right, top = shapely.bounds(cells.geometry.to_numpy()).T
    # By its centre, because rounding moves edges, and the antimeridian cuts cells.
    cols, rows = (np.floor(pair / 2 / metres).astype(np.int64) for pair in (left + right, -(bottom + top)))
    first_col, first_row = int(cols.min()), int(rows.min())
    height, width = int(rows.max()) - first_row + 1, int(cols.max()) - first_col + 1
    if height * width > MAX_PIXELS:
        size = f"{width:,} x {height:,} pixels"
        raise SegError(
            f"--cell {metres:g}: makes a raster of {size}: choose larger cells, or a table (--out FILE.parquet)"
        )
    transform = (metres, 0.0, first_col * metres, 0.0, -metres, -first_row * metres)
    return PixelGrid(height, width, cells.crs.to_wkt(), transform), rows - first_row, cols - first_col


def _blocks(
    grid: PixelGrid, rows: NDArray[np.int64], cols: NDArray[np.int64], values: NDArray[np.float32]
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Yield each block of a raster that holds cells, and its values `(2, height, width)`: NaN where no cell is."""
    blocks = np.stack([rows, cols]) // BLOCK
    order = np.lexsort(blocks)
    changes = np.flatnonzero(np.diff(blocks[:, order]).any(axis=0)) + 1
    for cells in np.split(order, changes):
        top, left = (int(each) * BLOCK for each in blocks[:, cells[0]])
        window = intersection(Window(top, left, BLOCK, BLOCK), Window(0, 0, grid.height, grid.width))
        block = np.full((len(values), window.height, window.width), np.nan, np.float32)
        block[:, rows[cells] - top, cols[cells] - left] = values[:, cells]
        yield window, block
