"""Data files of PROJ and GDAL, such as the database of EPSG codes. Those of the rasterio package are used.

Other installations (a GIS, a conda environment) set PROJ_DATA, PROJ_LIB or GDAL_DATA to files of other versions. A
valid CRS is then unknown: https://github.com/rasterio/rasterio/issues/2103. rasterio reads these variables whenever an
outermost `rasterio.Env` begins. The variables themselves are the caller's, and stay as they are.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import rasterio
from rasterio._env import set_gdal_config, set_proj_data_search_path
from rasterio.crs import CRS
from rasterio.env import GDALDataFinder, PROJDataFinder, setenv
from rasterio.session import DummySession

VARIABLES = {"PROJ_DATA", "PROJ_LIB", "GDAL_DATA"}
# Credentials, which `rasterio.Env` takes from boto3 alone.
KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}

_beginning = threading.Lock()
_thread = threading.local()


@contextmanager
def gdal_environment(settings: Mapping[str, str | float] | None = None) -> Iterator[None]:
    """Enter a `rasterio.Env` with settings, in which the data files of the rasterio package are used.

    The variables decide if rasterio has no data files, because it was built against the system's libraries.
    Credentials are among the settings. With keys in the environment, rasterio would make a session of boto3 for each
    image that is opened: https://github.com/rasterio/rasterio/issues/3331.
    """
    settings = dict(settings or {})
    keys = {name: settings.pop(name) for name in KEYS & settings.keys()}
    environment = rasterio.Env(session=DummySession(), **settings)
    with ExitStack() as stack:
        if VARIABLES.isdisjoint(os.environ):
            stack.enter_context(environment)
        else:
            # The path to PROJ's files belongs to the process, and rasterio has just set it to the variable's. A thread
            # opens the database once: here, where no other thread can change the path meanwhile.
            with _beginning:
                stack.enter_context(environment)
                _use_own_files()
        setenv(**keys)
        yield


def _use_own_files() -> None:
    if proj := PROJDataFinder().search_wheel():
        set_proj_data_search_path(proj)
        if not getattr(_thread, "knows_crs", False):
            CRS.from_epsg(4326)
            _thread.knows_crs = True
    if gdal := GDALDataFinder().search_wheel():
        set_gdal_config("GDAL_DATA", gdal)
