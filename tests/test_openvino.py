"""Networks in OpenVINO: what torch computes, within rounding; and what happens where that can't be."""

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeBundle, MakeScene, write_untrained
from seg_command import SMALL, seg
from torch import Tensor, nn

from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.region import read_region
from seg_core.inference.quantize import _compare, _read_crops
from seg_core.model import engines
from seg_core.model.bundle import BUILT_IN, read_bundle, read_weights
from seg_core.model.engines import TorchNetwork, load_network
from seg_core.model.loading import load_model
from seg_core.model.networks import fold_batchnorm
from seg_core.model.openvino_network import OpenVinoNetwork, read_model
from seg_core.model.quantize import import_nncf, quantize_network
from seg_core.model.quantized import read_quantized
from seg_core.model.segmenter import Segmenter
from seg_core.processor import choose_precision
from seg_core.run.plan import Settings, make_plan
from seg_core.synthetic import draw_town

CPU = torch.device("cpu")
ROOMS = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.6}  # by which probabilities of the built-in model may differ


@pytest.fixture(scope="module")
def town() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels `uint8 (3, 320, 448)`, and which are valid."""
    pixels, _, valid = draw_town(320, 448, seed=1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), valid


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_untrained(str(tmp_path_factory.mktemp("bundles") / "bundle"), width=4, depth=2)


@pytest.mark.parametrize("precision", ROOMS)
def test_probabilities_are_those_of_torch_within_rounding(precision: str, town: Any) -> None:
    exact, other = Segmenter(BUILT_IN, "cpu"), Segmenter(BUILT_IN, "cpu", precision=precision)
    found, expected = (each(*town, 0, 320, 448) for each in (other, exact))
    assert found.dtype == np.float32
    difference = np.abs(found - expected)
    assert 0 < difference.max() < ROOMS[precision]
    assert ((found >= 0.5) != (expected >= 0.5)).mean() < ROOMS[precision] / 10
    assert (exact.exact, other.exact) == (True, False)
    assert exact.engine.startswith("torch 2.")
    assert other.engine.startswith("OpenVINO 20")


@pytest.mark.parametrize("precision", ROOMS)
def test_a_window_gives_the_same_again_and_another_size_the_same_within_rounding(precision: str, town: Any) -> None:
    pixels, valid = (np.pad(each, (*[(0, 0)] * (each.ndim - 2), (96, 96), (96, 96)), mode="reflect") for each in town)
    segmenter = Segmenter(BUILT_IN, "cpu", precision=precision)
    whole = segmenter(pixels, valid, 96, 320, 448)
    assert np.array_equal(segmenter(pixels, valid, 96, 320, 448), whole)
    for window in split(Window(0, 0, 320, 448), 192):
        rows, cols = (slice(at, at + size + 192) for at, size in ((window.row_off, window.height), window[1::2]))
        chip = np.ascontiguousarray(pixels[:, rows, cols]), np.ascontiguousarray(valid[rows, cols])
        part = segmenter(*chip, 96, window.height, window.width)
        np.testing.assert_allclose(part, whole[window.slices(Window(0, 0, 320, 448))], rtol=0, atol=ROOMS[precision])


class _OfOneSize(nn.Module):
    """A network that answers otherwise for images wider than that with which it is traced."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.stride = network, 4

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return -logits if images.shape[-2] > engines.UNET_SIDE else logits


