"""Training in this process, as a worker of Ray Train does it: that takes Ray a quarter of a minute to start."""

import os
import shutil
import warnings
from typing import Any

import pytest
import ray.train.v2._internal.execution.train_fn_utils as ray_train
import torch.distributed
from ray.train import Checkpoint, Result
from ray.train.v2.api.exceptions import WorkerGroupError

Kept = list[tuple[Checkpoint, dict[str, Any]]]
_kept: dict[str, Kept] = {}  # the checkpoints of each training, by its folder: Ray goes on from the last one


class LocalTrainer:
    """Ray's trainer, but for its processes. Checkpoints are kept where Ray would keep them, all of them.

    Of several workers it is the first one, which exchanges its gradients with none.
    """

    def __init__(self, worker: Any, *, train_loop_config: Any, run_config: Any, scaling_config: Any) -> None:
        self.worker, self.config, self.scaling = worker, train_loop_config, scaling_config
        self.folder = f"{run_config.storage_path}/{run_config.name}"

    def fit(self) -> Result:
        reported = _Reports(self.folder, self.scaling.max_workers)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                # What Ray's store holds can't be written to. Torch warns that it could.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                patch.setattr(ray_train, "_train_fn_utils", reported)
                self.worker(self.config)
        except Exception as error:
            raise WorkerGroupError("a worker failed", {0: error}) from error
        finally:
            torch.distributed.destroy_process_group()
        return Result(metrics=None, checkpoint=None, path=None, error=None, best_checkpoints=reported.kept)


class _Reports(ray_train.LocalTrainFnUtils):
    def __init__(self, folder: str, workers: int) -> None:
        super().__init__("local", world_size=workers)
        self.folder, self.kept = folder, _kept.setdefault(folder, [])
        self._last_checkpoint = self.kept[-1][0] if self.kept else None

    def report(
        self, metrics: dict[str, Any], checkpoint: Any = None, checkpoint_dir_name: Any = None, **_: Any
    ) -> None:
        path = os.path.join(self.folder, checkpoint_dir_name)
        shutil.copytree(checkpoint.path, path)
        self.kept.append((Checkpoint.from_directory(path), metrics))


def train_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Have `seg train` start no workers."""
    patch.setattr("aerial_seg.train.TorchTrainer", LocalTrainer)
