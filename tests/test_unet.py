"""The U-Net is the article's, its footing is found by probing, and tiles of any size give the scene's own answer."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import write_untrained
from numpy.typing import NDArray
from torch import Tensor, nn

from seg_core.errors import SegError
from seg_core.grid import MIN_CHIP, Window, chip_window, reflect, split
from seg_core.model.bundle import read_weights
from seg_core.model.engines import TorchNetwork
from seg_core.model.loading import load_model
from seg_core.model.networks import build_model, find_min_chip, fold_batchnorm, measure_network, normalise
from seg_core.model.segmenter import Segmenter
from seg_core.model.unet import ConvBlock, DownBlock, UNet, UpBlock

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 330, 421  # multiples of neither stride nor window


def enliven(model: nn.Module, in_channels: int = 3) -> nn.Module:
    """Fit the batch norms to noise: an untrained network else answers nearly the same whatever it is shown."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # statistics are those of the one batch
    model.train()
    with torch.no_grad():
        model(torch.randn(1, in_channels, 256, 256, generator=torch.Generator().manual_seed(1)))
    return model.eval()


# The network


def test_the_network_of_the_article_has_37_million_parameters() -> None:
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(36.96e6, abs=0.005e6)


def test_the_channels_double_from_64_to_1024() -> None:
    with torch.device("meta"):
        model = UNet()
        for block, (before, after) in zip(model.down, pairwise([3, 64, 128, 256, 512]), strict=True):
            assert block(torch.empty(1, before, 8, 8))[1].shape[1] == after
        assert model.bottleneck(torch.empty(1, 512, 8, 8)).shape[1] == 1024
        assert [block.convs[0].out_channels for block in model.up] == [512, 256, 128, 64]


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_each_block_holds_two_3_x_3_convolutions_with_batch_norm_and_relu(depth: int) -> None:
    model = UNet(width=2, depth=depth)
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
    assert len(blocks) == 2 * depth + 1
    for block in blocks:
        assert [type(layer) for layer in block] == 2 * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert block[0].kernel_size == block[3].kernel_size == (3, 3)
        assert block[0].out_channels == block[3].in_channels == block[3].out_channels
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 2 * len(blocks) + 1  # and the head


@pytest.mark.parametrize(("classes", "in_channels", "depth"), [(1, 3, 0), (1, 3, 2), (5, 4, 3)])
def test_logits_have_the_size_of_the_image(classes: int, in_channels: int, depth: int) -> None:
    model = UNet(in_channels=in_channels, classes=classes, width=2, depth=depth)
    assert model(torch.zeros(2, in_channels, 24, 40)).shape == (2, classes, 24, 40)


def test_a_down_block_returns_what_is_pooled_and_the_skip() -> None:
    pooled, skip = DownBlock(3, 8)(torch.randn(2, 3, 12, 20))
    assert pooled.shape == (2, 8, 6, 10)
    assert skip.shape == (2, 8, 12, 20)
    assert torch.equal(pooled, skip.unflatten(2, (6, 2)).unflatten(4, (10, 2)).amax(dim=(3, 5)))


def test_an_up_block_keeps_its_channels_until_it_has_seen_the_skip() -> None:
    block = UpBlock(16, 8, 4)
    x, skip = torch.randn(2, 16, 3, 5), torch.randn(2, 8, 6, 10)
    assert block.up(x).shape == (2, 16, 6, 10)
    assert block.convs[0].in_channels == 16 + 8
    assert block(x, skip).shape == (2, 4, 6, 10)


@pytest.mark.parametrize(
    ("depth", "patch", "height", "width", "wanted"),
    [
        (4, 1, 100, 120, "112 x 128"),
        (4, 1, 112, 120, "112 x 128"),
        (4, 1, 1500, 1500, "1504 x 1504"),
        (1, 1, 3, 2, "4 x 2"),
        (0, 3, 3, 5, "3 x 6"),
        (3, 2, 1500, 1496, "1504 x 1504"),
    ],
)
def test_a_size_off_the_stride_is_refused_with_the_size_to_pad_to(
    depth: int, patch: int, height: int, width: int, wanted: str
) -> None:
    message = rf"^{height} x {width} px: .*stride is {patch * 2**depth}: pad to {wanted}$"
    with torch.device("meta"), pytest.raises(SegError, match=message):
        UNet(width=1, depth=depth, patch=patch)(torch.empty(1, 3, height, width))


