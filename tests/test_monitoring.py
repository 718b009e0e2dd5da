"""What a running job tells: lines on what happens to its nodes and processes, messages as JSON, and metrics."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import MakeScene, free_port
from parts import RESOURCES
from seg_command import SMALL, seg

from aerial_seg import node_watch
from aerial_seg.metrics import METRICS, PREFIX, JobMetrics
from aerial_seg.node_watch import NodeWatch
from aerial_seg.segmenting.monitor import RunMonitor
from aerial_seg.segmenting.receipts import Receipt
from aerial_seg.terminal import command_line, format_message
from aerial_seg.training.log import TrainingLog, describe_lack
from aerial_seg.training.settings import TrainSettings

DASHBOARD = Path(__file__).parents[1] / "cluster/grafana/dashboard.json"
Capture = pytest.CaptureFixture[str]


def node(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": name * 8, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True, "Resources": resources}


def test_nodes_that_come_and_go_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, lines = [node("1", CPU=2), node("2", CPU=4, GPU=1)], list[str]()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    watch = NodeWatch(lines.append)
    watch.look()
    assert lines == []
    assert (watch.total("CPU"), watch.total("GPU")) == (6, 1)
    nodes[1]["Alive"] = False
    watch.look()
    assert lines == [
        "lost node 10.0.0.2 (22222222, 4 CPU, 1 GPU): 1 node is alive, and what it was doing is done again"
    ]
    assert describe_lack(watch, "CPU", 2) == ""
    assert describe_lack(watch, "CPU", 3) == "3 workers need one CPU each, and the cluster has 2"
    nodes.append(node("3", CPU=1))
    watch.look()
    assert lines[1:] == ["new node 10.0.0.3 (33333333, 1 CPU): 2 nodes are alive"]


@pytest.mark.usefixtures("without_head")
def test_nodes_are_looked_at_even_if_the_head_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch, "LOOK_INTERVAL", 0.01)
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            raise ConnectionError("no head")

    refreshed: list[float] = []
    metrics = JobMetrics("/a/run")
    monkeypatch.setattr(metrics, "refresh", lambda: refreshed.append(metrics.latest["nodes"]))
    with node_watch.watch_nodes(lambda _: None, metrics) as watch:
        monkeypatch.setattr(watch, "look", look)
        while len(looks) < 3 or len(refreshed) < 3:
            time.sleep(0.01)
    assert set(refreshed) == {0}


@pytest.fixture
def without_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster whose nodes could be looked at."""
    monkeypatch.setattr(node_watch, "list_nodes", dict)


def receipt(actor: str, **fields: Any) -> Receipt:
    return Receipt(
        actor=actor, readers=1, started=time.time() - 1, ended=time.time(), pixels=10**6, windows=1, **fields
    )


