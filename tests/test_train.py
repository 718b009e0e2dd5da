"""Training jobs as a user runs them, each with a Ray of its own."""

import json
import signal
import subprocess
from pathlib import Path

from conftest import outside_environment

TINY = ["--width", "4", "--depth", "2", "--steps", "6", "--batch", "4", "--epochs", "5"]


def start(dataset: Path, folder: Path) -> subprocess.Popen[str]:
    command = ["seg", "train", "--data", str(dataset), "--out", "bundle", *TINY]
    return subprocess.Popen(
        command, cwd=folder, env=outside_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def epochs_of(folder: Path) -> list[int]:
    lines = (folder / "bundle.train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def test_the_same_command_goes_on_where_a_killed_one_was(dataset: Path, tmp_path: Path) -> None:
    killed = start(dataset, tmp_path)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("epoch 2"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert epochs_of(tmp_path)[:2] == [1, 2]
    assert not (tmp_path / "bundle").exists()
    again = start(dataset, tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "epoch 1 of 5" not in err
    assert "epoch 5 of 5" in err
    assert epochs_of(tmp_path)[-1] == 5
    weights = [path.name for path in (tmp_path / "bundle").iterdir()]
    assert sorted(weights) == ["model.json", "weights.safetensors"]
