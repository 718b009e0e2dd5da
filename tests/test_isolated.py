"""Work in child processes: in order, and whatever becomes of a child, it is known over which item."""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rasterio.errors import NotGeoreferencedWarning
from runs import BuiltRun, build_run, published_parts, read_part

from seg_core.errors import ReadError, SegError
from seg_core.run import isolated
from seg_core.run.check import Expected
from seg_core.run.isolated import for_each_isolated
from seg_core.run.parts import Location
from seg_core.run.plan import Part
from seg_core.run.resume import parts_to_do
from seg_core.run.tables import State, _read_state, part_path
from seg_core.run.verify import VerifyReport, _verify_part, repair


def work(item: int) -> int:
    """Negative items are the signals that end the process, 13 and 14 can't be done."""
    if item < 0:
        print("a word of C++", file=sys.__stderr__)
        os.kill(os.getpid(), -item)
        time.sleep(60)
    if item == 13:
        raise ReadError("13: can't be read")
    if item == 14:
        os._exit(3)
    return 2 * item


def crashed(item: int) -> int:
    return item


def done(items: list[int]) -> list[int]:
    return list(for_each_isolated(work, crashed, items, threads=3))


@pytest.fixture
def made(tmp_path: Path) -> BuiltRun:
    return BuiltRun(*build_run(tmp_path))


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    assert [child for child in psutil.Process().children() if "serve()" in " ".join(child.cmdline())] == []


def test_results_come_in_order_over_several_batches_and_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "BATCH_SIZE", 7)
    monkeypatch.setattr(isolated, "ITEMS_PER_CHILD", 10)
    assert done([100 + n for n in range(50)]) == [2 * (100 + n) for n in range(50)]
    assert done([]) == []


def test_an_item_that_crashes_its_process_is_known_and_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isolated, "BATCH_SIZE", 4)
    items = [0, -signal.SIGABRT, 2, 3, 4, -signal.SIGSEGV]
    assert done(items) == [item if item < 0 else 2 * item for item in items]
    assert capfd.readouterr() == ("", "")


def warn(item: int) -> int:
    warnings.warn(NotGeoreferencedWarning("Dataset has no geotransform, gcps, or rpcs."), stacklevel=1)
    return item


def test_what_rasterio_says_of_arrays_in_memory_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(for_each_isolated(warn, warn, [1], None)) == [1]
    assert capfd.readouterr() == ("", "")


def test_an_exception_of_the_function_comes_out() -> None:
    with pytest.raises(ReadError, match=r"^13: can't be read$"):
        done([1, 13, 2])


@pytest.mark.parametrize("item", [-signal.SIGKILL, -signal.SIGTERM, 14])
def test_a_process_that_is_killed_or_ends_says_nothing_about_its_item(item: int) -> None:
    with pytest.raises(
        SegError, match=f"a process that reads files of the run ended with exit code {3 if item == 14 else item}"
    ):
        done([1, item, 2])


def test_a_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "numpy", "pyarrow", "seg_core"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(4)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert done([1]) == [2]


def test_nothing_goes_on_where_the_caller_stops_early() -> None:
    results = for_each_isolated(work, crashed, list(range(100, 200)), threads=1)
    assert next(results) == 200
    results.close()


def crash_over(expected: Expected, where: tuple[Location, Part]) -> VerifyReport:
    """Check a part in a process that the part of the smaller scene crashes."""
    if where[1].scene.scene_id == "south/b.tif":
        os.abort()
    return _verify_part(expected, where)


def crash_over_footer(path: str) -> State:
    if f"-{SMALLER}-" in path:
        os.abort()
    return _read_state(path)


SMALLER = hashlib.sha256(b"south/b.tif").hexdigest()[:16]  # what the names of its parts begin with


def test_a_part_that_crashes_its_reader_is_named_and_the_rest_is_read(
    made: BuiltRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seg_core.run.verify._verify_part", crash_over)
    monkeypatch.setattr("seg_core.run.tables._read_state", crash_over_footer)
    shutil.rmtree(Path(made.run, "ledger"))  # with it, files that are as they were published are not read
    *others, crashing = made.parts
    found = repair(made.run)
    assert found.problems == [f"part-{crashing.key}.parquet: can't be read: it crashes the process that reads it"]
    assert found.bad_parts == [part_path(made.run, crashing.key)]
    assert found.num_done == sum(len(read_part(part_path(made.run, part.key))) for part in others)
    assert len(published_parts(made.run)) == len(others)
    Path(found.bad_parts[0]).touch()
    assert list(parts_to_do(made.run, made.plan)) == [crashing]


@pytest.mark.parametrize("seed", range(2))
def test_a_part_with_bytes_flipped_anywhere_is_survived(
    made: BuiltRun,
    seed: int,
) -> None:
    # Arrow's reader of Parquet need not raise for damaged metadata: some of it crashes the process.
    draw, content = random.Random(seed), bytearray(made.path().read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in draw.sample(range(footer if seed % 2 else 4, len(content) - 8), 20):
        content[at] ^= 1 << draw.randrange(8)
    made.path().write_bytes(content)
    assert made.path().name in made.problems()
    assert set(parts_to_do(made.run, made.plan)) <= {made.parts[0]}
    assert repair(made.run).bad_parts == [str(made.path())]
    assert list(parts_to_do(made.run, made.plan)) == [made.parts[0]]
