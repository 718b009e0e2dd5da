"""Training that begins from a bundle: what is kept, what is fitted to other bands and classes, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA_FIELDS, UTM, MakeBundle
from scipy.special import logit
from seg_command import seg
from torch import Tensor, nn

from aerial_seg.training.fine_tuning import (
    choose_classes,
    describe_change,
    match_classes,
    read_initial_weights,
    read_origin,
    take_over,
)
from aerial_seg.training.preparation import describe_model, identify_files
from aerial_seg.training.settings import FINE_TUNING, PRESETS, TrainSettings, difference, make_settings
from aerial_seg.training.worker import make_learner
from seg_core.errors import SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.model.adapt import Change, adapt_stem, adapt_weights
from seg_core.model.bundle import BUILT_IN, Bundle, find_bundle, read_bundle, read_weights, write_bundle
from seg_core.model.networks import build_model, class_probability
from seg_core.training.dataset import Classes
from seg_core.training.loop import epochs, set_training_mode, step

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = Change(bands=(3, 3), outputs=(1, 1), positive=1, sources=(0, 1))
MakeModel = Callable[..., nn.Module]


def unet(bands: int, outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model({"name": "unet", "in_channels": bands, "classes": outputs, "width": 2, "depth": 1, "patch": 2})


def resnet(bands: int, outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model({"name": "smp:Unet/resnet18", "in_channels": bands, "classes": outputs})


def fitted(old: nn.Module, new: nn.Module, change: Change) -> nn.Module:
    new.load_state_dict(adapt_weights(old.state_dict(), new, change))
    return new.eval()


def pixels(bands: int, seed: int = 0) -> Tensor:
    return torch.randn(1, bands, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [unet, resnet])
@torch.inference_mode()
def test_further_bands_change_no_answer_before_training(make: MakeModel) -> None:
    old, image = make(3, 1).eval(), pixels(5)
    new = fitted(old, make(5, 1, seed=1), replace(SAME, bands=(3, 5)))
    assert torch.allclose(new(image), old(image[:, :3]), atol=1e-5)


@pytest.mark.parametrize("make", [unet, resnet])
@pytest.mark.parametrize("bands", [1, 2])
@torch.inference_mode()
def test_bands_that_are_gone_look_like_the_mean_of_the_others(make: MakeModel, bands: int) -> None:
    old, image = make(3, 1).eval(), pixels(bands)
    new = fitted(old, make(bands, 1, seed=1), replace(SAME, bands=(3, bands)))
    mean = image.mean(dim=1, keepdim=True)
    assert torch.allclose(new(image), old(torch.cat([image, *[mean] * (3 - bands)], dim=1)), atol=1e-4)


def test_one_band_gets_what_timm_gives_it() -> None:
    from timm.models import adapt_input_conv

    weight = torch.randn(4, 3, 3, 3)
    assert torch.allclose(adapt_stem(weight, 3, 1), adapt_input_conv(1, weight))


@pytest.mark.parametrize("make", [unet, resnet])
@torch.inference_mode()
def test_between_one_and_two_outputs_the_probabilities_stay(make: MakeModel) -> None:
    old, image = make(3, 1).eval(), pixels(3)
    expected = class_probability(old(image), 1)
    # Roads, which are new, are not in sight: the classes are those of before, the other way round.
    two = fitted(old, make(3, 2, seed=1), replace(SAME, outputs=(1, 2), sources=(1, 0)))
    assert torch.allclose(class_probability(two(image), 0), expected, atol=1e-6)
    one = fitted(two, make(3, 1, seed=2), replace(SAME, outputs=(2, 1), positive=0, sources=(1, 0)))
    assert torch.allclose(class_probability(one(image), 1), expected, atol=1e-6)


@torch.inference_mode()
def test_of_the_head_a_class_of_the_same_name_keeps_its_logits_and_another_begins_anew() -> None:
    old, blank, image = unet(3, 3).eval(), unet(3, 3, seed=1), pixels(3)
    fresh = {k: v.clone() for k, v in blank.state_dict().items()}
    new = fitted(old, blank, Change(bands=(3, 3), outputs=(3, 3), positive=1, sources=(2, None, 0)))
    assert torch.equal(new(image)[:, [0, 2]], old(image)[:, [2, 0]])
    assert torch.equal(new.state_dict()["head.weight"][4:8], fresh["head.weight"][4:8])  # of patches of 2 x 2 px
    assert torch.equal(new.state_dict()["head.bias"][4:8], fresh["head.bias"][4:8])


def test_weights_of_another_architecture_are_named() -> None:
    state = unet(3, 1).state_dict()
    lacking = {k: v for k, v in state.items() if not k.startswith("head.")}
    with pytest.raises(SegError, match=r"^the file lacks head\.bias, head\.weight$"):
        adapt_weights(lacking, unet(3, 1), SAME)
    with pytest.raises(SegError, match=r"^the architecture does not know a, b, c and 1 more$"):
        adapt_weights({**state, **dict.fromkeys("abcd", state["head.bias"])}, unet(3, 1), SAME)
    wide = build_model({"name": "unet", "in_channels": 3, "classes": 1, "width": 4, "depth": 1, "patch": 2})
    with pytest.raises(SegError, match=r"measures [0-9 x]+, that of the architecture [0-9 x]+$"):
        adapt_weights(state, wide, SAME)


def test_classes_are_matched_by_name_and_all_buildings_are_buildings() -> None:
    assert match_classes(("background", "building"), ("Background", "buildings")) == (0, 1)
    assert match_classes(("background", "building"), ("road", "building", "background")) == (None, 1, 0)
    assert match_classes(("building", "buildings"), ("buildings", "building")) == (1, 0)


def test_what_is_fitted_is_said_in_a_line_each() -> None:
    binary = ("background", "building")
    assert describe_change(SAME, binary, binary) == []
    assert describe_change(SAME, binary, ("background", "Buildings")) == []
    assert describe_change(replace(SAME, bands=(3, 4)), binary, binary) == [
        "4 bands, the model had 3: the first 3 are taken for those, the others begin at 0"
    ]
    assert describe_change(replace(SAME, bands=(3, 1)), binary, binary) == [
        "1 band, the model had 3: the weights of the last 2 are added to the others'"
    ]
    assert describe_change(replace(SAME, sources=(0, None)), binary, ("background", "road")) == [
        "classes background, road, the model had background, building: new, with random weights: road"
    ]


def make_origin(**fields: Any) -> Bundle:
    described = {"architecture": {}, "stride": 16, "context_px": None, "halo": 0, "activation_bytes_per_px": 1}
    return Bundle(**{**DATA_FIELDS, **described, "threshold": 0.5, **fields})


def test_the_normalisation_stays_and_the_resolution_is_that_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"mean": (1.0, 2.0, 3.0, 4.0), "std": (5.0, 6.0, 7.0, 8.0), "gsd_m": 1.05}
    origin = make_origin()
    mean, std = (120.0, 121.0, 122.0, 4.0), (60.0, 61.0, 62.0, 8.0)
    kept = {"threshold": 0.5, "temperature": 1.0}
    assert take_over(origin, measured) == {"mean": mean, "std": std, "gsd_m": 1.05, **kept}
    assert capsys.readouterr().err == ""
    one = {"mean": (1.0,), "std": (5.0,), "gsd_m": None}
    assert take_over(origin, one) == {"mean": (120.0,), "std": (60.0,), "gsd_m": 1.0, **kept}
    assert take_over(replace(origin, gsd_m=None), one)["gsd_m"] is None
    assert take_over(origin, measured | {"gsd_m": 0.6})["gsd_m"] == 0.6
    assert "the data measures 0.6 m a pixel, the model was trained at 1 m" in capsys.readouterr().err


def test_the_class_is_that_of_the_bundle_where_the_dataset_has_it(tmp_path: Path) -> None:
    (tmp_path / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,1,1,1\nroad,2,2,2\n")
    roads = make_origin(classes=("background", "road"))
    assert choose_classes(str(tmp_path), "", roads).positive == 2
    assert choose_classes(str(tmp_path), "building", roads).positive == 1
    assert choose_classes(str(tmp_path), "", make_origin(classes=("background", "trees"))).positive == 1
    assert choose_classes(str(tmp_path), "", None).positive == 1


def test_settings_are_those_for_fine_tuning_unless_they_are_set(tmp_path: Path) -> None:
    built_in = {"from": "built-in"}
    settings = make_settings("small", None, [built_in])
    assert {name: getattr(settings, name) for name in FINE_TUNING} == FINE_TUNING
    assert (settings.width, settings.depth, settings.patch, settings.crop) == (40, 3, 2, PRESETS["small"]["crop"])
    (tmp_path / "mine.toml").write_text("steps = 7\nlr = 0.5\n")
    explicit = make_settings("small", str(tmp_path / "mine.toml"), [built_in, {"lr": 0.25, "width": 40}])
    assert (explicit.steps, explicit.lr, explicit.epochs) == (7, 0.25, FINE_TUNING["epochs"])
    assert explicit.keeps_threshold
    assert make_settings("small", None, [built_in, {"threshold": 0.0}]).threshold == 0.0  # the best on validation
    assert make_settings("small", None, []).lr == PRESETS["small"]["lr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from": "built-in", "width": 64}, r"^width = 64: --from built-in is of width = 40: leave it out$"),
        ({"from": "built-in", "model": "smp:Unet/resnet18"}, r"^model = smp:Unet/resnet18: --from built-in is of"),
        ({"from": "built-in", "encoder_weights": "imagenet"}, r"^encoder_weights = imagenet: --from built-in has"),
        ({"from": "built-in", "sync_batchnorm": True}, r"^sync_batchnorm = true: freeze_batchnorm leaves nothing"),
        ({"threshold": -1.0}, r"^threshold = -1\.0: must be at least 0 and less than 1, or -1 with --from$"),
        ({"from": "built-in", "threshold": -0.5}, r"^threshold = -0\.5: must be"),
        ({"from": "built-in", "threshold": 1.0}, r"^threshold = 1\.0: must be"),
        ({"freeze_batchnorm": True}, r"^freeze_batchnorm = true: there are no statistics"),
        ({"from": "nowhere"}, r"nowhere: no such bundle$"),
        ({"from": 3}, r"from = 3: expected str$"),
    ],
)
def test_settings_that_contradict_the_bundle_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SegError, match=message):
        make_settings("small", None, [changes])


def test_the_settings_of_a_network_that_leaves_some_to_their_defaults(make_bundle: MakeBundle) -> None:
    settings = make_settings("small", None, [{"from": make_bundle()}])
    assert (settings.model, settings.width, settings.depth, settings.patch) == ("unet", 4, 2, 1)


def test_the_built_in_model_has_a_name() -> None:
    assert find_bundle("built-in") == BUILT_IN
    assert find_bundle("/a/built-in") == "/a/built-in"


CLASSES = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))


def test_without_changes_training_begins_with_the_weights_of_the_bundle() -> None:
    settings, origin = make_settings("small", None, [{"from": "built-in"}]), read_origin("built-in")
    header, initial = describe_model(settings, CLASSES, 3, origin)
    assert origin is not None
    assert initial is not None
    for name, array in read_weights(BUILT_IN, origin).items():
        assert np.array_equal(initial[name].numpy(), array.astype(initial[name].numpy().dtype))
    assert header["architecture"] == origin.architecture
    assert {name: header[name] for name in ("stride", "halo", "context_px", "bands")} == {
        name: getattr(origin, name) for name in ("stride", "halo", "context_px", "bands")
    }
    assert identify_files(settings, origin).begin_from == origin.hash


def test_weights_that_are_not_finite_are_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    path = make_bundle()
    origin = read_bundle(path)
    weights = {k: v.copy() for k, v in read_weights(path, origin).items()}
    weights["head.bias"][0] = np.nan
    broken = write_bundle(str(tmp_path / "broken"), origin, weights)
    model = build_model(origin.architecture)
    with pytest.raises(SegError, match=rf"^{tmp_path}/broken: head\.bias holds values that are not finite: "):
        read_initial_weights(f"{tmp_path}/broken", broken, model, vars(origin))


def test_an_architecture_of_another_version_is_refused_by_name(make_bundle: MakeBundle, tmp_path: Path) -> None:
    path = make_bundle()
    origin = read_bundle(path)
    newer = replace(origin, architecture=origin.architecture | {"norm": "group"})
    write_bundle(str(tmp_path / "newer"), newer, read_weights(path, origin))
    settings = make_settings("small", None, [{"from": f"{tmp_path}/newer"}])
    with pytest.raises(SegError, match=rf"^{tmp_path}/newer: model unet: of a version with norm, .*: upgrade"):
        describe_model(settings, CLASSES, 3, read_origin(settings.begin_from))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights(frozen: bool) -> None:
    header = {"bands": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "building": 1}
    settings = replace(TrainSettings(), freeze_batchnorm=frozen, schedule="constant", compile="no")
    learner = make_learner(settings, header, unet(3, 1), torch.device("cpu"), 1, 1)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    set_training_mode(learner)
    step(learner, (torch.randint(0, 255, (2, 32, 32, 3)), torch.randint(0, 2, (2, 32, 32))))
    changed = {name for name, value in learner.network.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in changed) is not frozen
    assert "bottleneck.1.weight" in changed


def tune_without_change(**changes: Any) -> dict[str, Any]:
    """Figures of an epoch that changes no weight, from a bundle of threshold 0.4 and temperature 1.5."""
    header = {"bands": 3, "mean": [0.0] * 3, "std": [1.0] * 3, "building": 1, "threshold": 0.4, "temperature": 1.5}
    fixed = {"from": "built-in", "lr": 1e-12, "weight_decay": 0.0, "ema": 0.0, "compile": "no"}
    learner = make_learner(
        make_settings("small", None, [fixed, changes]), header, unet(3, 1), torch.device("cpu"), 1, 2
    )
    images = torch.randint(0, 255, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    batch = images, (images[..., 0] > 127).long()
    (figures,) = epochs(learner, iter([batch]), lambda: [batch], steps=1, first=1, last=1)
    assert abs(figures["temperature"] - 1.5) > 0.1
    return figures


def test_where_no_weight_changes_the_mask_stays_whatever_the_calibration() -> None:
    figures = tune_without_change()
    assert logit(figures["threshold"]) * figures["temperature"] == pytest.approx(logit(0.4) * 1.5, abs=0.01)


def test_a_threshold_that_is_set_is_one_of_the_probabilities_of_the_finished_model() -> None:
    assert tune_without_change(threshold=0.3)["threshold"] == 0.3


def test_a_run_with_another_bundle_is_another_run() -> None:
    built_in = replace(TrainSettings(), begin_from="abc")
    assert difference({}, built_in) == "from none there, abc now"
    assert difference({"begin_from": "abc"}, built_in) == ""


def write_dataset(data: Path) -> None:
    """Bright squares on dark noise, in two bands."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 2), ("val", 1)):
        for i in range(number):
            image, label = rng.integers(20, 90, (2, 64, 64), dtype=np.uint8), np.zeros((1, 64, 64), np.uint8)
            image[:, 16:48, 16 + i : 48], label[:, 16:48, 16 + i : 48] = 220, 255
            transform = (0.5, 0.0, 400_000.0, 0.0, -0.5, 5_800_000.0 + 1000 * i)
            for folder, content in ((split, image), (f"{split}_labels", label)):
                (data / folder).mkdir(parents=True, exist_ok=True)
                write_geotiff(str(data / folder / f"{i}.tif"), content, crs=UTM, transform=transform)
    (data / "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,255,255,255\n")


