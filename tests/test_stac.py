"""Masks of a run as a STAC catalogue: valid, true to the rasters and the run, and still whole when it is moved."""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from conftest import MakeBundle, MakeScene
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from rasterio.warp import transform_bounds
from runs import SETTINGS, BuiltRun, bare_scene, build_run, plan_scenes, write_light_bundle
from seg_command import SMALL, Json, seg
from shapely.geometry import box, shape

from seg_core.run.export_masks import export_masks
from seg_core.run.query import query
from seg_core.run.stac import open_catalogue
from seg_core.run.stac_terms import find_period, plain_id, plain_name

Capture = pytest.CaptureFixture[str]
KEEPING = replace(SETTINGS, keep_probability=True)
LAEA = "+proj=laea +lat_0=52 +lon_0=13 +ellps=GRS80 +units=m +no_defs"
NAMES = re.compile(r"^https://stac-extensions\.github\.io/([a-z]+)/v\d+\.\d+\.\d+/schema\.json$")


def read(path: Path) -> Json:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def export(capsys: Capture, run: str | Path, out: Path, *options: object, code: int = 0) -> tuple[list[str], str]:
    """Export a run with a catalogue. Returns the files, relative to the folder, and the messages."""
    found, err = seg(capsys, "export", "masks", run, "--stac", "--out", out, "--json", *options, code=code)
    return [str(Path(each).relative_to(out)) for each in json.loads(found)["files"]], err


def check_valid(path: Path) -> Json:
    """Check a file against the schema of STAC 1.1, and against what its extensions demand. Returns its content."""
    content = read(path)
    is_item = content["type"] == "Feature"
    kind = pystac.STACObjectType.ITEM if is_item else pystac.STACObjectType.COLLECTION
    assert JsonSchemaSTACValidator().validate_core(content, kind, "1.1.0")
    for url in content.get("stac_extensions", []):
        match = NAMES.match(url)
        assert match
        DEMANDS[match[1]](content)
    described = {name.split(":")[0] for name in fields_of(content) if ":" in name} - {"aerial_seg"}
    names = {"proj": "projection"}
    if is_item:  # a prefix in a link or an output of the model needs no extension of its own
        assert {names.get(each, each) for each in described} == {
            NAMES.match(url)[1] for url in content["stac_extensions"]
        }
    return content


def fields_of(item: Json) -> set[str]:
    """The names of the properties of an item, of its assets and of their bands."""
    assets = item.get("assets", {}).values()
    bands = [band for asset in assets for band in asset.get("bands", [])]
    return {name for each in (item.get("properties", {}), *assets, *bands) for name in each}


def check_projection(item: Json) -> None:
    """Check what version 2.0.0 of the extension says of the types of its fields."""
    properties = item["properties"]
    assert isinstance(properties["proj:code"], str | None)
    assert isinstance(properties.get("proj:wkt2", ""), str)
    assert [type(number) for number in properties["proj:shape"]] == [int, int]
    assert len(properties["proj:transform"]) in {6, 9}
    assert set(prefixed(properties, "proj")) <= {"proj:code", "proj:wkt2", "proj:shape", "proj:transform"}


def check_raster(item: Json) -> None:
    """Check that a band of an asset says something, of the fields of version 2.0.0."""
    bands = [band for asset in item["assets"].values() for band in asset.get("bands", [])]
    assert any(prefixed(band, "raster") for band in bands)
    for band in bands:
        assert set(prefixed(band, "raster")) <= {"raster:sampling", "raster:scale"}
        assert band.get("raster:sampling", "area") in {"area", "point"}
        assert isinstance(band.get("raster:scale", 1.0), float)


def check_classification(item: Json) -> None:
    """Check that an asset has classes, of version 2.0.0: whole numbers with plain names."""
    found = [asset["classification:classes"] for asset in item["assets"].values() if "classification:classes" in asset]
    assert found
    for each in (each for classes in found for each in classes):
        check_class(each)


def check_class(found: Json) -> None:
    """Check a class: a value and a name are required since version 2.0.0, a description was before."""
    assert isinstance(found["value"], int)
    assert re.fullmatch("[0-9A-Za-z_-]+", found["name"])
    assert found["description"]


