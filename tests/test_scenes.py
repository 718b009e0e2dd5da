"""Scenes of a region: how they are found and named, and how large their pixels are on the ground."""

import math
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeScene
from pyproj import Geod, Transformer

from seg_core.errors import ReadError, SegError
from seg_core.imagery.georef import Transform
from seg_core.imagery.headers import read_scene
from seg_core.imagery.region import FoundImages, find_images, read_region
from seg_core.imagery.scene import Scene, choose_bands, fit_to_model

WGS84 = Geod(ellps="WGS84")
RADIUS = 6_378_137.0  # of WGS 84's ellipsoid, and of web mercator's sphere
ECCENTRICITY = 0.00669437999014  # squared


def ids(sources: list[str]) -> list[str]:
    scenes, unreadable = read_region(sources)
    assert not unreadable
    return [scene.scene_id for scene in scenes]


@pytest.fixture
def region(tmp_path: Path, make_scene: MakeScene) -> Path:
    """A folder of four images, in subfolders too, among other files."""
    for name in ("a.tif", "B.TIFF", "sub/a.tif", "sub/deep/c.tif"):
        make_scene(f"region/{name}", 8, 9)
    folder = tmp_path / "region"
    (folder / "notes.txt").write_text("not a scene\n")
    (folder / "list.csv").write_text("uri\nnowhere.tif\n")
    (folder / "sub/c.tif.aux.xml").write_text("<PAMDataset/>")
    (folder / "sub/.hidden.tif").write_bytes(b"")
    (folder / "sub/sheet.vrt").write_text("<VRTDataset/>")
    return folder


def test_a_file_is_its_own_region(region: Path) -> None:
    assert find_images(str(region / "a.tif")).images == [str(region / "a.tif")]
    assert ids([str(region / "a.tif")]) == ["a.tif"]


def test_a_folder_is_searched_with_its_subfolders_for_images_only(region: Path) -> None:
    assert sorted(find_images(str(region)).images) == sorted(
        str(region / name) for name in ("a.tif", "B.TIFF", "sub/a.tif", "sub/deep/c.tif")
    )
    assert sorted(ids([str(region)])) == ["B.TIFF", "a.tif", "sub/a.tif", "sub/deep/c.tif"]


def test_a_glob_names_the_images_it_matches(region: Path) -> None:
    assert find_images(str(region / "*.tif")).images == [str(region / "a.tif")]
    assert sorted(find_images(str(region / "*")).images) == sorted([str(region / "B.TIFF"), str(region / "a.tif")])
    found = find_images(str(region / "**/*.tif")).images
    assert sorted(found) == sorted(str(region / name) for name in ("a.tif", "sub/a.tif", "sub/deep/c.tif"))


def test_a_file_whose_name_looks_like_a_glob_is_found(make_scene: MakeScene) -> None:
    path = make_scene("odd[1]*.tif")
    assert find_images(path).images == [path]


