"""Networks are refused before they fail; a training step's memory is counted; folding batch norm changes only speed."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import write_untrained
from torch import Tensor, nn

import seg_core.model.networks
from seg_core.errors import SegError
from seg_core.model.bundle import read_bundle
from seg_core.model.loading import load_model
from seg_core.model.networks import (
    build_model,
    check_sizes,
    fold_batchnorm,
    measure_network,
    stride_of,
    training_bytes_per_px,
)
from seg_core.model.unet import UNet
from seg_core.training.losses import make_loss

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = sorted(cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values())
FLOAT = 4  # bytes
SPARE = 5 / 4  # for what both passes hold for a moment


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 3),  # its input
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)), 3 + 8),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1)), 3 + 8),
        # The input, what is normalised, and what the ReLU leaves behind, which the last convolution needs as well.
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1)), 3 + 8 + 8),
        # A pooling keeps its input and, in int64, where in it the maxima were; the next convolution keeps the maxima.
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 1, 1)), 3 + 8 + 8 * 2 / 4 + 8 / 4),
    ],
    ids=["convolution", "relu", "relu in place", "batch norm", "pooling"],
)
def test_memory_of_a_small_network_is_that_counted_by_hand(network: nn.Module, channels: float) -> None:
    assert training_bytes_per_px(network, 3, 2) == int(FLOAT * channels * SPARE)


def kept_in_training(model: nn.Module, side: int) -> float:
    """Bytes a pixel that autograd keeps of a whole training step, the loss's included, each memory counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[Tensor] = []

    def note(saved: Tensor) -> Tensor:
        held.append(saved)  # alive, so that no two have the same place
        return saved

    labels = torch.ones(2, side, side, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        make_loss("bce+dice")(model.train()(torch.zeros(2, 3, side, side)), labels)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for place, size in sizes.items() if place not in own) / (2 * side**2)


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "width": 8, "depth": 3},
        {"name": "unet", "width": 16, "depth": 2, "patch": 2},
        {"name": "smp:Unet/resnet18"},
    ],
    ids=lambda architecture: architecture["name"],
)
def test_a_training_step_keeps_no_more_than_is_planned_for_it(architecture: dict[str, Any]) -> None:
    model = build_model({**architecture, "in_channels": 3, "classes": 1})
    planned = training_bytes_per_px(model, 3, stride_of(model))
    kept = kept_in_training(model, 128)
    assert kept <= planned < 1.5 * kept


def test_a_network_of_twice_the_width_takes_twice_the_memory() -> None:
    narrow, wide = (training_bytes_per_px(UNet(width=width, depth=2), 3, 4) for width in (16, 32))
    assert 1.8 * narrow < wide <= 2 * narrow


def test_a_network_of_patches_takes_much_less_memory() -> None:
    plain, patched = (training_bytes_per_px(UNet(width=16, depth=2, patch=patch), 3, 4 * patch) for patch in (1, 2))
    assert patched < plain / 3


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_as_it_was(training: bool) -> None:
    model = UNet(width=4, depth=2).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_bytes_per_px(model, 3, stride_of(model))
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def randomised(model: nn.Module) -> nn.Module:
    """As if trained: batch norms with statistics and weights of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "in_channels": 3, "classes": 1, "width": 8, "depth": 2, "patch": 2},
        {"name": "smp:Unet/resnet18", "in_channels": 3, "classes": 2},
        {"name": "smp:PSPNet/resnet18", "in_channels": 3, "classes": 2},
    ],
    ids=lambda architecture: architecture["name"],
)
@torch.inference_mode()
def test_a_network_with_its_batch_norms_folded_answers_the_same(architecture: dict[str, Any]) -> None:
    model = randomised(build_model(architecture))
    folded = fold_batchnorm(deepcopy(model))
    for module in folded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: pytest.fail("a batch norm was called"))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert expected.std() > 0
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


class Twice(nn.Sequential):
    """What comes before the batch norm is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        before = self[0](x)
        out: Tensor = self[1](before) + before
        return out


class Shared(nn.Sequential):
    """One batch norm after two convolutions."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules, nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[1](self[2](self[1](self[0](x))))
        return out


class Wayward(nn.Sequential):
    """Its way depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[0](x)
        return self[1](out) if x.mean() > 0 else out


class Named(nn.Sequential):
    """It hands its layers what they take by name."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[1](input=self[0](input=x))
        return out


@pytest.mark.parametrize("kind", [Backwards, Twice, Shared, Wayward, Named])
@torch.inference_mode()
def test_a_batch_norm_that_is_not_a_convolution_s_alone_is_left(kind: type[nn.Sequential]) -> None:
    model = randomised(kind(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    folded = fold_batchnorm(deepcopy(model))
    assert isinstance(folded[1], nn.BatchNorm2d)
    for x in (torch.rand(1, 3, 8, 8), -torch.rand(1, 3, 8, 8)):
        assert torch.equal(folded(x), model(x))


class Either(nn.ModuleList):
    """One of two ways, by the input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[int(x.mean() > 0)](x)
        return out


@torch.inference_mode()
def test_ways_that_share_a_convolution_keep_it() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = randomised(Either([nn.Sequential(conv, nn.BatchNorm2d(3)) for _ in range(2)]))
    folded = fold_batchnorm(deepcopy(model))
    for x in (torch.rand(1, 3, 8, 8), -torch.rand(1, 3, 8, 8)):
        torch.testing.assert_close(folded(x), model(x))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 2


# What of segmentation-models-pytorch is served


def build(name: str) -> nn.Module:
    return build_model({"name": name, "in_channels": 3, "classes": 1})