def check_processing(item: Json) -> None:
    """Check the fields of version 1.2.0, of which there must be one."""
    found = prefixed(item["properties"], "processing")
    assert found
    assert set(found) <= {"processing:level", "processing:software", "processing:datetime"}
    assert all(isinstance(each, str) for each in found["processing:software"].values())
    assert found.get("processing:datetime", "Z").endswith("Z")


def check_file(item: Json) -> None:
    """Check that checksums are multihashes, of version 2.1.0: hexadecimal and in small letters."""
    found = [asset["file:checksum"] for asset in item["assets"].values() if "file:checksum" in asset]
    assert found
    assert all(re.fullmatch("1220[0-9a-f]{64}", each) for each in found)  # SHA-256


def check_mlm(item: Json) -> None:
    """Check what version 1.5.2 demands: required fields, inputs and outputs, bands that are described, one model."""
    properties = item["properties"]
    required = {"mlm:name", "mlm:architecture", "mlm:tasks", "mlm:input", "mlm:output"}
    assert required <= set(prefixed(properties, "mlm")) <= required | OPTIONAL
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", properties["mlm:name"])
    assert all(re.fullmatch(r"[0-9a-zA-Z_.-]+", name) for name in properties["mlm:hyperparameters"])
    named = {band["name"] for band in properties["bands"]}
    for each in properties["mlm:input"]:
        check_array(each["input"])
        assert each["name"]
        assert set(each["bands"]) <= named
        assert bool(each["bands"]) == ("bands" in each["input"]["dim_order"])
        assert all(set(scaling) == {"type", "mean", "stddev"} for scaling in each["value_scaling"])
    for each in properties["mlm:output"]:
        check_array(each["result"])
        assert each["tasks"] == properties["mlm:tasks"] == ["semantic-segmentation"]
        for found in each["classification:classes"]:
            check_class(found)
    models = [asset for asset in item["assets"].values() if "mlm:model" in asset["roles"]]
    assert models
    assert all(("mlm:artifact_type" in asset) == (asset in models) for asset in item["assets"].values())


OPTIONAL = {"mlm:framework", "mlm:accelerator", "mlm:hyperparameters"}
DEMANDS = {
    "projection": check_projection,
    "raster": check_raster,
    "classification": check_classification,
    "processing": check_processing,
    "file": check_file,
    "mlm": check_mlm,
}


def check_array(described: Json) -> None:
    """Check the shape of an array, -1 where it varies, with the names of its dimensions and its type."""
    assert set(described) == {"shape", "dim_order", "data_type"}
    assert len(described["shape"]) == len(set(described["dim_order"]))
    assert all(number == -1 or number > 0 for number in described["shape"])


def prefixed(fields: Mapping[str, Any], prefix: str) -> Json:
    return {name: value for name, value in fields.items() if name.startswith(f"{prefix}:")}


def open_items(folder: Path) -> tuple[pystac.Collection, list[pystac.Item]]:
    """A catalogue as a user reads it, by pystac."""
    collection = pystac.Collection.from_file(folder / "collection.json")
    return collection, list(collection.get_items())


def test_all_files_are_valid_and_lead_to_each_other_wherever_the_folder_is(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING)
    files, err = export(capsys, run, tmp_path / "out", "--probability")
    items = ["north/a.json", "south/b.json"]
    rasters = [f"{name[:-5]}{suffix}.tif" for name in items for suffix in ("", "_probability")]
    assert sorted(files) == sorted([*rasters, *items, "model.json", "collection.json"])
    assert err.splitlines() == [str(tmp_path / "out" / each) for each in files]
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.json"):
        check_valid(path)
    collection, found = open_items(tmp_path / "elsewhere")
    assert [item.id for item in found] == ["north-a", "south-b"]
    for item, image in zip(found, plan.images, strict=True):
        assert item.get_collection() is collection
        assert item.get_root() is collection
        assert item.properties["title"] == image.scene_id
        assert {name: asset.roles for name, asset in item.assets.items()} == {
            "mask": ["data"],
            "probability": ["data"],
            "style": ["style"],
            "probability_style": ["style"],
        }
        for asset in item.assets.values():
            assert Path(asset.get_absolute_href()).is_file()
        (link,) = item.get_links("derived_from")
        model = pystac.Item.from_file(link.get_absolute_href())
        assert link.extra_fields["mlm:name"] == model.properties["mlm:name"] == "bundle"
        assert model.id == plan.model == item.properties["aerial_seg:model"]
        weights = Path(model.assets["model"].href).read_bytes()
        assert len(weights) > 50