def test_sources_are_taken_from_the_current_folder(region: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(region)
    assert find_images("a.tif").images == [str(region / "a.tif")]
    assert find_images("sub/../a.tif").images == [str(region / "a.tif")]
    assert ids(["."]) == ids([str(region)])


def test_a_text_manifest_names_a_scene_a_line_from_its_own_folder(region: Path) -> None:
    (region / "list.txt").write_text(f"# two scenes\na.tif\n\n  {region}/sub/a.tif  \n  # and no more\n")
    assert find_images(str(region / "list.txt")).images == [str(region / "a.tif"), str(region / "sub/a.tif")]


@pytest.mark.parametrize("column", ["uri", "path", "scene", "URI", "Path"])
def test_a_csv_manifest_has_a_column_of_scenes(region: Path, column: str) -> None:
    (region / "list.csv").write_text(f'year,{column},note\n2020,a.tif,"one, two"\n2021,sub/a.tif,\n')
    assert find_images(str(region / "list.csv")).images == [str(region / "a.tif"), str(region / "sub/a.tif")]


def test_a_csv_manifest_may_come_from_a_spreadsheet(region: Path) -> None:
    (region / "list.csv").write_text("uri,year\r\na.tif,2020\r\n", encoding="utf-8-sig", newline="")
    assert find_images(str(region / "list.csv")).images == [str(region / "a.tif")]


@pytest.mark.parametrize("column", ["uri", "path", "scene"])
def test_a_parquet_manifest_has_a_column_of_scenes(region: Path, column: str) -> None:
    frame = pd.DataFrame({"year": [2020, 2021], column: ["a.tif", "sub/a.tif"]})
    frame.to_parquet(region / "list.parquet")
    assert find_images(str(region / "list.parquet")).images == [str(region / "a.tif"), str(region / "sub/a.tif")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "# nothing\n\n", "list.txt: this manifest names no scene: add one"),
        ("list.csv", "uri\n", "list.csv: this manifest names no scene: add one"),
        ("list.csv", "", "list.csv: this manifest can't be read"),
        (
            "list.csv",
            "file,year\na.tif,2020\n",
            "list.csv: a manifest needs a column uri, path or scene; it has file, year",
        ),
        ("list.txt", "a.tif\nb.tif\n", "list.txt: it names {folder}/b.tif, which is not a file: correct or remove it"),
        ("list.csv", "uri\nb.tif\n", "list.csv: it names {folder}/b.tif, which is not a file: correct or remove it"),
        ("list.csv", "year,uri\n2020\n", "list.csv: "),
        ("list.parquet", "PAR1", "list.parquet: "),
        ("list.txt", b"\xff\xfe\x00", "list.txt: "),
        ("list.csv", b"uri\n\xff\xfe\x00\n", "list.csv: "),
    ],
)
def test_a_manifest_that_names_no_scenes_is_refused(
    region: Path, name: str, content: str | bytes, message: str
) -> None:
    (region / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SegError) as refusal:
        find_images(str(region / name))
    assert str(refusal.value).startswith(f"{region}/{message.format(folder=region)}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nowhere.tif", "nowhere", "*.jp2", "nowhere/**/*.tif"])
def test_a_source_that_is_not_there_is_refused(region: Path, name: str) -> None:
    with pytest.raises(SegError, match="no such file or folder"):
        find_images(str(region / name))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(SegError, match=f"^{tmp_path}: no images in this folder"):
        find_images(str(tmp_path))


def test_a_uri_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(SegError, match=r"^ftp://host/a\.tif: "):
        find_images("ftp://host/a.tif")


def test_scene_ids_are_unique_relative_paths_in_order(region: Path, make_scene: MakeScene) -> None:
    other = Path(make_scene("other/a.tif", 8, 9))
    found = ids([str(other), str(region), str(region / "sub"), str(region / "*.tif"), str(region / "a.tif")])
    assert found == sorted(set(found))
    assert sorted(found) == [
        "other/a.tif",
        "region/B.TIFF",
        "region/a.tif",
        "region/sub/a.tif",
        "region/sub/deep/c.tif",
    ]


def test_the_order_of_sources_changes_nothing(region: Path) -> None:
    sources = [str(region / "sub"), str(region / "a.tif"), str(region / "B.TIFF")]
    assert read_region(sources) == read_region(sources[::-1])


def test_what_cannot_be_read_is_named_and_the_rest_is_read(region: Path) -> None:
    (region / "bad.tif").write_text("not an image")
    (region / "empty.png").write_bytes(b"")
    scenes, unreadable = read_region([str(region)])
    assert len(scenes) == 4
    assert [line.split(": ")[0] for line in unreadable] == [str(region / "bad.tif"), str(region / "empty.png")]
    assert all("not an image, or a damaged one" in line for line in unreadable)


def test_a_header_says_what_the_file_holds(make_scene: MakeScene) -> None:
    path = make_scene("a.tif", 40, 50, bands=4, dtype="uint16", nodata=9)
    scene = read_scene(path, "a.tif")
    status = os.stat(path)
    assert scene == Scene(
        scene_id="a.tif",
        uri=path,
        size=status.st_size,
        version=f"{status.st_size}-{status.st_mtime_ns}",
        height=40,
        width=50,
        bands=(1, 2, 3, 4),
        dtype="uint16",
        nodata=9.0,
        masked=False,
        crs=UTM,
        transform=NORTH_UP,
        gsd_m=scene.gsd_m,
        source_gsd_m=scene.gsd_m,
    )