class _Foreign(_OfOneSize):
    """A network with an operation that OpenVINO does not know."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits + torch.linalg.svdvals(images[:, 0]).sum()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(_OfOneSize, "its probabilities differ by "), (_Foreign, "Conversion is failed")],
    ids=["size", "operation"],
)
def test_torch_takes_over_what_openvino_can_not_take_and_a_line_says_so(
    bundle: str, kind: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = engines.load_model
    monkeypatch.setattr(engines, "load_model", lambda *each: kind(load(*each)).eval())
    monkeypatch.setattr(engines, "stride_of", lambda model: model.stride)
    network = load_network(bundle, read_bundle(bundle), CPU, "float32")
    assert isinstance(network, TorchNetwork)
    (line,) = caplog.messages
    assert line.startswith("the network runs in torch, which is slower: OpenVINO can't take it: ")
    assert reason in line


def test_torch_takes_over_where_openvino_is_not_installed(
    bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "seg_core.model.openvino_network", None)
    assert isinstance(load_network(bundle, read_bundle(bundle), CPU, "bfloat16"), TorchNetwork)
    assert "the network runs in torch, which is slower" in caplog.text


def test_a_segmenter_is_freed_by_whoever_drops_it_and_not_by_the_garbage_collector(bundle: str) -> None:
    """That may run in any thread, and OpenVINO's networks have crashed in those of other libraries."""
    gc.disable()
    try:
        segmenter = Segmenter(bundle, "cpu", precision="float32")
        network = weakref.ref(segmenter.network)
        segmenter(np.zeros((3, 64, 64), np.uint8), np.ones((64, 64), np.bool_), 0, 64, 64)
        assert isinstance(network(), OpenVinoNetwork)
        del segmenter
        assert network() is None
    finally:
        gc.enable()


