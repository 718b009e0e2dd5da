"""PROJ_DATA, PROJ_LIB and GDAL_DATA of another PROJ or GDAL: what a scene's CRS is does not depend on them.

rasterio issue 2103, torchgeo issue 994.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakeScene, outside_environment

READ = """
import sys
from concurrent.futures import ThreadPoolExecutor
{first}
from seg_core.imagery.headers import read_scene
with ThreadPoolExecutor(1) as pool:  # in which rasterio reads the environment again
    for scene in (read_scene(sys.argv[1], "a.tif"), pool.submit(read_scene, sys.argv[1], "a.tif").result()):
        print(scene.crs, scene.gsd_m)
"""


@pytest.mark.parametrize(
    ("variable", "first"),
    [
        ("PROJ_DATA", ""),
        ("PROJ_DATA", "import rasterio; rasterio.crs.CRS.from_epsg"),  # before this package
        ("PROJ_LIB", ""),
        ("GDAL_DATA", ""),
    ],
)
def test_the_data_of_another_proj_is_not_used(make_scene: MakeScene, tmp_path: Path, variable: str, first: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/proj.db").touch()
    done = subprocess.run(
        [sys.executable, "-c", READ.format(first=first), make_scene()],
        env=outside_environment(**{variable: str(tmp_path / "data")}),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    scene, in_thread = done.stdout.splitlines()
    assert scene == in_thread
    assert scene.startswith("EPSG:32633 1.00")
    assert done.stderr == ""
