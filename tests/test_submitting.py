"""What is found out about a command before it is submitted, and about a job from its log."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import MakeBundle, MakeScene

from aerial_seg.cli import cluster_commands, submitted
from aerial_seg.cli.parser import make_parser
from aerial_seg.cli.places import check_places, existing_folders, find_local_bundle, find_run
from aerial_seg.progress import Progress
from aerial_seg.submitting import dashboard
from aerial_seg.submitting.jobs import _plain_text, find_progress
from aerial_seg.submitting.packages import ORIGIN, SENT_BUNDLE, copy_packages, lasting_name
from aerial_seg.training.log import TrainingLog
from aerial_seg.training.settings import TrainSettings
from seg_core.errors import SegError
from seg_core.model.bundle import BUILT_IN, Bundle, read_bundle


def parse(*words: str) -> Namespace:
    return make_parser().parse_args(words)


def test_a_bundle_on_this_machine_is_found_and_sent(make_bundle: MakeBundle, tmp_path: Path) -> None:
    path, folder = make_bundle("model"), str(tmp_path)
    segment = ["segment", "a.tif", "--out", "run"]
    assert find_local_bundle(parse(*segment, "--model", "model"), folder) == path
    assert find_local_bundle(parse("evaluate", path, "--data", "d"), "/") == path
    assert find_local_bundle(parse("train", "--data", "d", "--out", "b", "--from", "model"), folder) == path
    for elsewhere in ("built-in", "s3://bucket/model", "absent"):
        assert find_local_bundle(parse(*segment, "--model", elsewhere), folder) is None


@pytest.mark.parametrize("address", ["10.0.0.5:8265", "http://10.0.0.5:8265"])
def test_the_dashboard_of_the_environment_needs_no_scheme(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def refuse(url: str) -> None:
        raise ConnectionError(url)

    monkeypatch.setattr(dashboard, "_await_answer", refuse)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    with pytest.raises(SegError, match=f"^--address {address}: ") as refusal:
        dashboard.connect(None)
    assert str(refusal.value.__cause__) == "http://10.0.0.5:8265"


def test_names_with_brackets_are_found_as_they_are(make_scene: MakeScene, tmp_path: Path) -> None:
    make_scene("tile[1].tif")
    check_places(parse("plan", "tile[1].tif"), str(tmp_path), [])


def test_the_built_in_model_is_exported_beside_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(source: str, _: str, out: str) -> Bundle:
        Path(out).write_text(source)
        return read_bundle(source)

    monkeypatch.setattr("seg_core.model.export.export_model", write)
    monkeypatch.chdir(tmp_path)
    args = parse("export", "model", "built-in", "--to", "onnx")
    assert args.carry_out(args) == 0
    assert (tmp_path / "built-in.onnx").read_text() == BUILT_IN


def test_a_bundle_is_named_by_what_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lasting_name(BUILT_IN) == "built-in"
    assert lasting_name("/models/a") == "/models/a"
    (tmp_path / "origin.txt").write_text("/home/me/model")
    monkeypatch.setattr("aerial_seg.submitting.packages.SENT_BUNDLE", tmp_path)
    assert lasting_name(str(tmp_path)) == "/home/me/model"


@pytest.mark.parametrize("int8", [False, True])
def test_all_files_of_a_bundle_are_sent(make_bundle: MakeBundle, tmp_path: Path, int8: bool) -> None:
    bundle = BUILT_IN if int8 else make_bundle()
    copies = copy_packages(str(tmp_path / "job"), bundle)
    sent = Path(copies[-1], SENT_BUNDLE.name)
    assert bool(read_bundle(str(sent)).int8_sha256) == int8
    assert {path.name for path in sent.iterdir()} == {*os.listdir(bundle), ORIGIN}


def test_a_resumed_command_runs_in_the_folder_that_it_ran_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["-C", "imagery", "segment", "a.tif", "--out", "run"]
    args = parse("submit", "--", *command)
    first = cluster_commands._check(args, command)
    assert (first.folder, first.run) == (f"{tmp_path}/imagery", f"{tmp_path}/imagery/run")
    monkeypatch.chdir("/")
    assert cluster_commands._check(args, first.command, first.folder) == first


def test_a_model_that_was_sent_is_exported_to_where_it_came_from(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Path(make_bundle("sent"))
    (sent / ORIGIN).write_text(str(tmp_path / "model"))
    monkeypatch.setattr("aerial_seg.submitting.packages.SENT_BUNDLE", sent)
    args = parse("export", "model", str(sent), "--to", "torch-export")
    assert args.carry_out(args) == 0
    assert (tmp_path / "model.pt2").is_file()


def test_the_run_of_a_command_is_what_it_writes_or_reads() -> None:
    assert find_run(parse("segment", "a.tif", "--out", "run"), "/home/me") == "/home/me/run"
    assert find_run(parse("query", "s3://bucket/run"), "/home/me") == "s3://bucket/run"
    assert find_run(parse("bench", "segment"), "/home/me") is None


def test_inputs_that_the_cluster_lacks_are_named_with_their_option(make_scene: MakeScene, tmp_path: Path) -> None:
    make_scene("region/a.tif")
    folder = str(tmp_path)
    for there in ("region", "region/*.tif", "region/a.tif"):
        check_places(parse("plan", there, "--model", "built-in"), folder, [])
    for words, said in (
        (["plan", "region", "absent"], f"{folder}/absent: no such file or folder for node"),
        (["plan", "region/*.jp2"], f"{folder}/region/\\*.jp2: no such file"),
        (["plan", "region", "--model", "m"], f"--model {folder}/m: no such file"),
    ):
        with pytest.raises(SegError, match=f"^{said}"):
            check_places(parse(*words), folder, [])


def test_an_output_belongs_into_a_folder_that_the_cluster_has_too(make_scene: MakeScene, tmp_path: Path) -> None:
    scene = make_scene()
    here = tmp_path / "here"
    here.mkdir()
    args = parse("segment", scene, "--out", "new/run")
    folders = existing_folders(args, str(here))
    assert folders == [str(here)]
    check_places(args, str(here), folders)
    assert list(here.iterdir()) == []
    here.rmdir()
    with pytest.raises(SegError, match=f"^--out {here}/new/run: node .* of the cluster has no folder {here}: use a"):
        check_places(args, str(here), folders)
    check_places(parse("segment", scene, "--out", f"{tmp_path}/a/b"), str(here), [str(tmp_path)])  # nobody has it yet


def test_an_output_that_cannot_be_written_is_named(make_scene: MakeScene, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SegError, match=r"^--out .*file.* \(node .* of the cluster has tried it\)$"):
        check_places(parse("segment", make_scene(), "--out", "file/run"), str(tmp_path), [str(tmp_path)])


def test_a_python_without_the_dependencies_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted.find_missing("3.11.0") is None
    monkeypatch.setattr(submitted, "MODULES", ("numpy", "absent_library"))
    monkeypatch.delenv(submitted.JOB_CONFIG, raising=False)
    assert submitted.main() == 2
    said = capsys.readouterr().out
    assert f"({sys.executable}) has no absent_library: install aerial-seg with its dependencies on all nodes" in said
    monkeypatch.setattr(submitted, "OLDEST_PYTHON", (4, 0))
    older = submitted.find_missing("4.0.1")
    assert older is not None
    assert "the cluster runs Python 3." in older
    assert "4.0.1 is where you submit from" in older


@pytest.mark.parametrize("line", [None, "", "a line", "{", '{"message": "a line"}', '{"level": "info"}', "[1]", "7"])
def test_the_last_line_of_a_job_is_its_message(line: str | None) -> None:
    assert _plain_text(line) == ("a line" if line and "message" in line else line)


def test_the_next_command_is_for_the_same_cluster() -> None:
    assert cluster_commands._command(Namespace(address=None), "resume", "a job") == "seg resume 'a job'"
    there = Namespace(address="http://127.0.0.1:1234")
    assert (
        cluster_commands._command(there, "logs", "job", "--follow")
        == "seg logs job --follow --address http://127.0.0.1:1234"
    )


def test_the_progress_of_a_job_is_what_its_log_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aerial_seg.progress.LOG_INTERVAL", 0.0)
    shown = Progress(4321)
    assert find_progress(capsys.readouterr().err.splitlines()) is None
    shown.update(1234, 10**6, shown.created - 10, 2)
    shown.end()
    lines = [*capsys.readouterr().err.splitlines(), "another line"]
    found = find_progress(lines)
    assert found is not None
    assert find_progress([json.dumps({"message": line}) for line in lines]) == found
    assert (found["done"], found["total"], found["unit"], found["failed"]) == (1234, 4321, "windows", 2)
    assert found["mpx_s"] > 0
    assert ":" in found["left"]

    log = TrainingLog(str(tmp_path), TrainSettings(epochs=7))
    figures = {"epoch": 3, "loss": 0.5, "val_iou": 0.25, "train_mpx_s": 1.5, "seconds": 30.0}
    log.close()
    found = find_progress([log._line(figures)])
    assert found == {"done": 3, "total": 7, "unit": "epochs", "mpx_s": 1.5, "left": "2:00", "failed": 0}
    assert os.listdir(tmp_path) == ["tensorboard"]
