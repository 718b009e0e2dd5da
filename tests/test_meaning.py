"""Imagery that means something else than it seems: read as it is meant, or refused or doubted in a line with a way out.

Each test names a condition that was seen in public reports, of this kind of program or of GDAL, and its right value.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.windows import Window as RasterioWindow
from runs import bare_scene, read_part

from aerial_seg.cli.main import main
from seg_core.errors import ReadError, SegError
from seg_core.imagery.georef import GEOD, area_m2, split_at_antimeridian
from seg_core.imagery.headers import read_scene
from seg_core.imagery.jpeg_streams import read_streams
from seg_core.imagery.overlaps import find_copies, find_overlaps
from seg_core.imagery.raster import read_chip
from seg_core.imagery.region import read_region
from seg_core.imagery.scene import Scene, fit_to_model, resample_grid
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import Settings, make_plan
from seg_core.run.resume import open_run
from seg_core.run.rows import Failure, failed_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import write_part
from seg_core.storage.files import publish, sha256

Pixels = NDArray[Any]

SIDE = 128  # px
RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
SETTINGS = Settings(halo=16, threshold=0.5, tile_size=64, part=64)


def noise(bands: int = 3, seed: int = 0, low: int = 20, high: int = 230) -> Pixels:
    return np.random.default_rng(seed).integers(low, high, (bands, SIDE, SIDE)).astype(np.uint8)


def disc() -> NDArray[np.bool_]:
    """Which pixels hold data in scenes with a collar: those of a circle."""
    rows, cols = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    return np.asarray(np.hypot(rows, cols) < 0.45 * SIDE)


def write(
    path: Path, pixels: Pixels, labels: Sequence[ColorInterp] | None = None, mask: Pixels | None = None, **options: Any
) -> str:
    """Write a GeoTIFF in blocks of 64 px."""
    profile: dict[str, Any] = {"driver": "GTiff", "crs": UTM, "transform": Affine(*NORTH_UP), "tiled": True}
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **{**profile, "blockxsize": 64, "blockysize": 64, **shape, **options}) as dataset,
    ):
        if labels:
            dataset.colorinterp = labels
        dataset.write(pixels)
        if mask is not None:
            dataset.write_mask(mask)
    return str(path)


def valid_of(path: str, alpha: int | None = None, gsd_m: float | None = None) -> NDArray[np.bool_]:
    """Which pixels of a file hold data, read as it is or resampled."""
    scene = read_scene(path, os.path.basename(path), alpha)
    grid = scene if gsd_m is None else resample_grid(scene, gsd_m)
    return read_chip(grid, grid.window, None if scene.dtype == "uint8" else (0.0, 255.0))[1]


def served(scene: Scene, scale: tuple[float, float] | None = None, bands: tuple[int, ...] | None = None) -> Scene:
    return fit_to_model(scene, num_bands=3, dtype="uint8", gsd_m=None, bands=bands, scale=scale, resample=False)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 1, 2)])
def test_colours_are_read_by_their_labels(tmp_path: Path, order: tuple[int, ...]) -> None:
    # GeoDeep pull request 11: files whose bands are blue, green, red, and say so.
    pixels = noise()
    labels = [RGB[i] for i in order]
    path = write(tmp_path / "a.tif", pixels[list(order)], labels, photometric="minisblack")
    scene = served(read_scene(path, "a.tif"))
    assert np.array_equal(read_chip(scene, scene.window)[0], pixels)


def test_the_advice_on_four_bands_is_by_their_labels(tmp_path: Path) -> None:
    # raster-vision issue 108.
    labels = [*RGB[::-1], ColorInterp.undefined]
    scene = read_scene(write(tmp_path / "a.tif", noise(4), labels, photometric="minisblack"), "a.tif")
    with pytest.raises(SegError, match=r"4 bands besides alpha, the model needs 3: .*--bands 3,2,1$"):
        served(scene)
    assert served(scene, bands=(3, 2, 1)).bands == (3, 2, 1)


def test_bands_that_are_labelled_in_part_stay_in_their_order(tmp_path: Path) -> None:
    labels = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.red]
    path = write(tmp_path / "a.tif", noise(), labels, photometric="minisblack")
    assert read_scene(path, "a.tif").bands == (1, 2, 3)


@pytest.mark.parametrize("bands", [None, (1, 2, 3)])
def test_a_band_that_looks_like_alpha_is_asked_about(tmp_path: Path, bands: tuple[int, ...] | None) -> None:
    # MapServer issue 5216: an alpha band that is not labelled; its collar would be open land.
    alpha = 255 * disc()[np.newaxis].astype(np.uint8)
    path = write(tmp_path / "a.tif", np.concatenate([noise(), alpha]), photometric="rgb", alpha="unspecified")
    with pytest.raises(SegError, match=r"band 4 may be alpha.* --alpha 4, or --alpha none --bands 1,2,3$"):
        served(read_scene(path, "a.tif"), bands=bands)
    assert np.array_equal(valid_of(path, 4), disc())
    assert valid_of(path, 0).all()
    assert served(read_scene(path, "a.tif", 4)).bands == (1, 2, 3)


@pytest.mark.parametrize("content", [noise(1), np.zeros((1, SIDE, SIDE), np.uint8)])
def test_infrared_is_no_alpha(tmp_path: Path, content: Pixels) -> None:
    path = write(tmp_path / "a.tif", np.concatenate([noise(), content]), photometric="rgb", alpha="unspecified")
    assert served(read_scene(path, "a.tif"), bands=(1, 2, 3)).maybe_alpha is None


def test_infrared_that_is_labelled_alpha_is_doubted(tmp_path: Path) -> None:
    # PlanetaryComputer issue 82: NAIP deliveries.
    infrared = noise(1, low=0, high=256)
    path = write(tmp_path / "a.tif", np.concatenate([noise(), infrared]), photometric="rgb", alpha="yes")
    (doubt,) = read_scene(path, "a.tif").doubts
    assert "band 4 is labelled alpha, but holds many values" in doubt
    assert doubt.endswith("add --alpha none")
    assert not valid_of(path).all()
    assert valid_of(path, 0).all()
    assert read_scene(path, "a.tif", 0).doubts == ()


@pytest.mark.parametrize("edge", [0, 90])
def test_an_alpha_band_with_a_soft_edge_is_not_doubted(tmp_path: Path, edge: int) -> None:
    alpha = 255 * disc()[np.newaxis].astype(np.uint8)
    alpha[:, SIDE // 2, :] = np.minimum(alpha[:, SIDE // 2, :], 255 - edge)
    path = write(tmp_path / "a.tif", np.concatenate([noise(), alpha]), photometric="rgb", alpha="yes")
    assert read_scene(path, "a.tif").doubts == ()


def test_an_alpha_band_that_a_scene_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"a.tif: --alpha 4: it has only 3 bands$"):
        read_scene(write(tmp_path / "a.tif", noise()), "a.tif", 4)


@pytest.mark.parametrize(("kind", "doubted"), [("nodata", True), ("alpha", True), ("mask", False), ("plain", False)])
def test_validity_within_lossy_pixels_is_doubted(tmp_path: Path, kind: str, doubted: bool) -> None:
    # GDAL issue 8834: noise of JPEG in a collar counts as data.
    pixels, options = np.where(disc(), noise(), 0).astype(np.uint8), {"compress": "jpeg"}
    if kind == "alpha":
        path = write(tmp_path / "a.tif", np.concatenate([pixels, 255 * disc()[np.newaxis].astype(np.uint8)]), **options)
    else:
        nodata, mask = 0 if kind == "nodata" else None, disc() if kind == "mask" else None
        path = write(tmp_path / "a.tif", pixels, mask=mask, nodata=nodata, **options)
    found = read_scene(path, "a.tif").doubts
    assert [("nearblack -setmask" in line) for line in found] == [True] * doubted


@pytest.mark.parametrize("gsd_m", [None, 2.5])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_blocks_that_a_sparse_file_leaves_out_are_missing(tmp_path: Path, interleave: str, gsd_m: float | None) -> None:
    # stackstac issue 219: without a nodata value they were open land.
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 256, "width": 256, "dtype": "uint8", "crs": UTM}
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True, "interleave": interleave}
    with rasterio.open(path, "w", transform=Affine(*NORTH_UP), **profile, **options) as dataset:
        dataset.write(noise(), window=RasterioWindow(0, 0, SIDE, SIDE))
    valid = valid_of(str(path), gsd_m=gsd_m)
    side = int(SIDE / (gsd_m or 1))
    assert side**2 <= valid.sum() <= (side + 3) ** 2
    assert valid[:side, :side].all()


def test_blocks_that_a_sparse_jpeg_leaves_out_are_missing_for_every_decoder(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 256, "width": 256, "dtype": "uint8", "compress": "jpeg"}
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True, "photometric": "ycbcr"}
    with rasterio.open(path, "w", **profile, **options) as dataset:
        dataset.write(noise(), window=RasterioWindow(0, 0, SIDE, SIDE))
    scene = read_scene(str(path), "a.tif")
    streams = read_streams(scene, scene.window)
    assert streams is not None
    assert streams.valid.sum() == SIDE**2
    assert np.array_equal(streams.valid, read_chip(scene, scene.window)[1])


COLOUR = (255, 0, 255)


def write_colour(path: Path, pixels: Pixels) -> str:
    """Write a PNG with a transparent colour, or a TIFF whose nodata values are in an .aux.xml."""
    if path.suffix == ".png":
        from PIL import Image

        Image.fromarray(pixels.transpose(1, 2, 0)).save(path, transparency=COLOUR)
        return str(path)
    write(path, pixels)
    bands = (
        f'<PAMRasterBand band="{i}"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
        for i, value in enumerate(COLOUR, 1)
    )
    Path(f"{path}.aux.xml").write_text(f"<PAMDataset>{''.join(bands)}</PAMDataset>")
    return str(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_nodata_colour_is_missing_and_each_of_its_values_is_not(tmp_path: Path, name: str) -> None:
    # Pillow issue 421, rasterio issue 1896: white was missing, magenta was not.
    pixels = noise()
    pixels[:, ~disc()] = np.array(COLOUR)[:, np.newaxis]
    pixels[:, 60:70, 60:70] = 255
    pixels[:, 50:60, 50:60] = 0
    path = write_colour(tmp_path / name, pixels)
    assert np.array_equal(valid_of(path), disc())
    if name.endswith(".tif"):
        smaller = valid_of(path, gsd_m=2.0)
        assert abs(smaller.sum() - disc().sum() / 4) < np.pi * 0.9 * SIDE / 2


@pytest.mark.parametrize("gsd_m", [None, 2.0])
def test_nan_is_missing_to_the_same_pixel_whether_it_is_declared_or_not(tmp_path: Path, gsd_m: float | None) -> None:
    pixels = np.where(disc(), noise().astype(np.float32), np.nan)
    found = [
        valid_of(write(tmp_path / f"{nodata}.tif", pixels, nodata=nodata), gsd_m=gsd_m)
        for nodata in (None, np.nan, -9999)
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    true = disc().sum() / (gsd_m or 1) ** 2
    assert true <= found[0].sum() <= true + np.pi * 0.9 * SIDE / (gsd_m or 1)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_pixel_holds_data_where_mask_and_alpha_both_say_so(tmp_path: Path, interleave: str) -> None:
    alpha = 255 * disc()[np.newaxis].astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[SIDE // 2 :] = True
    path = write(tmp_path / "a.tif", np.concatenate([noise(), alpha]), mask=mask, interleave=interleave)
    assert np.array_equal(valid_of(path), disc() & mask)


@pytest.mark.parametrize("gsd_m", [None, 2.0])
def test_where_0_is_white_the_picture_counts_and_not_the_numbers(tmp_path: Path, gsd_m: float | None) -> None:
    pixels = np.repeat(np.linspace(0, 255, SIDE).round()[np.newaxis, np.newaxis], SIDE, axis=1).astype(np.uint8)
    found = []
    for name, values in (("minisblack", pixels), ("miniswhite", 255 - pixels)):
        scene = read_scene(write(tmp_path / f"{name}.tif", values, photometric=name), name)
        grid = scene if gsd_m is None else resample_grid(scene, gsd_m)
        found.append(read_chip(grid, grid.window)[0])
    assert abs(found[0].astype(int) - found[1]).max() <= (gsd_m is not None)
    with pytest.raises(ReadError, match="0 means white, and its pixels are float32: invert them"):
        read_scene(write(tmp_path / "c.tif", pixels.astype(np.float32), photometric="miniswhite"), "c.tif")


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 4), ("uint16", 12)])
def test_where_0_is_white_and_bits_are_few_white_is_the_largest_value(tmp_path: Path, dtype: str, bits: int) -> None:
    most = 2**bits - 1
    pixels = np.full((1, SIDE, SIDE), most // 4, dtype)
    scene = read_scene(write(tmp_path / "a.tif", pixels, photometric="miniswhite", nbits=bits), "a.tif")
    assert read_chip(scene, scene.window, (0, most))[0].mean() == pytest.approx(255 * 3 / 4, abs=16)


def test_fewer_bits_than_eight_need_a_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise() // 16, nbits=4)
    with pytest.raises(SegError, match=r"a.tif: its pixels have 4 bits, not 8: add --scale 0 15$"):
        served(read_scene(path, "a.tif"))
    assert served(read_scene(path, "a.tif"), scale=(0.0, 15.0)).bits == 4
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((8, 8), np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])
    assert read_scene(str(tmp_path / "b.png"), "b.png").bits == 1


@pytest.mark.parametrize(("scale", "offset"), [(0.0001, 0.0), (1.0, -0.1)])
def test_values_that_mean_others_are_refused_with_both_ways_out(tmp_path: Path, scale: float, offset: float) -> None:
    # Sentinel-2 from processing baseline 04.00 on has an offset, and had none before.
    path = write(tmp_path / "a.tif", noise().astype(np.uint16))
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (scale,) * 3, (offset,) * 3
    with pytest.raises(ReadError, match=r"gdal_translate -unscale .*gdal_edit.py -scale 1 -offset 0"):
        read_scene(path, "a.tif")


@pytest.mark.parametrize("bigtiff", ["no", "yes"])
@pytest.mark.parametrize("endianness", ["little", "big"])
def test_colours_that_are_multiplied_by_alpha_are_divided_again(tmp_path: Path, bigtiff: str, endianness: str) -> None:
    pixels, alpha = noise(), noise(1, seed=1, low=100, high=256)
    product = (pixels.astype(np.float64) * alpha / 255).round().astype(np.uint8)
    options = {"photometric": "rgb", "bigtiff": bigtiff, "endianness": endianness}
    for kind, stored in (("premultiplied", product), ("non-premultiplied", pixels)):
        path = write(tmp_path / f"{kind}.tif", np.concatenate([stored, alpha]), alpha=kind, **options)
        scene = read_scene(path, kind)
        assert scene.premultiplied == (kind == "premultiplied")
        assert abs(read_chip(scene, scene.window)[0].astype(int) - pixels).max() <= 2 * scene.premultiplied
        assert read_scene(path, kind, 4).premultiplied == scene.premultiplied
        assert not read_scene(path, kind, 0).premultiplied


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
def test_other_colour_spaces_are_read_as_the_picture_looks(tmp_path: Path, mode: str) -> None:
    from PIL import Image, ImageCms

    picture = Image.fromarray(np.full((SIDE, SIDE, 3), (200, 120, 60), np.uint8))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.applyTransform(
            picture,
            ImageCms.buildTransform(*profiles, "RGB", "LAB"),  # type: ignore[arg-type]
        )
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.tif")
    scene = served(read_scene(str(tmp_path / "a.tif"), "a.tif"))
    assert abs(read_chip(scene, scene.window)[0].mean(axis=(1, 2)) - (200, 120, 60)).max() < 25


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    # GDAL issue 3329: the first was planned, and the others were not.
    from PIL import Image

    pages = [Image.fromarray(noise(seed=i).transpose(1, 2, 0)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ReadError, match=r"a.tif: holds 3 images, .* \(gdal_translate GTIFF_DIR:1:a.tif\)$"):
        read_scene(str(tmp_path / "a.tif"), "a.tif")


def test_overviews_and_masks_are_no_further_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(), mask=disc())
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    assert read_scene(path, "a.tif").masked


def test_a_codec_that_gdal_lacks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(), compress="deflate")
    content = bytearray(Path(path).read_bytes())
    at = content.index((259).to_bytes(2, "little") + (3).to_bytes(2, "little")) + 8  # the tag Compression, a short
    content[at : at + 2] = (34661).to_bytes(2, "little")  # JBIG
    Path(path).write_bytes(content)
    with pytest.raises(
        ReadError, match=r"a.tif: its pixels are compressed with JBIG, which this GDAL does not support"
    ):
        read_scene(path, "a.tif")


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(), compress="deflate")
    scene = read_scene(path, "a.tif")
    with rasterio.open(path) as dataset:
        start, size = (int(dataset.get_tag_item(f"BLOCK_{what}_1_0", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE"))
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * size)
    with pytest.raises(ReadError, match=r"a.tif: its block of 64 x 64 px at row 0, column 64 can't be decoded: ."):
        read_chip(scene, scene.window)


@pytest.mark.parametrize(
    ("dtypes", "scale", "message"),
    [
        (("uint16", "uint8"), (0.0, 200.0), "b.tif: its pixels are uint8, those of a.tif are uint16, and --scale"),
        (("uint8",), (0.0, 65535.0), "a.tif: --scale 0 65535: its pixels are uint8, 0 to 255: segment it in"),
        (("int16",), (0.0, 65535.0), "a.tif: --scale 0 65535: its pixels are int16, -32768 to 32767: segment it in"),
        (("uint16", "float32"), (0.0, 1.0), "b.tif: its pixels are float32, those of a.tif are uint16"),
    ],
)
def test_a_scale_is_for_one_type_of_pixel(
    make_scene: MakeScene, make_bundle: MakeBundle, dtypes: Sequence[str], scale: tuple[float, float], message: str
) -> None:
    # jai-ext issue 74: 8-bit scenes among 16-bit ones were all black.
    paths = [make_scene(f"{name}.tif", dtype=dtype) for name, dtype in zip("ab", dtypes, strict=False)]
    settings = Settings(halo=16, threshold=0.5, tile_size=64, part=64, scale=scale)
    _, refused = make_plan(read_region(paths)[0], read_bundle(make_bundle()), settings)
    assert len(refused) == 1
    assert refused[0].startswith(message)


UNNAMED = {  # CRSs of which PROJ finds a code by their ellipsoid, of some country's datum
    "utm": "+proj=utm +zone=19 +ellps=intl +units=m +type=crs",
    "towgs84": "+proj=tmerc +lon_0=9 +x_0=3500000 +ellps=bessel +towgs84=598.1,73.7,418.2,0.2,0.05,-2.5,6.7 +type=crs",
}


@pytest.mark.parametrize("name", sorted(UNNAMED))
def test_a_crs_whose_datum_has_no_name_is_kept_as_it_is(tmp_path: Path, name: str) -> None:
    crs = rasterio.crs.CRS.from_user_input(UNNAMED[name])
    easting = 3_500_000.0 if name == "towgs84" else 500_000.0
    path = write(tmp_path / "a.tif", noise(), crs=crs, transform=Affine(1, 0, easting, 0, -1, 5_800_000.0))
    with rasterio.open(path) as dataset:
        text = dataset.crs.to_wkt()
    assert dataset.crs.to_epsg() is not None  # a code that is not meant
    scene = read_scene(path, "a.tif")
    row = next(failed_rows(scene, scene.window, SIDE, Failure("ReadError", "none")))
    there = pyproj.Transformer.from_crs(text, "EPSG:4326", always_xy=True).transform(easting, 5_800_000.0)
    bbox = row["bbox"]
    assert GEOD.inv(*there, bbox["xmin"], bbox["ymax"])[2] < 3  # the box is turned a little
    exported = write(tmp_path / "b.tif", noise(), crs=scene.crs)
    with rasterio.open(exported) as dataset:
        assert pyproj.CRS(dataset.crs.to_wkt()).equals(pyproj.CRS(text))


def test_a_crs_that_is_exactly_a_code_is_called_by_it(make_scene: MakeScene) -> None:
    assert read_scene(make_scene(), "a.tif").crs == UTM


def test_control_points_that_are_not_used_are_doubted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(), crs=None, transform=None)
    corners = [(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]
    with rasterio.open(path, "r+") as dataset:
        points = [GroundControlPoint(row, col, 500_000 + col, 5_800_000 - row) for row, col in corners]
        dataset.gcps = points, rasterio.crs.CRS.from_string(UTM)
    scene = read_scene(path, "a.tif")
    assert scene.crs is None
    assert scene.doubts[0].endswith("warp it (gdalwarp)")


# Longitudes


def place(path: Path, crs: str, west: float, north: float, size: float) -> tuple[dict[str, Any], shapely.Geometry]:
    """The row and geometry of a scene of one tile, whose first corner is there."""
    scene = read_scene(write(path, noise(), crs=crs, transform=Affine(size, 0, west, 0, -size, north)), path.name)
    row = next(failed_rows(scene, scene.window, SIDE, Failure("ReadError", "none")))
    return row, shapely.from_wkb(row["geometry"])


def test_longitudes_from_0_to_360_become_those_from_minus_180(tmp_path: Path) -> None:
    # geolens issue 924.
    row, polygon = place(tmp_path / "a.tif", "EPSG:4326", 190.0, 50.0, 1e-5)
    assert row["bbox"]["xmin"] == pytest.approx(-170.0)
    assert polygon.bounds[0] == pytest.approx(-170.0)
    assert area_m2(polygon) == pytest.approx(area_m2(place(tmp_path / "b.tif", "EPSG:4326", -170.0, 50.0, 1e-5)[1]))


@pytest.mark.parametrize(
    ("crs", "west"), [("EPSG:4326", 179.9994), ("EPSG:4326", -180.0006), ("EPSG:3832", 3_339_525.0)]
)
def test_what_crosses_the_antimeridian_is_split_there(tmp_path: Path, crs: str, west: float) -> None:
    size = 1e-5 if crs == "EPSG:4326" else 1.0
    north = -17.0 if crs == "EPSG:4326" else -1_900_000.0
    row, polygon = place(tmp_path / "a.tif", crs, west, north, size)
    assert polygon.geom_type == "MultiPolygon"
    assert row["bbox"]["xmin"] > 179.99
    assert row["bbox"]["xmax"] < -179.99
    west_part, east_part = polygon.geoms
    assert (west_part.bounds[2], east_part.bounds[0]) == (180.0, -180.0)
    assert all(part.exterior.is_ccw for part in polygon.geoms)
    assert sum(map(area_m2, polygon.geoms)) == pytest.approx((SIDE * ground(crs, north, size)) ** 2, rel=0.05)


def ground(crs: str, north: float, size: float) -> float:
    """About how many metres a pixel of a scene there measures."""
    if crs != "EPSG:4326":
        return size * 0.96
    return float((GEOD.inv(0, north, size, north)[2] * GEOD.inv(0, north, 0, north - size)[2]) ** 0.5)


def test_the_halves_of_what_is_split_are_valid_where_a_hole_touches_the_shell() -> None:
    shell = shapely.box(178, 0, 181, 3).difference(shapely.box(178, 2, 179, 3))
    polygon = shell.difference(shapely.box(179, 1, 180, 2))
    assert polygon.is_valid
    (halves,), (box,) = split_at_antimeridian(np.array([polygon], object))
    assert halves.is_valid
    assert halves.area == polygon.area
    assert box == [178.0, 0.0, -179.0, 3.0]


def test_ground_around_a_pole_fails_nothing() -> None:
    around = bare_scene(96, 96, "EPSG:3413", (1.0, 0.0, -48.0, 0.0, -1.0, 48.0))
    beside = bare_scene(96, 96, "EPSG:3413", (1.0, 0.0, 1000.0, 0.0, -1.0, 48.0), scene_id="b.tif")
    assert find_overlaps([around, beside]) == []
    rows = list(failed_rows(around, around.window, 32, Failure("ReadError", "none")))
    assert len(rows) == 9
    assert all((row["geometry"] is None) == (row["bbox"] is None) for row in rows)


def test_a_part_says_which_kinds_of_geometry_it_holds(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "tiles").mkdir()
    for key, west, kinds in (("a", 179.9994, ["MultiPolygon", "Polygon"]), ("b", 170.0, ["Polygon"])):
        path = write(tmp_path / f"{key}.tif", noise(), crs="EPSG:4326", transform=Affine(1e-5, 0, west, 0, -1e-5, 9))
        scene = read_scene(path, key)
        rows = list(failed_rows(scene, scene.window, 64, Failure("ReadError", "none")))
        write_part(str(tmp_path), key, rows, "model", "1")
        table = f"{tmp_path}/tiles/part-{key}.parquet"
        geo = json.loads(pq.read_schema(table).metadata[b"geo"])
        assert geo["columns"]["geometry"]["geometry_types"] == kinds
        assert len(read_part(table)) == 4


# Scenes that lie on each other


def at(col: float, row: float = 0.0, size: float = 1.0) -> tuple[float, ...]:
    a, _, x, _, e, y = NORTH_UP
    return (a * size, 0.0, x + a * col, 0.0, e * size, y + e * row)


def test_scenes_that_overlap_are_found_with_their_share(make_scene: MakeScene) -> None:
    # crop-mask issue 364, invest issue 1310: what two scenes hold was counted twice.
    make_scene("r/a.tif", 100, 100)
    make_scene("r/b.tif", 100, 100, transform=at(50), seed=1)
    make_scene("r/c.tif", 100, 100, transform=at(150), seed=2)
    path = make_scene("r/d.tif", 100, 100, transform=at(249), seed=3)  # a px of rounding
    scenes, _ = read_region([os.path.dirname(path)])
    assert [(o.one.scene_id, o.other.scene_id, round(o.share, 3)) for o in find_overlaps(scenes)] == [
        ("a.tif", "b.tif", 0.5)
    ]


def test_scenes_of_two_crs_overlap_where_their_ground_does(tmp_path: Path, make_scene: MakeScene) -> None:
    make_scene("r/a.tif", 100, 100)
    crs = "EPSG:3857"
    a, _, x, _, _, y = NORTH_UP
    x, y = pyproj.Transformer.from_crs(UTM, crs, always_xy=True).transform(x, y)
    make_scene("r/b.tif", 100, 100, crs=crs, transform=(a, 0.0, x, 0.0, -a, y), seed=1)
    scenes, _ = read_region([str(tmp_path / "r")])
    ((one, other, share),) = find_overlaps(scenes)
    assert {one.scene_id, other.scene_id} == {"a.tif", "b.tif"}
    assert share > 0.9


def test_scenes_overlap_across_the_antimeridian(tmp_path: Path) -> None:
    for name, west in (("a", 179.9995), ("b", -179.9999)):
        write(tmp_path / f"{name}.tif", noise(), crs="EPSG:4326", transform=Affine(1e-5, 0, west, 0, -1e-5, 9))
    ((_, _, share),) = find_overlaps(read_region([str(tmp_path)])[0])
    assert share == pytest.approx(1 - 60 / SIDE, abs=0.01)


def test_copies_and_links_are_the_same_content(tmp_path: Path, make_scene: MakeScene) -> None:
    original = make_scene("r/a.tif", 100, 100)
    (tmp_path / "r/again").mkdir()
    shutil.copy(original, tmp_path / "r/again/a.tif")
    (tmp_path / "r/link.tif").symlink_to(original)
    make_scene("r/b.tif", 100, 100, transform=at(100))
    other = bytearray(Path(original).read_bytes())
    other[len(other) // 3] ^= 1
    (tmp_path / "r/nearly.tif").write_bytes(other)
    pairs = find_copies(read_region([str(tmp_path / "r")])[0])
    assert [(one.scene_id, two.scene_id) for one, two in pairs] == [
        ("a.tif", "again/a.tif"),
        ("again/a.tif", "link.tif"),
    ]


def seg(capsys: pytest.CaptureFixture[str], *command: object, code: int = 0) -> tuple[str, str]:
    found = main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def test_an_overlap_is_refused_unless_it_is_said_how_it_counts(
    tmp_path: Path, make_scene: MakeScene, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scene("r/a.tif", 100, 100)
    make_scene("r/b.tif", 100, 100, transform=at(50), seed=1)
    command = ("plan", tmp_path / "r", "--model", make_bundle(), "--json")
    line = "a.tif and b.tif overlap by 50% of the smaller one: their common ground would count twice"
    figures = json.loads(seg(capsys, *command, code=2)[0])
    assert figures["refused"] == [f"{line}: add --mosaic or --overlap count"]
    assert json.loads(seg(capsys, *command, "--mosaic")[0])["refused"] == []
    figures = json.loads(seg(capsys, *command, "--overlap", "count")[0])
    assert figures["refused"] == []
    assert figures["doubts"][0].startswith(line)
    assert "leave out one" in seg(capsys, *command, "--overlap", "count", "--mosaic", code=2)[1]
    shutil.copy(tmp_path / "r/a.tif", tmp_path / "r/c.tif")
    (line,) = json.loads(seg(capsys, *command, code=2)[0])["refused"]
    assert line.startswith("a.tif and c.tif hold the same content (and 2 more pairs overlap): ")


def test_the_same_picture_twice_without_a_place_is_named(
    tmp_path: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), noise().transpose(1, 2, 0))
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    figures = json.loads(seg(capsys, "plan", tmp_path, "--model", make_bundle(), "--json")[0])
    assert (figures["refused"], figures["doubts"]) == ([], ["a.png: b.png holds the same content"])


# Previews


def region_ids(folder: Path, *include: str) -> list[str]:
    return [scene.scene_id for scene in read_region([str(folder)], include=include)[0]]


@pytest.mark.parametrize("name", ["a.png", "a.tif.jpg", "a_thumb.jpg", "a-preview.png", "quicklook.png", "Browse.JPG"])
def test_a_preview_beside_its_scene_is_left_out_and_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.tif", noise())
    cv2.imwrite(str(tmp_path / name), noise()[:, :32, :32].transpose(1, 2, 0))
    (scene,), _ = read_region([str(tmp_path)])
    assert scene.doubts == (f"{name} beside it is left out as a preview: to segment it, add --include {name}",)
    assert region_ids(tmp_path, name) == sorted(["a.tif", name])
    assert region_ids(tmp_path, f"*{Path(name).suffix}") == sorted(["a.tif", name])


def test_what_is_doubtful_is_no_part_of_a_runs_record(tmp_path: Path, make_bundle: MakeBundle) -> None:
    write(tmp_path / "r/a.tif", noise())
    plain, model = read_region([str(tmp_path / "r")])[0], read_bundle(make_bundle())
    cv2.imwrite(str(tmp_path / "r/a.png"), noise()[:, :32, :32].transpose(1, 2, 0))
    doubted = read_region([str(tmp_path / "r")])[0]
    assert doubted[0].doubts
    assert doubted[0].to_plain() == plain[0].to_plain()
    plan = make_plan(doubted, model, SETTINGS)[0]
    open_run(str(tmp_path / "run"), plan, "model")
    assert read_plan(str(tmp_path / "run")).fingerprint == plan.fingerprint


@pytest.mark.parametrize("name", ["b.png", "a2.png", "a.1.png", "sub/a.png", "b_small.png", "overview_bridge.png"])
def test_other_pictures_in_a_folder_are_scenes(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.tif", noise())
    (tmp_path / "sub").mkdir()
    cv2.imwrite(str(tmp_path / name), noise()[:, :32, :32].transpose(1, 2, 0))
    assert region_ids(tmp_path) == sorted(["a.tif", name])


@pytest.mark.parametrize("folder", [False, True])
def test_a_picture_that_is_named_is_a_scene(tmp_path: Path, folder: bool) -> None:
    path = write(tmp_path / "a.tif", noise())
    cv2.imwrite(str(tmp_path / "a.png"), noise().transpose(1, 2, 0))
    scenes, _ = read_region([str(tmp_path) if folder else path, str(tmp_path / "a.png")])
    assert [(scene.scene_id, scene.doubts) for scene in scenes] == [("a.png", ()), ("a.tif", ())]


def test_a_photo_beside_a_terrain_model_is_no_preview(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", noise(1).astype(np.float32))
    cv2.imwrite(str(tmp_path / "a.jpg"), noise().transpose(1, 2, 0))
    assert region_ids(tmp_path) == ["a.jpg", "a.tif"]


def test_coarse_colours_beside_fine_grey_are_no_preview(tmp_path: Path) -> None:
    write(tmp_path / "grey.tif", noise(1))
    write(tmp_path / "rgb.tif", noise()[:, :64, :64], transform=Affine(*at(0, size=2)))
    assert region_ids(tmp_path) == ["grey.tif", "rgb.tif"]


def test_a_preview_of_a_preview_is_named_with_the_scene(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", noise())
    write(tmp_path / "a_half.tif", noise()[:, :64, :64], transform=Affine(*at(0, size=2)))
    cv2.imwrite(str(tmp_path / "a_half.png"), noise()[:, :32, :32].transpose(1, 2, 0))
    (scene,), _ = read_region([str(tmp_path)])
    assert sorted(line.split()[0] for line in scene.doubts) == ["a_half.png", "a_half.tif"]


def test_a_coarse_geotiff_of_the_same_ground_is_a_preview(tmp_path: Path) -> None:
    write(tmp_path / "scene.tif", noise())
    write(tmp_path / "low.tif", noise()[:, :32, :32], transform=Affine(*at(0, size=SIDE / 32)))
    (scene,), _ = read_region([str(tmp_path)])
    assert scene.scene_id == "scene.tif"
    assert scene.doubts[0].startswith("low.tif beside it is left out as a preview")
    assert region_ids(tmp_path, "low.tif") == ["low.tif", "scene.tif"]


# Files beside a scene, on disk and in S3, and GDAL's settings


def sidecar_region(folder: Path) -> dict[str, Callable[[Scene], object]]:
    """Scenes that say something of themselves in a file beside them; by name, what that is."""
    write(folder / "nodata.tif", np.where(disc(), noise(), 7).astype(np.uint8))
    bands = "".join(f'<PAMRasterBand band="{i}"><NoDataValue>7</NoDataValue></PAMRasterBand>' for i in (1, 2, 3))
    (folder / "nodata.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    write(folder / "crs.tif", noise(seed=1), crs=None)
    (folder / "crs.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32619</SRS></PAMDataset>")
    write(folder / "place.tif", noise(seed=2), crs="EPSG:32619", transform=None)
    (folder / "place.tfw").write_text("0.3\n0\n0\n-0.3\n300000.15\n4500000\n")
    write(folder / "mask.tif", noise(seed=3), transform=Affine(*at(900)))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(folder / "mask.tif", "r+") as dataset:
        dataset.write_mask(disc())
    assert (folder / "mask.tif.msk").exists()
    return {
        "nodata.tif": lambda scene: scene.nodata == 7,
        "crs.tif": lambda scene: scene.crs == "EPSG:32619",
        "place.tif": lambda scene: scene.transform[0] == 0.3,
        "mask.tif": lambda scene: scene.masked,
    }


def meaning(scene: Scene) -> tuple[object, ...]:
    """What a scene says, but for where it lies; and which of its pixels hold data."""
    plain = {k: v for k, v in scene.to_plain().items() if k not in {"uri", "scene_id", "version", "sidecars"}}
    pixels, valid = read_chip(scene, scene.window)
    return plain, pixels.tobytes(), valid.tobytes()


ADVERSE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "NONE",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif",
    "GTIFF_POINT_GEO_IGNORE": "YES",
    "JPEG_READ_MASK": "NO",
}


def meanings(source: str) -> dict[str, str]:
    """By the name of each scene of a region, a digest of what it says."""
    scenes, refused = read_region([source])
    assert not refused
    return {scene.scene_id: sha256(repr(meaning(scene)).encode()) for scene in scenes}


def test_files_beside_a_scene_count_wherever_it_lies_and_whatever_gdals_settings_are(tmp_path: Path, s3: str) -> None:
    # GDAL issues 4593 and 909: they were used on disk and not in S3.
    expected, remote = sidecar_region(tmp_path / "r"), f"{s3}/meaning/r"
    for path in sorted((tmp_path / "r").iterdir()):
        publish(f"{remote}/{path.name}", path.read_bytes())
    assert all(expected[scene.scene_id](scene) for scene in read_region([str(tmp_path / "r")])[0])
    before = meanings(str(tmp_path / "r"))
    assert meanings(remote) == before
    assert meanings(f"{remote}/mask.tif") == {"mask.tif": before["mask.tif"]}  # named alone
    # In a process of its own, for rasterio keeps what an environment once said.
    code = "import json, sys; from test_meaning import meanings; print(json.dumps([meanings(s) for s in sys.argv[1:]]))"
    command = [sys.executable, "-c", code, remote, str(tmp_path / "r")]
    environment, folder = {**os.environ, **ADVERSE}, Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [before, before]


def test_a_mask_beside_a_remote_scene_is_part_of_its_state(tmp_path: Path, s3: str) -> None:
    sidecar_region(tmp_path / "r")
    versions = []
    for mask in (disc(), ~disc()):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "r/mask.tif", "r+") as dataset:
            dataset.write_mask(mask)
        for name in ("mask.tif", "mask.tif.msk"):
            publish(f"{s3}/meaning/state/{name}", (tmp_path / "r" / name).read_bytes())
        versions.append(read_scene(f"{s3}/meaning/state/mask.tif", "mask.tif").version)
    assert versions[0] != versions[1]


def test_files_beside_a_remote_scene_that_are_of_others_do_not_count(tmp_path: Path, s3: str) -> None:
    publish(f"{s3}/meaning/others/2021.tif", Path(write(tmp_path / "a.tif", noise())).read_bytes())
    for name in ("2021.05.tif.msk", "2021.jpg.msk", "2021.tif.msk.txt"):
        publish(f"{s3}/meaning/others/{name}", b"no mask of this scene")
    assert read_scene(f"{s3}/meaning/others/2021.tif", "2021.tif").sidecars == ()


def test_a_mask_beside_a_remote_scene_that_is_no_tiff_is_refused(tmp_path: Path, s3: str) -> None:
    publish(f"{s3}/meaning/bad/a.tif", Path(write(tmp_path / "a.tif", noise())).read_bytes())
    publish(f"{s3}/meaning/bad/a.tif.msk", b"<VRTDataset/>")
    with pytest.raises(ReadError, match=r"a.tif.msk, which is beside it, is not a TIFF: remove it"):
        read_scene(f"{s3}/meaning/bad/a.tif", "a.tif")


@pytest.mark.parametrize("side", [SIDE // 2, 2 * SIDE])
def test_a_mask_beside_a_scene_that_has_another_size_is_refused(tmp_path: Path, side: int) -> None:
    path = write(tmp_path / "a.tif", noise())
    write(tmp_path / "mask.tif", np.full((1, side, side), 255, np.uint8))
    (tmp_path / "mask.tif").rename(f"{path}.msk")
    with pytest.raises(ReadError, match=rf"a.tif.msk, which is beside it, has {side} x {side} px, the image has 128"):
        read_scene(path, "a.tif")


# All of them in one folder


def test_a_plan_names_scene_doubt_and_way_out_in_lines_that_fit_a_screen(
    tmp_path: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, alpha = tmp_path / "r", 255 * disc()[np.newaxis].astype(np.uint8)
    infrared = noise(1, low=0, high=256)
    collar = np.where(disc(), noise(), 0).astype(np.uint8)
    made: list[Callable[[Path], object]] = [
        lambda p: write(p / "alpha.tif", np.concatenate([noise(), alpha]), photometric="rgb", alpha="unspecified"),
        lambda p: write(p / "bits.tif", noise() // 16, nbits=4, transform=Affine(*at(200))),
        lambda p: write(
            p / "infrared.tif", np.concatenate([noise(), infrared]), alpha="yes", transform=Affine(*at(400))
        ),
        lambda p: write(p / "jpeg.tif", collar, compress="jpeg", nodata=0, transform=Affine(*at(600))),
        lambda p: write(p / "four.tif", noise(4), [*RGB[::-1], ColorInterp.undefined], transform=Affine(*at(800))),
        lambda p: write(p / "plain.tif", noise(), transform=Affine(*at(1000))),
        lambda p: write(p / "twice.tif", noise(), transform=Affine(*at(1000))),
        lambda p: cv2.imwrite(str(p / "plain.png"), noise()[:, :32, :32].transpose(1, 2, 0)),
        lambda p: write(p / "wide.tif", noise().astype(np.uint16), transform=Affine(*at(1200))),
    ]
    for make in made:
        make(folder)
    out, _ = seg(capsys, "plan", folder, "--model", make_bundle(), code=2)
    lines = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    for name in ("alpha", "bits", "infrared", "jpeg", "four", "plain", "wide"):
        assert sum(line.startswith(f"{name}.tif") for line in lines) >= 1
    assert len(lines) == 8
    assert all(len(line) <= 160 and ("--" in line or "(" in line) for line in lines)
