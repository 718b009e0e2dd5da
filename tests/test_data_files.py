"""What rasterio takes from the environment: data files of another PROJ or GDAL, and keys to a store.

A scene's CRS does not depend on PROJ_DATA, PROJ_LIB and GDAL_DATA: rasterio issue 2103, torchgeo issue 994.
"""

import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import rasterio
from conftest import MakeScene, outside_environment

from seg_core.imagery.data_files import gdal_environment

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


def test_keys_in_the_environment_cost_a_reader_of_local_files_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setattr(boto3, "Session", lambda *_, **__: made.append(1) or session)
    session = boto3.session.Session()
    with gdal_environment():
        assert not made
    rasterio.Env()  # as it does by itself
    assert made