def test_an_item_says_what_the_rasters_are(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path, settings=KEEPING)
    export(capsys, run, tmp_path / "out", "--probability")
    collection, items = open_items(tmp_path / "out")
    (whole,) = collection.extent.spatial.bboxes
    for item in items:
        for name in ("mask", "probability"):
            asset = item.assets[name]
            (band,) = asset.extra_fields["bands"]
            with rasterio.open(asset.get_absolute_href()) as file:
                assert item.properties["proj:code"] == file.crs.to_string()
                assert tuple(item.properties["proj:transform"]) == tuple(file.transform)[:6]
                assert tuple(item.properties["proj:shape"]) == file.shape
                assert band["data_type"] == file.dtypes[0]
                assert band.get("nodata") == file.nodata
                assert band.get("raster:scale", 1.0) == file.scales[0]
                bounds = transform_bounds(file.crs, "OGC:CRS84", *file.bounds)
        assert item.bbox == pytest.approx(bounds, abs=1e-7)
        assert shape(item.geometry).bounds == tuple(item.bbox)
        assert box(*whole).covers(shape(item.geometry))
        classes = item.assets["mask"].extra_fields["classification:classes"]
        assert {each["value"]: each["name"] for each in classes} == {0: "background", 1: "building"}


def test_figures_are_those_of_the_rows(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, failed_parts=[1])
    BuiltRun(run, plan).path(2).unlink()
    export(capsys, run, tmp_path / "out", code=1)
    sums = "sum(valid_px)::INT valid, sum(building_px)::INT building, sum(area_m2) area, sum(building_m2) built"
    for name, scene in (("north/a", "north/a.tif"), ("south/b", "south/b.tif")):
        found = prefixed(check_valid(tmp_path / "out" / f"{name}.json")["properties"], "aerial_seg")
        (row,) = query(run, f"SELECT {sums} FROM tiles WHERE scene_id = '{scene}'").to_pylist()
        assert found["aerial_seg:valid_px"] == row["valid"] > 0
        assert found["aerial_seg:building_px"] == row["building"]
        assert found["aerial_seg:coverage"] == row["building"] / row["valid"]
        assert found["aerial_seg:area_m2"] == pytest.approx(row["area"])
        assert found["aerial_seg:building_m2"] == pytest.approx(row["built"])
        (numbers,) = query(run, f"SELECT count(*) n FROM failures WHERE scene_id = '{scene}'").to_pylist()
        assert found["aerial_seg:failed_tiles"] == numbers["n"]
    assert found["aerial_seg:planned_tiles"] == 2
    assert found["aerial_seg:missing_tiles"] == 0
    north = read(tmp_path / "out/north/a.json")["properties"]
    assert (north["aerial_seg:planned_tiles"], north["aerial_seg:failed_tiles"]) == (16, 4)
    assert north["aerial_seg:missing_tiles"] == 4


@pytest.mark.usefixtures("without_actors")
def test_dates_are_those_of_the_scenes_and_what_is_not_known_is_not_made_up(
    make_scene: MakeScene, make_bundle: MakeBundle, tmp_path: Path, capsys: Capture
) -> None:
    for name, left, tags in (("a", 0, {"TIFFTAG_DATETIME": "2013:07:01 12:30:00"}), ("b", 120, {})):
        path = make_scene(f"m/{name}.tif", transform=(1.0, 0.0, 400_000.0 + left, 0.0, -1.0, 5_800_000.0))
        with rasterio.open(path, "r+") as dataset:
            dataset.update_tags(**tags)
    seg(capsys, "segment", tmp_path / "m", "--model", make_bundle(), "--out", tmp_path / "run", *SMALL)
    export(capsys, tmp_path / "run", tmp_path / "out")
    known, unknown = (check_valid(tmp_path / "out" / f"{name}.json")["properties"] for name in "ab")
    created = read(tmp_path / "run/run.json")["created"]
    assert known["datetime"] == "2013-07-01T12:30:00Z"
    assert "start_datetime" not in known
    assert unknown["datetime"] is None
    assert (unknown["start_datetime"], unknown["end_datetime"]) == ("1850-01-01T00:00:00Z", created)
    collection = check_valid(tmp_path / "out/collection.json")
    assert collection["extent"]["temporal"]["interval"] == [["1850-01-01T00:00:00Z", created]]
    export(capsys, tmp_path / "run", tmp_path / "joined", "--mosaic")
    mosaic = check_valid(tmp_path / "joined/mosaic.json")
    assert mosaic["properties"]["start_datetime"] == "1850-01-01T00:00:00Z"
    assert mosaic["properties"]["proj:shape"] == [100, 240]
    assert "aerial_seg:valid_px" not in mosaic["properties"]  # where scenes overlap it would count twice
    assert mosaic["properties"]["aerial_seg:planned_tiles"] == 8


