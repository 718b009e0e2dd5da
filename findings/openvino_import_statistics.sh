#!/usr/bin/env bash
# OpenVINO 2026.4.1: `import openvino` alone begins to send usage statistics, without a question.
#
# Expected: statistics, if any, come from the converter `ovc`, or after somebody has agreed. Seen: the import makes a
# client id and a counter in ~/intel, and a child process looks up www.google-analytics.com. With CI=true in the
# environment it does neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 openvino-telemetry==2025.2.0 numpy==2.4.6
unset CI TF_BUILD JENKINS_URL
cat > "$folder/look.py" <<'PYTHON'
import os
import socket
import time
from pathlib import Path

HOME = Path.home()


def lookup_fails(host, *_, **__):
    with open(HOME / "hosts", "a") as file:  # a child process may write it
        file.write(f"{host}\n")
    raise OSError("there is no network here")


socket.getaddrinfo = lookup_fails
import openvino

time.sleep(3)
print(openvino.__version__.split("-")[0], sorted(str(path.relative_to(HOME)) for path in HOME.rglob("*") if path.is_file()))
print(sorted(set((HOME / "hosts").read_text().split())) if (HOME / "hosts").exists() else "no host")
PYTHON
mkdir "$folder/plain" "$folder/ci"
plain=$(HOME="$folder/plain" "$folder/venv/bin/python" "$folder/look.py")
in_ci=$(HOME="$folder/ci" CI=true "$folder/venv/bin/python" "$folder/look.py")
printf 'as it is:\n%s\nwith CI=true:\n%s\n' "$plain" "$in_ci"
[ "$plain" = "2026.4.1 ['hosts', 'intel/openvino_ga_cid', 'intel/stats']
['www.google-analytics.com']" ]
[ "$in_ci" = "2026.4.1 []
no host" ]
