"""Estimate the time and cost of a run from a few of its windows, segmented on this machine."""

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, cycle, islice, zip_longest
from typing import Any

import torch

from seg_core.errors import ReadError, SegError
from seg_core.grid import Window
from seg_core.inference.windows import stage_windows, start_windows
from seg_core.model.device_chips import DeviceChip
from seg_core.model.loading import choose_device
from seg_core.model.segmenter import Segmenter
from seg_core.run.plan import Plan, ReadBlock, Settings
from seg_core.run.sizing import fit_window, gpu_share, largest_read_block, read_blocks
from seg_core.threads import count_cpus, prefetch

from .progress import waiting
from .resources import CPUS_PER_ACTOR, split_cores
from .terminal import note

MAX_SAMPLED_WINDOWS = 8  # and no more than a quarter of the region
MIN_SECONDS, MAX_SECONDS = 1.0, 10.0  # s to measure the model; reading is measured for MAX_SECONDS at most
SECONDS_PER_HOUR = 3600
WAY_OUT = "leave the option out, or name other scenes"


def calibrate(
    plan: Plan, model: str, window: int, wanted: int | None, device: str, devices: int | None, price: float | None
) -> dict[str, Any]:
    """Measure one device and its readers, and estimate hours, device-hours and cost of the plan on `devices` devices.

    `window` is the planned side in px. If none is `wanted` and a GPU's memory is small, smaller windows are measured,
    as in a run. `devices` is by default the number in this machine, whose CPUs are divided as in a run. `price` is per
    device-hour; without it the cost is None. Start-up is not counted. Rates are in Mpx/s.

    Windows that can't be read are left out. Raises SegError if none of those that are sampled holds data.
    """
    on_gpu, cpus = choose_device(device).type == "cuda", count_cpus()
    compiling = "yes" if on_gpu else "no"  # on a GPU most of a run is compiled
    plan = plan.for_device(on_gpu)
    segmenter = Segmenter(model, device, precision=plan.settings.precision, compiling=compiling)
    window = fit_window(window, wanted, plan.settings, segmenter.bundle, gpu_share(segmenter.memory, 1.0))
    local_devices = torch.cuda.device_count() if on_gpu else -(-cpus // CPUS_PER_ACTOR)
    threads, readers = split_cores(cpus // local_devices, on_gpu)
    torch.set_num_threads(threads)
    step = -(-plan.counts["parts"] // max(MAX_SAMPLED_WINDOWS, 2 * readers))
    # From the middle of each step, because the first and last parts of a scene are the small ones.
    parts = list(islice(plan.parts(), step // 2, None, step))
    blocks_of_parts = [read_blocks([part], window, largest_read_block(window)) for part in parts]
    blocks = [block for each in blocks_of_parts for block in (each if len(parts) < 2 * readers else each[:1])]
    with waiting("measuring how fast windows are read"):
        decode = _decode_rate(blocks, plan.settings, segmenter, readers)
    # The first window of each block, then the second window of each block, and so on.
    ordered = zip_longest(*(block.tasks for block in blocks))
    tasks = [task for task in chain.from_iterable(ordered) if task is not None]
    num_sampled = min(MAX_SAMPLED_WINDOWS, -(-plan.num_windows(window) // 4))
    sample = tasks[:: max(1, len(blocks) // num_sampled)][:num_sampled]
    with waiting(f"measuring how fast {len(sample)} windows are segmented"):
        chips = _read_chips([ReadBlock(task.part, (task.window,)) for task in sample], plan.settings, segmenter)
        rates = {"decode": decode, "model": _model_rate(chips, plan.settings, segmenter)}
    limit = min(rates, key=lambda name: rates[name])
    number_of_devices = devices or local_devices
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


def _decode_rate(blocks: Sequence[ReadBlock], settings: Settings, segmenter: Segmenter, readers: int) -> float:
    """Return the useful pixels per second that `readers` threads read, without halos, measured for MAX_SECONDS.

    Each block is read only once, because its data is cached then. If there are several, the first one is a warm-up.
    Those that can't be read count nothing. Raises SegError if no other is left.
    """

    def read(block: ReadBlock) -> int:
        with suppress(ReadError):
            stage_windows(block, settings, segmenter)
            return block.num_pixels
        return 0

    first, *others = blocks
    if others:
        read(first)
    with ThreadPoolExecutor(readers) as pool:
        started, pixels = time.perf_counter(), 0
        for block_pixels in prefetch(pool, read, others or blocks, readers):
            pixels, seconds = pixels + block_pixels, time.perf_counter() - started
            if seconds > MAX_SECONDS:
                break
    if not pixels:
        raise SegError(
            f"{blocks[0].part.scene.scene_id}: nothing that was sampled for --calibrate can be read: {WAY_OUT}"
        )
    return pixels / seconds


def _read_chips(
    blocks: Sequence[ReadBlock], settings: Settings, segmenter: Segmenter
) -> list[tuple[Window, DeviceChip]]:
    """Return the window of each block, and its chip. Those that can't be read are left out, and a line says so.

    Raises SegError if none holds data.
    """
    chips: list[tuple[Window, DeviceChip]] = []
    for block in blocks:
        try:
            chips.append((block.windows[0], stage_windows(block, settings, segmenter)[0]))
        except ReadError as error:
            unread = error
    if len(chips) < len(blocks):
        note(f"{len(blocks) - len(chips)} of {len(blocks)} windows can't be read, and are left out: {unread}")
    if not any(chip.any_valid for _, chip in chips):
        raise SegError(
            f"{blocks[0].part.scene.scene_id}: no window that was sampled for --calibrate holds data: {WAY_OUT}"
        )
    return chips


def _model_rate(chips: Sequence[tuple[Window, DeviceChip]], settings: Settings, segmenter: Segmenter) -> float:
    """Return the useful pixels per second that the model segments, without halos, in batches of windows of one size."""
    by_size = defaultdict(list)
    for window, chip in chips:
        by_size[window.shape].append((window, chip))
    largest = max((chip.image.shape for _, chip in chips), key=lambda shape: shape.numel())
    length = segmenter.find_batch(*largest)
    batches = [group[start : start + length] for group in by_size.values() for start in range(0, len(group), length)]

    def run(batches: Sequence[Sequence[tuple[Window, DeviceChip]]]) -> float:
        started = time.perf_counter()
        pending = [start_windows([c for _, c in batch], batch[0][0], settings, segmenter) for batch in batches]
        for each in pending:
            each.result()
        return time.perf_counter() - started

    run(batches if segmenter.on_gpu else batches[:1])  # warms up, and compiles
    # A GPU is fastest with all batches in flight; a CPU takes one batch after the other.
    groups = [batches] if segmenter.on_gpu else [[batch] for batch in batches]
    seconds, pixels = 0.0, 0
    for number, group in enumerate(cycle(groups), 1):
        seconds += run(group)
        pixels += sum(window.num_pixels for batch in group for window, _ in batch)
        if seconds >= MIN_SECONDS and (number >= len(groups) or seconds >= MAX_SECONDS):
            break
    return pixels / seconds
