"""The READMEs are true: their commands and snippets run, their links lead somewhere, their sentences are short."""

import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shapely
from conftest import NORTH_UP, UTM, outside_environment, write_untrained
from footprints import write_vectors
from readme import LINK, NAMES, README, ROOT, anchor, blocks, commands, headings, inline_code, read, sentences

from aerial_seg.cli.main import main
from aerial_seg.cli.parser import make_parser
from seg_core.imagery.geotiff import write_geotiff
from seg_core.storage.files import publish
from seg_core.synthetic import draw_town

WORDS, WORDS_IN_SENTENCE = 1800, 29
SIDE = 300  # px of a scene

# The first two steps make the environment in which the tests run, as .ci/run does by the same words.
INSTALL = re.compile(r"^python3 -m venv \.venv && \.venv/bin/pip install -q -e (\S+) && \.venv/bin/")
# Options that make a command short; the last value of an option counts. The first pattern that fits is used.
SMALL_PIPE = "--model light --tile-size 64 --part 128 --window 64 --seconds 0.2"
CHEAP = (
    (r"seg train .*--from", "--epochs 1 --steps 1 --batch 1 --crop 64 --readers 0"),
    (r"seg train", "--width 4 --depth 2 --patch 1 --epochs 1 --steps 2 --batch 2 --crop 64"),
    (r"seg dataset make", "--block 100"),
    (r"seg bench train", "--width 4 --depth 2 --patch 1 --batch 2 --crop 64"),
    (r"seg bench scale", f"{SMALL_PIPE} --side {SIDE} --sizes 2,4"),
    (r"pytest", "--collect-only -q tests/test_threads.py"),
)
# The test machine has two cores, and one bucket of which these are folders.
REPLACED = (
    (r"--workers 8 --min-workers 4", "--workers 2 --min-workers 1"),
    (r"s3://(imagery|results|bucket)", r"{s3}/\1"),
)
# These take minutes or serve: their own tests run them.
ELSEWHERE = ("seg demo", "seg view run", "seg bench segment imagery/")
PREPARATION = {
    "seg_core/README.md": ["cp -r light bundle"],
    "seg_core/run/README.md": ["seg segment imagery/ --out run", "cp -r imagery moved"],
}


def write_town(path: str, seed: int, *, row: int = 0, label: str | None = None) -> None:
    """Write a drawn scene, some squares to the south of the first, and its label if that has a path."""
    image, building, valid = draw_town(SIDE, SIDE, seed)
    a, b, x, d, e, y = NORTH_UP
    place = (a, b, x, d, e, y - SIDE * row)
    write_geotiff(path, np.ascontiguousarray(image.transpose(2, 0, 1)), crs=UTM, transform=place, nodata=255)
    if label is not None:
        truth = np.where(valid, building, 255)[None].astype(np.uint8)
        write_geotiff(label, truth, crs=UTM, transform=place, nodata=255)


