"""Log the metrics of a training run, and draw their curves.

Each epoch is a line on the terminal and in `metrics.jsonl`, and a step in TensorBoard and, where installed, in MLflow.
"""

import importlib.util
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seg_core.environment import environment
from seg_core.errors import SegError
from seg_core.plots.figures import draw_curves
from seg_core.storage.files import is_remote, publish, read_bytes, upload

from ..metrics import JobMetrics
from ..node_watch import NodeWatch, watch_nodes
from ..progress import CLEAR_LINE, StatusLine, format_duration
from ..terminal import note
from .messages import Failed, Message, Note, Resumed
from .settings import TrainSettings

METRICS = "metrics.jsonl"
MLFLOW_RUN = "mlflow.run"  # holds its id there
CURVES = "curves.png"


class TrainingLog:
    """The metrics of a training run's epochs, with those before it was resumed. Repeated epochs replace theirs."""

    def __init__(self, work: str, settings: TrainSettings) -> None:
        self.work, self.settings = work, settings
        self.error: Exception | None = None  # why the workers stopped, where they know
        self.note: Callable[[str], None] = note
        self.missing: Callable[[], str] = str  # what the cluster lacks for the workers, in words
        self.metrics = JobMetrics(work)
        self.began = time.monotonic()
        self.epochs: dict[int, dict[str, Any]] = {}
        with suppress(ValueError, TypeError, KeyError):  # of a damaged file: the checkpoints know it all
            lines = (read_bytes(f"{work}/{METRICS}") or b"").decode().splitlines()
            self.epochs = {f["epoch"]: f for f in map(json.loads, lines)}
        self.writers: list[_TensorBoard | _MLflow] = [_TensorBoard(work, settings)]
        if _has_mlflow(work):
            self.writers.append(_MLflow(work, settings))

    def take(self, figures: dict[str, Any]) -> None:
        """Log the metrics of an epoch everywhere."""
        self.epochs[figures["epoch"]] = figures
        try:
            self._publish()
        except (OSError, SegError) as error:  # the next epoch writes all lines again
            self.note(f"{self.work}/{METRICS}: can't be written: {error}")
        self.note(self._line(figures))
        self.began = time.monotonic()
        self.metrics.publish(
            {
                "epochs_done": figures["epoch"],
                "epochs_total": self.settings.epochs,
                "loss": figures["loss"],
                "val_iou": figures["val_iou"],
                "mpx_per_second": figures["train_mpx_s"],
                "seconds_left": self._seconds_left(figures),
            }
        )
        self._call_writers(lambda writer: writer.write(figures))

    def restore(self, history: Sequence[dict[str, Any]]) -> None:
        """Replace the epochs by those of a checkpoint: a driver that was killed may have missed some."""
        self.epochs = {figures["epoch"]: figures for figures in history}
        self._publish()

    def close(self) -> None:
        """Close all writers."""
        self._call_writers(lambda writer: writer.close())

    def _call_writers(self, what: Callable[["_TensorBoard | _MLflow"], None]) -> None:
        for writer in list(self.writers):
            try:
                what(writer)
            except Exception as error:  # a tracking server that is away must not end a training run
                self.writers.remove(writer)
                self.note(f"{writer.name} is written no more: {error}")

    def _publish(self) -> None:
        """The metrics, and their curves so far."""
        epochs = [self.epochs[number] for number in sorted(self.epochs)]
        publish(f"{self.work}/{METRICS}", "".join(json.dumps(figures) + "\n" for figures in epochs).encode())
        publish(f"{self.work}/{CURVES}", draw_curves(epochs))

    def under_way(self) -> str:
        """A line on how many epochs are done, and for how long the next one has been awaited."""
        done = max(self.epochs, default=0)
        elapsed, missing = format_duration(time.monotonic() - self.began), self.missing()
        waiting = f"; waiting for a node: {missing}" if missing else ""
        return f"training: {done} of {self.settings.epochs} epochs done ... {elapsed}{waiting}"

    def _seconds_left(self, figures: dict[str, Any]) -> float:
        return float(figures["seconds"]) * (self.settings.epochs - int(figures["epoch"]))

    def _line(self, figures: dict[str, Any]) -> str:
        last, iou = self.settings.epochs, figures["val_iou"]
        shown = "undefined" if iou is None else f"{iou:.4f}"
        return (
            f"epoch {figures['epoch']} of {last}: loss {figures['loss']:.4f}, "
            f"{self.settings.class_name or 'building'} IoU {shown}, {figures['train_mpx_s']:.2f} Mpx/s, "
            f"{format_duration(self._seconds_left(figures))} left"
        )


