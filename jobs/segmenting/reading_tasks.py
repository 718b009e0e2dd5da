"""Read windows in Ray tasks, on free CPUs of any node, where those of a GPU's own node can't keep it busy.

thread of an actor ─ part, chip ─▶ task on a free CPU ─ pixels, by the object store ─▶ thread of the actor
"""

import numpy as np
import ray

from seg_core.chips import AllocatePixels, Pixels, Valid, allocate_pixels
from seg_core.grid import Window
from seg_core.imagery.jpeg_library import find_decoders
from seg_core.inference.windows import Chip, read_pixels
from seg_core.run.plan import Part, Settings

from ..spread import get_result

MAX_ATTEMPTS = 4  # processes, or nodes, that may end over a window before it is given up


@ray.remote(num_cpus=1, max_retries=MAX_ATTEMPTS - 1)
def read_in_task(part: Part, chip: Window, settings: Settings) -> tuple[Pixels, Valid | None, dict[str, str]]:
    """Return the pixels of a chip, which of them hold data (None: all), and what decoded them. Raises ReadError."""
    import cv2

    cv2.setNumThreads(1)
    pixels, valid = read_pixels(part, chip, settings)
    return pixels, None if valid.all() else valid, find_decoders()


class TaskReader:
    """Reads pixels like `read_pixels`, in a Ray task. Any thread may use it.

    Ray repeats a task whose process or node ends, and places it on a node without a GPU if one has a free CPU. An
    autoscaler starts nodes for tasks that wait.
    """

    def __init__(self) -> None:
        self.decoders: dict[str, str] = {}  # what decoded the last chip, with versions

    def __call__(self, part: Part, chip: Window, settings: Settings, new: AllocatePixels = allocate_pixels) -> Chip:
        """Return the pixels of a chip, in `new` memory, and which hold data.

        Raises ReadError, or WorkerCrashedError if reading the chip ends MAX_ATTEMPTS processes.
        """
        shared, valid, self.decoders = get_result(read_in_task.remote(part, chip, settings))
        pixels = new(shared.shape)  # what Ray shares can't be written to, nor be copied by a GPU by itself
        np.copyto(pixels, shared)
        return pixels, np.ones(shared.shape[1:], np.bool_) if valid is None else np.array(valid)
