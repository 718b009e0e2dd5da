#!/usr/bin/env bash
# Ray 2.60.0: a gauge of ray.util.metrics that is set once disappears from the node's metrics.
#
# Expected: a gauge keeps its last value until it is set again, as in Prometheus and OpenTelemetry; so a figure that
# changes seldom, such as the number of tiles that have failed, may be set when it changes. Seen: after two report
# intervals (10 s each by default, 1 s here) it is no longer among the metrics. A gauge that is set again and again
# stays, and so does a counter that was increased once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[default]==2.60.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import time
import urllib.request

os.environ["RAY_metrics_report_interval_ms"] = "1000"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.util.metrics import Counter, Gauge

ray.init("local", include_dashboard=False, num_cpus=1, logging_level="ERROR")
(node,) = ray.nodes()
address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
once, again, counter = Gauge("set_once"), Gauge("set_again"), Counter("counted_once")
once.set(1.0)
counter.inc()
seen = []
began = time.monotonic()
while time.monotonic() - began < 30:
    again.set(2.0)
    with urllib.request.urlopen(address, timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    names = sorted({line.split("{")[0] for line in lines if line.startswith(("ray_set_", "ray_counted_"))})
    if names and (not seen or seen[-1] != names):
        seen.append(names)
        print(round(time.monotonic() - began), "s:", names)
    time.sleep(0.5)
ray.shutdown()
assert any("ray_set_once" in names for names in seen)
assert seen[-1] == ["ray_counted_once_total", "ray_set_again"]
PYTHON
