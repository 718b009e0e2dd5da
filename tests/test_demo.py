"""The demonstration, as the README's first command runs it."""

import subprocess
from pathlib import Path

import cv2
from conftest import outside_environment


def test_the_demo_trains_segments_verifies_and_scores(tmp_path: Path) -> None:
    found = subprocess.run(
        ["seg", "demo", "--out", "demo"],
        cwd=tmp_path,
        env=outside_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    figures = dict(line.split(None, 1) for line in found.stdout.splitlines()[-7:])
    assert float(figures["iou"]) >= 0.8
    assert figures["verified"] == "yes"
    assert not (tmp_path / "demo" / "bundle.train" / "samples.png").exists()  # drawing it could not be stopped
    picture = cv2.imread(str(tmp_path / "demo" / "picture.png"))
    assert picture is not None
    assert picture.std() > 20
