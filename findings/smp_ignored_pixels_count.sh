#!/usr/bin/env bash
# segmentation-models-pytorch 0.6.0, torch 2.14.1: of two losses, pixels that are ignored still divide the mean.
#
# Expected: smp calls SoftBCEWithLogitsLoss and SoftCrossEntropyLoss drop-in replacements of PyTorch's losses, and with
# ignore_index PyTorch divides by the pixels that count. So a tile of which a part is ignored has the loss of the rest.
# Seen: they divide by all pixels. A tile that is half ignored has half the loss, and one of which 1/16 is kept has 1/16,
# so that gradients of tiles at the edge of the labelled area fade away, and losses of batches can't be compared. The
# library's own FocalLoss, DiceLoss, TverskyLoss and LovaszLoss leave ignored pixels out of both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q segmentation-models-pytorch==0.6.0 timm==1.0.31 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from segmentation_models_pytorch import losses

IGNORED = 255
torch.manual_seed(0)
torch.set_num_threads(1)
logits = {"binary": torch.randn(2, 1, 16, 16), "multiclass": torch.randn(2, 3, 16, 16)}
labels = {"binary": torch.randint(0, 2, (2, 1, 16, 16)).float(), "multiclass": torch.randint(0, 3, (2, 16, 16))}
cases = [
    ("multiclass", torch.nn.CrossEntropyLoss(ignore_index=IGNORED), 1),
    ("multiclass", losses.FocalLoss("multiclass", ignore_index=IGNORED), 1),
    ("multiclass", losses.DiceLoss("multiclass", ignore_index=IGNORED), 1),
    ("multiclass", losses.TverskyLoss("multiclass", ignore_index=IGNORED), 1),
    ("multiclass", losses.LovaszLoss("multiclass", ignore_index=IGNORED), 1),
    ("multiclass", losses.SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=IGNORED), None),
    ("binary", losses.SoftBCEWithLogitsLoss(ignore_index=IGNORED), None),
]
for kind, loss, expected in cases:
    for columns in (8, 1):
        some = labels[kind].clone()
        some[..., columns:] = IGNORED
        alone = loss(logits[kind][..., :columns].contiguous(), labels[kind][..., :columns].contiguous())
        ratio = float(loss(logits[kind], some) / alone)
        print(f"{type(loss).__module__.split('.')[0]} {type(loss).__name__}: {columns} of 16 columns kept, loss / loss of"
              f" these alone {ratio:.4f}")
        assert abs(ratio - (expected or columns / 16)) < 1e-4
PYTHON
