"""How large windows are, what is read at once, how much of it may wait, and how many threads read.

    memory of what computes ─ half ─▶ forward pass of one window             choose_window
              │
              └─ other half, on a GPU ┐
    memory of the host ───────────────┴─ an eighth of the smaller ─▶ chips   choose_depth

Nothing here changes what a run's rows say. `jobs/resources.py` decides how many actors share a node and its memory.

A model that sees further than the halo has the window of its plan, whatever the memory (`plan.make_plan`). An actor on
a GPU may take a smaller window than the driver chose (`fit_window`). After running out of memory, an actor takes half
(`jobs/segmenting/batches.py`).
"""

import math
from collections.abc import Sequence

from seg_core.grid import split
from seg_core.model.bundle import Bundle
from seg_core.run.plan import Part, ReadBlock, Settings

READ_SIDE = 4096  # px a side of what is read at once: windows beside each other share blocks of their file
FORWARD_SHARE = 1 / 2  # of the memory of what computes: for the forward pass of a window
CHIPS_DIVISOR = 8  # an eighth of the memory is for chips that wait for the model
READER_SURPLUS = 1.25  # times as many reading threads as just keep up
MAX_READERS = 64
MAX_CORE_SHARE = 0.9  # of the cores that threads compute on: with more they would only take turns


def choose_window(wanted: int | None, settings: Settings, bundle: Bundle, memory: float) -> int:
    """The side of a window in px: as asked for, or the largest up to 2048 whose forward pass fits half the memory.

    That is the memory, in bytes, of what computes.
    """
    wanted = settings.window if settings.context_exceeds_halo else wanted
    if wanted is not None:
        return min(wanted, settings.part)
    sizes = range(settings.tile_size, settings.largest_window + 1, settings.tile_size)
    room = memory * FORWARD_SHARE
    fitting = [side for side in sizes if (side + 2 * settings.halo) ** 2 * bundle.activation_bytes_per_px <= room]
    return max(fitting, default=settings.tile_size)


def gpu_share(memory: int | None, gpus: float) -> float:
    """Bytes of a GPU that an actor with so many, or a part of one, may use; infinite where it has none.

    `memory` is all that the GPU has, in bytes; None on a CPU.
    """
    return math.inf if memory is None else memory * min(1.0, gpus)


def fit_window(window: int, wanted: int | None, settings: Settings, bundle: Bundle, gpu_memory: float) -> int:
    """The side of windows in px: as planned, or smaller ones where none is `wanted` and the share of a GPU is small.

    Only the actor knows how many bytes its share of a GPU has: see `gpu_share`.
    """
    return min(window, choose_window(wanted, settings, bundle, gpu_memory))


def chip_memory(host_memory: int, gpu_memory: float) -> int:
    """Bytes for chips: of the host, or what forward passes leave of the share of a GPU, where that is less."""
    return int(min(host_memory, gpu_memory * (1 - FORWARD_SHARE)))


def choose_depth(side: int, settings: Settings, bundle: Bundle, memory: int, at_once: int) -> int:
    """How many blocks of `side` px may wait for the model: two for each that is read at once.

    In at most an eighth of the memory, in bytes.
    """
    # Bytes a pixel: one says what is valid. Scaled, a band may be of four, and is stretched in as many.
    each = bundle.bands * (1 if settings.scale is None else 9) + 1
    fitting = memory // CHIPS_DIVISOR // (each * (min(side, settings.part) + 2 * settings.halo) ** 2)
    return max(1, min(2 * at_once, fitting))


def largest_read_block(window: int) -> int:
    """The side in px of the largest blocks, of whole windows of that size in px."""
    return max(1, READ_SIDE // window) * window


def read_blocks(parts: Sequence[Part], window: int, side: int) -> list[ReadBlock]:
    """Windows of parts, by what is read at once: squares of up to `side` px."""
    blocks = [(part, block) for part in parts for block in split(part.window, side)]
    return [ReadBlock(part, tuple(split(block, window))) for part, block in blocks]


def choose_read_blocks(
    parts: Sequence[Part], window: int, settings: Settings, bundle: Bundle, memory: int, readers: int, batch: int = 1
) -> tuple[list[ReadBlock], int]:
    """What is read at once of parts whose windows are of that size in px, and how many of it may wait for the model.

    Blocks of a file that windows share are decoded once then. They are as large as READ_SIDE, or smaller by halves, so
    that there are two for each of the `readers`, and `memory` in bytes for more than one for each.
    """
    side = largest_read_block(window)
    while True:
        found = read_blocks(parts, window, side)
        at_once = max(readers, -(-batch // (side // window) ** 2))
        depth = choose_depth(side, settings, bundle, memory, at_once)
        if side == window or (len(found) >= 2 * readers and depth > readers):
            return found, depth
        side = max(1, side // window // 2) * window


def enough_readers(least: int, cores: int, reading: float, reading_cpu: float, model: float) -> int:
    """How many threads must read, so that the model does not wait.

    A window takes so many seconds to read, of which some are computed, and for the model. Threads that decode are worth
    no more than the cores; of those that wait for a store, many more can do so at once.
    """
    reading, reading_cpu, model = (max(seconds, 1e-9) for seconds in (reading, reading_cpu, model))
    wanted, room = READER_SURPLUS * reading / model, MAX_CORE_SHARE * cores * reading / reading_cpu
    return max(least, math.ceil(min(wanted, room, MAX_READERS)))
