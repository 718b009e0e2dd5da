"""The command line: its options, what bad input is told, and what may import what."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeBundle, MakeScene
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from runs import build_run, file_digests, write_light_bundle

from aerial_seg.cli.main import main, make_parser
from aerial_seg.cli.model_commands import train_settings
from aerial_seg.train import _refuse_other
from aerial_seg.training.settings import TrainSettings, make_settings
from seg_core.imagery.geotiff import CODECS
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip
from seg_core.model.bundle import read_bundle
from seg_core.run.lease import acquire_lease
from seg_core.run.score import RunScore
from seg_core.training.dataset import Classes, read_classes
from seg_core.training.metrics import Counts
from seg_core.training.shapes import ShapeCounts

pytestmark = pytest.mark.usefixtures("no_ray")

ROOT = Path(__file__).parents[1]
GENERAL = ["--debug", "--help", "--log-format", "--no-sign-request"]
REGION = [
    "--alpha",
    "--bands",
    "--decode",
    "--halo",
    "--include",
    "--keep-probability",
    "--model",
    "--mosaic",
    "--normalize",
    "--order",
    "--overlap",
    "--part",
    "--precision",
    "--resample",
    "--scale",
    "--threshold",
    "--tile-size",
    "--window",
    "SCENE",
]
EXECUTION = [
    "--actors",
    "--address",
    "--batch",
    "--compile",
    "--device",
    "--gpus-per-actor",
    "--node-timeout",
    "--readers",
]
BENCH = ["--at", "--codec", "--json", "--seconds", "--side"]
SETTINGS = [
    "--accumulate",
    "--augment",
    "--batch",
    "--class",
    "--compile",
    "--config",
    "--crop",
    "--data",
    "--depth",
    "--device",
    "--edge-weight",
    "--ema",
    "--encoder-weights",
    "--epochs",
    "--equivariant",
    "--freeze-batchnorm",
    "--from",
    "--keep",
    "--label-smoothing",
    "--loss",
    "--lr",
    "--max-norm",
    "--min-valid",
    "--min-workers",
    "--model",
    "--no-equivariant",
    "--no-freeze-batchnorm",
    "--no-sync-batchnorm",
    "--node-timeout",
    "--optimizer",
    "--pad-multiple",
    "--patch",
    "--patience",
    "--placement",
    "--precision",
    "--preset",
    "--readers",
    "--schedule",
    "--seed",
    "--set",
    "--steps",
    "--sync-batchnorm",
    "--threshold",
    "--weight-decay",
    "--weights",
    "--width",
    "--workers",
]
AREAS = ["--areas", "--bbox", "--crs", "--grid", "--h3", "--id"]
SUBMIT = ["--address", "--follow", "--json", "--no-follow"]
OPTIONS = {
    "seg": ["--help", "--version", "-C", "COMMAND"],
    "seg dataset": ["--help", "make"],
    "seg dataset make": [
        *GENERAL,
        "--all-touched",
        "--alpha",
        "--aoi",
        "--bands",
        "--block",
        "--class-column",
        "--classes",
        "--json",
        "--labels",
        "--out",
        "--seed",
        "--test",
        "--val",
        "SCENE",
    ],
    "seg train": [*GENERAL, *SETTINGS, "--address", "--json", "--out", "--work"],
    "seg evaluate": [
        *GENERAL,
        "--aoi",
        "--class",
        "--data",
        "--device",
        "--figures",
        "--json",
        "--labels",
        "--normalize",
        "--precision",
        "--per-image",
        "--split",
        "--tta",
        "BUNDLE|RUN",
    ],
    "seg quantize": [
        *GENERAL,
        "--bands",
        "--crops",
        "--json",
        "--model",
        "--normalize",
        "--out",
        "--resample",
        "--scale",
        "SCENE",
    ],
    "seg plan": [*GENERAL, *REGION, "--calibrate", "--device", "--devices", "--json", "--price"],
    "seg segment": [*GENERAL, *REGION, *EXECUTION, "--json", "--max-failures", "--out", "--relocate"],
    "seg verify": [*GENERAL, "--deep", "--device", "--json", "--model", "--relocate", "RUN"],
    "seg repair": [*GENERAL, "--json", "RUN", "PART"],
    "seg query": [
        *GENERAL,
        *AREAS,
        "--address",
        "--explain",
        "--format",
        "--json",
        "--out",
        "--schema",
        "RUN",
        "SQL",
    ],
    "seg rethreshold": [*GENERAL, "--json", "--out", "--threshold", "RUN"],
    "seg compact": [*GENERAL, "--json", "--size", "RUN"],
    "seg compare": [*GENERAL, *AREAS, "--json", "--out", "--rasters", "BEFORE", "AFTER"],
    "seg audit": [*GENERAL, *AREAS, "--aoi", "--json", "--labels", "--out", "--sample", "--seed", "RUN"],
    "seg report": [*GENERAL, "--json", "--out", "--relocate", "RUN"],
    "seg view": [*GENERAL, "--json", "--open", "--port", "--relocate", "RUN"],
    "seg submit": [*GENERAL, *SUBMIT, "--name", "--num-cpus", "--num-gpus", "-- COMMAND ..."],
    "seg jobs": [*GENERAL, "--address", "--json"],
    "seg logs": [*GENERAL, "--address", "--follow", "--json", "-f", "ID"],
    "seg stop": [*GENERAL, "--address", "--json", "ID"],
    "seg resume": [*GENERAL, *SUBMIT, "ID"],
    "seg models": ["--help", "show"],
    "seg models show": [*GENERAL, "--json", "BUNDLE"],
    "seg export": ["--help", "masks|footprints|coverage|picture|model"],
    "seg export masks": [
        *GENERAL,
        "--address",
        "--json",
        "--model",
        "--mosaic",
        "--out",
        "--probability",
        "--stac",
        "RUN",
    ],
    "seg export footprints": [
        *GENERAL,
        "--address",
        "--crs",
        "--json",
        "--min-area",
        "--out",
        "--regularize",
        "--simplify",
        "RUN",
    ],
    "seg export coverage": [*GENERAL, "--address", "--cell", "--crs", "--json", "--out", "RUN"],
    "seg export picture": [
        *GENERAL,
        "--data",
        "--json",
        "--labels",
        "--out",
        "--relocate",
        "--tile",
        "--window",
        "RUN",
    ],
    "seg export model": [*GENERAL, "--json", "--out", "--to", "BUNDLE"],
    "seg bench": ["--help", "segment|scale|train"],
    "seg bench segment": [*GENERAL, *REGION, *EXECUTION, *BENCH, "--rounds"],
    "seg bench scale": [*GENERAL, *REGION, *EXECUTION, *BENCH, "--out", "--sizes", "--windows", "--workers"],
    "seg bench train": [*GENERAL, *SETTINGS, "--json"],
    "seg demo": [*GENERAL, "--json", "--out"],
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        """The one JSON object of a command that went well."""
        assert (self.code, self.err) == (0, "")
        return dict(json.loads(self.out))


Seg = Callable[..., Outcome]


@pytest.fixture
def seg(capsys: pytest.CaptureFixture[str]) -> Seg:
    """Call the command line; the parser's way out, too, is an exit code."""

    def call(*args: object) -> Outcome:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tripwire: nothing here may start Ray, for what is refused must be so before."""

    def tripped(*_: object, **__: object) -> NoReturn:
        pytest.fail("Ray was to be started")

    monkeypatch.setattr("aerial_seg.segment.ray_session", tripped)
    monkeypatch.setattr("aerial_seg.train.ray_session", tripped)


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return write_light_bundle(tmp_path / "bundle")


def refused(outcome: Outcome, *named: object) -> str:
    """The one line of a refusal, in which all of that is named."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("seg: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    for name in named:
        assert str(name) in outcome.err
    return outcome.err.strip()


