"""Figures of a running job as Ray metrics, which Prometheus reads from the nodes: see cluster/grafana."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "aerial_seg_"  # Ray puts ray_ before it
METRICS = {
    "windows_done": "windows segmented by this job",
    "windows_total": "windows that this job is to segment",
    "tiles_failed": "tiles that failed",
    "epochs_done": "epochs trained",
    "epochs_total": "epochs to train",
    "loss": "loss of the latest epoch",
    "val_iou": "IoU of the latest epoch on the validation images",
    "mpx_per_second": "megapixels per second",
    "seconds_left": "seconds until the job ends, estimated",
    "busy_reading": "share of the time in which the reading threads or their cores were busy",
    "busy_decoding": "share of the time in which the GPU's JPEG engine was busy",
    "busy_model": "share of the time in which the device was busy",
    "busy_writing": "share of the time in which the writers were busy",
    "nodes": "nodes of the cluster that are alive",
}


class JobMetrics:
    """Publishes figures by the names of METRICS, under the path or URI of what the job writes."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.gauges: dict[str, Gauge] = {}
        self.latest: dict[str, float] = {}

    def publish(self, figures: Mapping[str, float | None]) -> None:
        """Publish figures. One that is None is not known, and is left as it was."""
        self.latest |= {name: float(value) for name, value in figures.items() if value is not None}
        self.refresh()

    def refresh(self) -> None:
        """Publish the latest figures again: Ray drops those that nobody has set for two of its report intervals."""
        for name, value in list(self.latest.items()):
            if name not in self.gauges:
                self.gauges[name] = Gauge(PREFIX + name, METRICS[name], tag_keys=("run",))
            self.gauges[name].set(value, tags=self.tags)
