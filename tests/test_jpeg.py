"""JPEG streams inside GeoTIFFs, decoded by the device: the pixels that GDAL reads, but for the rounding of colours."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
import torch
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene, write_untrained
from rasterio.transform import Affine
from rasters import HEIGHT, WIDTH, WINDOWS, decode, write_jpeg
from runs import rows_of
from seg_command import seg

from aerial_seg.segmenting.stopwatch import Stopwatch
from seg_core.errors import ReadError
from seg_core.grid import Window
from seg_core.imagery import jpeg_streams as jpeg
from seg_core.imagery.headers import read_scene
from seg_core.imagery.jpeg_library import IMAGE, NAMES, find_jpeg_library
from seg_core.imagery.jpeg_streams import ByteRangeCache, _without_colour, read_streams
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene
from seg_core.inference.windows import stage_windows
from seg_core.model.jpeg_decoder import JpegDecoder
from seg_core.model.segmenter import Segmenter
from seg_core.run.plan import ReadBlock, Settings, make_plan
from seg_core.run.stored_plan import read_plan
from seg_core.storage.files import publish, read_ranges


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return Segmenter(write_untrained(str(tmp_path_factory.mktemp("bundles") / "bundle"), width=4, depth=2), "cpu")


def assert_near(segmenter: Segmenter, scene: Scene, window: Window, *, room: float = 1.5) -> None:
    """The device's pixels are GDAL's, but for rounding; what is valid is the same."""
    pixels, valid = decode(segmenter, scene, window)
    expected, holds = read_chip(scene, window)
    assert (pixels.shape, pixels.dtype) == (expected.shape, expected.dtype)
    assert np.array_equal(valid, holds)
    assert expected[:, holds].std() > 10
    assert np.abs(pixels.astype(int) - expected)[:, holds].mean() < room


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"photometric": "rgb"},  # colours at full resolution
        {"jpeg_quality": 40},
        {"jpegtablesmode": 0},  # each block with tables of its own
        {"jpegtablesmode": 3},
        {"tiled": False, "blockysize": 16},
        {"bands": 1, "photometric": "minisblack"},
    ],
)
def test_a_chip_decoded_by_the_device_is_what_gdal_reads(
    tmp_path: Path, segmenter: Segmenter, window: Window, options: dict[str, Any]
) -> None:
    assert_near(segmenter, write_jpeg(tmp_path / "a.tif", **options), window)


def test_chips_decoded_together_are_those_decoded_alone(tmp_path: Path, segmenter: Segmenter) -> None:
    colour, grey = write_jpeg(tmp_path / "a.tif"), write_jpeg(tmp_path / "b.tif", bands=1, photometric="minisblack")
    empty = write_jpeg(tmp_path / "c.tif", valid=np.zeros((HEIGHT, WIDTH), np.bool_))
    chips = [read_streams(scene, window) for window in WINDOWS for scene in (colour, empty, grey)]
    together = segmenter.decoder.decode([chip for chip in chips if chip is not None])
    for chip, found in zip(chips, together, strict=True):
        assert chip is not None
        assert torch.equal(found.image, segmenter.decoder(chip).image)


def test_the_time_that_a_gpus_engine_decodes_is_counted(tmp_path: Path, segmenter: Segmenter) -> None:
    streams = read_streams(write_jpeg(tmp_path / "a.tif"), WINDOWS[0])
    assert streams is not None
    watch = Stopwatch()
    for on_gpu in (False, True):  # a CPU's threads read and decode in one
        decoder = JpegDecoder(torch.device("cpu"), lambda: None)
        decoder.on_gpu, decoder.decode_context = on_gpu, partial(watch.on, "decoding")
        assert torch.equal(decoder(streams).image, segmenter.decoder(streams).image)
        assert (watch.take().decoding > 0) == on_gpu


@pytest.mark.parametrize("size", [{"blockxsize": 64}, {"blockxsize": 256}, {"blockysize": 32}, {"blockysize": 128}])
def test_a_block_of_another_size_is_a_read_error(tmp_path: Path, segmenter: Segmenter, size: dict[str, int]) -> None:
    streams = read_streams(write_jpeg(tmp_path / "a.tif"), WINDOWS[0])
    other = read_streams(write_jpeg(tmp_path / "b.tif", **size), WINDOWS[0])
    assert streams is not None
    assert other is not None
    mixed = [other.blocks[0], *streams.blocks[1:]]
    with pytest.raises(ReadError, match="its size is not 128 x 64 px"):
        segmenter.stage_streams(streams._replace(blocks=mixed))


def test_bands_are_those_that_were_asked_for(tmp_path: Path, segmenter: Segmenter) -> None:
    scene = write_jpeg(tmp_path / "a.tif")
    for bands in ((3, 2, 1), (2,), (1,), (1, 1, 1)):
        assert_near(segmenter, Scene(**{**vars(scene), "bands": bands}), WINDOWS[0])


@pytest.mark.parametrize("window", WINDOWS)
def test_an_internal_mask_says_what_is_valid(tmp_path: Path, segmenter: Segmenter, window: Window) -> None:
    valid = np.ones((HEIGHT, WIDTH), np.bool_)
    valid[:150, :200] = False
    assert_near(segmenter, write_jpeg(tmp_path / "a.tif", valid=valid), window)


def test_of_a_chip_without_a_valid_pixel_no_block_is_fetched(tmp_path: Path, segmenter: Segmenter) -> None:
    scene = write_jpeg(tmp_path / "a.tif", valid=np.zeros((HEIGHT, WIDTH), np.bool_))
    streams = read_streams(scene, WINDOWS[0])
    assert streams is not None
    assert streams.blocks == []
    pixels, valid = decode(segmenter, scene, WINDOWS[0])
    assert not pixels.any()
    assert not valid.any()


def test_blocks_that_a_sparse_file_leaves_out_are_zero(tmp_path: Path, segmenter: Segmenter) -> None:
    path = tmp_path / "a.tif"
    options = {"tiled": True, "blockxsize": 128, "blockysize": 64, "compress": "jpeg", "photometric": "ycbcr"}
    with rasterio.open(
        path, "w", driver="GTiff", height=HEIGHT, width=WIDTH, count=3, dtype="uint8", sparse_ok=True, crs=UTM,
        transform=Affine(*NORTH_UP), interleave="pixel", **options,
    ) as dataset:  # fmt: skip
        dataset.write(np.full((3, 64, 128), 90, np.uint8), window=rasterio.windows.Window(128, 64, 128, 64))
    scene = read_scene(str(path), "a.tif")
    streams = read_streams(scene, WINDOWS[0])
    assert streams is not None
    assert streams.block_offsets == [(64, 128)]
    pixels, _ = decode(segmenter, scene, WINDOWS[0])
    assert np.abs(pixels.astype(int) - read_chip(scene, WINDOWS[0])[0]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "deflate", "photometric": "rgb"},
        {"nodata": 0},
        {"interleave": "band", "photometric": "rgb"},
        {"bands": 4, "photometric": "rgb", "ALPHA": "yes"},
        {"bands": 2, "photometric": "minisblack"},
    ],
)
def test_what_it_takes_gdal_to_read_is_left_to_it(tmp_path: Path, options: dict[str, Any]) -> None:
    assert read_streams(write_jpeg(tmp_path / "a.tif", **options), WINDOWS[0]) is None


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_a_gpu_that_takes_rgb_for_ycbcr_is_given_none(
    tmp_path: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, photometric: str
) -> None:
    scene = write_jpeg(tmp_path / "a.tif", photometric=photometric)
    settings = Settings(halo=16, threshold=0.5, decode="device")
    part = next(make_plan([scene], segmenter.bundle, settings)[0].parts())
    for knows, decoded in ((True, True), (False, photometric == "ycbcr")):
        monkeypatch.setattr(Segmenter, "decodes_rgb", knows)
        assert stage_windows(ReadBlock(part, (part.window,)), settings, segmenter)[0].decoded == decoded


def test_so_is_a_very_wide_image_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the blocks of a chip are many times as large as the chip."""
    scene = write_jpeg(tmp_path / "a.tif", tiled=False, blockysize=16)
    for room, served in ((WIDTH, True), (WIDTH - 1, False)):
        monkeypatch.setattr(jpeg, "MAX_BLOCK_WIDTH", room)
        assert (read_streams(scene, Window(16, 200, 64, 64)) is not None) == served