# Patches


@pytest.mark.parametrize(("classes", "patch", "depth"), [(1, 2, 2), (5, 2, 0), (3, 3, 1), (2, 4, 1)])
def test_a_network_of_patches_answers_at_the_size_of_the_image(classes: int, patch: int, depth: int) -> None:
    model = UNet(in_channels=4, classes=classes, width=2, depth=depth, patch=patch)
    assert model.stride == patch * 2**depth
    assert model(torch.zeros(2, 4, 2 * model.stride, 3 * model.stride)).shape == (
        2,
        classes,
        2 * model.stride,
        3 * model.stride,
    )


def test_a_network_of_patches_sees_every_pixel_and_tells_them_apart() -> None:
    model = enliven(UNet(width=4, depth=1, patch=2)).double().requires_grad_(False)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    answer = model(x)
    for row, col in ((6, 6), (6, 7), (7, 6), (7, 7)):
        changed = x.clone()
        changed[..., row, col] += 1
        assert not torch.equal(model(changed), answer)
    inside = answer[0, 0, 6:8, 6:8].flatten().tolist()
    assert len(set(inside)) == 4


@torch.inference_mode()
def test_pixels_of_a_patch_come_out_where_they_went_in() -> None:
    model = UNet(in_channels=1, classes=1, width=4, depth=0, patch=2).double()
    ((conv, norm, _, second, other, _),) = (list(model.bottleneck),)
    for layer in (conv, second):  # four channels, each passed on as it is
        layer.weight.zero_()
        layer.weight[range(4), range(4), 1, 1] = 1
    for layer in (norm, other):
        layer.eval().eps = 1e-20  # not 0, which some versions of torch refuse
    model.head.weight.zero_()
    model.head.weight[range(4), range(4)] = 1
    model.head.bias.zero_()
    x = torch.rand(2, 1, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), x)


def test_with_patches_of_one_pixel_the_network_is_the_one_without() -> None:
    torch.manual_seed(0)
    plain = UNet(width=4, depth=2).eval()
    torch.manual_seed(0)
    patched = UNet(width=4, depth=2, patch=1).eval()
    x = torch.randn(1, 3, 16, 20)
    assert torch.equal(plain(x), patched(x))
    assert UNet(width=4, depth=2, patch=2).down[0].convs[0].in_channels == 12
    assert UNet(width=4, depth=2, patch=2).head.out_channels == 4


def test_patches_make_the_network_cheaper_on_the_same_image() -> None:
    plain, patched = (measure_network(UNet(width=8, depth=2, patch=p), 3).activation_bytes_per_px for p in (1, 2))
    assert patched < plain / 2


# Names


def test_a_network_of_smp_is_built_without_weights_to_download() -> None:
    model = build_model({"name": "smp:Unet/resnet18", "in_channels": 4, "classes": 2}).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 4, 32, 64)).shape == (1, 2, 32, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smp:Unett/resnet18", "Unett.*similar are .*Unet"),
        ("smp:Unet/resnet19", "resnet19.*similar are .*resnet18"),
        ("smp:Unet", "smp:Unet: not known.*smp:Unet/resnet34"),
        ("u-net", "u-net: not known.*unet"),
    ],
)
def test_an_unknown_name_is_refused_with_names_to_use_instead(name: str, message: str) -> None:
    with pytest.raises(SegError, match=message):
        build_model({"name": name, "in_channels": 3, "classes": 1})


# The footing


@pytest.mark.parametrize(
    ("depth", "patch", "stride", "halo"),
    [(1, 1, 2, 8), (2, 1, 4, 24), (3, 1, 8, 48), (4, 1, 16, 96), (1, 2, 4, 16), (2, 2, 8, 48), (2, 3, 12, 72)],
)
def test_probing_finds_stride_and_halo(depth: int, patch: int, stride: int, halo: int) -> None:
    footing = measure_network(UNet(width=2, depth=depth, patch=patch), 3)
    assert (footing.stride, footing.halo) == (stride, halo)
    assert footing.context_px is not None
    assert halo - stride < footing.context_px <= halo


