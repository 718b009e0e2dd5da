"""Other engines read a run, compacted or not: the two lines of each that stand in the README, and what they read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import geopandas
import pandas as pd
import pyarrow.dataset
import pytest
import ray.data
from conftest import UTM
from readme import blocks
from runs import build_run, rows_of
from seg_command import seg
from shapely import box

from aerial_seg import spread
from aerial_seg.benchmarks.sleeping import Sleeper
from aerial_seg.segment import stream_receipts
from seg_core.errors import SegError
from seg_core.run.compact import compact_run

COLUMNS = ["scene_id", "tile_row", "tile_col", "building_px", "coverage"]
README = "seg_core/run/README.md"


@pytest.fixture(scope="module", params=["parts", "compacted"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two scenes of 100 x 120 px and 40 x 30 px, with tiles of 32 px."""
    path, _ = build_run(tmp_path_factory.mktemp("engines"))
    if request.param == "compacted":
        compact_run(path)
    return path


def rows(run: str) -> list[dict[str, Any]]:
    return sorted(({name: row[name] for name in COLUMNS} for row in rows_of(run)), key=place)


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["scene_id"], row["tile_row"], row["tile_col"]


def test_duckdb_and_pandas_and_pyarrow_read_the_rows(run: str) -> None:
    expected = pd.DataFrame(rows(run))
    by_duckdb = duckdb.sql(f"SELECT {', '.join(COLUMNS)} FROM '{run}/tiles/*.parquet' ORDER BY ALL").df()
    by_pandas = pd.read_parquet(f"{run}/tiles", columns=COLUMNS)
    by_arrow = pyarrow.dataset.dataset(f"{run}/tiles").to_table(columns=COLUMNS).to_pandas()
    for found in (by_duckdb, by_pandas, by_arrow):
        ordered = found.sort_values(COLUMNS[:3], ignore_index=True)
        pd.testing.assert_frame_equal(ordered, expected, check_dtype=False)


def test_geopandas_knows_outlines_and_their_crs(run: str) -> None:
    found = geopandas.read_parquet(f"{run}/tiles", columns=["width", "height", "geometry"])
    assert found.crs == "OGC:CRS84"
    metres = found.to_crs(UTM)
    assert metres.area.to_numpy() == pytest.approx(found["width"] * found["height"], rel=0.01)
    west, south, east, north = found.total_bounds
    part = geopandas.read_parquet(f"{run}/tiles", bbox=(west, (south + north) / 2, east, north))
    assert 0 < len(part) < len(found)  # by the covering of bounding boxes


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_reads_the_rows(run: str) -> None:
    found = ray.data.read_parquet(f"{run}/tiles").select_columns(COLUMNS).take_all()
    assert sorted(found, key=place) == rows(run)


def test_the_lines_of_the_readme_read_it(run: str) -> None:
    snippets = [[line for line in block.splitlines() if line] for block in blocks(README, "python")]
    lines = [each for each in snippets if len(each) == 2 and "run/tiles" in each[1]]
    engines = [each[0].split()[1].split(".")[0] for each in lines]
    assert engines == ["duckdb", "pandas", "geopandas", "pyarrow", "ray"]
    for code in ("\n".join(each) for each in lines if "ray" not in each[0]):
        command, folder = [sys.executable, "-c", code], Path(run).parent
        assert subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.strip()


@pytest.mark.usefixtures("ray_cluster")
def test_areas_are_measured_on_a_cluster_as_on_this_machine(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _, _, y = geopandas.read_parquet(f"{run}/tiles").to_crs(UTM).total_bounds
    squares = [box(x + 7 * n, y - 60 - 5 * n, x + 50 + 6 * n, y - 9) for n in range(5)]
    geopandas.GeoDataFrame(geometry=squares, crs=UTM).to_file(tmp_path / "areas.gpkg")
    command = ["query", run, "--areas", tmp_path / "areas.gpkg", "--json"]
    expected, _ = seg(capsys, *command)
    tasks: list[int] = []
    monkeypatch.setattr("aerial_seg.spread.ITEMS_PER_TASK", 2)
    remote = spread.ray.remote
    monkeypatch.setattr(spread.ray, "remote", lambda function: tasks.append(1) or remote(function))
    found, _ = seg(capsys, *command, "--address", "auto")
    assert tasks == [1]
    assert json.loads(found) == json.loads(expected)
    assert json.loads(found)[0]["valid_m2"] > 100


@pytest.mark.usefixtures("ray_cluster")
def test_errors_on_a_cluster_are_those_of_this_machine() -> None:
    def fail(number: int) -> int:
        raise SegError(f"{number}: is damaged")

    with pytest.raises(SegError) as refusal:
        list(spread.spread_over_cluster("auto", fail, [7]))
    assert str(refusal.value) == "7: is damaged"


@pytest.mark.usefixtures("ray_cluster")
def test_a_part_may_take_longer_than_ray_data_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    (receipt,) = stream_receipts([{"parts": 1}], Sleeper, (0.75,), 1, num_cpus=1)
    assert receipt.ended - receipt.started >= 3
