"""Bad input: refused in one line that names it and the way out, or failed rows; no zeros, traceback, hang or flood."""

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, window_figures
from numpy.typing import NDArray
from parts import EXECUTION, RESOURCES, SETTINGS
from proxy import Proxy
from pyproj import Geod, Transformer
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasters import damage
from runs import build_run, published_parts, read_part
from weed import put

from aerial_seg.cli.main import main
from aerial_seg.segmenting import reading
from aerial_seg.segmenting.actor import PartSegmenter
from seg_core.errors import ReadError, SegError
from seg_core.grid import Window, chip_window, intersects, reflect_window, split
from seg_core.imagery.georef import Transform
from seg_core.imagery.headers import read_scene
from seg_core.imagery.open import open_image
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import find_images, read_region
from seg_core.inference.recheck import Recheck, recheck
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import make_plan
from seg_core.run.resume import open_run, parts_to_do
from seg_core.run.rows import tile_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, read_states
from seg_core.run.verify import verify
from seg_core.storage import files as storage

Capture = pytest.CaptureFixture[str]
Write = Callable[[Path], None]


def refusal(capsys: Capture, *sources: object) -> str:
    """What `seg plan` says of the one thing that it refuses."""
    code = main(["plan", *map(str, sources), "--json"])
    out, err = capsys.readouterr()
    assert code == 2
    lines = json.loads(out)["refused"] if out else [err.removeprefix("seg: ").removesuffix("\n")]
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    assert "Traceback" not in err
    return str(lines[0])


LOOK = """
import json, sys
from collections import Counter
from seg_core.model.bundle import BUILT_IN, read_bundle
from seg_core.errors import ReadError
from seg_core.imagery.raster import read_chip
from seg_core.run.plan import Settings, make_plan
from seg_core.imagery.region import read_region
from seg_core.grid import Window

settings = Settings(halo=96, threshold=0.5, scale=(0.0, 255.0), bands=(1, 1, 1))
found = Counter()
for path in sys.argv[1:]:
    scenes, refused = read_region([path])
    plan, unfit = make_plan(scenes, read_bundle(BUILT_IN), settings)
    for part in plan.parts():
        try:
            read_chip(part.scene, Window(part.scene.height - 400, -112, 512, 512), settings.scale)
            found["read"] += 1
        except ReadError as error:
            refused.append(str(error))
        break
    for line in refused + unfit:
        assert path.endswith(line.split(": ")[0]), line
        assert line.isprintable(), line
        found[line.removeprefix(path)] += 1
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"found": found, "mib": int(peak.split()[1]) / 1024}))
"""


def look(paths: list[Path], seconds: float = 60) -> dict[str, int]:
    """Plan each file and read its last rows, in a process of its own; what came of it, and how often."""
    command = [sys.executable, "-c", LOOK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert figures["mib"] < 700, figures  # of which importing everything takes 200
    return dict(figures["found"])


def write_tiff(path: Path, pixels: NDArray[Any], **options: Any) -> None:
    bands, height, width = pixels.shape
    shape = {"height": height, "width": width, "count": bands, "dtype": pixels.dtype.name}
    ground = {"crs": UTM, "transform": Affine(*NORTH_UP)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **{**ground, **options}) as dataset:
        dataset.write(pixels)


def noise(bands: int = 3, height: int = 300, width: int = 320) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 250, (bands, height, width)).astype(np.uint8)


TILED = {"tiled": True, "blockxsize": 128, "blockysize": 128}
KINDS: dict[str, dict[str, Any]] = {
    "plain": TILED,
    "deflate": {**TILED, "compress": "deflate", "nodata": 0},
    "strips": {"compress": "deflate", "blockysize": 16},
    "zstd": {**TILED, "compress": "zstd", "interleave": "band"},
    "lzw": {"compress": "lzw", "BIGTIFF": "YES"},
    "jpeg": {**TILED, "compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel"},
}


def directory(content: bytes) -> int:
    """Where the first image file directory of a TIFF is."""
    big = content[2] == 43
    return int(struct.unpack_from("<Q" if big else "<I", content, 8 if big else 4)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_with_flipped_bits_is_refused_or_read_and_nobody_is_hurt(tmp_path: Path, kind: str) -> None:
    write_tiff(tmp_path / "whole.tif", noise(), **KINDS[kind])
    content, draw = (tmp_path / "whole.tif").read_bytes(), random.Random(kind)
    assert look([tmp_path / "whole.tif"]) == {"read": 1}
    places = [range(16), range(directory(content), directory(content) + 250), range(len(content))]
    paths = []
    for number in range(150):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 3])):
            damaged[draw.choice(places[number % 3]) % len(content)] ^= 1 << draw.randrange(8)
        paths.append(tmp_path / f"{number}.tif")
        paths[-1].write_bytes(damaged)
    found = look(paths)
    assert sum(found.values()) == 150
    assert 20 < found["read"] < 150


