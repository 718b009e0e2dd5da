"""What a run would take, from a few of its windows on this machine."""

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice, zip_longest
from typing import Any

import torch

from seg_core.grid import Window
from seg_core.inference.windows import stage_windows, start_windows
from seg_core.model.segmenter import DeviceChip, Segmenter, choose_device
from seg_core.run.plan import Plan, ReadBlock, Settings
from seg_core.run.sizing import fit_window, gpu_share, largest_read_block, read_blocks
from seg_core.threads import prefetch

from .progress import waiting
from .resources import CPUS_PER_ACTOR, share_cores

SAMPLE = 8  # windows, and no more than a quarter of the region
LEAST, MOST = 1.0, 10.0  # s for which the model, and reading, are measured
SECONDS_PER_HOUR = 3600


def calibrate(
    plan: Plan, model: str, window: int, wanted: int | None, device: str, devices: int | None, price: float | None
) -> dict[str, Any]:
    """Rates of one device and its readers, and the hours, device-hours and cost of the whole plan with `devices`.

    Of windows as planned, or of smaller ones where none is `wanted` and a GPU's memory is small, as in a run.
    Without `devices` they are those of this machine, whose CPUs are shared out as in a run. Start-up is not counted.
    """
    on_gpu, cpus = choose_device(device).type == "cuda", os.cpu_count() or 1
    compiling = "yes" if on_gpu else "no"  # as most of a run is
    segmenter = Segmenter(model, device, precision=plan.settings.precision, compiling=compiling)
    plan = plan.with_decoder(on_gpu)
    window = fit_window(window, wanted, plan.settings, segmenter.bundle, gpu_share(segmenter.memory, 1.0))
    here = torch.cuda.device_count() if on_gpu else -(-cpus // CPUS_PER_ACTOR)
    threads, readers = share_cores(cpus // here, on_gpu)
    torch.set_num_threads(threads)
    every = -(-plan.counts["parts"] // max(SAMPLE, 2 * readers))
    # From the middle of each stretch, for the first and last parts of a scene are the small ones.
    parts = list(islice(plan.parts(), every // 2, None, every))
    within = [read_blocks([part], window, largest_read_block(window)) for part in parts]
    chosen = [block for each in within for block in (each if len(within) < 2 * readers else each[:1])]
    with waiting("measuring how fast windows are read"):
        decode = _decode_rate(chosen, plan.settings, segmenter, readers)
    # Of each block the first, then the second ones.
    ordered = zip_longest(*(block.tasks for block in chosen))
    tasks = [task for task in chain.from_iterable(ordered) if task is not None]
    most = min(SAMPLE, -(-plan.num_windows(window) // 4))
    sample = tasks[:: max(1, len(chosen) // most)][:most]
    with waiting(f"measuring how fast {len(sample)} windows are segmented"):
        blocks = [ReadBlock(task.part, (task.window,)) for task in sample]
        chips = [(block.windows[0], stage_windows(block, plan.settings, segmenter)[0]) for block in blocks]
        rates = {"decode": decode, "model": _model_rate(chips, plan.settings, segmenter)}
    limit = min(rates, key=lambda name: rates[name])
    number_of_devices = devices or here
    device_hours = plan.counts["pixels"] / rates[limit] / SECONDS_PER_HOUR
    return {
        **{f"{name}_mpx_s": round(rate / 1e6, 6) for name, rate in rates.items()},
        "calibrated_on": len(chips),
        "limit": limit,
        "devices": number_of_devices,
        "hours": device_hours / number_of_devices,
        "device_hours": device_hours,
        "cost": None if price is None else device_hours * price,
    }


def _decode_rate(chosen: Sequence[ReadBlock], settings: Settings, segmenter: Segmenter, readers: int) -> float:
    """Useful pixels a second that so many threads read in `MOST` s; each block once, for what was fetched is kept.

    The first one warms up, where there are others.
    """

    def read(block: ReadBlock) -> int:
        stage_windows(block, settings, segmenter)
        return block.num_pixels

    first, *others = chosen
    if others:
        read(first)
    with ThreadPoolExecutor(readers) as pool:
        started, pixels = time.perf_counter(), 0
        for read_now in prefetch(pool, read, others or chosen, readers):
            pixels, seconds = pixels + read_now, time.perf_counter() - started
            if seconds > MOST:
                break
        return pixels / seconds


def _model_rate(chips: Sequence[tuple[Window, DeviceChip]], settings: Settings, segmenter: Segmenter) -> float:
    """Useful pixels a second of windows and their chips, in batches of one size."""
    by_size = defaultdict(list)
    for at, chip in chips:
        by_size[at.shape].append((at, chip))
    most = segmenter.find_batch(*max((chip.image.shape for _, chip in chips), key=lambda shape: shape.numel()))
    batches = [some[first : first + most] for some in by_size.values() for first in range(0, len(some), most)]

    def run(batches: Sequence[Sequence[tuple[Window, DeviceChip]]]) -> float:
        started = time.perf_counter()
        under_way = [start_windows([c for _, c in some], some[0][0], settings, segmenter) for some in batches]
        for each in under_way:
            each.result()
        return time.perf_counter() - started

    run(batches if segmenter.on_gpu else batches[:1])  # warms up, and compiles
    # A GPU is at its fastest with all of them under way; a CPU takes one after the other.
    groups = [batches] if segmenter.on_gpu else [[some] for some in batches]
    seconds, pixels = 0.0, 0
    for number, group in enumerate(cycle(groups), 1):
        seconds += run(group)
        pixels += sum(at.num_pixels for some in group for at, _ in some)
        if seconds >= LEAST and (number >= len(groups) or seconds >= MOST):
            break
    return pixels / seconds
