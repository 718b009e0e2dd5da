"""The data files of PROJ and GDAL, such as the database of EPSG codes: those that come with rasterio are used.

Other installations (a GIS, a conda environment) set PROJ_DATA, PROJ_LIB or GDAL_DATA to files of other versions, with
which a valid CRS is unknown: https://github.com/rasterio/rasterio/issues/2103. rasterio reads these variables when it
is imported, and again in each thread.
"""

import os

from rasterio._env import set_gdal_config, set_proj_data_search_path
from rasterio.env import GDALDataFinder, PROJDataFinder


def use_own_data_files() -> None:
    """Use the files in the rasterio package, in this process and in those it starts.

    Where rasterio has none, because it was built against the system's libraries, the variables are left alone.
    """
    if proj := PROJDataFinder().search_wheel():
        os.environ.pop("PROJ_DATA", None)
        os.environ.pop("PROJ_LIB", None)
        set_proj_data_search_path(proj)
    if gdal := GDALDataFinder().search_wheel():
        os.environ.pop("GDAL_DATA", None)
        set_gdal_config("GDAL_DATA", gdal)