def test_a_resampled_scene_is_left_to_gdal(tmp_path: Path) -> None:
    scene = write_jpeg(tmp_path / "a.tif")
    assert read_streams(Scene(**{**vars(scene), "gsd_m": 2.0}), WINDOWS[0]) is None


def test_real_imagery_is_decoded_as_gdal_does(shared: Path, segmenter: Segmenter) -> None:
    path = next(iter(sorted((shared / "massachusetts-buildings" / "val").iterdir())))
    scene = read_scene(str(path), path.name)
    for window in (scene.window, Window(-96, -96, 704, 704), Window(1000, 1000, 600, 600)):
        assert_near(segmenter, scene, window, room=1.0)


def test_a_strip_whose_rows_gdal_shows_as_blocks_is_left_to_it(tmp_path: Path, segmenter: Segmenter) -> None:
    """Of one strip of more than 2,000 rows: GDAL knows where the first of its rows is alone."""
    for height, served in ((1900, True), (2104, False)):
        path = tmp_path / f"{height}.tif"
        pixels = np.random.default_rng(0).integers(0, 256, (1, height, 64), dtype=np.uint8)
        options = {"compress": "jpeg", "tiled": False, "blockysize": height, "crs": UTM, "transform": Affine(*NORTH_UP)}
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=64, count=1, dtype="uint8", **options
        ) as dataset:
            dataset.write(pixels)
        scene, window = read_scene(str(path), path.name), Window(600, 0, 64, 64)
        assert (read_streams(scene, window) is not None) == served
        if served:
            assert_near(segmenter, scene, window)


