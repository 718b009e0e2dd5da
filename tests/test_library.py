"""Code that is imported into somebody else's program leaves that program's process as it was."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeScene, outside_environment
from rasterio.errors import NotGeoreferencedWarning
from sources import EVERY, ROOT, imports, is_ours

from aerial_seg.cli import main as command_line_main
from aerial_seg.ray_session import ray_session
from aerial_seg.terminal import command_line, owns_process
from seg_core.environment import environment
from seg_core.imagery.data_files import gdal_environment
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.open import open_image
from seg_core.model.cpu_threads import at_least_two_threads
from seg_core.run.rows import encode_png

LOOK = """
import contextlib, importlib, logging, os, signal, warnings

def state():
    levels = {{name: logging.getLogger(name).level for name in ("", "seg_core", "ray", "huggingface_hub", "rasterio")}}
    handlers = {{name: len(logging.getLogger(name).handlers) for name in levels}}
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), list(warnings.filters), levels, handlers, signals, os.getcwd(), os.fstat(2)

for name in {others}:
    with contextlib.suppress(ImportError):  # a name in a module
        importlib.import_module(name)
before = state()
for name in {ours}:
    importlib.import_module(name)
for one, other in zip(before, state(), strict=True):
    if isinstance(one, dict):
        one, other = set(one.items()) - set(other.items()), set(other.items()) - set(one.items())
    assert one == other, (one, other)
"""


def test_to_import_everything_changes_nothing_of_the_process(tmp_path: Path) -> None:
    """What other libraries do when they are imported is not looked at: they are imported before."""
    ours = [name.removesuffix(".__init__").replace("jobs", "aerial_seg", 1) for name, _ in EVERY]
    needed = set().union(*(imports(name, path, top_only=True) for name, path in EVERY))
    others = sorted({name for name in needed if name and not is_ours(name)})
    assert {"rasterio", "ray", "torch"} <= set(others)
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(others=others, ours=ours)],
        env=outside_environment(PROJ_DATA=str(tmp_path), PROJ_LIB=str(tmp_path), GDAL_DATA=str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_the_library_prints_nothing() -> None:
    found = [
        f"{path}:{number}"
        for name, path in EVERY
        if name.startswith("seg_core.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.lstrip().startswith("print(") or "sys.stdout." in line or "sys.stderr.write" in line
    ]
    assert found == []


def test_files_of_another_proj_are_not_used_and_its_variable_stays(
    make_scene: MakeScene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proj.db").touch()
    monkeypatch.setenv("PROJ_DATA", str(tmp_path))
    with open_image(make_scene()) as dataset:
        assert dataset.crs.to_epsg() == 32633
    with gdal_environment({"GDAL_CACHEMAX": 64}):
        assert os.environ["PROJ_DATA"] == str(tmp_path)
    assert os.environ["PROJ_DATA"] == str(tmp_path)


def test_a_scene_without_georeference_is_warned_of_by_rasterio_and_not_on_the_command_line(tmp_path: Path) -> None:
    path = str(tmp_path / "plain.png")
    Path(path).write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with command_line():
            write_geotiff(str(tmp_path / "plain.tif"), np.zeros((1, 4, 4), np.uint8))
            with open_image(path):
                pass
        with pytest.raises(NotGeoreferencedWarning), open_image(path):
            pass


def test_messages_of_the_library_are_lines_of_the_command_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("seg_core.storage.s3")
    with command_line():
        log.warning("S3 at %s does not answer", "here")
        log.info("of no interest")
    assert capsys.readouterr().err == "S3 at here does not answer\n"
    assert caplog.messages == []
    log.warning("in a notebook")
    assert caplog.messages == ["in a notebook"]
    assert capsys.readouterr().err == ""


def test_only_the_command_line_owns_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(command_line_main, "_run", lambda _: seen.append(owns_process()) or 0)
    assert command_line_main.main(["models", "show", "x"]) == 0
    assert seen == [True]
    assert not owns_process()


def test_standard_error_is_redirected_by_the_command_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """While Ray starts."""
    terminal, seen = os.fstat(2), []

    class StartedError(SystemExit):
        pass

    def start(*_: object, **__: object) -> None:
        seen.append(os.fstat(2) == terminal)
        raise StartedError

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    level = logging.getLogger("ray").level
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), ray_session(None):
            pass
        if len(seen) == 1:
            with command_line(), pytest.raises(KeyboardInterrupt), ray_session(None):
                pass
    assert seen == [True, False, True]
    assert os.fstat(2) == terminal
    assert logging.getLogger("ray").level == level
    assert "OMP_WAIT_POLICY" not in os.environ or os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_variables_are_set_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEG_THERE", "before")
    monkeypatch.delenv("SEG_ABSENT", raising=False)
    with pytest.raises(RuntimeError), environment({"SEG_THERE": "now", "SEG_ABSENT": "now"}):  # noqa: PT012
        assert (os.environ["SEG_THERE"], os.environ["SEG_ABSENT"]) == ("now", "now")
        raise RuntimeError
    assert os.environ["SEG_THERE"] == "before"
    assert "SEG_ABSENT" not in os.environ


def test_threads_of_torch_are_given_back(one_thread: None) -> None:  # noqa: ARG001
    import torch

    with at_least_two_threads():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