SIGNAL = """
import os, signal, sys, threading
import numpy as np
from seg_core.model.segmenter import Segmenter

segmenters = [Segmenter(sys.argv[1], "cpu", precision="float32")]
segmenters[0](np.zeros((3, 64, 64), np.uint8), np.ones((64, 64), np.bool_), 0, 64, 64)
thread = threading.Thread(target=segmenters.clear)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_process_whose_segmenter_was_freed_in_another_thread_takes_signals(bundle: str) -> None:
    """The stack for signals that OpenVINO gives a thread must outlive the network."""
    command = [sys.executable, "-X", "faulthandler", "-P", "-c", SIGNAL, bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_gpu_refuses_what_only_cpus_compute_in() -> None:
    for precision in ("exact", "int8"):
        with pytest.raises(SegError, match=f"^--precision {precision}: is for CPUs: add --device cpu"):
            choose_precision(precision, on_gpu=True)
    with pytest.raises(SegError, match="is for CPUs"):
        load_network(BUILT_IN, read_bundle(BUILT_IN), torch.device("cuda"), "int8")


def test_converting_and_quantizing_write_nothing_in_the_home_of_the_user(
    bundle: str, make_scene: MakeScene, tmp_path: Path
) -> None:
    """OpenVINO and NNCF would send usage statistics, and keep an identity for them there."""
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys; from aerial_seg.cli.main import main; from seg_core.model.segmenter import Segmenter\n"
        "Segmenter(sys.argv[1], 'cpu', precision='float32')\n"
        "sys.exit(main(['quantize', sys.argv[2], '--model', sys.argv[1], '--out', sys.argv[3], '--crops', '1']))"
    )
    left_out = {"CI", "TF_BUILD", "JENKINS_URL"}  # where these are set, nothing is sent anyhow
    variables = {name: value for name, value in os.environ.items() if name not in left_out} | {"HOME": str(home)}
    command = [sys.executable, "-c", script, bundle, make_scene(height=64, width=64), str(tmp_path / "quantized")]
    subprocess.run(command, check=True, env=variables, capture_output=True)
    assert [path.name for path in home.rglob("*") if path.is_file() and ".cache" not in path.parts] == []


@pytest.mark.usefixtures("without_actors")
def test_a_bundle_is_quantized_and_a_region_segmented_in_int8(
    make_bundle: MakeBundle,
    make_scene: MakeScene,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene, model, quantized = make_scene(height=150, width=200), make_bundle(), tmp_path / "quantized"
    command = ["segment", scene, "--out", tmp_path / "run", *SMALL, "--precision", "int8"]
    _, err = seg(capsys, *command, "--model", model, code=2)
    assert "--precision int8: the model has no int8 network: make a bundle that has one: seg quantize" in err
    out, err = seg(capsys, "quantize", scene, "--model", model, "--out", quantized, "--crops", "2", "--json")
    assert "--crops 2: the scenes gave only 1: " in err
    found = json.loads(out)
    assert 0 <= found["differing_share"] < 0.1
    assert (found["crops"], found["hash"]) == (1, read_bundle(str(quantized)).hash)
    assert read_bundle(str(quantized)).weights_sha256 == read_bundle(model).weights_sha256
    seg(capsys, *command, "--model", quantized)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["settings"]["precision"], record["exact"]) == ("int8", False)
    assert record["software"]["engine"].startswith("OpenVINO")
    out, _ = seg(capsys, "verify", tmp_path / "run", "--deep", "--json")
    assert json.loads(out)["rechecked"] > 0
    _, err = seg(capsys, "quantize", scene, "--model", model, "--out", quantized, code=2)
    assert "quantized: already exists" in err


def test_the_crops_of_quantizing_are_no_smaller_than_the_chips_of_a_run(bundle: str, make_scene: MakeScene) -> None:
    found, described = read_region([make_scene(height=520, width=1030)])[0], read_bundle(bundle)
    plan, _ = make_plan(found, described, Settings(halo=described.halo, threshold=0.5))
    least = described.min_chip
    sizes = [image.shape[2:] for image, _ in _read_crops(plan, described, 9, lambda _: None)]
    assert sizes == [(512, 512), (512, 512), (512, least), (least, 512), (least, 512), (least, least)]


def test_int8_is_compared_where_there_is_data(bundle: str) -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    model = load_model(read_bundle(bundle), read_weights(bundle, read_bundle(bundle)))
    quantized = quantize_network(fold_batchnorm(model), [image], 64)
    int8, valid = OpenVinoNetwork(read_model(quantized), "int8"), np.zeros((64, 64), bool)
    valid[:48] = True

    class DiffersWhereMissing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(torch.from_numpy(valid), int8(images), -int8(images))

    for mask, share in ((valid, 0.0), (~valid, 1.0), (np.ones((64, 64), bool), 0.25)):
        found = _compare(DiffersWhereMissing(), quantized, read_bundle(bundle), [(image, mask)])
        assert found == pytest.approx(share, abs=0.002)


def test_quantizing_leaves_the_logging_of_the_process_as_it_was(make_bundle: MakeBundle) -> None:
    """NNCF has a class of loggers of its own, and sets the levels of handlers that others have given its logger."""
    import_nncf()
    handler, log = logging.NullHandler(), logging.getLogger("nncf")
    log.addHandler(handler)
    before = logging.getLoggerClass(), log.level
    path = make_bundle()
    network = fold_batchnorm(load_model(read_bundle(path), read_weights(path, read_bundle(path))))
    quantize_network(network, [np.zeros((1, 3, 64, 64), np.float32)], 64)
    assert (logging.getLoggerClass(), log.level) == before
    assert before[0] is logging.Logger
    assert handler.level == logging.NOTSET
    log.removeHandler(handler)


def test_quantizing_twice_gives_the_same_network(bundle: str, make_scene: MakeScene, tmp_path: Path) -> None:
    scene = make_scene(height=64, width=64)
    from aerial_seg.cli.main import main

    hashes = set()
    for name in ("a", "b"):
        assert main(["quantize", scene, "--model", bundle, "--out", str(tmp_path / name)]) == 0
        hashes.add(read_bundle(str(tmp_path / name)).hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_an_int8_network_that_is_damaged_is_refused(change: str, tmp_path: Path) -> None:
    built_in = read_bundle(BUILT_IN)
    for name in ("int8.xml", "int8.bin"):
        (tmp_path / name).write_bytes(Path(BUILT_IN, name).read_bytes())
    assert isinstance(read_quantized(str(tmp_path), built_in.int8_sha256).model, bytes)
    if change == "missing":
        (tmp_path / "int8.bin").unlink()
    else:
        (tmp_path / "int8.xml").write_bytes(Path(BUILT_IN, "int8.xml").read_bytes().replace(b"FakeQuantize", b"Sinh"))
    with pytest.raises(SegError, match=r"damaged: int8.xml and int8.bin are not what the bundle was written with"):
        read_quantized(str(tmp_path), built_in.int8_sha256)


def test_a_processor_without_bfloat16_is_named(bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    network = load_network(bundle, read_bundle(bundle), CPU, "bfloat16")
    assert isinstance(network, OpenVinoNetwork)
    network(torch.zeros(1, 3, 64, 64))
    native = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert ("this processor has no instructions for bfloat16" in caplog.text) == (not native)
