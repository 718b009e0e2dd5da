"""The tables of a run: their columns, their bytes, what geopandas makes of them, and how they are published."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from conftest import NORTH_UP, UTM, window_figures
from pyproj import CRS
from runs import published_parts, read_part

from seg_core.errors import SegError
from seg_core.imagery.scene import Scene
from seg_core.run.rows import Failure, Row, failed_rows, tile_rows
from seg_core.run.schema import SCENES, TILES
from seg_core.run.tables import part_path, read_scenes, scenes_path, write_part, write_scenes
from seg_core.storage.files import make_folder, publish, published

SCENE = Scene(
    scene_id="north/a.tif",
    uri="/data/north/a.tif",
    size=12345,
    version="1700000000123456789",
    height=100,
    width=75,
    bands=(1, 2, 3),
    dtype="uint8",
    nodata=255.0,
    masked=False,
    crs=UTM,
    transform=NORTH_UP,
    gsd_m=1.000123,
    source_gsd_m=1.000123,
)


def draw_rows(scene: Scene = SCENE, *, failed: bool = True) -> list[Row]:
    """Rows of a scene from random probabilities; of its last tiles, rows that failed."""
    rng = np.random.default_rng(2)
    probability = rng.random((scene.height, scene.width), dtype=np.float32)
    valid = rng.random((scene.height, scene.width)) > 0.2
    valid[:32, :32] = False
    rows = list(tile_rows(scene, scene.window, 32, window_figures(probability, valid, 32)))
    broken = list(failed_rows(scene, scene.window, 32, Failure("ReadError", "the disk said no")))
    return [*rows[:-2], *broken[-2:]] if failed else rows


@pytest.fixture
def run(tmp_path: Path) -> str:
    for name in ("tiles", "scenes"):
        (tmp_path / "run" / name).mkdir(parents=True)
    return str(tmp_path / "run")


def test_the_tiles_table_has_these_columns() -> None:
    bbox = pa.struct([("xmin", pa.float64()), ("ymin", pa.float64()), ("xmax", pa.float64()), ("ymax", pa.float64())])
    expected = [
        ("status", pa.string(), False),
        ("error_class", pa.string(), True),
        ("error", pa.string(), True),
        ("attempts", pa.int32(), True),
        ("scene_id", pa.string(), False),
        ("tile_row", pa.int32(), False),
        ("tile_col", pa.int32(), False),
        ("row_off", pa.int32(), False),
        ("col_off", pa.int32(), False),
        ("height", pa.int32(), False),
        ("width", pa.int32(), False),
        ("valid_px", pa.int64(), True),
        ("building_px", pa.int64(), True),
        ("coverage", pa.float64(), True),
        ("area_m2", pa.float64(), True),
        ("building_m2", pa.float64(), True),
        ("mean_probability", pa.float64(), True),
        ("mask", pa.binary(), True),
        ("valid", pa.binary(), True),
        ("probability", pa.binary(), True),
        ("model", pa.string(), False),
        ("geometry", pa.binary(), True),
        ("bbox", bbox, True),
    ]
    assert [(f.name, f.type, f.nullable) for f in TILES] == expected


def test_the_scenes_table_has_these_columns() -> None:
    expected = [
        ("scene_id", pa.string(), False),
        ("uri", pa.string(), False),
        ("size", pa.int64(), False),
        ("version", pa.string(), False),
        ("height", pa.int32(), False),
        ("width", pa.int32(), False),
        ("bands", pa.list_(pa.int32()), False),
        ("dtype", pa.string(), False),
        ("nodata", pa.float64(), True),
        ("masked", pa.bool_(), False),
        ("crs", pa.string(), True),
        ("transform", pa.list_(pa.float64()), False),
        ("gsd_m", pa.float64(), True),
        ("source_gsd_m", pa.float64(), True),
        ("alpha", pa.int32(), True),
        ("nodata_color", pa.list_(pa.float64()), True),
        ("inverted", pa.bool_(), True),
        ("premultiplied", pa.bool_(), True),
        ("bits", pa.int32(), True),
        ("normalize_mean", pa.list_(pa.float64()), True),
        ("normalize_std", pa.list_(pa.float64()), True),
        ("sidecars", pa.list_(pa.string()), True),
        ("captured", pa.timestamp("ms"), True),
        ("gdal_version", pa.string(), True),
        ("decoder_version", pa.string(), True),
    ]
    assert [(f.name, f.type, f.nullable) for f in SCENES] == expected


def test_the_files_hold_the_columns_that_the_schema_says(run: str) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    write_scenes(run, [SCENE])
    assert pq.read_schema(Path(part_path(run, "k"))).equals(TILES, check_metadata=False)
    assert pq.read_schema(Path(scenes_path(run))).equals(SCENES, check_metadata=False)


def test_tiles_are_geoparquet_1_1(run: str) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    assert json.loads(pq.read_schema(Path(part_path(run, "k"))).metadata[b"geo"]) == {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "orientation": "counterclockwise",
                "covering": {
                    "bbox": {
                        "xmin": ["bbox", "xmin"],
                        "ymin": ["bbox", "ymin"],
                        "xmax": ["bbox", "xmax"],
                        "ymax": ["bbox", "ymax"],
                    }
                },
            }
        },
    }


def test_tiles_are_compressed_with_zstd(run: str) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    group = pq.read_metadata(Path(part_path(run, "k"))).row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_rows_come_back_as_they_were_in_the_order_of_their_tiles(run: str) -> None:
    rows = draw_rows()
    write_part(run, "k", rows[::-1], "hash", "1")
    empty = dict.fromkeys(TILES.names)
    assert read_part(part_path(run, "k")) == [{**empty, "model": "hash", **row} for row in rows]
    assert read_part(part_path(run, "k"), ["tile_row", "status"]) == [
        {"tile_row": row["tile_row"], "status": row["status"]} for row in rows
    ]


def test_the_same_rows_give_the_same_bytes_in_any_order(run: str) -> None:
    rows = draw_rows()
    write_part(run, "k", rows, "hash", "1")
    content = Path(part_path(run, "k")).read_bytes()
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        turned = [dict(reversed(row.items())) for row in shuffled]
        write_part(run, "k", iter(turned), "hash", "1")
        assert Path(part_path(run, "k")).read_bytes() == content


def test_other_rows_give_other_bytes(run: str) -> None:
    rows = draw_rows()
    write_part(run, "k", rows, "hash", "1")
    content = Path(part_path(run, "k")).read_bytes()
    write_part(run, "k", [*rows[1:], {**rows[0], "valid_px": 1}], "hash", "1")
    assert Path(part_path(run, "k")).read_bytes() != content
    write_part(run, "k", rows, "another", "1")
    assert Path(part_path(run, "k")).read_bytes() != content


def test_geopandas_reads_a_part(run: str) -> None:
    rows = draw_rows()
    write_part(run, "k", rows, "hash", "1")
    frame = geopandas.read_parquet(Path(part_path(run, "k")))
    assert CRS(frame.crs).equals(CRS("OGC:CRS84"), ignore_axis_order=False)
    assert len(frame) == len(rows)
    assert set(frame.geom_type) == {"Polygon"}
    assert frame.geometry.is_valid.all()
    assert shapely.is_ccw(frame.geometry.exterior).all()
    box = frame.geometry.bounds
    for side, of in (("xmin", "minx"), ("ymin", "miny"), ("xmax", "maxx"), ("ymax", "maxy")):
        stored = pq.read_table(Path(part_path(run, "k"))).column("bbox").combine_chunks().field(side)
        assert stored.to_pylist() == box[of].tolist()
    assert 14.9 > frame.total_bounds[0] > 13.0  # UTM zone 33, its west
    assert 53.0 > frame.total_bounds[1] > 52.0


def test_geopandas_reads_all_parts_of_the_folder_and_what_is_not_published_it_does_not(run: str) -> None:
    other = replace(SCENE, scene_id="b.tif", transform=(1.0, 0.0, 500_000.0, 0.0, -1.0, 5_800_000.0))
    write_part(run, "k", draw_rows(), "hash", "1")
    write_part(run, "l", draw_rows(other), "hash", "1")
    Path(run, "tiles", ".partial-0123456789abcdef").write_bytes(b"PAR1 and then the power went")
    frame = geopandas.read_parquet(Path(run, "tiles"))
    assert len(frame) == 2 * len(draw_rows())
    assert CRS(frame.crs).equals(CRS("OGC:CRS84"), ignore_axis_order=False)


def test_geopandas_reads_by_bbox(run: str) -> None:
    other = replace(SCENE, scene_id="b.tif", transform=(1.0, 0.0, 500_000.0, 0.0, -1.0, 5_800_000.0))
    write_part(run, "k", draw_rows(), "hash", "1")
    write_part(run, "l", draw_rows(other), "hash", "1")
    frame = geopandas.read_parquet(Path(run, "tiles"), bbox=(14.9, 52.0, 15.1, 53.0))
    assert set(frame.scene_id) == {"b.tif"}
    assert len(frame) == len(draw_rows())


def test_geopandas_reads_a_part_of_a_scene_without_crs(run: str) -> None:
    write_part(run, "k", draw_rows(replace(SCENE, crs=None)), "hash", "1")
    frame = geopandas.read_parquet(Path(part_path(run, "k")))
    assert frame.geometry.isna().all()
    assert frame.area_m2.isna().all()


@pytest.mark.parametrize("nodata", [None, 255.0, -3.4028234663852886e38])
@pytest.mark.parametrize("crs", [None, UTM, CRS(UTM).to_wkt()])
def test_scenes_come_back_as_they_were(run: str, nodata: float | None, crs: str | None) -> None:
    gsd_m, source_gsd_m = (None, None) if crs is None else (0.6, 1.000123)
    other = replace(SCENE, nodata=nodata, crs=crs, gsd_m=gsd_m, source_gsd_m=source_gsd_m)
    scenes = [SCENE, replace(other, scene_id="ü b.tif", bands=(3, 3, 1), dtype="float32")]
    write_scenes(run, scenes)
    assert read_scenes(run) == scenes
    assert [scene.is_resampled for scene in read_scenes(run)] == [False, crs is not None]


def test_a_scenes_nan_nodata_comes_back(run: str) -> None:
    write_scenes(run, [replace(SCENE, nodata=float("nan"))])
    (scene,) = read_scenes(run)
    assert scene.nodata is not None
    assert np.isnan(scene.nodata)


def test_scenes_that_are_not_there_or_damaged_are_refused(run: str) -> None:
    with pytest.raises(SegError, match=r"scenes\.parquet: can't be read"):
        read_scenes(run)
    Path(scenes_path(run)).write_bytes(b"PAR1")
    with pytest.raises(SegError, match=r"scenes\.parquet: can't be read"):
        read_scenes(run)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_part_is_refused(run: str, keep: float) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    path = Path(part_path(run, "k"))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(SegError, match=r"^part-k\.parquet: can't be read"):
        read_part(str(path))


def test_a_part_with_damaged_pages_is_refused(run: str) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    path = Path(part_path(run, "k"))
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(SegError, match=r"^part-k\.parquet: can't be read"):
        read_part(str(path))


def test_a_part_with_other_columns_is_refused(run: str) -> None:
    write_part(run, "k", draw_rows(), "hash", "1")
    path = Path(part_path(run, "k"))
    pq.write_table(pq.read_table(path).drop_columns(["model"]), path)
    with pytest.raises(SegError, match=r"^part-k\.parquet: has no column model"):
        read_part(str(path))


def test_published_parts_are_listed_by_name_without_what_is_not_there_yet(run: str) -> None:
    assert published_parts(run) == []
    for key in ("b", "a"):
        write_part(run, key, draw_rows(), "hash", "1")
    Path(run, "tiles", ".partial-1.parquet").write_bytes(b"")
    Path(run, "tiles", "notes.txt").write_bytes(b"")
    assert published_parts(run) == [part_path(run, "a"), part_path(run, "b")]
    assert list(published(f"{run}/no such folder", ".parquet")) == []


def test_a_publish_that_fails_leaves_what_was_there(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(run, "old", draw_rows(), "hash", "1")
    before = Path(part_path(run, "old")).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for key in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            write_part(run, key, draw_rows(), "another", "1")
    assert os.listdir(Path(run, "tiles")) == ["part-old.parquet"]
    assert Path(part_path(run, "old")).read_bytes() == before


KILLED = """
import os, signal, sys
from seg_core.storage.files import publish

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

