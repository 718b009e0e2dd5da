"""Memory does not grow with the scene: measured over every process of a real run."""

import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import rasterio
from conftest import MakeBundle, outside_environment
from rasterio.windows import Window

from seg_core.run.normalization import BLOCK

MAX_GROWTH = 1.2
# MiB that a process takes at its first work, such as one that writes parts. A small run may end before it gets any. The
# pixels of the large scene are more.
FIRST_WORK = 40
SEG = [sys.executable, "-m", "aerial_seg.cli.main"]


def tile_region(source: Path, target: Path, side: int, times: int) -> Path:
    """A scene made by laying a corner of the region out `times` x `times`."""
    with rasterio.open(source) as region:
        pixels, profile = region.read(window=Window(0, 0, side, side)), region.profile
    profile.update(height=times * side, width=times * side, zlevel=1)
    with rasterio.open(target, "w", **profile) as out:
        for row in range(times):
            for col in range(times):
                out.write(pixels, window=Window(col * side, row * side, side, side))
    return target


def peaks(command: list[str]) -> dict[str, float]:
    """Run a command and return the peak resident memory in MiB of each kind of process below it.

    The kernel keeps the peak (VmHWM, proc(5)), so that none falls between two looks; it begins anew where a fork of
    the driver becomes another program. So the latest look counts, at the name as well: Ray names its workers late.
    """
    latest: dict[int, tuple[str, float]] = {}
    process = subprocess.Popen(
        command, env=outside_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def watch() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            below = []
            with suppress(psutil.NoSuchProcess):  # it has ended just now
                below = root.children(recursive=True)
            for each in [root, *below]:
                try:
                    mark = high_water_mark(each.pid)
                    name = "driver" if each == root else kind_of(each)
                except (psutil.Error, OSError, IndexError, StopIteration):
                    continue  # it has ended meanwhile
                latest[each.pid] = name, mark
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate(timeout=900)
    watcher.join()
    assert process.returncode == 0, err
    found: dict[str, float] = defaultdict(float)
    for kind, mark in latest.values():
        found[kind] = max(found[kind], mark)
    found.pop("default_worker.py", None)  # of a worker that ended before it had a name, and had not started
    return dict(found)


def kind_of(process: psutil.Process) -> str:
    """What Ray calls a process, or else the script that Python runs in it."""
    words = process.cmdline()
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return (script if words[0].split("/")[-1].startswith("python") else words[0]).split("/")[-1].split("(")[0]


def high_water_mark(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


MakeScenes = Callable[[int, int], dict[str, str]]


@pytest.fixture
def scenes(shared: Path, tmp_path: Path) -> MakeScenes:
    """Makes a small scene with that side in px, and a large one with that many times the side."""

    def make(side: int, times: int) -> dict[str, str]:
        region = shared / "brookline" / "region.tif"
        sizes = {"small": 1, "large": times}
        return {name: str(tile_region(region, tmp_path / f"{name}.tif", side, size)) for name, size in sizes.items()}

    return make


def assert_no_growth(peaks_of: dict[str, dict[str, float]]) -> None:
    small, large = peaks_of["small"], peaks_of["large"]
    print({kind: (round(small[kind]), round(large.get(kind, 0))) for kind in small})
    for kind in small:
        assert large.get(kind, 0) <= max(MAX_GROWTH * small[kind], small[kind] + FIRST_WORK), kind


def test_segmenting_takes_no_more_memory_for_a_larger_scene(
    scenes: MakeScenes, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    # Parts of which even the small scene has many that are whole, so that as much is read at once of both.
    options = ["--model", make_bundle(width=2, depth=1), "--tile-size", "256", "--window", "256", "--part", "512"]
    options += ["--normalize", "model"]  # the sample of the imagery has its own test
    found = {
        name: peaks([*SEG, "segment", scene, *options, "--out", str(tmp_path / name)])
        for name, scene in scenes(1536, 3).items()
    }
    assert "ray::MapWorker" in found["small"]
    assert_no_growth(found)


def test_sampling_the_imagery_takes_no_more_memory_for_a_larger_scene(scenes: MakeScenes) -> None:
    # Of both, as many whole blocks are sampled as of any scene: a small one of fewer blocks takes less.
    assert_no_growth({name: peaks([*SEG, "plan", scene]) for name, scene in scenes(8 * BLOCK, 2).items()})
