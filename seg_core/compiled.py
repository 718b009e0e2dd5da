"""A function of batches of chips, compiled for the sizes of batches on which it has spent long enough."""

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

AFTER = 20.0  # s on batches of one size: about as long as it takes to compile for them
MAX_SIZES = 4

Answer = tuple[Tensor, ...]


class Compiled:
    """The function `answer(images, masks, ...)`, which gives tensors; compiled with static shapes where that pays.

    That is for a size of batches on which `after` seconds were `spent`, and never where that is None. Where it can't be
    compiled it is called as it is, and a line says so.
    """

    def __init__(self, answer: Callable[..., Answer], after: float | None, on_gpu: bool) -> None:
        self.answer, self.after, self.on_gpu = answer, after, on_gpu
        self.sizes: dict[Hashable, Callable[[Tensor, Tensor], Answer]] = {}
        self.spent: defaultdict[Hashable, float] = defaultdict(float)  # seconds, by size
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None  # of memory, which all sizes share

    def __call__(self, size: Hashable | None, images: Tensor, masks: Tensor, *rest: Any) -> Answer:
        """The answer to a batch. Its size says all that may not change, `rest` too; None: it comes seldom."""
        return self.sizes[size](images, masks) if size in self.sizes else self.answer(images, masks, *rest)

    def prepare(self, size: Hashable | None, images: Tensor, masks: Tensor, *rest: Any) -> bool:
        """Compile for batches of that size, where it is time to, with one of them; whether it was."""
        waited = size is not None and self.after is not None and self.spent[size] >= self.after
        if size in self.sizes or not waited or len(self.sizes) >= MAX_SIZES:
            return False
        try:
            compiled = torch.compile(self.answer, dynamic=False)
            self.sizes[size] = (self._record if self.on_gpu else self._try)(compiled, images, masks, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # there are as many reasons as there are compilers
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"the network runs uncompiled: torch.compile: {first}", file=sys.stderr)
            self.after = None
        return True

    def _try(
        self, compiled: Callable[..., Answer], images: Tensor, masks: Tensor, *rest: Any
    ) -> Callable[[Tensor, Tensor], Answer]:
        """The same, once it has run."""

        def run(images: Tensor, masks: Tensor) -> Answer:
            # Pieces of larger chips lie otherwise in memory, for which it would compile anew.
            return compiled(images.contiguous(), masks.contiguous(), *rest)

        run(images, masks)
        return run

    def _record(
        self, compiled: Callable[..., Answer], images: Tensor, masks: Tensor, *rest: Any
    ) -> Callable[[Tensor, Tensor], Answer]:
        """The same as a CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).

        A single call starts all of it, where each of some hundred would wait for threads that read and write. cuDNN,
        too, tries which of its routines are fastest for the size. The answer is in the same place each time, until the
        next call.
        """
        images, masks = images.clone(), masks.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            compiled(images, masks, *rest)
            # Other threads copy meanwhile, and allocate.
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                found = compiled(images, masks, *rest)

        def replay(new_images: Tensor, new_masks: Tensor) -> Answer:
            images.copy_(new_images)
            masks.copy_(new_masks)
            graph.replay()
            return found

        return replay