def test_what_a_block_says_of_its_colours_does_not_count(tmp_path: Path) -> None:
    scene = write_jpeg(tmp_path / "a.tif", photometric="rgb", jpegtablesmode=0)
    with rasterio.open(scene.uri) as dataset:
        offset, size = (int(dataset.get_tag_item(f"BLOCK_{name}_0_0", "TIFF", bidx=1)) for name in ("OFFSET", "SIZE"))
    plain = Path(scene.uri).read_bytes()[offset : offset + size]
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    without = [b"".join(_without_colour(stream)) for stream in (plain[:2] + jfif + plain[2:], plain)]
    assert without == [plain[2:]] * 2


def test_a_damaged_block_is_a_read_error(tmp_path: Path, segmenter: Segmenter) -> None:
    scene = write_jpeg(tmp_path / "a.tif")
    streams = read_streams(scene, WINDOWS[0])
    assert streams is not None
    broken = [block[: len(block) // 3] if at else np.zeros_like(block) for at, block in enumerate(streams.blocks)]
    with pytest.raises(ReadError, match="a block can't be decoded"):
        segmenter.stage_streams(streams._replace(blocks=broken))
    (tmp_path / "b.tif").write_bytes(Path(scene.uri).read_bytes()[:-20_000])
    with pytest.raises(ReadError, match=r"b\.tif: ends before its data does"):
        read_streams(replace(scene, uri=str(tmp_path / "b.tif")), WINDOWS[0])


def test_windows_beside_each_other_share_what_was_read(tmp_path: Path) -> None:
    scene = write_jpeg(tmp_path / "a.tif")
    content, path = Path(scene.uri).read_bytes(), Path(scene.uri)
    first, second, third = (0, 300), (300, 300), (600, 300)
    kept = ByteRangeCache(700)
    assert kept.read(scene, [first, second]) == [content[:300], content[300:600]]
    path.write_bytes(bytes(len(content)))  # from here on, what is read is 0
    assert kept.read(scene, [second, third, first]) == [content[300:600], bytes(300), content[:300]]
    assert (kept.size, len(kept.ranges)) == (600, 2)  # the second, first used in that call, had to go
    assert kept.read(scene, [second]) == [bytes(300)]
    assert kept.read(replace(scene, size=scene.size + 1), [first]) == [bytes(300)]  # another state of the file
    path.write_bytes(content)
    assert kept.read(scene, [second]) == [bytes(300)]
    assert kept.read(scene, [second], fresh=True) == [content[300:600]]
    assert (kept.size, len(kept.ranges)) == (600, 2)


def test_several_threads_share_what_is_kept(tmp_path: Path) -> None:
    scene = write_jpeg(tmp_path / "a.tif")
    content, kept = Path(scene.uri).read_bytes(), ByteRangeCache(1000)
    rng = np.random.default_rng(0)
    asked = [[(int(at), 100) for at in rng.integers(0, 20, 4) * 50] for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ranges: kept.read(scene, ranges), asked))
    assert found == [[content[at : at + size] for at, size in ranges] for ranges in asked]
    assert kept.size == sum(map(len, kept.ranges.values())) <= 1000


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("near", [0, 10, 1000])
def test_pieces_of_a_file_are_read_in_their_order(where: str, near: int, tmp_path: Path, s3: str) -> None:
    content = np.random.default_rng(0).bytes(500)
    path = f"{s3}/pieces.bin" if where == "s3" else str(tmp_path / "pieces.bin")
    publish(path, content)
    ranges = [(300, 50), (0, 10), (12, 8), (20, 1), (310, 5), (499, 1), (40, 0)]
    assert read_ranges(path, ranges, near) == [content[offset : offset + size] for offset, size in ranges]
    assert read_ranges(path, [], near) == []
    with pytest.raises(ReadError, match=r"pieces\.bin: ends before its data does"):
        read_ranges(path, [(490, 20)], near)
    with pytest.raises(ReadError, match=r"none\.bin: can't be read"):
        read_ranges(path.replace("pieces", "none"), [(0, 1)], near)


@pytest.mark.usefixtures("without_actors")
def test_who_decodes_is_a_setting_of_the_run_and_what_it_leaves_to_the_cpu_is_said(
    make_scene: MakeScene,
    make_bundle: MakeBundle,
    segmenter: Segmenter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "region").mkdir()
    scene = write_jpeg(tmp_path / "region" / "jpeg.tif")
    command = ["segment", tmp_path / "region", "--model", make_bundle(), "--tile-size", "64", "--part", "256"]
    command += ["--window", "128"]
    _, err = seg(capsys, *command, "--out", tmp_path / "run", "--decode", "device")
    assert "decoded by the CPU" not in err
    assert read_plan(str(tmp_path / "run")).settings.decode == "device"
    assert json.loads(seg(capsys, "verify", tmp_path / "run", "--deep", "--json")[0])["rechecked"] > 1
    _, err = seg(capsys, *command, "--out", tmp_path / "run", code=2)
    assert "decode device there, cpu now" in err
    seg(capsys, *command, "--out", tmp_path / "cpu", "--decode", "auto")
    assert read_plan(str(tmp_path / "cpu")).settings.decode == "cpu"  # there is no GPU
    pairs = list(zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "cpu"), strict=True))
    assert all(abs(one["mean_probability"] - two["mean_probability"]) < 0.05 for one, two in pairs)
    # The rows tell who decoded, where the two differ at all: GDAL 3.12 and torchvision 0.26 agree to the pixel.
    agree = np.array_equal(decode(segmenter, scene, scene.window)[0], read_chip(scene, scene.window)[0])
    assert any(one["mask"] != two["mask"] for one, two in pairs) == (not agree)
    for begun in ("run", "cpu"):  # as each of them began
        assert "nothing to do" in seg(capsys, *command, "--out", tmp_path / begun, "--decode", "auto")[1]

    make_scene("region/plain.tif", 100, 100, transform=(1.0, 0.0, 500_000.0, 0.0, -1.0, 5_800_000.0))
    _, err = seg(capsys, *command, "--out", tmp_path / "both", "--decode", "device")
    assert "1 windows were decoded by the CPU: --decode device is for JPEG GeoTIFFs" in err

    content = bytearray(Path(scene.uri).read_bytes())
    with rasterio.open(scene.uri) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    content[offset : offset + 2] = b"no"
    Path(scene.uri).write_bytes(content)
    seg(capsys, *command, "--out", tmp_path / "damaged", "--decode", "device", code=1)
    failed = [row for row in rows_of(tmp_path / "damaged") if row["status"] == "failed"]
    assert {(row["error_class"], row["scene_id"]) for row in failed} == {("ReadError", "jpeg.tif")}
    assert all("jpeg.tif" in row["error"] for row in failed)  # GDAL's words for it


