#!/usr/bin/env bash
# segmentation-models-pytorch 0.6.0, timm 1.0.31: smp's encoder timm-tf_efficientnet_lite0 is not timm's tf_efficientnet_lite0.
#
# Expected: an encoder of that name computes what timm's network computes, "tf" being the port that pads as TensorFlow
# does, so that weights of the one fit the other. Seen: its first 288 tensors have the same shapes in the same order,
# and load without a word; but its convolutions pad evenly and its batch norm adds 1e-5 to the variance (timm: as
# TensorFlow, 1e-3), and with equal weights its features differ by about 80 % of their mean. The encoder
# tu-tf_efficientnet_lite0 of the same library is timm's, and its features are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q segmentation-models-pytorch==0.6.0 timm==1.0.31 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import segmentation_models_pytorch as smp
import timm
import torch

torch.manual_seed(0)
image = torch.rand(1, 3, 64, 64)
reference = timm.create_model("tf_efficientnet_lite0", features_only=True, pretrained=False).eval()
for module in reference.modules():
    if isinstance(module, torch.nn.BatchNorm2d):  # small variances, as trained networks of this kind have some
        torch.nn.init.uniform_(module.running_var, 0.001, 0.01)
weights = list(reference.state_dict().values())
found = {}
for name in ("timm-tf_efficientnet_lite0", "tu-tf_efficientnet_lite0"):
    encoder = smp.encoders.get_encoder(name, in_channels=3, depth=5, weights=None).eval()
    state = encoder.state_dict()
    assert [each.shape for each in weights] == [each.shape for each in state.values()][: len(weights)]
    encoder.load_state_dict({**state, **dict(zip(state, weights))})
    norms = {module.eps for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    with torch.inference_mode():
        expected = {each.shape: each for each in reference(image)}
        pairs = [(each, expected[each.shape]) for each in encoder(image)[1:] if each.shape in expected]
    assert len(pairs) >= 4
    apart = [float((one - two).abs().mean() / two.abs().mean()) for one, two in pairs]
    print(name, "tensors", len(state), "epsilon", norms, "relative difference of features", apart)
    found[name] = norms, min(apart), max(apart)
assert found["tu-tf_efficientnet_lite0"] == ({1e-3}, 0.0, 0.0)
norms, least, _ = found["timm-tf_efficientnet_lite0"]
assert norms == {1e-5} and least > 0.5
PYTHON