def refused_by_parser(outcome: Outcome, *named: object) -> None:
    """Check what argparse refuses, whose last line follows a reminder of the usage."""
    assert (outcome.code, outcome.out) == (2, "")
    line = outcome.err.splitlines()[-1]
    assert line.startswith("seg")
    assert "Traceback" not in outcome.err
    for name in named:
        assert str(name) in line


def options(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, list[str]]]:
    """All options of a parser and of those below it, by command."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    flags = [flag for a in parser._actions for flag in (a.option_strings or [str(a.metavar)]) if flag != "-h"]
    yield name, sorted(flags)
    for action in below:
        for command, child in action.choices.items():
            yield from options(child, f"{name} {command}")


def test_the_commands_have_these_options_and_no_others() -> None:
    assert dict(options(make_parser(), "seg")) == {name: sorted(flags) for name, flags in OPTIONS.items()}


def test_each_command_has_its_function() -> None:
    def leaves(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from list(leaves(child)) or [(child.get_default("command") or name, child)]

    found = list(leaves(make_parser()))
    assert len(found) > 15
    for command, parser in found:
        assert callable(parser.get_default("carry_out")), command


@pytest.mark.parametrize("command", ["plan a.tif", "bench segment", "export masks run --out a", "jobs"])
def test_an_unknown_option_is_refused_with_the_usage_of_its_command(seg: Seg, command: str) -> None:
    name = " ".join(word for word in command.split()[:2] if "." not in word)
    outcome = seg(*command.split(), "--unknown")
    refused_by_parser(outcome, f"seg {name}: error: unrecognized arguments: --unknown")
    assert outcome.err.startswith(f"usage: seg {name} ")


def test_options_are_not_abbreviated(seg: Seg, bundle: str, make_scene: MakeScene) -> None:
    refused_by_parser(seg("plan", make_scene(), "--model", bundle, "--tile", 32), "--tile")


@pytest.mark.parametrize("command", ["", *(name.removeprefix("seg ") for name in OPTIONS if name != "seg")])
def test_help_names_every_option(seg: Seg, command: str) -> None:
    outcome = seg(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    for flag in OPTIONS[f"seg {command}".strip()]:
        assert flag.split()[0] in outcome.out


def test_help_is_quick_because_it_imports_no_heavy_library() -> None:
    code = """
