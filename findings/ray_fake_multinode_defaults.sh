#!/usr/bin/env bash
# Ray 2.60.0: the wheel lacks the file that the fake multi-node provider and ray.cluster_utils.AutoscalingCluster read.
#
# Expected: `AutoscalingCluster`, which is a developer API in the package, and clusters of `type: fake_multinode`, which
# Ray's documentation describes for trying out autoscaling on one machine, work from a wheel. Seen: both end in
# FileNotFoundError, for ray/autoscaler/_private/fake_multi_node/example.yaml is not in the wheel. The provider itself is
# there: `type: external` with its module, and a complete configuration, starts it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[default]==2.60.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os

import ray
from ray.autoscaler._private.util import prepare_config
from ray.cluster_utils import AutoscalingCluster

print("Ray", ray.__version__)
folder = os.path.join(os.path.dirname(ray.__file__), "autoscaler/_private/fake_multi_node")
print("in the wheel:", sorted(name for name in os.listdir(folder) if name != "__pycache__"))
provider = {"type": "fake_multinode"}
made = {
    "AutoscalingCluster": lambda: AutoscalingCluster(head_resources={"CPU": 0}, worker_node_types={}),
    "type: fake_multinode": lambda: prepare_config({"cluster_name": "a", "provider": provider}),
}
for name, make in made.items():
    try:
        make()
    except FileNotFoundError as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name} works")
assert "node_provider.py" in os.listdir(folder)
PYTHON