@pytest.mark.parametrize(
    ("name", "bands"), [("a.png", 3), ("rgba.png", 4), ("a.jpg", 3), ("A.JPEG", 3), ("grey.png", 1)]
)
def test_a_picture_without_georeference_is_a_scene_without_crs(tmp_path: Path, name: str, bands: int) -> None:
    assert cv2.imwrite(str(tmp_path / name), np.full((7, 9, bands), 60, np.uint8))
    scene = read_scene(str(tmp_path / name), name)
    assert (scene.height, scene.width, scene.dtype) == (7, 9, "uint8")
    assert scene.bands == tuple(range(1, min(bands, 3) + 1))
    assert (scene.crs, scene.gsd_m, scene.source_gsd_m) == (None, None, None)


def gsd(make_scene: MakeScene, crs: str, transform: Transform, height: int = 100, width: int = 100) -> float:
    found = read_scene(make_scene("gsd.tif", height, width, crs=crs, transform=transform), "gsd.tif").gsd_m
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0.25, 1.0, 3.0])
def test_gsd_of_a_utm_scene_is_its_pixel_over_the_scale_factor(make_scene: MakeScene, size: float) -> None:
    # On the central meridian of a zone the map is 0.9996 of the ground.
    found = gsd(make_scene, UTM, (size, 0.0, 500_000.0 - 50 * size, 0.0, -size, 5_800_000.0))
    assert found == pytest.approx(size / 0.9996, rel=1e-5)


def test_gsd_of_a_lonlat_scene_is_that_of_the_ground(make_scene: MakeScene) -> None:
    step, latitude = 1e-5, 52.0
    found = gsd(make_scene, "EPSG:4326", (step, 0.0, 13.0, 0.0, -step, latitude + 50 * step))
    along_row = WGS84.inv(13.0, latitude, 13.0 + step, latitude)[2]
    along_column = WGS84.inv(13.0, latitude, 13.0, latitude + step)[2]
    assert along_row < 0.62 * along_column * 1.01
    assert found == pytest.approx(math.sqrt(along_row * along_column), rel=1e-4)


def test_gsd_of_a_web_mercator_scene_at_60_degrees_is_half_its_nominal_one(make_scene: MakeScene) -> None:
    latitude = math.radians(60)
    y = RADIUS * math.log(math.tan(math.pi / 4 + latitude / 2))
    found = gsd(make_scene, "EPSG:3857", (1.0, 0.0, 1_500_000.0, 0.0, -1.0, y + 50))
    # One nominal metre is this far on the ellipsoid: the radii of its two curvatures over the sphere's, times cos.
    bent = 1 - ECCENTRICITY * math.sin(latitude) ** 2
    along_row = math.cos(latitude) / math.sqrt(bent)
    along_column = math.cos(latitude) * (1 - ECCENTRICITY) / bent**1.5
    assert found == pytest.approx(math.sqrt(along_row * along_column), rel=1e-5)
    assert found == pytest.approx(0.5, rel=0.005)


def test_gsd_is_in_metres_where_the_map_is_in_feet(make_scene: MakeScene) -> None:
    found = gsd(make_scene, "EPSG:2249", (2.0, 0.0, 750_000.0, 0.0, -2.0, 2_950_000.0))
    assert found == pytest.approx(2.0 * 1200 / 3937, rel=1e-3)


def test_gsd_of_oblong_pixels_is_their_mean_and_of_turned_ones_the_same(make_scene: MakeScene) -> None:
    corner = (500_000.0, 5_800_000.0)
    oblong = gsd(make_scene, UTM, (2.0, 0.0, corner[0], 0.0, -0.5, corner[1]))
    turned = gsd(
        make_scene, UTM, (math.sqrt(0.5), math.sqrt(0.5), corner[0], math.sqrt(0.5), -math.sqrt(0.5), corner[1])
    )
    assert oblong == pytest.approx(1.0, rel=1e-3)
    assert turned == pytest.approx(1.0, rel=1e-3)


def test_gsd_is_that_of_the_scenes_centre(make_scene: MakeScene) -> None:
    step = 1e-3
    found = gsd(make_scene, "EPSG:4326", (step, 0.0, 0.0, 0.0, -step, 60.0), 400, 10)
    to_centre = WGS84.inv(0.0, 59.8, step, 59.8)[2] * WGS84.inv(0.0, 59.7995, 0.0, 59.8005)[2]
    assert found == pytest.approx(math.sqrt(to_centre), rel=1e-4)


def test_gsd_of_the_real_brookline_region_is_1_m(shared: Path) -> None:
    scene = read_scene(str(shared / "brookline/region.tif"), "region.tif")
    assert scene.crs == "EPSG:26986"
    assert scene.gsd_m == pytest.approx(1.0, abs=0.001)