@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw"])
def test_a_damaged_block_fails_its_own_window_only(tmp_path: Path, compress: str) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, noise(), **TILED, compress=compress)
    whole, _ = read_chip(read_scene(str(path), "a.tif"), Window(0, 0, 128, 320))
    damage(path, {(2, 2)})
    scene = read_scene(str(path), "a.tif")
    assert np.array_equal(read_chip(scene, Window(0, 0, 128, 320))[0], whole)
    with pytest.raises(ReadError, match=f"^{path}: ") as error:
        read_chip(scene, Window(280, 300, 8, 8))
    assert "\n" not in str(error.value)


def test_a_damaged_block_fails_the_tiles_that_touch_it_however_the_scene_is_cut(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path, model = make_scene("region/a.tif", 768, 768), make_bundle()
    settings = replace(SETTINGS, tile_size=128, part=1024)
    plan, _ = make_plan(read_region([path])[0], read_bundle(model), settings)
    damage(Path(path), {(0, 0)})  # in blocks of 256 px

    def segment(window: int) -> tuple[list[dict[str, Any]], str]:
        run = str(tmp_path / f"run-{window}")
        open_run(run, plan, model)
        list(PartSegmenter(model, run, settings, window, RESOURCES, EXECUTION, "s").segment_parts(list(plan.parts())))
        return [row for part in plan.parts() for row in read_part(part_path(run, part.key))], run

    (found, run), (small, _) = segment(1024), segment(128)
    assert found == small
    failed = {(row["row_off"], row["col_off"]) for row in found if row["status"] == "failed"}
    chips = {
        tile.origin: reflect_window(chip_window(tile, 24, 1), 768, 768)[0]
        for tile in split(Window(0, 0, 768, 768), 128)
    }
    assert failed == {at for at, chip in chips.items() if intersects(chip, Window(0, 0, 256, 256))}
    assert 0 < len(failed) < len(chips)
    assert verify(run).ok
    assert recheck(run, 1, "cpu") == Recheck(num_same=1)
    damage(Path(path), {(2, 2)})
    again = recheck(run, 1, "cpu")
    assert (again.num_same, again.differing, len(again.unread)) == (0, {}, 1)
    assert again.unread[0].startswith(path)


def test_a_scene_that_is_gone_is_asked_for_once_a_window(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, asked = make_scene("region/a.tif", 256, 256), make_bundle(), []
    plan, _ = make_plan(read_region([path])[0], read_bundle(model), SETTINGS)
    open_run(str(tmp_path / "run"), plan, model)
    Path(path).unlink()
    stage = reading.stage_windows
    monkeypatch.setattr(reading, "stage_windows", lambda *rest: asked.append(rest[0]) or stage(*rest))
    part_segmenter = PartSegmenter(model, str(tmp_path / "run"), SETTINGS, 256, RESOURCES, EXECUTION, "s")
    list(part_segmenter.segment_parts(list(plan.parts())))
    assert len(asked) == 1
    rows = [row for path in published_parts(str(tmp_path / "run")) for row in read_part(path)]
    assert {(row["status"], row["error"]) for row in rows} == {("failed", f"{path}: no such file")}


def raw_tiff(width: int, height: int, tile: tuple[int, int] | None, bands: int, content: bytes) -> bytes:
    """A TIFF of one block of deflated data: a strip, or a tile `(width, height)`."""
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 2 if bands == 3 else 1, 277: bands}
    tags |= {322: tile[0], 323: tile[1]} if tile else {278: height}
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {324 if tile else 273: at, 325 if tile else 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def deflated(size: int, piece: int = 2**24) -> bytes:
    """Zeros, deflated."""
    packer = zlib.compressobj(1)
    return b"".join([packer.compress(bytes(piece)) for _ in range(-(-size // piece))] + [packer.flush()])


def png(width: int, height: int, interlaced: bool, content: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def jpeg(side: int, progressive: bool) -> bytes:
    """A small picture that says it is a large one."""
    import cv2

    content = bytearray(cv2.imencode(".jpg", noise(3, 64, 64).T, [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)])[1])
    at = content.find(b"\xff\xc2" if progressive else b"\xff\xc0")
    struct.pack_into(">HH", content, at + 5, side, side)
    return bytes(content)


SMALL = deflated(1000, 1000)
LARGE = 25_000  # px a side: as a whole, more than `look` allows
BLOCKS = ": its blocks of {} px are {} MiB each, more than 256: write it in tiles (gdal_translate -co TILED=YES)"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "strip.tif": (lambda: raw_tiff(10**6, 10**6, None, 1, SMALL), ": its block of 1000000 x 1 px at row 999600"),
    "row.tif": (lambda: raw_tiff(2**31 - 1, 1, None, 1, SMALL), BLOCKS.format("2147483647 x 1", "2,048")),
    "tile.tif": (
        lambda: raw_tiff(1000, 1000, (32768, 32768), 3, SMALL),
        BLOCKS.format("32768 x 32768", "3,072"),
    ),
    "full.tif": (
        lambda: raw_tiff(1000, 1000, (32768, 32768), 1, deflated(2**30)),
        BLOCKS.format("32768 x 32768", "1,024"),
    ),
    "more.tif": (lambda: raw_tiff(1000, 1000, None, 1, deflated(2**30)), "read"),
    "long.tif": (lambda: raw_tiff(LARGE, LARGE, None, 1, deflated(LARGE**2)), "read"),
    "whole.png": (lambda: png(LARGE, LARGE, False, deflated((LARGE + 1) * LARGE)), "read"),
    "short.png": (lambda: png(LARGE, LARGE, False, SMALL), ": libpng: Not enough image data"),
    "interlaced.png": (lambda: png(LARGE, LARGE, True, SMALL), ": libpng: Not enough image data"),
    "progressive.jpg": (lambda: jpeg(60000, True), ": Reading this image would require libjpeg to allocate"),
    "sequential.jpg": (lambda: jpeg(LARGE, False), "read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_says_or_becomes_much_takes_little_memory(tmp_path: Path, name: str) -> None:
    content, expected = BOMBS[name]
    (tmp_path / name).write_bytes(content())
    (found,) = look([tmp_path / name], seconds=240)  # to decode 625 million px line by line takes a while
    assert found.startswith(expected)


def test_a_sparse_scene_of_a_million_px_a_side_is_planned_and_read_cheaply(tmp_path: Path) -> None:
    path, side = tmp_path / "sparse.tif", 10**6
    shape = {"height": side, "width": side, "count": 3, "dtype": "uint8", "blockxsize": 512, "blockysize": 512}
    packed = {"tiled": True, "SPARSE_OK": True, "compress": "deflate", "bigtiff": "YES", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", **shape, **packed):
        pass
    assert look([path], seconds=20) == {"read": 1}
    scene = read_scene(str(path), "sparse.tif")
    assert not read_chip(scene, Window(side // 2, side // 2, 512, 512))[1].any()


def test_a_header_that_says_more_than_any_image_holds_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(raw_tiff(2**31 - 1, 2**31 - 1, None, 1, SMALL))
    assert refusal(capsys, path) == f"{path}: its header gives {2**31 - 1} x {2**31 - 1} px: it is damaged"


def write_masked(path: Path, valid: NDArray[np.bool_], kind: str) -> str:
    """A scene whose validity is in an internal mask, an alpha band or a nodata value."""
    pixels = noise(3, *valid.shape) if kind != "nodata" else noise(3, *valid.shape) * valid
    options = {**TILED, "compress": "deflate", "interleave": "band", "crs": UTM, "transform": Affine(*NORTH_UP)}
    shape = {"height": valid.shape[0], "width": valid.shape[1], "count": 3 + (kind == "alpha"), "dtype": "uint8"}
    options |= {"nodata": 0} if kind == "nodata" else {}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **options) as dataset,
    ):
        if kind == "alpha":
            dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
            dataset.write(valid * np.uint8(255), 4)
        dataset.write(pixels, [1, 2, 3])
        if kind == "mask":
            dataset.write_mask(valid)
    return str(path)


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_where_nothing_is_valid_the_colours_are_not_read(tmp_path: Path, kind: str) -> None:
    valid = np.zeros((512, 512), np.bool_)
    valid[:, 256:] = True
    scene = read_scene(write_masked(tmp_path / "a.tif", valid, kind), "a.tif")
    damage(tmp_path / "a.tif")
    pixels, found = read_chip(scene, Window(-20, -20, 270, 270))
    assert (pixels.shape, pixels.any(), found.any()) == ((3, 270, 270), False, False)
    for window in (Window(0, 0, 100, 257), Window(0, 300, 8, 8)):  # where anything is, its failure is one
        with pytest.raises(ReadError):
            read_chip(scene, window)


def test_a_window_without_data_fetches_little_of_a_remote_scene(s3: str, tmp_path: Path, proxied: Proxy) -> None:
    valid = np.zeros((1024, 1024), np.bool_)
    valid[:, 1000:] = True
    uri = put(write_masked(tmp_path / "a.tif", valid, "mask"), f"{s3}/masked/a.tif")
    # In a process of its own: rasterio holds the interpreter while GDAL looks for a mask, and the proxy is in this one.
    read = f"print(read_chip(read_scene({uri!r}, 'a'), Window(0, 0, {{}}, {{}}))[1].sum())"
    imports = "from seg_core.imagery.raster import read_chip; from seg_core.imagery.headers import read_scene; "
    imports += "from seg_core.grid import Window; "
    for side, count, most in ((1000, 0, 100_000), (1024, valid.sum(), 4 * 2**20)):
        before = proxied.received
        command = [sys.executable, "-c", imports + read.format(side, side)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert int(done.stdout) == count
        assert most / 4 - 100_000 < proxied.received - before < most


@pytest.mark.parametrize("kind", ["mask", "alpha", "nodata"])
def test_a_scene_without_a_valid_pixel_has_tiles_without_coverage(tmp_path: Path, kind: str) -> None:
    scene = read_scene(write_masked(tmp_path / "a.tif", np.zeros((100, 120), np.bool_), kind), "a.tif")
    pixels, valid = read_chip(scene, scene.window)
    assert (pixels.shape, valid.any()) == ((3, 100, 120), False)
    certain = np.ones((100, 120), np.float32)
    for row in tile_rows(scene, scene.window, 64, window_figures(certain, valid, 64)):
        assert (row["status"], row["valid_px"], row["coverage"], row["building_px"]) == ("done", 0, None, 0)


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nodata", [None, np.nan, -np.inf])
def test_a_scene_of_nan_or_infinity_holds_no_data(tmp_path: Path, fill: float, nodata: float | None) -> None:
    write_tiff(tmp_path / "a.tif", np.full((3, 20, 30), fill, np.float32), nodata=nodata)
    scene = read_scene(str(tmp_path / "a.tif"), "a.tif")
    assert not read_chip(scene, Window(-5, -5, 40, 40), (0.0, 1.0))[1].any()


TURNED = (0.8, 0.6, 400_000.0, 0.6, -0.8, 5_800_000.0)  # by 37 degrees
SOUTH_UP = (1.0, 0.0, 400_000.0, 0.0, 1.0, 5_800_000.0)


@pytest.mark.parametrize("transform", [TURNED, SOUTH_UP, (-1.0, 0.0, 400_000.0, 0.0, 1.0, 5_800_000.0)])
def test_a_scene_that_is_turned_or_south_up_lies_where_it_does(make_scene: MakeScene, transform: Transform) -> None:
    scene = read_scene(make_scene(transform=transform), "a.tif")
    ones = np.ones((100, 120), np.float32), np.ones((100, 120), np.bool_)
    (row,) = tile_rows(scene, scene.window, 512, window_figures(*ones, 512))
    polygon = shapely.from_wkb(row["geometry"])
    a, b, c, d, e, f = transform
    corners = [(a * x + b * y + c, d * x + e * y + f) for x, y in ((0, 0), (0, 100), (120, 100), (120, 0))]
    expected = Transformer.from_crs(UTM, "OGC:CRS84", always_xy=True).transform(*zip(*corners, strict=True))
    assert np.allclose(sorted(polygon.exterior.coords[:-1]), sorted(zip(*expected, strict=True)), rtol=0, atol=1e-9)
    assert polygon.exterior.is_ccw
    assert scene.gsd_m == pytest.approx(1.0, rel=1e-3)
    around = abs(Geod(ellps="WGS84").polygon_area_perimeter(*expected)[0])
    assert row["area_m2"] == row["building_m2"] == pytest.approx(around, rel=1e-9) == pytest.approx(12_000, rel=1e-3)


MOON = (
    'PROJCS["Moon",GEOGCS["Moon",DATUM["Moon",SPHEROID["Moon",1737400,0]],PRIMEM["Reference",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Equirectangular"],UNIT["metre",1]]'
)
NO_WAY = "PROJ can't convert its CRS to longitude and latitude"


@pytest.mark.parametrize(
    ("crs", "transform", "reason"),
    [
        ('LOCAL_CS["site grid",UNIT["metre",1]]', NORTH_UP, NO_WAY),
        ("EPSG:5703", NORTH_UP, NO_WAY),  # heights
        (MOON, NORTH_UP, NO_WAY),
        (UTM, (1.0, 0.0, 1e12, 0.0, -1.0, 1e12), "its transform 1, 0, 1e+12, 0, -1, 1e+12 does not put it on Earth"),
        (UTM, (1.0, 0.0, np.nan, 0.0, -1.0, 0.0), "its transform 1, 0, nan, 0, -1, 0 does not put it on Earth"),
        (UTM, (1e300, 0.0, 1.0, 0.0, -1e300, 0.0), "its transform 1e+300, 0, 1, 0, -1e+300, 0 does not put it"),
        (UTM, (1.0, 1.0, 4e5, 1.0, 1.0, 5.8e6), "its transform 1, 1, 400000, 1, 1, 5.8e+06 does not put it"),
        (UTM, (0.0, 0.0, 4e5, 0.0, 0.0, 5.8e6), "its transform 0, 0, 400000, 0, 0, 5.8e+06 does not put it"),
        ("EPSG:4326", (1.0, 0.0, 0.0, 0.0, -1.0, 400.0), "its transform 1, 0, 0, 0, -1, 400 does not put it on Earth"),
    ],
)
def test_a_scene_that_is_nowhere_on_earth_is_refused_and_segmented_without_its_crs(
    tmp_path: Path, capsys: Capture, crs: str, transform: Transform, reason: str
) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, noise(), crs=crs, transform=Affine(*transform))
    line = refusal(capsys, path)
    assert line.startswith(f"{path}: {reason}")
    assert line.endswith("or remove it (gdal_edit.py -a_srs None)")
    with rasterio.open(path, "r+") as dataset:
        dataset.crs = rasterio.CRS()
    assert read_scene(str(path), "a.tif").crs is None


def test_a_crs_that_is_no_text_is_refused(tmp_path: Path, capsys: Capture) -> None:
    write_tiff(tmp_path / "a.tif", noise(), crs='LOCAL_CS["site grid",UNIT["metre",1]]')
    content = (tmp_path / "a.tif").read_bytes()
    assert b"site grid" in content
    (tmp_path / "a.tif").write_bytes(content.replace(b"site grid", b"\xff\xfe\x01\x80|||\x00\x00"))
    assert "not an image, or a damaged one" in refusal(capsys, tmp_path)


def test_a_tile_beyond_what_its_crs_describes_has_no_geometry(make_scene: MakeScene) -> None:
    # Seen from a satellite, the corners of the picture are not on Earth.
    disk = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +ellps=WGS84"
    scene = read_scene(make_scene(crs=disk, transform=(1e5, 0.0, -6e6, 0.0, -1e5, 5e6)), "a.tif")
    ones = np.ones((100, 120), np.float32), np.ones((100, 120), np.bool_)
    rows = list(tile_rows(scene, scene.window, 20, window_figures(*ones, 20)))
    assert {row["status"] for row in rows} == {"done"}
    placed = [row["geometry"] is not None for row in rows]
    assert (placed[0], placed[14], len(rows)) == (False, True, 30)
    for row, there in zip(rows, placed, strict=True):
        assert [row[k] is not None for k in ("bbox", "area_m2", "building_m2")] == [there] * 3
        assert row["valid_px"] == 400


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_imagery_of_complex_numbers_is_refused(tmp_path: Path, capsys: Capture, dtype: str) -> None:
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=8, width=8, count=3, dtype=dtype):
        pass
    assert refusal(capsys, tmp_path / "a.tif").startswith(f"{tmp_path}/a.tif: its pixels are {dtype}")


VRT = (
    '<VRTDataset rasterXSize="320" rasterYSize="300"><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata>'
    '<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{}</SourceFilename>'
    "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
)


@pytest.mark.parametrize("suffix", ["msk", "MSK", "ovr"])
def test_a_mask_beside_a_scene_that_names_other_files_is_refused(tmp_path: Path, capsys: Capture, suffix: str) -> None:
    write_tiff(tmp_path / "secret.tif", noise(1))
    write_tiff(tmp_path / "a.tif", noise())
    beside = tmp_path / f"a.tif.{suffix}"
    beside.write_text(VRT.format(tmp_path / "secret.tif"))
    line = f"{tmp_path}/a.tif: {beside}, which is beside it, is not a TIFF: remove it"
    assert refusal(capsys, tmp_path / "a.tif") == line
    beside.unlink()
    scene = read_scene(str(tmp_path / "a.tif"), "a.tif")
    beside.write_text(VRT.format(tmp_path / "secret.tif"))
    with pytest.raises(ReadError, match="is not a TIFF"):
        read_chip(scene, scene.window)


def test_a_mask_beside_a_scene_says_what_is_valid_and_is_part_of_its_state(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", noise())
    valid = noise(1)[0] > 100
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.write_mask(valid)
    assert (tmp_path / "a.tif.msk").exists()
    scene = read_scene(str(tmp_path / "a.tif"), "a.tif")
    assert np.array_equal(read_chip(scene, scene.window)[1], valid)
    assert read_scene(str(tmp_path / "a.tif"), "a.tif") == scene
    os.utime(tmp_path / "a.tif.msk", ns=(0, 1))
    changed = read_scene(str(tmp_path / "a.tif"), "a.tif")
    assert changed != scene  # so that its tiles are done again
    assert replace(changed, version=scene.version) == scene


WMS = "<GDAL_WMS><Service name='TMS'><ServerUrl>http://127.0.0.1:9/${z}</ServerUrl></Service></GDAL_WMS>"
HEADERS = "ENVI\nsamples = 8\nlines = 8\nbands = 1\n"
MORE = {"service": WMS, "list": "GDAL_DATASET=other.tif\n", "header": HEADERS, "path": "/vsicurl/http://127.0.0.1:9/a"}


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".jp2"])
@pytest.mark.parametrize("kind", MORE)
def test_a_file_that_points_elsewhere_is_no_image(tmp_path: Path, capsys: Capture, kind: str, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_text(MORE[kind])
    assert "not an image, or a damaged one" in refusal(capsys, tmp_path / f"a{suffix}")


@pytest.mark.parametrize("source", ["/vsicurl/host/a.tif", "GTIFF_DIR:1:a.tif", "/vsizip/a.zip/a.tif"])
def test_gdals_own_ways_to_name_a_file_are_not_followed(capsys: Capture, source: str) -> None:
    assert refusal(capsys, source) == f"{source}: no such file or folder"


def test_a_pipe_is_no_image_and_not_waited_at(tmp_path: Path, capsys: Capture) -> None:
    os.mkfifo(tmp_path / "a.tif")
    assert refusal(capsys, tmp_path) == f"{tmp_path}/a.tif: no such file"


@pytest.mark.parametrize("name", [b"two\nlines.tif", b"\x1b[31mred.tif", "über.tif".encode()])
def test_a_bad_file_of_an_odd_name_is_refused_in_a_line(tmp_path: Path, capsys: Capture, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    line = refusal(capsys, tmp_path)
    assert line.isprintable()
    assert line.endswith(": not an image, or a damaged one (supported: .tif, .tiff, .png, .jpg, .jpeg, .jp2)")


def test_a_name_that_is_not_utf_8_is_refused(make_scene: MakeScene, tmp_path: Path, capsys: Capture) -> None:
    os.rename(os.fsencode(make_scene()), os.fsencode(tmp_path) + b"/\xff.tif")
    assert refusal(capsys, tmp_path) == f"{tmp_path}/\\udcff.tif: its name is not UTF-8: rename it"


CLOSED = """
import os, sys, seg_core.imagery.region
os.seteuid(65534)
try:
    print(seg_core.imagery.region.find_images(sys.argv[1]).images)
except seg_core.imagery.region.SegError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_cannot_be_looked_into_is_refused_and_not_left_out(tmp_path: Path, make_scene: MakeScene) -> None:
    make_scene("open.tif", 8, 8)
    make_scene("closed/a.tif", 8, 8)
    temporary = Path(tempfile.gettempdir())
    folders = [folder for folder in (tmp_path, *tmp_path.parents) if temporary in folder.parents]
    modes = [folder.stat().st_mode for folder in folders]
    try:
        for folder in folders:
            folder.chmod(0o755)
        (tmp_path / "closed").chmod(0o700)
        found = subprocess.run([sys.executable, "-c", CLOSED, tmp_path], capture_output=True, text=True, check=True)
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
    assert found.stdout == f"{tmp_path}/closed: this folder can't be looked into: Permission denied\n"


def test_a_scene_listed_twice_is_counted_once(make_scene: MakeScene, tmp_path: Path) -> None:
    path = make_scene("in/a.tif", 8, 8)
    (tmp_path / "list.txt").write_text("in/a.tif\n./in/a.tif\nin/../in/a.tif\n")
    (tmp_path / "list.csv").write_text(f"uri\nin/a.tif\n{path}\n")
    sources = [tmp_path / "in", path, tmp_path / "list.txt", tmp_path / "list.csv", tmp_path / "in/*.tif"]
    scenes, _ = read_region([str(source) for source in sources])
    assert [scene.scene_id for scene in scenes] == ["a.tif"]


def test_scenes_of_one_name_have_ids_of_their_own(make_scene: MakeScene, tmp_path: Path) -> None:
    paths = [make_scene(f"{year}/a.tif", 8, 8) for year in (2024, 2025)]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    for sources in (paths, [str(tmp_path / "list.txt")], [str(tmp_path)]):
        assert [scene.scene_id for scene in read_region(sources)[0]] == ["2024/a.tif", "2025/a.tif"]


ROW_2 = ": row 2 below the header names no scene: fill in its uri, or delete it"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "uri,year\na.tif,2020\n,2021\n", ROW_2),
        ("list.csv", 'uri,year\na.tif,2020\n"  ",2021\n', ROW_2),
        ("list.csv", "uri\na.tif\nNA\n", ": it names {folder}/NA, which is not a file: correct or remove it"),
        ("list.csv", "uri\na.tif\n007.tif\n", ": it names {folder}/007.tif, which is not a file: correct or remove it"),
        ("list.csv", "uri,year\na.tif,1\nb,c,d,e\n", ": this manifest can't be read: Error tokenizing data."),
        ("list.csv", "uri;year\na.tif;2020\n", ": a manifest needs a column uri, path or scene; it has uri;year"),
        ("list.txt", "a.tif\r\n.\r\n", ": it names {folder}, which is not a file: correct or remove it"),
        ("list.txt", "https://host/a.tif\n", None),
        ("list.parquet", {"uri": ["a.tif", None], "year": [1, 2]}, ROW_2),
        ("list.parquet", {"uri": ["a.tif", np.nan], "year": [1, 2]}, ROW_2),
        ("list.parquet", {"uri": [1.5, 2.5]}, ": it names {folder}/1.5, which is not a file: correct or remove it"),
    ],
)
def test_a_manifest_with_a_bad_row_is_refused_and_the_row_named(
    make_scene: MakeScene, tmp_path: Path, capsys: Capture, name: str, content: Any, message: str | None
) -> None:
    make_scene("a.tif", 8, 8)
    if isinstance(content, str):
        (tmp_path / name).write_text(content, newline="")
    else:
        pd.DataFrame(content).to_parquet(tmp_path / name)
    line = refusal(capsys, tmp_path / name)
    expected = "https://host/a.tif: only local" if message is None else f"{tmp_path}/{name}{message}"
    assert line.startswith(expected.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "\ufeffa.tif\r\nin/b.tif\r\n\r\n"),
        ("list.csv", "\ufeffuri,year\r\na.tif,2020\r\nin/b.tif,\r\n,\r\n\r\n"),
        ("list.csv", '"uri"\n" a.tif"\n"./in/b.tif"'),
    ],
)
def test_a_manifest_from_another_system_names_its_scenes(
    make_scene: MakeScene, tmp_path: Path, name: str, content: str
) -> None:
    expected = [make_scene("a.tif", 8, 8), make_scene("in/b.tif", 8, 8)]
    (tmp_path / name).write_text(content, newline="")
    assert find_images(str(tmp_path / name)).images == expected


Answer = tuple[int, str]


class Store(ThreadingHTTPServer):
    """An S3 server of one object at any key, until it answers something else to everything."""

    daemon_threads = True
    answer: Answer | None = None
    content = b""
    asked = 0

    def handle_error(self, *_: Any) -> None:
        """A client may leave when it has what it wants."""


class _Request(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked += 1
        content, code, kind = self.server.content, 200, "application/octet-stream"
        if self.server.answer:
            code, name = self.server.answer
            kind, content = "application/xml", f"<Error><Code>{name}</Code><Message>No.</Message></Error>".encode()
        elif "list-type=2" in self.path:  # it may not be listed
            kind, code, content = "application/xml", 403, b"<Error><Code>AccessDenied</Code></Error>"
        elif wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content, code = content[int(first) : int(last or len(content)) + 1], 206
        self.send_response(code)
        if code == 206:
            self.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{len(self.server.content)}"
            )
        self.send_header("Content-Type", kind)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":  # to a look at the head of an object S3 answers no more than the number
            self.wfile.write(content)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def store(other_environment: pytest.MonkeyPatch) -> Iterator[Store]:
    with Store(("127.0.0.1", 0), _Request) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        other_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        other_environment.setenv("AWS_ACCESS_KEY_ID", "old")
        other_environment.setenv("AWS_SECRET_ACCESS_KEY", "guarded")
        other_environment.setenv("AWS_REGION", "us-east-1")
        yield server
        server.shutdown()


def list_all(uri: str) -> None:
    list(storage.walk(uri))


LOG_IN = "the credentials have expired: log in again"


@pytest.mark.parametrize(
    ("answer", "listing", "looking"),
    [
        ((400, "ExpiredToken"), LOG_IN, f"S3 refuses the request without a reason: mostly {LOG_IN}, or see AWS_REGION"),
        ((403, "AccessDenied"), "access denied: these credentials", "access denied: these credentials"),
        ((403, "RequestTimeTooSkewed"), "S3 answers RequestTimeTooSkewed", "access denied"),
    ],
)
def test_a_store_that_refuses_is_told_of_in_a_line_that_helps(
    store: Store, capsys: Capture, answer: Answer, listing: str, looking: str
) -> None:
    store.answer = answer
    with pytest.raises(SegError, match=f"^s3://bucket/scenes: {listing}"):
        list_all("s3://bucket/scenes")
    line = refusal(capsys, "s3://bucket/scenes")
    assert line.startswith(f"s3://bucket/scenes: {looking}")
    assert "guarded" not in line
    assert store.asked < 10  # to ask again would not help


def test_credentials_that_expire_in_mid_run_fail_the_window_at_once(store: Store, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", noise(3, 600, 600), **TILED)
    store.content = (tmp_path / "a.tif").read_bytes()
    scene = read_scene("s3://bucket/a.tif", "a.tif")
    with pytest.raises(ReadError, match=f"^{scene.uri}") as during, open_image(scene.uri) as dataset:  # noqa: PT012
        store.answer = (400, "ExpiredToken")
        dataset.read()
    with pytest.raises(ReadError, match=LOG_IN) as after:
        read_chip(scene, Window(200, 200, 300, 300))
    for error in (during, after):
        assert "\n" not in str(error.value)
    assert store.asked < 40


@pytest.mark.parametrize(
    ("name", "value", "uri", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "s3://bucket/a", "s3://bucket/a: Invalid endpoint: localhost:9000"),
        ("AWS_PROFILE", "nobody", "s3://bucket/a", "s3://bucket/a: The config profile (nobody) could not be found"),
        (
            "AWS_REGION",
            "us-east-1",
            "s3://no bucket!/a",
            "s3://no bucket!/a: Parameter validation failed: Invalid buck",
        ),
    ],
)
def test_an_environment_or_a_uri_that_cannot_be_is_told_of_in_a_line(
    store: Store,
    other_environment: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    value: str,
    uri: str,
    message: str,
) -> None:
    other_environment.setenv(name, value)
    assert refusal(capsys, uri).startswith(message)
    assert store.asked == 0


@pytest.mark.parametrize("kind", ["other columns", "no statistics", "no rows"])
def test_a_foreign_table_in_the_place_of_a_part_is_named_and_done_again(tmp_path: Path, kind: str) -> None:
    run, _ = build_run(tmp_path)
    path = published_parts(run)[0]
    table = pq.read_table(path)
    if kind == "other columns":
        table = pa.table({"name": ["a"]})
    pq.write_table(table.slice(0, 0 if kind == "no rows" else None), path, write_statistics=kind != "no statistics")
    state = read_states([path])[path]
    assert state is None or not state[0] or kind == "no rows"
    assert [part.key in path for part in parts_to_do(run, read_plan(run))] == [True]
    if kind != "no statistics":
        assert path in verify(run).bad_parts