def write_dataset(folder: Path) -> None:
    """Write a training dataset of two images, and one to validate on."""
    for split, seeds in (("train", (1, 2)), ("val", (3,))):
        (folder / split).mkdir(parents=True)
        (folder / f"{split}_labels").mkdir()
        for seed in seeds:
            image, building, _ = draw_town(SIDE, SIDE, seed)
            for path, pixels in (
                (folder / split / f"{seed}.tiff", image.transpose(2, 0, 1)),
                (folder / f"{split}_labels" / f"{seed}.tif", np.repeat(building[None] * 255, 3, axis=0)),
            ):
                write_geotiff(str(path), np.ascontiguousarray(pixels), crs=UTM, transform=NORTH_UP)
    (folder / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,255,255,255\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the READMEs name: scenes, a manifest, labels, a training dataset. And a light model."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("imagery", "more", "elsewhere"):
        (folder / name).mkdir()
    write_town(f"{folder}/imagery/town.tif", 0, label=f"{folder}/truth.tif")
    for name in ("footprints", "districts"):
        write_vectors(folder / f"{name}.geojson", [shapely.box(20, 20, 60, 60)], "EPSG:4326", name=["old town"])
    write_town(f"{folder}/more/town.tif", 1, row=2)
    write_town(f"{folder}/elsewhere/town.tif", 2, row=4)
    (folder / "scenes.csv").write_text("uri\nelsewhere/town.tif\n")
    write_dataset(folder / "massachusetts-buildings")
    write_untrained(f"{folder}/light", width=2, depth=1)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the inputs, in which the test is; and the imagery in S3."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    for row in (6, 7):
        write_town(f"{tmp_path}/remote.tif", row, row=row)
        publish(f"{s3}/imagery/2025/{row}.tif", (tmp_path / "remote.tif").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cheap(command: str, s3: str) -> str:
    """The variant of a command that takes seconds, on inputs that are there."""
    command = INSTALL.sub("", command)
    for pattern, replacement in REPLACED:
        command = re.sub(pattern, replacement.format(s3=s3), command)
    options = [options for pattern, options in CHEAP if re.match(pattern, command)]
    return " ".join([command, *options[:1]])


def run(command: str) -> None:
    """Run a command: `seg` in this process, beside the Ray that is there; what needs a shell in a shell."""
    words = shlex.split(command)
    if words[0] == "seg" and ">" not in words:
        assert main(words[1:]) == 0, command
        return
    where = ROOT if words[0] == "pytest" else None
    outside = {name: value for name, value in outside_environment().items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=where, env=outside, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.usefixtures("without_workers", "without_actors")
@pytest.mark.parametrize("name", [name for name in NAMES if commands(name)])
def test_the_commands_and_snippets_run_in_their_order(
    name: str, folder: Path, s3: str, request: pytest.FixtureRequest
) -> None:
    for command in [*PREPARATION.get(name, []), *commands(name)]:
        short = cheap(command, s3)
        if not short.startswith((*ELSEWHERE, ". ")):
            run(short)
    for snippet in blocks(name, "python"):
        if "import ray" in snippet:  # on the Ray of the session: another one takes seconds to start
            request.getfixturevalue("ray_cluster")
            exec(snippet.replace('"run/', f'"{folder}/run/'), {})  # noqa: S102 - its processes are in another folder
        else:
            subprocess.run(
                [sys.executable, "-c", snippet], cwd=folder, env=outside_environment(), timeout=300, check=True
            )


def test_commands_that_take_minutes_or_serve_are_run_by_other_tests() -> None:
    assert cheap(commands(README)[0], "") == "seg demo"
    assert '["seg", "demo"' in read("tests/test_demo.py")
    assert "seg view run" in commands(README)
    assert '"view", built.run' in read("tests/test_view.py")
    (bench,) = [each for name in NAMES for each in commands(name) if each.startswith(ELSEWHERE[-1])]
    assert make_parser().parse_args(shlex.split(bench)[1:])
    assert '"bench", "segment"' in read("tests/test_bench.py")


def test_ci_finds_the_command_that_installs_and_tests() -> None:
    found = [line for line in read(README).splitlines() if re.match(r"python3 -m venv .*pytest", line)]
    assert len(found) == 1
    assert "grep -m1 -E '^python3 -m venv .*pytest' README.md" in read(".ci/run")


def test_the_extras_that_are_named_are_there() -> None:
    for name in NAMES:
        for extra in re.findall(r"(?:-e '\.|aerial-seg)\[(\w+)\]", read(name)):
            assert re.search(rf"^{extra} = \[", read("pyproject.toml"), re.MULTILINE), f"{name}: {extra}"


def test_the_readme_is_for_users_who_have_ten_minutes() -> None:
    assert len(read(README).split()) <= WORDS


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_short(name: str) -> None:
    long = [sentence for sentence in sentences(name) if len(sentence.split()) > WORDS_IN_SENTENCE]
    assert not long


def test_sentences_are_found_in_all_kinds_of_text() -> None:
    found = list(sentences(README))
    assert "Memory grows with the scene." in found  # a paragraph
    assert "A missing pixel is never background." in found  # a list
    assert "everything is done" in found  # a table


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for _, target in LINK.findall(read(name)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), f"{name}: {target}"
        if fragment:
            assert fragment in {anchor(text) for _, text in headings(str(there.resolve().relative_to(ROOT)))}, target


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("CHANGELOG.md")])
def test_the_contents_name_each_chapter(name: str) -> None:
    listed = [target[1:] for _, target in LINK.findall(read(name)) if target.startswith("#")]
    chapters = [anchor(text) for level, text in headings(name) if level == 2 and text != "Contents"]
    assert listed[: len(chapters)] == chapters


@pytest.mark.parametrize("package", ["seg_core", "jobs"])
def test_each_room_is_described(package: str) -> None:
    table = read(f"{package}/README.md").partition("## Rooms")[2].partition("\n## ")[0]
    rooms = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    modules = {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("_")}
    named = {name.strip("/") for name in re.findall(r"`([\w/]+)`", table)}
    assert rooms | modules <= named


def options_of(parser: ArgumentParser) -> Iterator[str]:
    """All options of a parser and of the commands below it, and the names of these."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, _SubParsersAction):
            for command, below in action.choices.items():
                yield command
                yield from options_of(below)


@pytest.mark.parametrize("name", NAMES)
def test_options_and_commands_that_are_named_exist(name: str) -> None:
    known = set(options_of(make_parser())) | set(re.findall(r'"(--[a-z-]+)"', read("cluster/local.py")))
    for code in inline_code(name):
        if not code.startswith(("pytest", "pip")):
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known, f"{name}: {code}"
        for command in re.findall(r"^seg (\w+)", code):
            assert command in known, f"{name}: {code}"