def test_gsd_of_the_real_joplin_scenes_is_60_cm(shared: Path) -> None:
    scenes, _ = read_region([str(shared / "joplin")])
    assert [scene.scene_id for scene in scenes] == sorted(p.name for p in (shared / "joplin").glob("*.tif"))
    assert len(scenes) == 4
    for scene in scenes:
        assert scene.crs == "EPSG:26915"
        assert scene.gsd_m == pytest.approx(0.6, rel=0.002)


def test_a_crs_without_a_code_is_kept_as_text(make_scene: MakeScene) -> None:
    proj = "+proj=tmerc +lat_0=52 +lon_0=13.2 +k=1 +x_0=1000 +y_0=2000 +ellps=GRS80 +units=m +no_defs"
    scene = read_scene(make_scene(crs=proj, transform=(1.0, 0.0, 1000.0, 0.0, -1.0, 2000.0)), "a")
    assert scene.crs is not None
    lon, lat = Transformer.from_crs(scene.crs, "OGC:CRS84", always_xy=True).transform(1000, 2000)
    assert (lon, lat) == pytest.approx((13.2, 52.0), abs=1e-6)
    assert scene.gsd_m == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("has", "wanted", "asked", "expected"),
    [
        (3, 3, None, (1, 2, 3)),
        (5, 3, (5, 1, 2), (5, 1, 2)),
        (1, 3, (1, 1, 1), (1, 1, 1)),
        (1, 3, None, "1 bands besides alpha, the model needs 3: choose with --bands, such as --bands 1,1,1"),
        (2, 3, None, "is one like the others, or choose with --bands, such as --bands 1,2,2"),
        (5, 3, None, "5 bands besides alpha, the model needs 3: choose with --bands, such as --bands 1,2,3"),
        (3, 3, (1, 2), "--bands 1,2: names 2 bands, the model needs 3"),
        (3, 3, (1, 2, 4), "no colour band 4 (it has 1, 2, 3)"),
        (3, 3, (0, 1, 2), "no colour band 0 (it has 1, 2, 3)"),
    ],
)
def test_bands_follow_from_the_file_or_are_asked_for(
    make_scene: MakeScene, has: int, wanted: int, asked: tuple[int, ...] | None, expected: tuple[int, ...] | str
) -> None:
    scene = read_scene(make_scene(bands=has), "scene.tif")
    if isinstance(expected, tuple):
        assert choose_bands(scene, wanted, asked) == expected
    else:
        with pytest.raises(SegError) as refusal:
            choose_bands(scene, wanted, asked)
        assert str(refusal.value).endswith(expected)


def fitted(scene: Scene, gsd_m: float | None, *, resample: bool = False) -> Scene:
    return fit_to_model(scene, num_bands=3, dtype="uint8", gsd_m=gsd_m, bands=None, scale=None, resample=resample)


@pytest.mark.parametrize("gsd_m", [0.92, 1.0, 1.09, None])
def test_a_scene_near_the_models_resolution_is_served_as_it_is(make_scene: MakeScene, gsd_m: float | None) -> None:
    scene = read_scene(make_scene(), "a")
    assert fitted(scene, gsd_m) == scene


@pytest.mark.parametrize("gsd_m", [0.5, 0.88, 1.15, 2.0])
def test_a_scene_of_another_resolution_is_refused_or_resampled(make_scene: MakeScene, gsd_m: float) -> None:
    scene = read_scene(make_scene(), "scene.tif")
    with pytest.raises(
        SegError, match=rf"scene.tif: 1 m per pixel, the model was trained at {gsd_m:.3g} m: add --resample"
    ):
        fitted(scene, gsd_m)
    served = fitted(scene, gsd_m, resample=True)
    assert (served.gsd_m, served.source_gsd_m) == (gsd_m, scene.gsd_m)
    assert served.is_resampled
    assert served.height == pytest.approx(100 / gsd_m, abs=0.6)
    assert served.width == pytest.approx(120 / gsd_m, abs=0.6)
    written = read_scene(make_scene("b.tif", served.height, served.width, transform=served.transform), "b.tif")
    assert written.gsd_m == pytest.approx(gsd_m, rel=0.01)