for name in sys.argv[2:]:
    setattr(os, name, kill)
publish(sys.argv[1], b"new" * 100_000)
"""


@pytest.mark.parametrize("moment", [["fsync"], ["replace", "rename"]], ids=["flush", "rename"])
def test_a_process_killed_while_it_publishes_leaves_no_part_of_a_file(run: str, moment: list[str]) -> None:
    Path(part_path(run, "old")).write_bytes(b"old")
    for key in ("old", "new"):
        command = [sys.executable, "-c", KILLED, str(Path(part_path(run, key))), *moment]
        code = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        assert code == -signal.SIGKILL
    assert published_parts(run) == [part_path(run, "old")]
    assert Path(part_path(run, "old")).read_bytes() == b"old"
    write_part(run, "new", draw_rows(), "hash", "1")
    assert read_part(part_path(run, "new"))


def test_a_file_is_flushed_to_disk_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        assert not (tmp_path / "file").exists()
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    publish(tmp_path / "file", b"content")
    assert flushed[:1] == [7]
    assert (tmp_path / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in ("/proc/nowhere", str(tmp_path / "file"), str(tmp_path / "file/below")):
        with pytest.raises(SegError, match=f"^{folder}: can't be written to"):
            make_folder(folder)
    make_folder(tmp_path / "a/b")
    assert os.listdir(tmp_path / "a/b") == []