def test_a_run_that_has_lost_its_last_node_says_that_it_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"head": node("0"), "one": node("1", CPU=2)}
    monkeypatch.setattr(node_watch, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(node_watch, "list_nodes", lambda: dict(nodes))
    with RunMonitor("/a/run", 3, RESOURCES) as monitor:
        monitor.take(receipt("one"))
        line = monitor.progress.status.line
        assert line().endswith(" left")
        del nodes["one"]
        deadline = time.monotonic() + 60
        while (waits := line()) != "1 of 3 windows, waiting for a node: a process that segments takes 1 CPU":
            assert time.monotonic() < deadline, waits
            time.sleep(0.01)
        nodes["two"] = node("2", CPU=4)
        while "waiting" in line():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.usefixtures("without_head")
def test_a_process_that_is_replaced_is_a_line(capsys: Capture) -> None:
    with RunMonitor("/a/run", 3, RESOURCES) as monitor:
        monitor.take(receipt("one"))
        monitor.take(receipt("one"))
        assert "has ended" not in capsys.readouterr().err
        monitor.take(receipt("two"))
    assert "a process that segments has ended, and a new one has taken its place\n" in capsys.readouterr().err


def test_messages_as_json_say_when_and_about_what(make_scene: MakeScene, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    command = ["segment", make_scene(), "--out", run, "--log-format", "json", "--window", "16"]
    out, err = seg(capsys, *command, code=2)
    assert out == ""
    told = [json.loads(line) for line in err.splitlines()]
    assert told[-1]["level"] == "error"
    assert told[-1]["message"].startswith("seg: ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told[-1]["time"])


@pytest.mark.usefixtures("without_head")
def test_progress_and_failures_as_json_have_figures_and_places(capsys: Capture) -> None:
    with command_line("json"), RunMonitor("/a/run", 2, RESOURCES) as monitor:
        monitor.take(receipt("one"))
        monitor.take(receipt("one", failed=3, scene="a.tif", window=[0, 512, 64, 32], part="p"))
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    last = [each for each in told if "windows_done" in each][-1]
    assert (last["windows_done"], last["windows_total"], last["tiles_failed"]) == (2, 2, 3)
    failed = next(each for each in told if each["level"] == "warning")
    assert (failed["scene"], failed["window"], failed["message"]) == ("a.tif", [0, 512, 64, 32], "3 tiles failed")
    assert format_message("as it is", scene="a.tif") == "as it is"  # the format is that of one command


def test_a_training_that_waits_for_a_node_says_so(tmp_path: Path) -> None:
    log = TrainingLog(str(tmp_path), TrainSettings(epochs=7))
    log.close()
    assert re.fullmatch(r"training: 0 of 7 epochs done \.\.\. \d:\d\d", log.under_way())
    log.missing = lambda: "2 workers need one CPU each, and the cluster has 1"
    assert log.under_way().endswith("; waiting for a node: 2 workers need one CPU each, and the cluster has 1")


def test_a_small_run_is_seen_by_prometheus(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[JobMetrics] = []
    monkeypatch.setattr("aerial_seg.segmenting.monitor.JobMetrics", lambda run: made.append(JobMetrics(run)) or made[0])
    run = tmp_path / "run"
    seg(capsys, "segment", finished / "region", "--model", finished / "model", "--out", run, *SMALL)
    metrics = made[0]
    assert {"windows_done", "tiles_failed", "busy_model", "mpx_per_second"} < set(metrics.latest)
    metrics.publish(dict.fromkeys(METRICS.keys() - metrics.latest.keys(), 0.5))  # those of a training
    (here,) = [each for each in ray.nodes() if each["Alive"]]
    address = f"http://{here['NodeManagerAddress']}:{here['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 60, dict[str, float]()
    while found != pytest.approx(metrics.latest) and time.monotonic() < deadline:
        metrics.refresh()  # which a thread does while the run works
        time.sleep(0.2)
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        found = {
            name: float(value)
            for name, tags, value in re.findall(rf"^ray_{PREFIX}(\w+){{(.*)}} (\S+)$", text, re.MULTILINE)
            if f'run="{run}"' in tags
        }
    assert found == pytest.approx(metrics.latest)
    assert found.keys() == METRICS.keys()
    assert found["windows_done"] == found["windows_total"] > 0


@pytest.fixture
def prometheus(ray_cluster: None, tmp_path: Path) -> Iterator[str]:  # noqa: ARG001
    """Host and port of a Prometheus that asks this node every second."""
    (here,) = [each for each in ray.nodes() if each["Alive"]]
    target = f"{here['NodeManagerAddress']}:{here['MetricsExportPort']}"
    jobs = [{"job_name": "ray", "static_configs": [{"targets": [target]}]}]
    (tmp_path / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *options], cwd=tmp_path, stdout=log, stderr=log)
        yield address
        process.terminate()
        process.wait(30)


def ask(prometheus: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """The series that an expression of Prometheus gives now: their labels, and the value of each."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{prometheus}/api/v1/query?{query}") as answer:
        found = json.load(answer)["data"]["result"]
    return [(each["metric"], float(each["value"][1])) for each in found]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_what_the_dashboard_asks(prometheus: str) -> None:
    runs = [JobMetrics(f"s3://bucket/{name}") for name in ("a", "b")]
    for number, run in enumerate(runs):
        run.publish({name: 1.5 * place + number for place, name in enumerate(METRICS)})
    targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", [])]
    deadline = time.monotonic() + 60
    for target in targets:
        expression, found = target["expr"].replace("$run", "s3://bucket/.*"), list[tuple[dict[str, str], float]]()
        (name,) = re.findall(rf"ray_{PREFIX}(\w+)", expression)
        wanted = [({"run": f"s3://bucket/{letter}"}, run.latest[name]) for letter, run in zip("ab", runs, strict=True)]
        while found != wanted:
            assert time.monotonic() < deadline, (expression, found)
            time.sleep(0.2)
            for run in runs:
                run.refresh()  # which a thread does while a job works
            with suppress(urllib.error.URLError):  # it starts
                found = sorted(ask(prometheus, expression), key=lambda series: series[0]["run"])


def test_the_dashboard_shows_the_metrics_that_jobs_publish_and_no_others() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    names = {panel["title"]: panel for panel in dashboard["panels"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(names) == len(dashboard["panels"])
    asked = re.findall(rf"ray_{PREFIX}(\w+)", json.dumps(dashboard))
    assert set(asked) == set(METRICS)
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"]))) <= variables