class _TensorBoard:
    """Event files in `WORK/tensorboard`; for a remote folder they are copied there after each epoch."""

    name = "TensorBoard"

    def __init__(self, work: str, _settings: TrainSettings) -> None:
        from tensorboardX import SummaryWriter

        self.target = f"{work}/tensorboard"
        self.local = tempfile.TemporaryDirectory() if is_remote(work) else None
        self.writer = SummaryWriter(self.local.name if self.local else self.target)

    def write(self, figures: dict[str, Any]) -> None:
        for name, value in _scalars(figures):
            self.writer.add_scalar(name, value, figures["epoch"])
        self.writer.flush()
        if self.local:
            upload(self.local.name, self.target)

    def close(self) -> None:
        self.writer.close()
        if self.local:
            self.local.cleanup()


class _MLflow:
    """A run named after the folder, at $MLFLOW_TRACKING_URI or else in the database `WORK/mlflow.db`."""

    name = "MLflow"

    def __init__(self, work: str, settings: TrainSettings) -> None:
        self.work, self.settings = work, settings
        self.run: str | None = None  # its id, once it has begun

    def write(self, figures: dict[str, Any]) -> None:
        import mlflow

        self.run = self.run or self._begin()
        mlflow.log_metrics(dict(_scalars(figures)), step=figures["epoch"], run_id=self.run)

    def close(self) -> None:
        """End the run. MLflow's own `end_run` only ends one that began in the same thread."""
        import mlflow

        if self.run is not None:
            with environment({"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}):
                mlflow.MlflowClient().set_terminated(self.run)

    def _begin(self) -> str:
        """Resume the MLflow run of this training run, or begin one. Returns its id."""
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{self.work}/mlflow.db")
        known = (read_bytes(f"{self.work}/{MLFLOW_RUN}") or b"").decode() or None
        run = mlflow.start_run(run_id=known, run_name=os.path.basename(self.work))
        if known is None:
            mlflow.log_params(vars(self.settings))
            publish(f"{self.work}/{MLFLOW_RUN}", run.info.run_id.encode())
        return str(run.info.run_id)


def _has_mlflow(work: str) -> bool:
    """Whether MLflow is installed, and has somewhere to write: a server, or a local folder for its database."""
    if importlib.util.find_spec("mlflow") is None:
        return False
    local = not is_remote(work) and importlib.util.find_spec("sqlalchemy") is not None
    return local or "MLFLOW_TRACKING_URI" in os.environ


def _scalars(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in figures.items() if name != "epoch" and value is not None)


@contextmanager
def recording(work: str, settings: TrainSettings) -> Iterator[tuple[Queue, TrainingLog]]:
    """Yield a queue for the workers' messages, and the log that receives them until the block ends.

    Notes are printed, and the error of a failure is kept in `log.error`.
    """
    log = TrainingLog(work, settings)
    status = StatusLine(log.under_way)
    log.note = status.note
    # On the driver's own node: where that is lost, so is the driver.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    thread = threading.Thread(target=_drain, args=(iter(queue.get, None), log), daemon=True)
    thread.start()
    try:
        with watch_nodes(status.note, log.metrics) as nodes:
            resource = "GPU" if settings.use_gpus(nodes.total("GPU")) else "CPU"
            log.missing = lambda: describe_lack(nodes, resource, settings.least_workers)
            yield queue, log
    finally:
        with suppress(RayActorError):
            queue.put(None)
            thread.join(timeout=60)
        queue.shutdown()
        status.end(CLEAR_LINE)
        log.close()


def describe_lack(nodes: NodeWatch, resource: str, workers: int) -> str:
    """Return what the cluster lacks for workers that take one CPU or GPU each. Empty if it lacks nothing."""
    there = nodes.total(resource)
    return "" if there >= workers else f"{workers} workers need one {resource} each, and the cluster has {there}"


def _drain(messages: Iterable[Message], log: TrainingLog) -> None:
    for message in messages:
        if isinstance(message, Failed):
            log.error = message.error
        elif isinstance(message, Note):
            log.note(message.text)
        else:
            log.error = None  # the workers were started again, and work
            try:
                log.restore(message.history) if isinstance(message, Resumed) else log.take(message.figures)
            except Exception as error:  # a full disk or a closed terminal must not end a training run
                log.note(f"{METRICS} is not up to date: {error}")
