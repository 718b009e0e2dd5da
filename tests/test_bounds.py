"""Memory does not grow with the scene: measured over every process of a real run."""

import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import rasterio
from conftest import MakeBundle, outside_environment
from rasterio.windows import Window

MAX_GROWTH = 1.2


SIDE = 2304  # px: so many blocks are sampled of both scenes that all threads have some


def tile_region(source: Path, target: Path, times: int) -> Path:
    """A scene made by laying a corner of the region out `times` x `times`."""
    with rasterio.open(source) as region:
        pixels, profile, side = region.read(window=Window(0, 0, SIDE, SIDE)), region.profile, SIDE
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
                    name = "driver" if each == root else each.cmdline()[0].split("/")[-1].split("(")[0]
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
    return dict(found)


def high_water_mark(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def scenes(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    region = shared / "brookline" / "region.tif"
    return {times: tile_region(region, folder / f"{times}.tif", times) for times in (1, 2)}


def test_memory_does_not_grow_with_the_scene(scenes: dict[int, Path], make_bundle: MakeBundle, tmp_path: Path) -> None:
    model = make_bundle(width=2, depth=1)
    found = {}
    for times, scene in scenes.items():
        out = str(tmp_path / str(times))
        # Parts of which even the small scene has many that are whole, so that as much is read at once of both.
        options = ["--model", model, "--tile-size", "256", "--window", "256", "--part", "512", "--out", out]
        found[times] = peaks([sys.executable, "-m", "aerial_seg.cli.main", "segment", str(scene), *options])
    small, large = found[1], found[2]
    print({kind: (round(small[kind]), round(large.get(kind, 0))) for kind in small})
    assert "ray::MapWorker" in small
    for kind in small:
        assert large.get(kind, 0) <= max(MAX_GROWTH * small[kind], small[kind] + 20), kind