def test_a_period_reaches_from_the_first_date_to_the_last() -> None:
    early, late, now = (np.datetime64(f"{year}-05-01", "s").item() for year in (2010, 2012, 2020))
    assert find_period([late, early], now) == (early, late)
    assert find_period([late, None], now)[1] == now


def test_scenes_without_a_crs_are_refused_and_one_among_others_has_no_place(tmp_path: Path, capsys: Capture) -> None:
    run, _ = build_run(tmp_path / "bare", crs=None)
    _, err = seg(capsys, "export", "masks", run, "--stac", "--out", tmp_path / "out", code=2)
    assert err == "seg: --stac: the scenes have no CRS, so that a catalogue can't say where they are: leave it out\n"
    assert not (tmp_path / "out").exists()
    nowhere = bare_scene(40, 30, crs=None, transform=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    run = nearly_empty_run(tmp_path, [nowhere, bare_scene(40, 30, scene_id="b.tif")])
    _, err = export(capsys, run, tmp_path / "mixed", code=1)
    assert err.startswith("--stac: 1 of 2 scenes have no CRS, such as a.tif: their items say no place\n")
    item, other = (check_valid(tmp_path / "mixed" / name) for name in ("a.json", "b.json"))
    assert item["geometry"] is None
    assert "bbox" not in item
    assert item["properties"]["proj:code"] is None
    assert check_valid(tmp_path / "mixed/collection.json")["extent"]["spatial"]["bbox"] == [other["bbox"]]


@pytest.mark.parametrize("option", [[], ["--mosaic"]])
def test_a_catalogue_without_pystac_is_refused_with_the_way_to_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    run, _ = build_run(tmp_path)
    monkeypatch.setitem(sys.modules, "pystac", None)
    _, err = seg(capsys, "export", "masks", run, "--stac", *option, "--out", tmp_path / "out", code=2)
    assert err == "seg: --stac: needs the package pystac: pip install 'aerial-seg[stac]'\n"
    assert not (tmp_path / "out").exists()
    seg(capsys, "export", "masks", run, "--out", tmp_path / "out")


def test_a_process_without_pystac_writes_the_rasters_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = build_run(tmp_path)
    catalogue = open_catalogue(run, str(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "pystac", None)
    results = dict(export_masks(run, str(tmp_path / "out"), catalogue=catalogue))
    assert [Path(path).suffix for path, problem in results.items() if problem is None] == [".tif", ".tif"]
    problems = {str(problem) for problem in results.values() if problem}
    assert problems == {"--stac: needs the package pystac: pip install 'aerial-seg[stac]'"}
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_model_that_has_moved_is_left_out_unless_it_is_named(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path)
    shutil.move(tmp_path / "bundle", tmp_path / "my models 2")
    files, err = export(capsys, run, tmp_path / "without")
    assert err.startswith(
        f"--stac: the model is not at {tmp_path}/bundle: it is left out: name its folder with --model\n"
    )
    assert "model.json" not in files
    item = check_valid(tmp_path / "without/north/a.json")
    assert [link["rel"] for link in item["links"]] == ["root", "parent", "collection"]
    export(capsys, run, tmp_path / "with", "--model", tmp_path / "my models 2")
    model = check_valid(tmp_path / "with/model.json")
    assert (model["id"], model["properties"]["mlm:name"]) == (plan.model, "my-models-2")
    other = write_light_bundle(tmp_path / "other", seed=1)
    _, err = seg(capsys, "export", "masks", run, "--stac", "--model", other, "--out", tmp_path / "no", code=2)
    assert re.fullmatch(r"seg: --model: is \w{8}, but the run was made with \w{8}: name that model\n", err)
    _, err = seg(capsys, "export", "masks", run, "--model", other, "--out", tmp_path / "no", code=2)
    assert err == "seg: --model: is for --stac\n"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["north/a.json", "collection.json", "model.json"])
def test_no_file_of_a_catalogue_is_replaced(tmp_path: Path, capsys: Capture, name: str) -> None:
    run, _ = build_run(tmp_path)
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.touch()
    _, err = seg(capsys, "export", "masks", run, "--stac", "--out", tmp_path / "out", code=2)
    assert err == f"seg: {path}: already exists: choose another --out\n"
    assert [each for each in (tmp_path / "out").rglob("*") if each.is_file()] == [path]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a-b.tif", "a/b.tif"], "seg: --stac: two scenes would have the id a-b: rename one, and segment it\n"),
        (["a.tif", "a.tiff"], "seg: --stac: two scenes would have the id a: rename one, and segment it\n"),
        (
            ["a.tif", "model.tif"],
            "seg: --stac: {out}/model.json: is both the catalogue's and a scene's: rename the scene, and segment it\n",
        ),
        *(
            (
                [f"a{sign}.tif", "b.tif"],
                f"seg: --stac: {{out}}/a{sign}.json: a link with # ? or % leads elsewhere: rename the scene\n",
            )
            for sign in "#?%"
        ),
    ],
)
def test_items_do_not_share_an_id_or_a_file(tmp_path: Path, capsys: Capture, names: list[str], said: str) -> None:
    run = nearly_empty_run(tmp_path, [bare_scene(40, 30, scene_id=name) for name in names])
    _, err = seg(capsys, "export", "masks", run, "--stac", "--out", tmp_path / "out", code=2)
    assert err == said.format(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nearly_empty_run(folder: Path, scenes: list[Any]) -> str:
    """A run of which the first part failed, and all others are missing."""
    from seg_core.run.rows import Failure, failed_rows
    from seg_core.run.tables import write_part

    run, plan = plan_scenes(folder, scenes)
    part = next(plan.parts())
    rows = list(failed_rows(part.scene, part.window, plan.settings.tile_size, Failure("ReadError", "no")))
    write_part(run, part.key, rows, plan.model, part.version)
    return run


def test_a_scene_across_the_antimeridian_has_two_outlines(tmp_path: Path, capsys: Capture) -> None:
    place = (100.0, 0.0, 820_000.0, 0.0, -100.0, 200_000.0)  # west of the border of this zone
    run = nearly_empty_run(tmp_path, [bare_scene(200, 300, "EPSG:32660", place)])
    export(capsys, run, tmp_path / "out", code=1)
    item = check_valid(tmp_path / "out/a.json")
    assert item["geometry"]["type"] == "MultiPolygon"
    west, south, east, north = item["bbox"]
    assert -180 < east < west < 180
    assert south < north
    assert "aerial_seg:coverage" not in item["properties"]
    assert check_valid(tmp_path / "out/collection.json")["extent"]["spatial"]["bbox"] == [[-180, south, 180, north]]


def test_a_crs_without_a_code_is_written_in_full(tmp_path: Path, capsys: Capture) -> None:
    run = nearly_empty_run(tmp_path, [bare_scene(40, 30, LAEA, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0))])
    export(capsys, run, tmp_path / "out", code=1)
    properties = check_valid(tmp_path / "out/a.json")["properties"]
    assert properties["proj:code"] is None
    assert rasterio.crs.CRS.from_wkt(properties["proj:wkt2"]) == rasterio.crs.CRS.from_string(LAEA)


def test_a_raster_that_cannot_be_written_is_no_asset(tmp_path: Path, capsys: Capture) -> None:
    run, plan = build_run(tmp_path, settings=KEEPING)
    BuiltRun(run, plan).rewrite(lambda rows: [{**row, "probability": b"no"} for row in rows])
    export(capsys, run, tmp_path / "out", "--probability", code=1)
    _, (north, south) = open_items(tmp_path / "out")
    assert set(north.assets) == {"mask", "style"}
    assert set(south.assets) == {"mask", "style", "probability", "probability_style"}


@pytest.mark.parametrize(
    ("text", "as_id", "as_name"),
    [
        ("a/b c.d", "a-b-c.d", "a-b-c-d"),
        ("Gebäude", "Gebäude", "Geb-ude"),
        ("建物", "建物", "class-1"),
        ("a_1-B", "a_1-B", "a_1-B"),
    ],
)
def test_ids_and_names_are_as_plain_as_they_must_be(text: str, as_id: str, as_name: str) -> None:
    assert (plain_id(text), plain_name(text, "class-1")) == (as_id, as_name)