@pytest.mark.usefixtures("without_workers")
def test_a_bundle_is_fine_tuned_on_other_bands_and_says_from_what(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin, other = (read_bundle(make_bundle(name, seed=seed)) for name, seed in (("first", 0), ("other", 1)))
    data = tmp_path / "data"
    write_dataset(data)
    command: list[Any] = ["train", "--data", data, "--out", tmp_path / "tuned", "--crop", 64, "--batch", 2]
    command += ["--epochs", 1, "--steps", 1, "--readers", 0, "--preset", "small", "--lr", 1e-9]
    _, err = seg(capsys, *command, "--from", tmp_path / "first")
    assert "2 bands, the model had 3" in err
    assert "the data measures 0.5 m a pixel, the model was trained at 1 m" in err
    tuned = read_bundle(str(tmp_path / "tuned"))
    assert (tuned.bands, tuned.mean, tuned.std) == (2, origin.mean[:2], origin.std[:2])
    assert tuned.gsd_m == pytest.approx(0.5, rel=1e-3)  # on the ground, not on the map
    assert tuned.provenance["from"] == tuned.provenance["settings"]["begin_from"] == origin.hash
    assert str(tmp_path) not in json.dumps(tuned.provenance)
    before, after = (
        read_weights(f"{tmp_path}/{name}", read_bundle(f"{tmp_path}/{name}")) for name in ("first", "tuned")
    )
    assert np.allclose(after["up.0.up.weight"], before["up.0.up.weight"], atol=1e-3)  # as float16, barely trained
    tuned_settings = json.loads((tmp_path / "tuned.train" / "settings.json").read_text())
    assert tuned_settings["begin_from"] == origin.hash
    command[4] = tmp_path / "again"
    _, err = seg(capsys, *command, "--work", tmp_path / "tuned.train", "--from", tmp_path / "other", code=2)
    assert f"other settings (from {origin.hash} there, {other.hash} now)" in err
