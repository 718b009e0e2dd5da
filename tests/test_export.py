"""An exported model answers as its bundle does, to a program that has nothing but the file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import DATA_FIELDS, MakeBundle, write_untrained
from numpy.typing import NDArray

from seg_core.errors import SegError
from seg_core.model.bundle import HEADER, Bundle, describe, read_bundle, read_weights, write_bundle
from seg_core.model.export import SUFFIXES, export_model
from seg_core.model.networks import build_model, measure_network
from seg_core.model.segmenter import Segmenter

# Torch's own exporters warn of their own insides.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

UNET = {"name": "unet", "in_channels": 3, "width": 4, "depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "unet": {**UNET, "classes": 1},
    "three classes of patches": {**UNET, "classes": 3, "patch": 2},
    "smp": {
        "name": "smp:Unet/resnet18",
        "in_channels": 3,
        "classes": 1,
        "encoder_depth": 3,
        "decoder_channels": [16, 8, 8],
    },
}
SIZES = [(1, 3, 2), (2, 2, 5), (5, 4, 4)]  # images, and strides of height and width

# Each runs in a process of its own, which knows files of arrays and the exported file, and not this project.
ONNX = """
import json, sys
import numpy as np, onnxruntime
assert onnxruntime.set_default_logger_severity(3) is None
for line in sys.stdin:
    model, folder, number = json.loads(line)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    header = session.get_modelmeta().custom_metadata_map["model.json"]
    for i in range(number):
        fed = dict(np.load(f"{folder}/in-{i}.npz"))
        np.save(f"{folder}/out-{i}.npy", session.run(["probability"], fed)[0])
    print(json.dumps([names, json.loads(header)]))
assert "torch" not in sys.modules and "seg_core" not in sys.modules
"""
TORCH = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
for line in sys.stdin:
    model, folder, number = json.loads(line)
    extra = {"model.json": ""}
    program = torch.export.load(model, extra_files=extra).module()
    for i in range(number):
        fed = np.load(f"{folder}/in-{i}.npz")
        with torch.inference_mode():
            answer = program(torch.from_numpy(fed["pixels"]), torch.from_numpy(fed["valid"]))
        np.save(f"{folder}/out-{i}.npy", answer.numpy())
    print(json.dumps([[["pixels", "valid"], ["probability"]], json.loads(extra["model.json"])]))
assert "seg_core" not in sys.modules
"""
PROGRAMS = {"onnx": ONNX, "torch-export": TORCH}


def write_model(path: str, architecture: dict[str, Any], **fields: Any) -> str:
    """Write the bundle of a seeded network of any architecture, whose answers vary with the image."""
    torch.manual_seed(0)
    model = build_model(architecture)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 64))
    several = architecture["classes"] > 1
    described: dict[str, Any] = {
        "architecture": architecture,
        **DATA_FIELDS,
        "classes": ("background", "water", "building") if several else ("background", "building"),
        "building": 2 if several else 1,
        "mean": (100.0, 121.0, 140.0),
        "std": (40.0, 61.0, 90.0),
        **vars(measure_network(model, 3)),
        "threshold": 0.5,
        **fields,
    }
    write_bundle(path, Bundle(**described), {k: v.numpy() for k, v in model.state_dict().items()})
    return path