import sys
from aerial_seg.cli.main import main
for command in ([], ["train"], ["plan"], ["segment"], ["query"], ["bench", "segment"], ["bench", "scale"], ["demo"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code
print(*sorted(sys.modules), sep="\\n", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "aerial_seg.cli.main" in loaded
    assert not loaded & {
        "ray",
        "torch",
        "cv2",
        "rasterio",
        "pandas",
        "pyarrow",
        "duckdb",
        "albumentations",
        "matplotlib",
    }


def test_the_codecs_of_a_scene_that_is_made_are_those_that_can_be_written() -> None:
    offered = {name: found for name, found in choices(make_parser(), "seg") if name.endswith("--codec")}
    assert offered == {f"seg bench {kind} --codec": list(CODECS) for kind in ("segment", "scale")}


def choices(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, list[str]]]:
    """The choices that the options of a parser and of those below it leave."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                yield from choices(child, f"{name} {command}")
        elif action.choices:
            yield f"{name} {action.option_strings[0]}", list(action.choices)


def test_a_plain_picture_is_planned_without_a_word_of_warning(tmp_path: Path, bundle: str) -> None:
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    command = [
        sys.executable,
        "-m",
        "aerial_seg.cli.main",
        "plan",
        str(tmp_path / "a.png"),
        "--model",
        bundle,
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["pixels"] == 600


def test_a_plan_says_what_the_model_finds(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    write_pair(tmp_path / "a.tif", np.ones((3, 20, 30), np.uint8))
    bundle = make_bundle(classes=("background", "building", "road"), building=2)
    outcome = seg("plan", tmp_path / "a.tif", "--model", bundle, "--json")
    assert json.loads(outcome.out)["class"] == "road"
    assert f"{bundle}: finds the class road alone, and building counts as background: building_px" in outcome.err


def test_a_command_is_wanted_and_must_be_known(seg: Seg) -> None:
    refused_by_parser(seg(), "COMMAND")
    refused_by_parser(seg("segmnt"), "segmnt")


def test_the_version_is_looked_up_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerial_seg.cli.command_parser.code_version", lambda: pytest.fail("looked up"))
    make_parser().parse_args(["jobs"])


def test_version_is_said(seg: Seg) -> None:
    assert seg("--version").out.startswith("seg 0.")


# What is refused before anything is done


def refused_everywhere(seg: Seg, folder: Path, args: list[object], *named: object) -> None:
    """Assert that `seg segment` refuses those arguments in one line, writes nothing, and that `seg plan` agrees."""
    before = file_digests(folder)
    refused(seg("segment", *args, "--out", folder / "run"), *named)
    outcome = seg("plan", *args, "--json")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert all(str(name) in outcome.out + outcome.err for name in named)
    assert file_digests(folder) == before


@pytest.mark.parametrize("source", ["nowhere.tif", "nowhere", "*.jp2", "nowhere.csv"])
def test_a_source_that_is_not_there_is_refused(seg: Seg, tmp_path: Path, bundle: str, source: str) -> None:
    refused_everywhere(seg, tmp_path, [tmp_path / source, "--model", bundle], source, "no such file or folder")


def test_an_empty_folder_is_refused(seg: Seg, tmp_path: Path, bundle: str) -> None:
    (tmp_path / "photos").mkdir()
    refused_everywhere(seg, tmp_path, [tmp_path / "photos", "--model", bundle], "photos", "no images", ".tif")


@pytest.mark.parametrize("text", ["no image\n", "", "II*\0"])
def test_a_file_that_is_no_image_is_refused(seg: Seg, tmp_path: Path, bundle: str, text: str) -> None:
    (tmp_path / "a.tif").write_text(text)
    refused_everywhere(
        seg, tmp_path, [tmp_path / "a.tif", "--model", bundle], "a.tif", "not an image, or a damaged one"
    )


def test_one_bad_image_among_good_ones_is_named(seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene) -> None:
    folder = Path(make_scene("region/good.tif")).parent
    (folder / "bad.tif").write_text("no image")
    refused_everywhere(seg, tmp_path, [folder, "--model", bundle], folder / "bad.tif")
    assert seg("plan", folder, "--model", bundle).code == 2


def test_only_the_images_of_a_mixed_folder_are_planned(seg: Seg, bundle: str, make_scene: MakeScene) -> None:
    folder = Path(make_scene("region/a.tif")).parent
    make_scene("region/sub/b.tif")
    for name in ("notes.txt", "table.csv", "a.tif.aux.xml", "sub/buildings.geojson", "sheet.vrt", "sub/.b.tif"):
        (folder / name).write_text("something else")
    figures = seg("plan", folder, "--model", bundle, "--json").figures
    assert (figures["scenes"], figures["refused"]) == (2, [])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (20, 30), (511, 3)])
def test_a_scene_smaller_than_a_tile_is_one_tile(
    seg: Seg, bundle: str, make_scene: MakeScene, height: int, width: int
) -> None:
    figures = seg("plan", make_scene(height=height, width=width), "--model", bundle, "--json").figures
    assert {k: figures[k] for k in ("scenes", "parts", "tiles", "pixels", "windows", "refused")} == {
        "scenes": 1,
        "parts": 1,
        "tiles": 1,
        "pixels": height * width,
        "windows": 1,
        "refused": [],
    }


def test_a_plan_says_what_a_run_would_do(seg: Seg, bundle: str, make_scene: MakeScene) -> None:
    args = ["--tile-size", 32, "--part", 64, "--window", 32, "--halo", 8, "--threshold", 0.25, "--keep-probability"]
    figures = seg("plan", make_scene(), "--model", bundle, *args, "--json").figures
    assert {k: figures[k] for k in ("scenes", "parts", "tiles", "pixels", "window", "windows")} == {
        "scenes": 1,
        "parts": 4,
        "tiles": 16,
        "pixels": 12000,
        "window": 32,
        "windows": 16,
    }
    assert figures["model"] == json.loads(Path(bundle, "model.json").read_text())["hash"]
    assert figures["settings"] == {
        "tile_size": 32,
        "part": 64,
        "halo": 8,
        "threshold": 0.25,
        "resample": False,
        "scale": None,
        "bands": None,
        "decode": "cpu",
        "keep_probability": True,
        "precision": "auto",
        "mosaic": False,
        "window": 32,  # kept, because this halo does not cover the model's context of 12 px
        "alpha": None,
        "normalize": "model",
        "normalize_mean": None,
        "normalize_std": None,
    }
    assert seg("plan", make_scene(), "--model", bundle).out.startswith("scenes ")


def write_colours(path: Path, bands: int) -> str:
    """An uint8 GeoTIFF of so many colour bands; of four, GDAL would otherwise take the last for alpha."""
    with rasterio.open(
        path, "w", driver="GTiff", height=20, width=30, count=bands, dtype="uint8", crs=UTM,
        transform=Affine(*NORTH_UP), photometric="MINISBLACK",
    ) as dataset:  # fmt: skip
        dataset.write(np.full((bands, 20, 30), 9, np.uint8))
    return str(path)


@pytest.mark.parametrize(
    ("bands", "way_out"), [(1, "--bands 1,1,1"), (2, "--bands"), (4, "--bands 1,2,3"), (5, "--bands 1,2,3")]
)
def test_another_number_of_bands_is_refused_and_bands_named(
    seg: Seg, tmp_path: Path, bundle: str, bands: int, way_out: str
) -> None:
    path = write_colours(tmp_path / "a.tif", bands)
    refused_everywhere(seg, tmp_path, [path, "--model", bundle], f"a.tif: {bands} bands", "needs 3", way_out)


@pytest.mark.parametrize(("bands", "chosen"), [(1, "1,1,1"), (2, "1,2,1"), (3, "3,2,1"), (4, "4,1,2"), (5, "5,3,1")])
def test_bands_can_be_chosen(seg: Seg, tmp_path: Path, bundle: str, bands: int, chosen: str) -> None:
    path = write_colours(tmp_path / "a.tif", bands)
    figures = seg("plan", path, "--model", bundle, "--bands", chosen, "--json").figures
    assert figures["settings"]["bands"] == [int(band) for band in chosen.split(",")]


@pytest.mark.parametrize(
    ("chosen", "named"), [("1,2", "names 2 bands"), ("1,2,9", "no colour band 9"), ("0,1,2", "no colour band 0")]
)
def test_bands_that_are_not_there_are_refused(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, chosen: str, named: str
) -> None:
    refused_everywhere(seg, tmp_path, [make_scene(), "--model", bundle, "--bands", chosen], named)


@pytest.mark.parametrize("chosen", ["red", "1;2;3", "", "1,,3"])
def test_bands_that_are_no_numbers_are_refused(seg: Seg, bundle: str, make_scene: MakeScene, chosen: str) -> None:
    refused_by_parser(seg("plan", make_scene(), "--model", bundle, "--bands", chosen), "--bands", "1,2,3")


def test_alpha_is_validity_and_no_band(seg: Seg, tmp_path: Path, bundle: str) -> None:
    pixels = np.full((4, 20, 30), 9, np.uint8)
    pixels[3, :5] = 0
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", height=20, width=30, count=4, dtype="uint8", crs=UTM,
        transform=Affine(*NORTH_UP),
    ) as dataset:  # fmt: skip
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        dataset.write(pixels)
    assert seg("plan", tmp_path / "a.tif", "--model", bundle, "--json").figures["refused"] == []
    scene = read_scene(str(tmp_path / "a.tif"), "a.tif")
    assert np.array_equal(read_chip(scene, scene.window)[1], pixels[3] > 0)
    refused_everywhere(seg, tmp_path, [tmp_path / "a.tif", "--model", bundle, "--bands", "1,2,4"], "no colour band 4")


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_imagery_that_is_not_uint8_is_refused_and_scale_named(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, dtype: str
) -> None:
    args: list[object] = [make_scene(dtype=dtype), "--model", bundle]
    refused_everywhere(seg, tmp_path, args, "scene.tif", dtype, "--scale MIN MAX")
    figures = seg("plan", *args, "--scale", 0, 4000, "--json").figures
    assert (figures["scenes"], figures["settings"]["scale"]) == (1, [0.0, 4000.0])


def test_another_resolution_is_refused_and_resample_named(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene
) -> None:
    args: list[object] = [make_scene(transform=(0.5, 0.0, 4e5, 0.0, -0.5, 5.8e6)), "--model", bundle]
    refused_everywhere(seg, tmp_path, args, "scene.tif: 0.5 m per pixel", "trained at 1 m", "--resample")
    figures = seg("plan", *args, "--resample", "--json").figures
    assert figures["pixels"] == pytest.approx(50 * 60, rel=0.01)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--tile-size", 30], ["--tile-size 30", "stride is 4"]),
        (["--tile-size", 0], ["--tile-size 0"]),
        (["--halo", 3], ["--halo 3", "stride is 4"]),
        (["--halo", -4], ["--halo -4"]),
        (["--part", 100], ["--part 100", "tile size, 32"]),
        (["--threshold", 1.5], ["--threshold 1.5", "between 0 and 1"]),
        (["--threshold", "nan"], ["--threshold nan"]),
        (["--scale", 9, 9], ["--scale 9 9", "MIN must be less than MAX"]),
        (["--scale", "nan", 9], ["--scale"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, args: list[object], named: list[str]
) -> None:
    tile = [] if "--tile-size" in args else ["--tile-size", 32]
    refused_everywhere(seg, tmp_path, [make_scene(), "--model", bundle, *tile, *args], *named)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--tile-size", "big"], "--tile-size"),
        (["--window", "big"], "--window"),
        (["--scale", "0"], "--scale"),
        (["--actors", "2:1"], "--actors"),
        (["--actors", "0"], "--actors"),
        (["--actors", "many"], "--actors"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, args: list[str], named: str
) -> None:
    scene = make_scene()
    before = file_digests(tmp_path)
    refused_by_parser(seg("segment", scene, "--model", bundle, "--out", tmp_path / "run", *args), named)
    assert file_digests(tmp_path) == before


def test_a_window_that_is_no_multiple_of_the_tile_is_refused(seg: Seg, bundle: str, make_scene: MakeScene) -> None:
    outcome = seg("plan", make_scene(), "--model", bundle, "--tile-size", 32, "--window", 100)
    refused(outcome, "--window 100", "tile size, 32")


# The folder of the results


def test_a_window_is_refused_before_a_run_is_begun(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene
) -> None:
    args = ["--model", bundle, "--out", tmp_path / "run", "--tile-size", 32, "--window", 100]
    refused(seg("segment", make_scene(), *args), "--window 100", "tile size, 32")
    assert not (tmp_path / "run").exists()


def test_no_crs_is_accepted_with_a_note(seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene) -> None:
    scene = make_scene("bare.tif", crs=None)
    assert seg("plan", scene, "--model", bundle, "--json").figures["scenes"] == 1
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    outcome = seg("segment", scene, "--model", bundle, "--out", tmp_path / "taken")
    note, refusal = outcome.err.splitlines()
    assert note.startswith("bare.tif: no CRS: ")
    assert "so are the areas of the whole run" in note
    assert refusal.startswith("seg: ")


@pytest.mark.parametrize("kind", ["folder", "file", "bundle"])
def test_an_out_that_is_no_run_is_refused_and_left_alone(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, kind: str
) -> None:
    out = {"folder": tmp_path / "taken", "file": tmp_path / "taken/file", "bundle": bundle}[kind]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    scene = make_scene()
    before = file_digests(tmp_path)
    refused(
        seg("segment", scene, "--model", bundle, "--out", out),
        f"{out}: exists and is not a run",
        "choose another folder",
    )
    assert file_digests(tmp_path) == before


def test_an_out_that_cannot_be_written_is_refused(seg: Seg, bundle: str, make_scene: MakeScene) -> None:
    outcome = seg("segment", make_scene(), "--model", bundle, "--out", "/proc/nowhere/run")
    refused(outcome, "/proc/nowhere/run: can't be written to", "choose another folder")


def test_a_run_with_other_settings_is_refused(seg: Seg, tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    args = ["segment", tmp_path / "scenes", "--model", tmp_path / "bundle", "--out", run, "--part", 64]
    refused(seg(*args, "--tile-size", 16), "tile_size 32 there, 16 now", "choose another folder")


def test_a_whole_run_is_not_done_again(seg: Seg, tmp_path: Path) -> None:
    run, plan = build_run(tmp_path)
    before = file_digests(tmp_path)
    args = ["--model", tmp_path / "bundle", "--out", run, "--part", 64, "--tile-size", 32]
    outcome = seg("segment", tmp_path / "scenes", *args, "--json")
    assert outcome.code == 0
    assert outcome.err == f"{run}: nothing to do: all {plan.counts['tiles']} tiles are there\n"
    assert json.loads(outcome.out)["tiles"] == plan.counts["tiles"]
    assert file_digests(tmp_path) == before


@pytest.mark.parametrize("failed", [{4}, range(5)])
def test_a_run_is_not_called_good_where_tiles_failed(seg: Seg, tmp_path: Path, failed: Collection[int]) -> None:
    run, _ = build_run(tmp_path, failed_parts=failed)
    number = 18 if len(failed) == 5 else 2
    found, asked = seg("verify", run), seg("query", run)
    masks = seg("export", "masks", run, "--out", tmp_path / "masks")
    assert (found.code, asked.code, masks.code) == (1, 0, 1)
    for outcome in (found, asked, masks):
        first = outcome.out.splitlines()[0].split(maxsplit=1)
        assert first == ["run", f"complete, but {number} of 18 tiles failed"]
    assert found.err.startswith(
        f"{number} tiles failed (exit code 1): seg query {run} 'SELECT * FROM failures' shows why"
    )
    assert f"{number} tiles failed or are not done yet: they are nodata in the masks (exit code 1)" in masks.err


@pytest.mark.parametrize("name", ["new.tif", "new.PNG", "a/new.parquet", "new.csv/"])
def test_a_folder_is_not_given_the_name_of_a_file(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, name: str
) -> None:
    named = f"{tmp_path}/{name}: must be a folder, but looks like a file: leave out .{name.strip('/').split('.')[1]}"
    for command in (["segment", make_scene(), "--model", bundle], ["train", "--data", tmp_path], ["demo"]):
        refused(seg(*command, "--out", f"{tmp_path}/{name}"), f"--out {named}")
    refused(
        seg("train", "--data", tmp_path, "--out", tmp_path / "b", "--work", f"{tmp_path}/{name}"), f"--work {named}"
    )
    run, _ = build_run(tmp_path / "whole")
    refused(seg("export", "masks", run, "--out", f"{tmp_path}/{name}"), f"--out {named}")
    assert not (tmp_path / name.strip("/")).exists()


def test_a_run_that_is_called_like_a_file_goes_on(seg: Seg, tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    Path(run).rename(tmp_path / "run.tif")
    args = ["--model", tmp_path / "bundle", "--out", tmp_path / "run.tif", "--part", 64, "--tile-size", 32]
    assert "nothing to do" in seg("segment", tmp_path / "scenes", *args).err


@pytest.mark.parametrize("command", ["verify", "query"])
def test_what_is_no_run_is_refused(seg: Seg, tmp_path: Path, command: str) -> None:
    refused(seg(command, tmp_path), f"{tmp_path}: not a run")
    refused(seg(command, tmp_path / "nowhere"), f"{tmp_path}/nowhere: no such run")


def test_verify_ends_with_0_1_or_2(seg: Seg, tmp_path: Path) -> None:
    run, _ = build_run(tmp_path, failed_parts={4})
    counted = {"planned": 18, "done": 16, "failed": 2, "complete": True, "problems": []}
    outcome = seg("verify", run, "--json")
    assert (outcome.code, json.loads(outcome.out)) == (1, counted)
    whole, _ = build_run(tmp_path / "whole")
    assert seg("verify", whole, "--json").figures == {**counted, "done": 18, "failed": 0}
    lost, damaged = sorted(Path(whole, "tiles").glob("part-*"))[:2]
    lost.unlink()
    outcome = seg("verify", whole)
    assert outcome.code == 1
    assert "missing" in outcome.out
    assert outcome.out.startswith("run       not finished: 1 parts are missing\n")
    assert outcome.err == "the run is not finished: repeat its seg segment command to resume it\n"
    with acquire_lease(whole):
        driver = f"process {os.getpid()} on {socket.gethostname()}"
        again = f"once that has ended, {outcome.err.removeprefix('the run is not finished: ')}"
        found = seg("verify", whole)
        assert (found.code, found.err) == (1, f"the run is not finished: a driver is at work on it ({driver}); {again}")
    damaged.write_bytes(b"PAR1")
    assert f"seg repair {whole} removes the parts with problems" in seg("verify", whole).err


def test_relative_paths_are_taken_from_the_folder_of_c(
    seg: Seg, tmp_path: Path, make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # and back to where we were in the end
    make_scene("region/a.tif")
    write_light_bundle(tmp_path / "bundle")
    figures = seg("-C", tmp_path, "plan", "region", "--model", "bundle", "--json").figures
    assert figures["scenes"] == 1
    refused(seg("-C", tmp_path / "nowhere", "plan", "region", "--model", "bundle"), "-C", "nowhere", "no such folder")


# Bundles


def damage(bundle: str, how: str) -> None:
    header = Path(bundle, "model.json")
    fields = json.loads(header.read_text())
    if how == "weights":
        weights = Path(bundle, "weights.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    elif how == "foreign":
        header.write_text('{"model_type": "bert", "hidden_size": 768}')
    else:
        header.write_text(json.dumps(fields | {"newer": {"version": 2}, "altered": {"threshold": 0.1}}[how]))


BROKEN = [
    ("altered", "damaged: model.json was changed after it was written"),
    ("newer", "of version 2, this program reads 1: upgrade aerial-seg"),
    ("foreign", "not a bundle: model.json does not say format"),
]


@pytest.mark.parametrize(("how", "named"), BROKEN)
def test_a_broken_bundle_is_refused(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene, how: str, named: str
) -> None:
    damage(bundle, how)
    refused_everywhere(seg, tmp_path, [make_scene(), "--model", bundle], f"{bundle}: {named}")
    refused(seg("evaluate", bundle, "--data", tmp_path), f"{bundle}: {named}")


def test_what_is_no_bundle_is_refused(seg: Seg, tmp_path: Path, make_scene: MakeScene) -> None:
    scene = make_scene()
    refused_everywhere(seg, tmp_path, [scene, "--model", tmp_path / "nowhere"], f"{tmp_path}/nowhere: no such bundle")
    refused_everywhere(seg, tmp_path, [scene, "--model", tmp_path], f"{tmp_path}: not a bundle")
    refused_everywhere(seg, tmp_path, [scene, "--model", scene], f"{scene}: not a bundle")
    refused(seg("evaluate", tmp_path, "--data", tmp_path), f"{tmp_path}: not a bundle")


def test_damaged_weights_are_refused_before_a_run_is_begun(
    seg: Seg, tmp_path: Path, bundle: str, make_scene: MakeScene
) -> None:
    damage(bundle, "weights")
    outcome = seg("segment", make_scene(), "--model", bundle, "--out", tmp_path / "run")
    refused(outcome, f"{bundle}: damaged: weights.safetensors")
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused_by_evaluate(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle("real")
    damage(bundle, "weights")
    refused(seg("evaluate", bundle, "--data", make_dataset(tmp_path)), f"{bundle}: damaged: weights.safetensors")


# Training data and settings


def make_dataset(folder: Path) -> Path:
    """A dataset of one 40 x 50 px pair in each split."""
    rng = np.random.default_rng(0)
    data = folder / "data"
    for split in ("train", "val"):
        for name in (split, f"{split}_labels"):
            (data / name).mkdir(parents=True)
        write_pair(data / split / "a.tif", rng.integers(0, 255, (3, 40, 50)).astype(np.uint8))
        write_pair(data / f"{split}_labels/a.tif", np.zeros((3, 40, 50), np.uint8))
    (data / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,255,255,255\n")
    assert read_classes(str(data)).positive == 1
    return data


def write_pair(
    path: Path,
    pixels: np.ndarray[Any, np.dtype[np.uint8]],
    crs: str | None = UTM,
    corner: tuple[int, int] = (0, 0),
) -> None:
    """Write an image, or a label, whose corner lies so many rows and columns from the others'."""
    with rasterio.open(
        path, "w", driver="GTiff", count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype="uint8",
        crs=crs, transform=Affine(1.0, 0.0, NORTH_UP[2] + corner[1], 0.0, -1.0, NORTH_UP[5] - corner[0]),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)


def test_a_label_of_another_size_needs_a_georeference(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    data, label = make_dataset(tmp_path), tmp_path / "data/val_labels/a.tif"
    write_pair(label, np.zeros((3, 40, 49), np.uint8), crs=None)
    outcome = seg("evaluate", make_bundle(), "--data", data, "--device", "cpu")
    refused(outcome, label, "49 x 40 px", "50 x 40", "gdal_edit")


def test_a_label_in_another_frame_is_warped_and_named(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    data, score = make_dataset(tmp_path), ["evaluate", make_bundle(), "--device", "cpu", "--json", "--data"]
    label = data / "val_labels/a.tif"
    write_pair(label, np.zeros((3, 45, 50), np.uint8))  # five rows more below: it lies on the image's grid
    figures = seg(*score, data).figures
    assert figures["tn"] + figures["fp"] == 2000
    write_pair(label, np.zeros((3, 40, 50), np.uint8), corner=(0, 5))
    outcome = seg(*score, data)
    figures = json.loads(outcome.out)
    assert (outcome.code, figures["tn"] + figures["fp"]) == (0, 1800)
    assert outcome.err.startswith(f"{label}: warped to the pixel grid of its image: ")
    assert outcome.err.endswith("up to 5.0 px off\n")


def test_a_bundle_is_scored_on_a_split_and_needs_one(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    data, bundle = make_dataset(tmp_path), make_bundle()
    figures = seg("evaluate", bundle, "--data", data, "--device", "cpu", "--json").figures
    assert figures["images"] == 1
    refused(seg("evaluate", bundle), bundle, "--data")
    refused(seg("evaluate", bundle, "--data", data, "--split", "test"), data / "test", "no such folder")
    refused(seg("evaluate", bundle, "--data", tmp_path), "label_class_dict.csv")


def test_a_bundle_is_scored_on_its_class_whatever_else_a_dataset_has(
    seg: Seg, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    data, score = make_dataset(tmp_path), ["evaluate", make_bundle(), "--device", "cpu", "--json", "--data"]
    label = np.zeros((3, 40, 50), np.uint8)
    label[:, :20] = 255
    label[:, 30:, :7] = 128
    write_pair(data / "val_labels/a.tif", label)
    table = data / "label_class_dict.csv"
    found = []
    for classes in (
        "background,0,0,0\nbuilding,255,255,255\nroad,128,128,128\n",
        "building,255,255,255\nroad,128,128,128\nbackground,0,0,0\n",
        "road,128,128,128\nother,0,0,0\nBuildings,255,255,255\n",
        "background,0,0,0\nbuilding,255,255,255\nbuilding site,128,128,128\n",  # the model's own name, and another
    ):
        table.write_text(f"name,r,g,b\n{classes}")
        figures = seg(*score, data).figures
        found.append(tuple(figures[name] for name in ("tp", "fp", "fn", "tn")))
    assert len(set(found)) == 1
    assert found[0][0] + found[0][2] == 20 * 50
    for classes, number in (("background,0,0,0\nroad,255,255,255", 0), ("building a,0,0,0\nbuilding b,255,255,255", 2)):
        table.write_text(f"name,r,g,b\n{classes}\nwater,128,128,128\n")
        names = "; ".join(line.partition(",")[0] for line in [*classes.split("\n"), "water"])
        refused(seg(*score, data), f"{data}: the model finds building, of which its classes have {number}: {names}")


@pytest.mark.parametrize(("bands", "gsd_m", "option"), [(2, 1.0, "--bands"), (3, 0.5, "--resample")])
def test_images_that_a_bundle_is_not_for_are_segmented_before_they_are_scored(
    seg: Seg, tmp_path: Path, make_bundle: MakeBundle, bands: int, gsd_m: float, option: str
) -> None:
    data, bundle = make_dataset(tmp_path), make_bundle(gsd_m=gsd_m)
    write_pair(data / "val/a.tif", np.zeros((bands, 40, 50), np.uint8))
    way_out = "; that is for seg segment, whose run is scored by seg evaluate RUN --labels"
    refused(seg("evaluate", bundle, "--data", data), option, way_out)


def test_a_bundle_is_looked_at_from_all_sides(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    data, bundle = make_dataset(tmp_path), make_bundle()
    label = data / "val_labels/a.tif"
    label.unlink()
    write_pair(label, np.repeat(np.random.default_rng(1).integers(0, 2, (1, 40, 50)) * 255, 3, axis=0).astype(np.uint8))
    score = ["evaluate", bundle, "--data", data, "--device", "cpu", "--json"]
    plain = seg(*score, "--per-image", tmp_path / "each.csv").figures
    assert pd.read_csv(tmp_path / "each.csv").to_dict("records")[0]["tp"] == plain["tp"]
    sides = seg(*score, "--tta", "--per-image", tmp_path / "each.parquet", "--figures", tmp_path / "figures").figures
    assert sides["tp"] != plain["tp"]
    assert sides["best_iou"] >= sides["iou"]
    (image,) = pd.read_parquet(tmp_path / "each.parquet").to_dict("records")
    assert (image["image"], image["valid_px"]) == ("a.tif", 2000)
    assert {name: value for name, value in image.items() if name in sides} == {
        name: value for name, value in sides.items() if name in image
    }
    assert {"iou", "building_f1", "boundary_iou"} <= sides.keys() & image.keys()
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["calibration.png", "samples.png", "thresholds.csv", "thresholds.png"]
    curve = pd.read_csv(tmp_path / "figures/thresholds.csv")
    assert curve["iou"].max() == pytest.approx(sides["best_iou"])


def test_what_is_to_be_scored_must_be_there(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    nowhere, bundle, (run, _) = tmp_path / "nowhere", make_bundle("model"), build_run(tmp_path)
    refused(seg("evaluate", nowhere), f"{nowhere}: no such bundle or run")
    refused(seg("evaluate", nowhere, "--data", tmp_path), f"{nowhere}: no such bundle")
    refused(seg("evaluate", nowhere, "--labels", tmp_path), f"{nowhere}: no such run")
    refused(seg("evaluate", nowhere, "--labels", tmp_path, "--tta"), f"{nowhere}: no such run")
    refused(seg("evaluate", tmp_path, "--labels", tmp_path), f"{tmp_path}: not a run: it holds no run.json")
    refused(seg("evaluate", tmp_path), f"{tmp_path}: not a bundle: it holds no model.json")
    refused(seg("evaluate", bundle), f"{bundle}: is a bundle: name a dataset with --data")
    refused(seg("evaluate", bundle, "--labels", tmp_path), f"{bundle}: is a bundle: ", "--labels is for a run")
    refused(seg("evaluate", run), f"{run}: is a run: name its labels with --labels")
    refused(seg("evaluate", run, "--data", tmp_path), f"{run}: is a run: name its labels with --labels")
    refused(seg("evaluate", run, "--labels", nowhere), f"--labels {nowhere}: no such file or folder")


@pytest.mark.parametrize("command", [["verify"], ["query"], ["repair"], ["export", "masks", "--out", "new"]])
def test_a_run_that_is_not_there_is_named(seg: Seg, tmp_path: Path, command: list[str]) -> None:
    refused(seg(*command, tmp_path / "nowhere"), f"{tmp_path}/nowhere: no such run")


def test_what_is_for_bundles_is_refused_for_runs(seg: Seg, tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    refused(seg("evaluate", run, "--labels", tmp_path, "--tta"), "--tta: is for a bundle")
    refused(seg("evaluate", run, "--labels", tmp_path, "--split", "test"), "--split: is for a bundle")
    refused(seg("evaluate", run, "--labels", tmp_path, "--figures", "val"), "--figures: is for a bundle")
    refused(seg("evaluate", run, "--labels", tmp_path, "--precision", "float32"), "--precision: is for a bundle")


def test_a_run_is_scored_on_the_class_of_its_model_or_the_one_that_is_named(
    seg: Seg, tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    def score(_run: str, _labels: str, classes: Classes | None, _report: object) -> RunScore:
        scored.append("" if classes is None else classes.names[classes.positive])
        return RunScore(Counts(1, 1, 1, 1), 0, {}, ShapeCounts(), [])

    monkeypatch.setattr("seg_core.run.score.score_run", score)
    run, _ = build_run(tmp_path)
    stored = Path(run, "run.json")
    data, record = make_dataset(tmp_path), json.loads(stored.read_text())
    (data / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nBuildings,1,1,1\nroad,2,2,2\n")
    command = ["evaluate", run, "--labels", tmp_path, "--data", data, "--json"]
    for classes in (("background", "road"), ("background", "building")):
        bundle = make_bundle(classes[1], classes=classes)
        record.pop("class_name", None)  # as in older records
        record["model"] = {"hash": read_bundle(bundle).hash, "uri": bundle}
        stored.write_text(json.dumps(record))
        assert seg(*command).err == ""
        assert seg(*command, "--class", "Buildings").err == ""
    shutil.rmtree(bundle)
    assert "the run's model is not there: its masks are taken for buildings" in seg(*command).err
    for name in ("road", "building"):
        stored.write_text(json.dumps({**record, "class_name": name}))
        assert seg(*command).err == ""
    assert scored == ["road", *["Buildings"] * 4, "road", "Buildings"]
    refused(seg(*command, "--class", "water"), "--class water", "its classes are background, Buildings, road")
    refused(seg("evaluate", run, "--labels", tmp_path, "--class", "road"), "--class road: name its", "--data")
    refused(seg("evaluate", make_bundle("again"), "--data", data, "--class", "road"), "--class road: is for a run")


def test_a_bundle_tells_what_it_is(seg: Seg, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(metrics={"val_iou": 0.625})
    figures = seg("models", "show", bundle, "--json").figures
    assert figures["hash"] == read_bundle(bundle).hash
    assert figures["metrics"] == {"val_iou": 0.625}
    assert figures["class"] == "building"
    assert seg("models", "show", make_bundle("roads", classes=("land", "road")), "--json").figures["class"] == "road"
    outcome = seg("models", "show", bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert "val_iou 0.6250" in outcome.out
    assert "width 4" in outcome.out


def test_a_model_is_exported_beside_its_bundle(seg: Seg, tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    figures = seg("export", "model", bundle, "--to", "torch-export", "--json").figures
    assert figures["file"] == f"{bundle}.pt2"
    assert figures["bytes"] == Path(f"{bundle}.pt2").stat().st_size > 0
    Path(f"{bundle}.pt2").unlink()
    assert seg("export", "model", f"{bundle}/", "--to", "torch-export", "--json").figures["file"] == f"{bundle}.pt2"
    refused(seg("export", "model", bundle, "--to", "torch-export"), f"{bundle}.pt2: already exists", "--out")
    refused(seg("export", "model", tmp_path / "nowhere", "--to", "onnx"), "nowhere: no such bundle")
    refused_by_parser(seg("export", "model", bundle, "--to", "tflite"), "tflite", "onnx", "torch-export")


def test_labels_of_a_run_must_fit_its_scenes(seg: Seg, tmp_path: Path, make_scene: MakeScene) -> None:
    run, _ = build_run(tmp_path)
    labels = shutil.copytree(tmp_path / "scenes", tmp_path / "labels")
    make_scene("labels/north/a.tif", 100, 119, bands=1, crs=None)
    refused(seg("evaluate", run, "--labels", labels), labels / "north/a.tif", "119 x 100 px", "120 x 100", "gdal_edit")
    make_scene("labels/north/a.tif", 100, 120, bands=1, transform=(1.0, 0.0, 400_000.0, 0.0, -1.0, 5_700_000.0))
    refused(seg("evaluate", run, "--labels", labels), labels / "north/a.tif", "does not overlap", "scenes/north/a.tif")
    (labels / "north/a.tif").unlink()
    refused(
        seg("evaluate", run, "--labels", labels),
        labels,
        "no label for scene north/a.tif",
        "for north/a.tif, north/a.tiff)",
    )
    refused(seg("evaluate", run, "--labels", labels / "south/b.tif"), "--labels", "one file for 2 scenes")
    refused(seg("evaluate", run), run, "--labels")


def train(seg: Seg, folder: Path, *args: object) -> Outcome:
    """`seg train` that must be refused before anything is written."""
    before = file_digests(folder)
    outcome = seg("train", "--data", folder / "data", "--out", folder / "trained", *args)
    assert file_digests(folder) == before
    return outcome


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--set", "bathc=8"], ["--set: bathc is not a setting", "did you mean batch?"]),
        (["--set", "learning=8"], ["--set: learning is not a setting"]),
        (["--set", "batch"], ["--set batch", "say key=value"]),
        (["--set", "batch=eight"], ["batch", "eight", "expected int"]),
        (["--set", "batch=8.5"], ["batch", "8.5", "expected int"]),
        (["--set", "augment=1"], ["augment", "1", "expected str"]),
        (["--set", "augment=wild"], ["augment = wild", "none, exposure, light, colour, strong"]),
        (["--set", "sync_batchnorm=1"], ["sync_batchnorm", "1", "expected bool"]),
        (["--set", "epochs=true"], ["epochs", "true", "expected int"]),
        (["--set", "loss=focal"], ["loss = focal", "dice, bce+dice, cross-entropy"]),
        (["--batch", 2, "--workers", 3], ["batch = 2", "3 workers"]),
        (["--min-workers", 3, "--workers", 2], ["min_workers = 3", "workers = 2"]),
        (["--readers", -2], ["readers = -2", "or -1"]),
        (["--epochs", 0], ["epochs = 0", "more than 0"]),
        (["--lr", -1], ["lr = -1", "more than 0"]),
        (["--steps", -1], ["steps = -1", "not be negative"]),
        (["--seed", 2**64], ["seed = 18446744073709551616", "less than 2^64"]),
        (["--threshold", 2], ["threshold = 2", "less than 1"]),
        (["--ema", 1], ["ema = 1", "less than 1"]),
        (["--lr", "nan"], ["lr = nan"]),
        (["--label-smoothing", 1], ["label_smoothing = 1", "less than 1"]),
        (["--edge-weight", -1], ["edge_weight = -1", "not be negative"]),
        (["--loss", "dice", "--label-smoothing", 0.1], ["label_smoothing = 0.1", "loss = dice", "bce+dice"]),
        (["--loss", "lovasz", "--edge-weight", 2], ["edge_weight = 2", "loss = lovasz", "bce+lovasz"]),
    ],
)
def test_a_setting_that_is_none_or_cannot_work_is_refused(
    seg: Seg, tmp_path: Path, args: list[object], named: list[str]
) -> None:
    make_dataset(tmp_path)
    refused(train(seg, tmp_path, "--width", 2, "--depth", 2, *args), *named)


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("bathc = 8", ["settings.toml: bathc is not a setting", "did you mean batch?"]),
        ("[train]\nbatch = 8", ["settings.toml: train is not a setting"]),
        ('batch = "eight"', ["settings.toml: batch", "expected int"]),
        ("batch = 1979-05-27", ["settings.toml: batch", "expected int"]),
        ("batch = 2\nworkers = 3", ["batch = 2", "3 workers"]),
        ("batch = ", ["--config", "settings.toml"]),
        ("batch = 8\nbatch = 9", ["--config", "settings.toml"]),
        (b"\xff\xfe", ["settings.toml"]),
    ],
)
def test_a_config_file_that_cannot_work_is_refused(
    seg: Seg, tmp_path: Path, toml: str | bytes, named: list[str]
) -> None:
    make_dataset(tmp_path)
    (tmp_path / "settings.toml").write_bytes(toml.encode() if isinstance(toml, str) else toml)
    refused(train(seg, tmp_path, "--config", tmp_path / "settings.toml"), *named)


def test_a_config_file_that_is_not_there_is_refused(seg: Seg, tmp_path: Path) -> None:
    make_dataset(tmp_path)
    refused(train(seg, tmp_path, "--config", tmp_path / "nowhere.toml"), "--config", "nowhere.toml", "No such file")


def test_the_preset_follows_from_what_there_is_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*args: str) -> TrainSettings:
        return train_settings(make_parser().parse_args(["train", "--data", "d", "--out", "o", *args]))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert settings() == make_settings("small", None, [])
    assert settings("--preset", "large") == settings("--address", "ray://head:10001") == TrainSettings()
    assert settings("--preset", "article").width == 64
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert settings() == TrainSettings()


def test_an_unknown_preset_or_choice_is_refused(seg: Seg, tmp_path: Path) -> None:
    make_dataset(tmp_path)
    refused_by_parser(train(seg, tmp_path, "--preset", "fast"), "--preset", "fast", "article")
    refused_by_parser(train(seg, tmp_path, "--loss", "focal"), "--loss", "focal", "dice")
    refused_by_parser(train(seg, tmp_path, "--batch", "eight"), "--batch", "eight")


@pytest.mark.parametrize("kind", ["bundle", "folder", "file"])
def test_a_trained_model_is_not_written_over_another_thing(seg: Seg, tmp_path: Path, kind: str) -> None:
    make_dataset(tmp_path)
    there = tmp_path / "trained"
    if kind == "bundle":
        write_light_bundle(there)
    elif kind == "folder":
        there.mkdir()
    else:
        there.write_text("mine")
    refused(train(seg, tmp_path), f"{there}: already exists", "choose another name")


def test_a_trained_model_that_cannot_be_written_is_refused(seg: Seg, tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    outcome = seg("train", "--data", data, "--out", "/proc/nowhere/bundle", "--width", 2, "--depth", 2)
    refused(outcome, "/proc/nowhere", "can't be written to", "choose another folder")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--crop", 30, "--depth", 2, "--width", 2], ["crop = 30", "stride is 8"]),
        (["--pad-multiple", 6, "--depth", 2, "--width", 2], ["pad_multiple = 6", "stride is 8"]),
        (["--model", "resnet"], ["model resnet", "smp:ARCHITECTURE/ENCODER"]),
        (["--model", "smp:Unett/resnet18"], ["architecture Unett", "similar are Unet"]),
        (["--model", "smp:Unet/resnet19"], ["encoder resnet19", "similar are", "resnet18"]),
        (["--model", "smp:Unet/tu-resnet10"], ["encoder tu-resnet10", "similar are", "tu-resnet10t"]),
        (
            ["--model", "smp:Unet/tu-swin_tiny_patch4_window7_224"],
            ["does not segment 512 x 544 px", "smp:Unet/resnet34"],
        ),
        (["--model", "smp:PAN/resnet18", "--crop", 96], ["crop = 96", "smp:PAN/resnet18", "512 works"]),
    ],
)
def test_a_model_that_cannot_work_is_refused(seg: Seg, tmp_path: Path, args: list[object], named: list[str]) -> None:
    make_dataset(tmp_path)
    refused(train(seg, tmp_path, *args), *named)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("label_class_dict.csv", "label_class_dict.csv: no such file"),
        ("train", "train: no such folder"),
        ("val_labels", "val_labels: no such folder"),
        ("train/a.tif", "train: no images in this folder"),
        ("val_labels/a.tif", "val_labels: lacks the labels of 1 of 1 images: a.tif"),
    ],
)
def test_a_dataset_that_lacks_something_is_refused(seg: Seg, tmp_path: Path, gone: str, named: str) -> None:
    path = make_dataset(tmp_path) / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    refused(train(seg, tmp_path, "--width", 2, "--depth", 2), named)


@pytest.mark.parametrize(
    "table", ["", "name,r,g,b\n", "class,r,g,b\na,0,0,0\nb,1,1,1\n", "name,r,g,b\nbackground,0,0,x\nbuilding,1,1,1\n"]
)
def test_a_table_of_classes_that_is_none_is_refused(seg: Seg, tmp_path: Path, table: str) -> None:
    path = make_dataset(tmp_path) / "label_class_dict.csv"
    path.write_text(table)
    refused(train(seg, tmp_path, "--width", 2, "--depth", 2), path)


def test_the_class_to_train_on_must_be_one_of_the_dataset(seg: Seg, tmp_path: Path) -> None:
    table = make_dataset(tmp_path) / "label_class_dict.csv"
    refused(train(seg, tmp_path, "--class", "road"), "--class road", "its classes are background, building")
    table.write_text("name,r,g,b\nbackground,0,0,0\nroad,255,255,255\n")
    refused(train(seg, tmp_path), "classes background, road", "choose one with --class, such as --class road")
    refused(train(seg, tmp_path, "--class", "building"), "--class building", "its classes are background, road")
    refused(train(seg, tmp_path, "--set", "class=rood"), "--class rood", "its classes are background, road")


def test_a_training_run_does_not_go_on_with_another_class(seg: Seg, tmp_path: Path) -> None:
    data, work = make_dataset(tmp_path), tmp_path / "trained.train"
    (data / "label_class_dict.csv").write_text("name,r,g,b\nbuildings,0,0,0\nroad,255,255,255\n")
    tiny = {"width": 2, "depth": 2}
    flags = [text for name, value in tiny.items() for text in (f"--{name}", value)]
    work.mkdir()
    for before, now in (("road", []), ("buildings", ["--class", "road"]), (None, ["--class", "road"])):
        known = asdict(make_settings("small", None, [tiny])) | {"class_name": before}
        if before is None:  # as it was before there were other classes
            del known["class_name"]
        (work / "settings.json").write_text(json.dumps(known))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: False)
            outcome = train(seg, tmp_path, *flags, *now)
        there, here = before or "building", now[-1] if now else "buildings"
        refused(outcome, f"other settings (class {there} there, {here} now)", "choose another --work")


@pytest.mark.parametrize("known", [{}, {"class_name": "Buildings"}])
def test_a_training_run_goes_on_where_the_class_is_what_it_was(tmp_path: Path, known: dict[str, str]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(known))
    _refuse_other(str(tmp_path), TrainSettings(class_name="Buildings"))


# What may import what


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", ""])
@pytest.mark.parametrize("command", [["segment", "--out", "run"], ["plan"], ["bench", "segment"], ["verify"]])
def test_a_device_that_is_none_is_refused_before_anything(seg: Seg, command: list[str], device: str) -> None:
    refused_by_parser(seg(*command, "scene.tif", "--device", device), device, "expected auto, cpu or cuda")


def test_tracebacks_leave_the_exit_code_as_it_is(seg: Seg) -> None:
    outcome = seg("query", "nope", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("seg: ")


@pytest.mark.parametrize("name", ["figures.json", "figures"])
def test_figures_of_images_are_a_table(seg: Seg, name: str) -> None:
    outcome = seg("evaluate", "built-in", "--data", "absent", "--per-image", name)
    assert outcome.code == 2
    assert outcome.err == f"seg: --per-image {name}: must be a file that ends in .parquet or .csv\n"


@pytest.mark.parametrize("command", ["segment", "bench segment", "bench scale"])
def test_ray_chooses_the_gpu_of_a_job(seg: Seg, command: str) -> None:
    arguments = ["scene.tif", "--out", "run"] if command == "segment" else []
    refused_by_parser(seg(*command.split(), *arguments, "--device", "cuda:1"), "cuda:1", "CUDA_VISIBLE_DEVICES=1")


def test_an_option_that_would_do_nothing_is_refused(seg: Seg, make_scene: MakeScene, make_bundle: MakeBundle) -> None:
    scene, bundle = make_scene(), make_bundle()
    refused(seg("plan", scene, "--model", bundle, "--order", "given"), "--order given", "add --mosaic")
    refused(seg("evaluate", bundle, "--data", "data", "--labels", "labels"), bundle, "--labels is for a run")
    refused(seg("plan", scene, "--model", bundle, "--device", "cpu"), "--device", "add --calibrate")
    refused(seg("verify", "run", "--device", "cpu"), "--model, --device", "add --deep")
    for seconds in ("0", "-1", "nan", "soon"):
        refused_by_parser(seg("bench", "segment", "--seconds", seconds), f"{seconds}: expected a number above 0")
    refused(seg("verify", "run", "--model", bundle), "--model, --device", "add --deep")