def test_a_context_that_is_wider_than_the_greatest_halo_is_cut_off() -> None:
    footing = measure_network(UNet(width=1, depth=5), 3)
    assert footing.stride == 32
    assert footing.context_px is not None
    assert footing.context_px > footing.halo == 128


def test_probing_leaves_the_network_as_it_was() -> None:
    model = UNet(width=2, depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_network(model.train(), 3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    measure_network(model.eval(), 3)
    assert not model.training


def test_a_network_of_twice_the_width_takes_twice_the_memory() -> None:
    narrow, wide = (measure_network(UNet(width=width, depth=2), 3).activation_bytes_per_px for width in (8, 16))
    assert wide == 2 * narrow > 0


# Tiles


def cut(pixels: NDArray[np.uint8], at: Window) -> NDArray[np.uint8]:
    """A chip of a scene that goes on by reflection."""
    rows = reflect(at.row_off, at.row_off + at.height, pixels.shape[1])
    cols = reflect(at.col_off, at.col_off + at.width, pixels.shape[2])
    return np.ascontiguousarray(pixels[:, rows[:, None], cols])


@pytest.fixture(scope="module")
def scene() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    path = write_untrained(str(tmp_path_factory.mktemp("bundles") / "bundle"), width=4, depth=4)
    segmenter = Segmenter(path, "cpu")
    model = load_model(segmenter.bundle, read_weights(path, segmenter.bundle))
    enliven(model)
    segmenter.network = TorchNetwork(fold_batchnorm(model), segmenter.device, channels_last=False, bfloat16=False)
    return segmenter


def segment(segmenter: Segmenter, scene: NDArray[np.uint8], window: int, halo: int) -> NDArray[np.float32]:
    """Probability of a scene, window by window."""
    result = np.full(scene.shape[1:], np.nan, np.float32)
    for at in split(Window(0, 0, *scene.shape[1:]), window):
        chip = cut(scene, chip_window(at, halo, segmenter.bundle.stride, segmenter.bundle.min_chip))
        inside = np.s_[at.row_off : at.row_off + at.height, at.col_off : at.col_off + at.width]
        result[inside] = segmenter(chip, np.ones(chip.shape[1:], np.bool_), halo, at.height, at.width)
    return result


@pytest.fixture(scope="module")
def whole(segmenter: Segmenter, scene: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probability of the padded scene in one go; it varies enough for a wrong pixel to show."""
    padded = np.pad(scene, ((0, 0), (96, 96 + -HEIGHT % 16), (96, 96 + -WIDTH % 16)), mode="reflect")
    result = segmenter(padded, np.ones(padded.shape[1:], np.bool_), 96, HEIGHT, WIDTH)
    assert result.std() > 0.05
    return result


def furthest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("window", [64, 80, 128, 256])
def test_tiled_output_equals_whole_scene_output(
    segmenter: Segmenter, scene: NDArray[np.uint8], whole: NDArray[np.float32], window: int
) -> None:
    assert furthest(segment(segmenter, scene, window, 96), whole) == 0


@pytest.mark.parametrize(
    ("window", "halo", "difference"), [(128, 80, 5e-4), (128, 0, 0.1), (129, 96, 0.1)], ids=["narrow", "none", "off"]
)
def test_too_narrow_a_halo_and_a_window_off_the_strides_grid_show(
    segmenter: Segmenter,
    scene: NDArray[np.uint8],
    whole: NDArray[np.float32],
    window: int,
    halo: int,
    difference: float,
) -> None:
    assert furthest(segment(segmenter, scene, window, halo), whole) > difference


def test_the_same_chip_gives_the_same_bits(segmenter: Segmenter, scene: NDArray[np.uint8]) -> None:
    first, second = (segment(segmenter, scene[:, :100, :100], 64, 96) for _ in range(2))
    assert np.array_equal(first, second)


@torch.inference_mode()
@pytest.mark.parametrize(("depth", "patch"), [(4, 1), (3, 2)])
def test_tiles_differ_from_the_whole_by_rounding_alone(depth: int, patch: int) -> None:
    torch.manual_seed(0)
    model = enliven(UNet(width=4, depth=depth, patch=patch)).double().requires_grad_(False)
    x = torch.randn(3, 130, 150, dtype=torch.float64)

    def infer(at: Window) -> Tensor:
        chip = chip_window(at, 96, 16)
        rows = torch.from_numpy(reflect(chip.row_off, chip.row_off + chip.height, 130))
        cols = torch.from_numpy(reflect(chip.col_off, chip.col_off + chip.width, 150))
        logits: Tensor = model(x[:, rows[:, None], cols].unsqueeze(0))
        return logits[0, 0, 96 : 96 + at.height, 96 : 96 + at.width]

    whole = infer(Window(0, 0, 130, 150))
    for at in split(Window(0, 0, 130, 150), 128):
        same = whole[at.row_off : at.row_off + at.height, at.col_off : at.col_off + at.width]
        torch.testing.assert_close(infer(at), same, rtol=0, atol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize(("width", "depth", "patch"), [(4, 2, 1), (8, 2, 2)])
def test_from_its_least_chip_on_a_networks_values_do_not_depend_on_the_chip(width: int, depth: int, patch: int) -> None:
    torch.manual_seed(0)
    model = enliven(UNet(width=width, depth=depth, patch=patch))
    halo = measure_network(model, 3).halo
    least = max(find_min_chip(model, 3), 2 * halo + 8 * model.stride)  # so that there is something to compare
    sides = [least + number * model.stride for number in (0, 1, 5, 60)]
    x = torch.randn(1, 3, sides[-1], sides[-1], generator=torch.Generator().manual_seed(0))
    inside = np.s_[..., halo : least - halo, halo : least - halo]
    first, *others = [model(x[..., :side, :side].contiguous())[inside] for side in sides]
    assert all(torch.equal(first, other) for other in others)


def test_the_least_chip_follows_from_the_smallest_input_of_a_convolution() -> None:
    # 8 channels at a quarter of the side: 8 * 50**2 = 20,000 and 8 * 51**2 = 20,808 values
    assert find_min_chip(UNet(width=4, depth=2), 3) == 204
    assert find_min_chip(UNet(width=32, depth=3, patch=2), 3) == 208


def test_a_deep_and_narrow_network_has_larger_chips_than_the_others() -> None:
    assert measure_network(UNet(width=4, depth=2), 3).min_chip == MIN_CHIP
    assert measure_network(UNet(width=4, depth=5), 3).min_chip == 576


def test_what_stands_in_missing_pixels_changes_nothing(segmenter: Segmenter, scene: NDArray[np.uint8]) -> None:
    chip, valid = scene[:, :64, :64], np.ones((64, 64), np.bool_)
    valid[10:40, 20:50] = False
    changed = np.where(valid, chip, 255).astype(np.uint8)
    assert np.array_equal(segmenter(chip, valid, 16, 32, 32), segmenter(changed, valid, 16, 32, 32))
    every = np.ones_like(valid)
    assert not np.array_equal(segmenter(chip, every, 16, 32, 32), segmenter(changed, every, 16, 32, 32))


@torch.inference_mode()
def test_the_window_is_cut_out_of_its_chip_at_the_halo(segmenter: Segmenter, scene: NDArray[np.uint8]) -> None:
    chip, valid, bundle = scene[:, :64, :96], np.ones((64, 96), np.bool_), segmenter.bundle
    x = normalise(torch.from_numpy(chip)[None], torch.from_numpy(valid)[None], bundle.mean, bundle.std)
    expected = segmenter.network(x).sigmoid()[0, 0, 16:46, 16:36].numpy()
    np.testing.assert_allclose(segmenter(chip, valid, 16, 30, 20), expected, rtol=0, atol=1e-5, strict=True)


def test_a_chip_without_valid_pixels_holds_no_building(segmenter: Segmenter, scene: NDArray[np.uint8]) -> None:
    found = segmenter(scene[:, :64, :64], np.zeros((64, 64), np.bool_), 16, 30, 20)
    assert found.shape == (30, 20)
    assert not found.any()