@pytest.fixture
def small_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are checked on small chips, to be quick."""
    monkeypatch.setattr(seg_core.model.networks, "MIN_CHIP", 128)
    monkeypatch.setattr(seg_core.model.networks, "SMALL", 128)


@pytest.mark.usefixtures("small_chips")
@pytest.mark.filterwarnings("ignore:Encoder does not have prefix tokens")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_the_sizes_of_crops_and_chips_and_learns(architecture: str) -> None:
    name = f"smp:{architecture}/{'tu-' if architecture == 'DPT' else ''}resnet18"
    model = build(name)
    check_sizes(name, model, 3, crop=128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make_loss("bce+dice")(model.train()(torch.randn(2, 3, 128, 128)), torch.ones(2, 128, 128).byte())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("small_chips")
@pytest.mark.parametrize(
    "encoder", ["mobilenet_v2", "efficientnet-b0", "mit_b0", "dpn68", "tu-convnext_atto", "tu-mobilevit_s"]
)
def test_encoders_of_any_size_are_served(encoder: str) -> None:
    check_sizes(f"smp:Unet/{encoder}", build(f"smp:Unet/{encoder}"), 3, crop=96)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        # Each of these is refused by an error of another type, or in other words: see pytorch/vision, issue 2151.
        ("Unet/tu-swin_tiny_patch4_window7_224", r"512 x 544 px \(Input height \(512\) doesn't match model \(224\)\)"),
        ("Unet/tu-swinv2_tiny_window8_256", r"512 x 544 px \(Input height \(512\) doesn't match model \(256\)\)"),
        ("DPT/tu-vit_tiny_patch16_224", r"512 x 528 px \(Input height \(512\) doesn't match model \(224\)\)"),
        ("Unet/tu-maxvit_nano_rw_256", r"512 x 544 px \(width \(\d+\) must be divisible by window \(8\)\)"),
        ("Unet/tu-efficientformer_l1", r"512 x 544 px \(The size of tensor a \(\d+\) must match"),
    ],
)
def test_encoders_of_a_fixed_size_are_refused(pair: str, reason: str) -> None:
    with pytest.raises(
        SegError, match=rf"^model smp:{pair}: does not segment {reason}.*: choose .*, such as smp:"
    ) as line:
        check_sizes(f"smp:{pair}", build(f"smp:{pair}"), 3, crop=224)
    assert "\n" not in str(line.value)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("DPT/resnet18", "Only Timm encoders are supported for DPT"),
        ("Linknet/mit_b0", "Encoder `mit_b0` is not supported for Linknet"),
        ("DeepLabV3/vgg11", "'VGG' models do not support dilated mode"),
        ("Unet/tu-levit_128", "Unsupported model downsampling pattern"),
        ("Unet/tu-vit_tiny_patch16_224", "Unsupported model downsampling pattern"),
        ("PAN/tu-swin_tiny_patch4_window7_224", "unexpected keyword argument 'output_stride'"),
    ],
)
def test_pairs_that_smp_does_not_build_are_refused_in_its_words(pair: str, reason: str) -> None:
    with pytest.raises(SegError, match=rf"^model smp:{pair}, encoder_weights = None: .*{reason}") as line:
        build(f"smp:{pair}")
    assert "\n" not in str(line.value)


def test_a_crop_that_is_too_small_for_the_network_is_refused() -> None:
    model = build("smp:PAN/resnet18")
    check_sizes("smp:PAN/resnet18", model, 3, crop=128)
    with pytest.raises(
        SegError, match=r"^crop = 96: model smp:PAN/resnet18 does not accept it \(.*too small\): 512 works"
    ):
        check_sizes("smp:PAN/resnet18", model, 3, crop=96)


def test_a_network_that_takes_no_thin_inputs_is_probed_with_higher_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seg_core.model.networks, "MAX_PROBE", 512)
    footing = measure_network(build("smp:PAN/resnet18"), 3)  # it halves its input seven times
    assert (footing.stride, footing.context_px, footing.halo) == (16, None, 128)


class Answering(nn.Module):
    """A network of smp's kind, whose answer is made from its input by a function."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.encoder = answer, nn.Module()
        self.encoder.output_stride = 32  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)  # type: ignore[no-any-return]


def refuse(x: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.usefixtures("small_chips")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda x: x[..., ::2, ::2], r"its output has 64 x 80 px"),
        (lambda x: x / 0, r"its output is not finite"),
        (refuse, r"NotImplementedError"),
    ],
)
def test_answers_of_another_size_and_numbers_that_are_none_are_refused(answer: Any, reason: str) -> None:
    check_sizes("fine", Answering(lambda x: x), 3, crop=64)
    with pytest.raises(SegError, match=rf"^model odd: does not segment 128 x 160 px \({reason}\): "):
        check_sizes("odd", Answering(answer), 3)


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_network_and_random_state_as_they_were(training: bool) -> None:
    model, state = build("smp:PSPNet/resnet18").train(training), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_sizes("smp:PSPNet/resnet18", model, 3, crop=64)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bundle_whose_network_takes_no_chips_is_refused(tmp_path: Path) -> None:
    bundle = read_bundle(write_untrained(str(tmp_path / "bundle"), width=2, depth=1))
    name = "smp:Unet/tu-coat_tiny"
    model = build(name)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    odd = replace(bundle, architecture={"name": name, "in_channels": 3, "classes": 1})
    with pytest.raises(SegError, match=rf"^model {name}: does not segment 512 x 544 px \(Input height"):
        load_model(odd, weights)
