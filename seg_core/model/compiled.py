"""Compile a function of batches of chips for the sizes of batches that have taken long enough."""

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

COMPILE_AFTER = 20.0  # seconds spent on batches of one size: about the time that it takes to compile for them
MAX_SIZES = 4  # sizes of batches to compile for

log = logging.getLogger(__name__)

Outputs = tuple[Tensor, ...]
Chips = Sequence[Tensor]
Batch = Sequence[Chips]  # what the chips of a batch consist of, such as their images and their masks
RunBatch = Callable[[Batch], Outputs]


def stack_chips(chips: Chips) -> Tensor:
    """Stack chips to one batch. A batch of a single chip shares its memory."""
    return chips[0].unsqueeze(0) if len(chips) == 1 else torch.stack(list(chips))


class CompiledNetwork:
    """Calls a function `function(images, masks, normalizations, *rest)` of batches, compiled where that saves time.

    The function is the same in all calls. It is not kept before it is compiled: a reference to a method of the owner
    would leave the owner to the garbage collector, and its network to whichever thread that runs in. The function
    returns tensors. It is called with the chips of a batch: images `(bands, h, w)`, masks `(h, w)` and
    normalizations `(2, bands)`. It is compiled with static shapes for a size of batches on which `compile_after`
    seconds have been spent, and never if that is None. If it can't be compiled, it runs uncompiled, and a warning is
    logged.
    """

    def __init__(self, compile_after: float | None, on_gpu: bool) -> None:
        self.compile_after, self.on_gpu = compile_after, on_gpu
        self.sizes: dict[Hashable, RunBatch] = {}  # the compiled function of each size
        self.seconds_spent: defaultdict[Hashable, float] = defaultdict(float)  # seconds per size
        self.recording_lock = threading.Lock()  # held while a CUDA graph is recorded: nothing may wait for the GPU then
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None  # memory that the graphs of all sizes share

    def __call__(self, function: Callable[..., Outputs], size: Hashable | None, batch: Batch, *rest: Any) -> Outputs:
        """Return the function's tensors for a batch.

        `size` identifies all that must not change for a compiled function, including `rest`. It is None for a rare
        size.
        """
        if size in self.sizes:
            return self.sizes[size](batch)
        return function(*map(stack_chips, batch), *rest)

    def prepare(self, function: Callable[..., Outputs], size: Hashable | None, batch: Batch, *rest: Any) -> bool:
        """Compile for this size of batches, with one of them as input, if enough time was spent on it.

        Returns whether it compiled, or tried to.
        """
        is_due = size is not None and self.compile_after is not None and self.seconds_spent[size] >= self.compile_after
        if size in self.sizes or not is_due or len(self.sizes) >= MAX_SIZES:
            return False
        try:
            compiled = torch.compile(function, dynamic=False)
            make_run = self._record if self.on_gpu else self._call_once
            self.sizes[size] = make_run(compiled, batch, *rest)
        except torch.OutOfMemoryError:  # compiling takes more memory than running
            self.seconds_spent[size] = -math.inf
            torch.cuda.empty_cache()
        except Exception as error:  # each compiler fails in its own way
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the network runs uncompiled: torch.compile: %s", first)
            self.compile_after = None
        return True

    def _call_once(self, compiled: Callable[..., Outputs], batch: Batch, *rest: Any) -> RunBatch:
        """Return a function that calls the compiled network, after a first call that compiles it."""

        def run(batch: Batch) -> Outputs:
            # Views of larger chips have other strides, and would be compiled for again.
            return compiled(*(stack_chips(each).contiguous() for each in batch), *rest)

        run(batch)
        return run

    def _record(self, compiled: Callable[..., Outputs], batch: Batch, *rest: Any) -> RunBatch:
        """Record the network as a CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).

        One call starts the whole graph. Otherwise each of some hundred calls would wait for threads that read and
        write. cuDNN also tries which of its routines are fastest for this size. The returned tensors are overwritten by
        the next call.
        """
        inputs = [stack_chips(each).clone() for each in batch]
        graph = torch.cuda.CUDAGraph()
        # If recording fails, torch does not restore the current stream.
        current_stream = torch.cuda.stream(torch.cuda.current_stream())
        with current_stream, torch.backends.cudnn.flags(enabled=True, benchmark=True):
            compiled(*inputs, *rest)
            # Other threads copy and allocate at the same time.
            with self.recording_lock, torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                outputs = compiled(*inputs, *rest)

        def replay(batch: Batch) -> Outputs:
            for chips, memory in zip(batch, inputs, strict=True):
                torch.stack(list(chips), out=memory)
            graph.replay()
            return outputs

        return replay