def test_the_jpeg_library_is_known_by_its_pixels() -> None:
    assert find_jpeg_library() in NAMES.values()
    bgr = cv2.imdecode(np.frombuffer(IMAGE, np.uint8), cv2.IMREAD_COLOR)  # by the libjpeg-turbo in OpenCV's wheel
    pixels = np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1))
    assert NAMES[sha256(pixels.tobytes()).hexdigest()[:8]] == "libjpeg-turbo"


@pytest.mark.parametrize("colours", ["ycbcr", "rgb"])
def test_a_cpu_decodes_as_libjpeg_turbo_whatever_library_gdal_has(tmp_path: Path, colours: str) -> None:
    """So the rows of a run do not depend on the wheels of a node. OpenCV's wheel contains libjpeg-turbo."""
    scene = write_jpeg(tmp_path / "a.tif", photometric=colours)
    streams = read_streams(scene, scene.window)
    assert streams is not None
    found = JpegDecoder(torch.device("cpu"), lambda: None)(streams).image.numpy()
    for block, (row, col) in zip(streams.blocks, streams.block_offsets, strict=True):
        pixels = cv2.imdecode(block, cv2.IMREAD_COLOR)[..., ::-1].transpose(2, 0, 1)
        part = found[:, row : row + pixels.shape[1], col : col + pixels.shape[2]]
        assert np.array_equal(part, pixels[:, : part.shape[1], : part.shape[2]])
