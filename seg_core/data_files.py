"""The data files of PROJ and GDAL, such as what each EPSG code means: those that came with the libraries are used.

Other installations (a GIS, a conda environment) set PROJ_DATA, PROJ_LIB or GDAL_DATA to data of other versions, with
which a good CRS is not known: https://github.com/rasterio/rasterio/issues/2103. rasterio reads these variables when it
is imported, and again in each thread.
"""

import os

from rasterio._env import set_gdal_config, set_proj_data_search_path
from rasterio.env import GDALDataFinder, PROJDataFinder


def use_own_data_files() -> None:
    """Take PROJ's and GDAL's data from the rasterio package, in this process and those it starts, if they are there.

    Where rasterio was built against a PROJ of the system, the variables stay as they are.
    """
    if proj := PROJDataFinder().search_wheel():
        os.environ.pop("PROJ_DATA", None)
        os.environ.pop("PROJ_LIB", None)
        set_proj_data_search_path(proj)
    if gdal := GDALDataFinder().search_wheel():
        os.environ.pop("GDAL_DATA", None)
        set_gdal_config("GDAL_DATA", gdal)
