"""A function of batches of chips, compiled for the sizes of batches on which it has spent long enough."""

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

COMPILE_AFTER = 20.0  # s on batches of one size: about as long as it takes to compile for them
MAX_SIZES = 4

log = logging.getLogger(__name__)

Outputs = tuple[Tensor, ...]
Chips = Sequence[Tensor]
Run = Callable[[Chips, Chips], Outputs]


def batch(chips: Chips) -> Tensor:
    """Chips as one batch; that of a single one shares its memory."""
    return chips[0].unsqueeze(0) if len(chips) == 1 else torch.stack(list(chips))


class CompiledNetwork:
    """The function `answer(images, masks, ...)` of batches, which gives tensors, called with the chips of each.

    Those are `(bands, h, w)`, and the masks `(h, w)`. It is compiled with static shapes where that pays: for a size of
    batches on which `after` seconds were `spent`, and never where that is None. Where it can't be compiled it is called
    as it is, and a warning is logged.
    """

    def __init__(self, answer: Callable[..., Outputs], after: float | None, on_gpu: bool) -> None:
        self.answer, self.after, self.on_gpu = answer, after, on_gpu
        self.sizes: dict[Hashable, Run] = {}
        self.spent: defaultdict[Hashable, float] = defaultdict(float)  # seconds, by size
        self.recording = threading.Lock()  # while a GPU's work is recorded, the GPU may not be waited for
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None  # of memory, which all sizes share

    def __call__(self, size: Hashable | None, images: Chips, masks: Chips, *rest: Any) -> Outputs:
        """The answer to a batch. Its size says all that may not change, `rest` too; None: it is rare."""
        if size in self.sizes:
            return self.sizes[size](images, masks)
        return self.answer(batch(images), batch(masks), *rest)

    def prepare(self, size: Hashable | None, images: Chips, masks: Chips, *rest: Any) -> bool:
        """Compile for batches of that size, where it is time to, with one of them; whether it was."""
        waited = size is not None and self.after is not None and self.spent[size] >= self.after
        if size in self.sizes or not waited or len(self.sizes) >= MAX_SIZES:
            return False
        try:
            compiled = torch.compile(self.answer, dynamic=False)
            run = self._record if self.on_gpu else self._try
            self.sizes[size] = run(compiled, batch(images), batch(masks), *rest)
        except torch.OutOfMemoryError:  # it takes more than to run it does
            self.spent[size] = -math.inf
            torch.cuda.empty_cache()
        except Exception as error:  # there are as many reasons as there are compilers
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the network runs uncompiled: torch.compile: %s", first)
            self.after = None
        return True

    def _try(self, compiled: Callable[..., Outputs], images: Tensor, masks: Tensor, *rest: Any) -> Run:
        """A function that calls the compiled network, which has run once by then."""

        def run(images: Chips, masks: Chips) -> Outputs:
            # Pieces of larger chips lie otherwise in memory, for which it would compile anew.
            return compiled(batch(images).contiguous(), batch(masks).contiguous(), *rest)

        run(list(images), list(masks))
        return run

    def _record(self, compiled: Callable[..., Outputs], images: Tensor, masks: Tensor, *rest: Any) -> Run:
        """Record the network as a CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).

        A single call starts all of it, where each of some hundred would wait for threads that read and write. cuDNN,
        too, tries which of its routines are fastest for the size. The answer is in the same place each time, until the
        next call.
        """
        images, masks = images.clone(), masks.clone()
        graph = torch.cuda.CUDAGraph()
        # Where recording fails, torch leaves its own stream in force.
        here = torch.cuda.stream(torch.cuda.current_stream())
        with here, torch.backends.cudnn.flags(enabled=True, benchmark=True):
            compiled(images, masks, *rest)
            # Other threads copy meanwhile, and allocate.
            with self.recording, torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                found = compiled(images, masks, *rest)

        def replay(new_images: Chips, new_masks: Chips) -> Outputs:
            torch.stack(list(new_images), out=images)
            torch.stack(list(new_masks), out=masks)
            graph.replay()
            return found

        return replay