def draw_inputs(stride: int) -> list[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Images of several sizes, a third of whose pixels are missing."""
    rng = np.random.default_rng(0)
    shapes = [(n, rows * stride, cols * stride) for n, rows, cols in SIZES]
    return [(rng.integers(0, 256, (n, 3, h, w), dtype=np.uint8), rng.random((n, h, w)) < 0.67) for n, h, w in shapes]


def run_elsewhere(kind: str, jobs: list[tuple[str, str, int]], cwd: Path) -> list[Any]:
    """Have another process load each model and answer the inputs of its folder; return what it says of them."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    command = [sys.executable, "-c", PROGRAMS[kind]]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, cwd=cwd, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


Exported = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What the exported models answered, by kind of file and model, with what their bundles did."""
    base = tmp_path_factory.mktemp("export")
    answers: Exported = {}
    for kind, suffix in SUFFIXES.items():
        jobs = []
        for name, architecture in MODELS.items():
            bundle = str(base / name)
            if kind == "onnx":
                write_model(bundle, architecture)
            out, folder = base / kind / f"{name}{suffix}", base / kind / name
            returned = export_model(bundle, kind, str(out))
            folder.mkdir()
            inputs = draw_inputs(returned.stride)
            for i, (pixels, valid) in enumerate(inputs):
                np.savez(folder / f"in-{i}.npz", pixels=pixels, valid=valid)
            jobs.append((str(out), str(folder), len(inputs)))
            answers[kind, name] = {"bundle": bundle, "out": out, "returned": returned, "inputs": inputs}
        for name, (names, header) in zip(MODELS, run_elsewhere(kind, jobs, base), strict=True):
            found = [np.load(base / kind / name / f"out-{i}.npy") for i in range(len(SIZES))]
            answers[kind, name].update(names=names, header=header, found=found)
    return answers


every_kind = pytest.mark.parametrize("kind", SUFFIXES)
every_model = pytest.mark.parametrize("name", MODELS)


@every_kind
@every_model
def test_an_exported_model_answers_as_the_bundle_does(exported: Exported, kind: str, name: str) -> None:
    answer = exported[kind, name]
    segmenter = Segmenter(answer["bundle"], "cpu")
    for (pixels, valid), found in zip(answer["inputs"], answer["found"], strict=True):
        expected = np.stack([segmenter(p, v, 0, *v.shape) for p, v in zip(pixels, valid, strict=True)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, strict=True)
        unmasked = np.stack([segmenter(p, np.ones_like(v), 0, *v.shape) for p, v in zip(pixels, valid, strict=True)])
        assert np.abs(expected - unmasked).max() > 1e-3  # so that to leave out the mask would show


@every_kind
@every_model
def test_an_exported_model_describes_itself(exported: Exported, kind: str, name: str) -> None:
    answer = exported[kind, name]
    assert answer["header"] == describe(read_bundle(answer["bundle"])) == describe(answer["returned"])
    assert answer["header"] == json.loads(Path(answer["bundle"], HEADER).read_bytes())
    assert answer["names"] == [["pixels", "valid"], ["probability"]]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 3), (3, 1)])
def test_an_image_for_onnx_may_be_as_small_as_the_stride(exported: Exported, rows: int, cols: int) -> None:
    answer = exported["onnx", "unet"]
    segmenter = Segmenter(answer["bundle"], "cpu")
    stride = segmenter.bundle.stride
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, rows * stride, cols * stride), dtype=np.uint8)
    valid = np.ones((1, *pixels.shape[2:]), np.bool_)
    session = onnxruntime.InferenceSession(answer["out"], providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixels": pixels, "valid": valid})
    expected = segmenter(pixels[0], valid[0], 0, *valid.shape[1:])
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5, strict=True)


def test_one_logit_stands_for_the_second_class_whichever_is_the_building(tiny: str, tmp_path: Path) -> None:
    bundle = read_bundle(tiny)
    turned = Bundle(**{**vars(bundle), "classes": ("building", "background"), "building": 0})
    path, out = str(tmp_path / "turned"), tmp_path / "turned.pt2"
    write_bundle(path, turned, read_weights(tiny, bundle))
    export_model(path, "torch-export", str(out))
    pixels, valid = draw_inputs(8)[0]
    found = torch.export.load(out).module()(torch.from_numpy(pixels), torch.from_numpy(valid)).numpy()
    expected = Segmenter(path, "cpu")(pixels[0], valid[0], 0, *valid.shape[1:])
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5, strict=True)


@every_kind
def test_nothing_but_the_file_is_left(exported: Exported, kind: str) -> None:
    folder = exported[kind, "unet"]["out"].parent
    assert {p.name for p in folder.iterdir() if p.is_file()} == {f"{name}{SUFFIXES[kind]}" for name in MODELS}


@every_kind
def test_a_file_that_is_there_already_is_refused_and_left_alone(
    make_bundle: MakeBundle, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "model"
    out.write_text("precious")
    with pytest.raises(SegError, match=rf"^{out}: already exists: .*--out"):
        export_model(make_bundle(), kind, str(out))
    assert out.read_text() == "precious"


@every_kind
def test_a_bundle_that_is_none_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SegError, match="no such bundle"):
        export_model(str(tmp_path / "absent"), kind, str(tmp_path / "new" / "model"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    return write_untrained(str(path), width=1, depth=0)


@every_kind
def test_a_failure_to_write_leaves_nothing_behind(
    tiny: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    def fail(_model: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(onnx, "save", fail)
    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(tiny, kind, str(tmp_path / "model.x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
@pytest.mark.parametrize("out", ["model.onnx", "new/model.onnx"])
def test_without_the_packages_that_onnx_needs_they_are_named_with_how_to_get_them(
    tiny: str, tmp_path: Path, package: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SegError, match=rf"^--to onnx: {package} is not installed: pip install .*\[onnx\]") as caught:
        export_model(tiny, "onnx", str(tmp_path / out))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
