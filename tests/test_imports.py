"""Who imports whom: floors that are built on one another, with a wall between imagery and models."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sources import EVERY, ROOT, imports, is_ours, modules

import seg_core
from seg_core import api, results

# Each floor imports from those above it in this list, and from itself.
LIBRARY = (
    ("errors", "environment", "version", "grid", "chips", "grey_levels", "threads", "processor", "synthetic"),
    ("storage",),
    ("imagery", "model"),
    ("training",),
    ("run",),
    ("plots",),
    ("inference", "datasets"),
    ("audit", "footprints"),
    ("report",),
    ("view",),
    ("results",),
    ("api",),
)
JOBS = (
    ("terminal", "progress", "processes", "metrics", "node_watch", "ray_node"),
    ("ray_session", "capacity"),
    ("spread", "resources"),
    ("segmenting", "training", "submitting"),
    ("segment", "train", "calibrate", "submit"),
    ("demo", "benchmarks"),
    ("cli",),
)
FLOORS = {"seg_core": LIBRARY, "jobs": JOBS}


def test_there_is_something_to_look_at() -> None:
    assert len(EVERY) > 70
    assert "ray" in imports("jobs.segment", ROOT / "jobs/segment.py")
    assert "jobs.segmenting.actor" in imports("jobs.segment", ROOT / "jobs/segment.py")
    assert "rasterio" in imports("seg_core.imagery.open", ROOT / "seg_core/imagery/open.py")
    assert "torch" in imports("seg_core.model.segmenter", ROOT / "seg_core/model/segmenter.py")


@pytest.mark.parametrize(("name", "path"), EVERY, ids=[name for name, _ in EVERY])
def test_a_module_imports_from_its_own_floor_or_those_below_it(name: str, path: Path) -> None:
    folder = name.split(".", maxsplit=1)[0]
    if path.name == "__init__.py":
        return
    rooms = {room: number for number, floor in enumerate(FLOORS[folder]) for room in floor}
    own = name.split(".")[1]
    assert own in rooms, "a new module at the top needs its floor"
    for other in sorted(filter(is_ours, imports(name, path))):
        top, *rest = other.split(".")
        assert top in ({"seg_core", "jobs"} if folder == "jobs" else {"seg_core"})
        if top == folder and rest and rest[0] in rooms and rest[0] != own:
            assert rooms[rest[0]] < rooms[own] or _are_single(rooms, own, rest[0]), f"{name} imports {other}"


def _are_single(rooms: dict[str, int], own: str, other: str) -> bool:
    """Whether both are modules, not rooms, of one floor, for which it is enough that they form no circle."""
    single = {path.stem for folder in FLOORS for path in (ROOT / folder).glob("*.py")}
    return rooms[own] == rooms[other] and {own, other} <= single


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_form_no_circle(folder: str) -> None:
    files = {name: path for name, path in modules(folder).items() if path.name != "__init__.py"}
    graph = {name: {each for each in imports(name, path) if each in files} - {name} for name, path in files.items()}
    done: list[str] = []
    while graph:
        free = sorted(name for name, needed in graph.items() if needed <= set(done))
        assert free, f"a circle among {sorted(graph)}"
        done += free
        graph = {name: needed for name, needed in graph.items() if name not in free}
    assert len(done) == len(files)


def test_only_jobs_and_tests_import_jobs() -> None:
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in {"jobs", "tests", "build", "dist"} and not any(part.startswith(".") for part in parts):
            assert not {name.split(".")[0] for name in imports("", path)} & {"jobs", "aerial_seg"}, path


def test_no_file_of_tests_imports_another() -> None:
    """What several of them need is in a module of its own beside them."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not {name for name in imports("", path) if name.startswith("test_")}, path


def test_packages_reexport_nothing() -> None:
    found = [path for _, path in EVERY if path.name == "__init__.py" and path.parent.name != "seg_core"]
    assert len(found) > 8
    for path in found:
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, f"{path}: more than a docstring"


def test_the_package_offers_the_public_interface_and_imports_it_when_asked() -> None:
    tree = ast.parse((ROOT / "seg_core/__init__.py").read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in at_import if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert len(at_import) == 1
    for name in seg_core.__all__:
        assert getattr(seg_core, name) is getattr(results if hasattr(results, name) else api, name)
    assert set(seg_core.__all__) < set(dir(seg_core))
    with pytest.raises(AttributeError, match="no attribute 'segment_region'"):
        seg_core.segment_region  # noqa: B018


def loaded_by(*names: str) -> set[str]:
    """The top-level names of all that is loaded in a fresh process that imports modules."""
    code = "import sys, importlib; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def below(room: str) -> list[str]:
    return [name for name in modules("seg_core") if name.startswith(f"seg_core.{room}.")]


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["seg_core"], {"numpy", "torch", "rasterio", "pyarrow", "boto3", "ray"}),
        (["seg_core.api"], {"ray"}),
        (below("imagery"), {"torch", "ray"}),
        (below("model"), {"rasterio", "pyproj", "shapely", "boto3", "ray"}),
        (list(modules("seg_core")), {"ray"}),
        (["aerial_seg.cli.main"], {"numpy", "torch", "rasterio", "pyarrow", "pandas", "boto3", "ray"}),
        (["aerial_seg.segmenting.writers"], {"torch", "rasterio", "pandas", "boto3", "ray"}),
        (["seg_core.run.resume"], {"torch", "rasterio", "pandas", "boto3", "duckdb", "geopandas", "ray"}),
    ],
    ids=["the package", "the public interface", "imagery", "model", "everything", "the parser", "a writer", "a resume"],
)
def test_what_a_room_loads(names: list[str], absent: set[str]) -> None:
    assert len(names) == 1 or len(names) > 5
    found = loaded_by(*(name.removesuffix(".__init__") for name in names))
    assert "seg_core" in found
    assert not found & absent


def test_all_packages_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = {name.replace("aerial_seg", "jobs") for name in project["packages"]}
    assert listed == {name.removesuffix(".__init__") for name, path in EVERY if path.name == "__init__.py"}