def test_resampling_leaves_a_scene_within_a_percent_and_one_without_crs(make_scene: MakeScene) -> None:
    near, nowhere = read_scene(make_scene(), "a"), read_scene(make_scene("b.tif", crs=None), "b")
    assert fitted(near, 1.005, resample=True) == near
    assert fitted(nowhere, 3.0, resample=True) == nowhere


def test_oblong_pixels_become_square_on_the_ground(make_scene: MakeScene) -> None:
    scene = read_scene(make_scene(transform=(2.0, 0.0, 500_000.0, 0.0, -0.5, 5_800_000.0)), "a")
    served = fitted(scene, 0.5, resample=True)
    assert (served.height, served.width) == (100, 480)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_imagery_that_is_not_uint8_needs_a_scale(make_scene: MakeScene, dtype: str) -> None:
    scene = read_scene(make_scene(dtype=dtype), "scene.tif")
    with pytest.raises(SegError, match=f"scene.tif: its pixels are {dtype}, .* set with --scale MIN MAX"):
        fitted(scene, 1.0)
    assert (
        fit_to_model(scene, num_bands=3, dtype="uint8", gsd_m=1.0, bands=None, scale=(0.0, 255.0), resample=False)
        == scene
    )


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a"])
def test_what_is_no_image_is_a_read_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("GIF89a, or so it says")
    with pytest.raises(ReadError, match=f"^{tmp_path / name}: not an image, or a damaged one"):
        read_scene(str(tmp_path / name), name)


def test_links_to_folders_are_followed_and_none_is_looked_into_twice(region: Path, make_scene: MakeScene) -> None:
    make_scene("elsewhere/d.tif", 8, 9)
    (region / "linked").symlink_to(region.parent / "elsewhere")
    (region / "again").symlink_to(region / "sub")  # which is found under its own name
    (region / "sub/round").symlink_to(region)
    (region / "twice").symlink_to(region.parent / "elsewhere")
    assert sorted(ids([str(region)])) == ["B.TIFF", "a.tif", "linked/d.tif", "sub/a.tif", "sub/deep/c.tif"]


def test_two_files_of_one_name_are_refused(make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch) -> None:
    uris, plain = ["s3://b/r//a.tif", "s3://b/r/a.tif"], read_scene(make_scene(), "a.tif")
    monkeypatch.setattr("seg_core.imagery.region.find_images", lambda *_: FoundImages(uris, searched=True))
    monkeypatch.setattr(
        "seg_core.imagery.region.read_scene", lambda uri, name, _: replace(plain, uri=uri, scene_id=name)
    )
    with pytest.raises(SegError, match=r"^s3://b/r//a.tif, s3://b/r/a.tif: two files have the same name"):
        read_region(["s3://b/r"])


def test_a_scene_that_has_its_overviews_elsewhere_is_refused(make_scene: MakeScene) -> None:
    path, other = make_scene(), make_scene("other.tif")
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=other)
    with pytest.raises(ReadError, match=f"^{path}: its metadata names another file for its overviews, {other}: "):
        read_scene(path, "a")


def test_overviews_beside_a_scene_that_name_further_ones_are_refused(make_scene: MakeScene) -> None:
    path, other = make_scene(height=64, width=64), make_scene("other.tif")
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2])
    assert read_scene(path, "a").height == 64
    with rasterio.open(f"{path}.ovr", "r+", driver="GTiff") as overviews:
        overviews.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=other)
    with pytest.raises(ReadError, match=f"^{path}.ovr: its metadata names another file for its overviews"):
        read_scene(path, "a")


def test_a_palette_is_refused(make_scene: MakeScene) -> None:
    path = make_scene(bands=1)
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {3: (252, 3, 21, 255)})
    with pytest.raises(ReadError, match=r"its pixels are palette indices: .* -expand rgb"):
        read_scene(path, "a")


def test_oblong_pixels_are_measured_by_their_sides(make_scene: MakeScene) -> None:
    scene = read_scene(make_scene(transform=(2.0, 0.0, 500_000.0, 0.0, -0.5, 5_800_000.0)), "a")
    with pytest.raises(SegError, match=r"a: 2 x 0\.5 m per pixel, the model was trained at 1 m: add --resample"):
        fitted(scene, 1.0)
    assert scene.gsd_m is not None
    served = fitted(scene, scene.gsd_m, resample=True)  # though the mean is the same
    assert (served.height, served.width) == (50, 240)
    assert served.is_resampled
