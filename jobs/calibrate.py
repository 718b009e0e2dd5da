"""What a run would take, from a few of its windows on this machine."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, zip_longest
from typing import Any

import torch

from jobs.session import CPUS_PER_ACTOR, share_cores
from jobs.windows import fit_window, stage_windows, start_windows
from seg_core.ahead import ahead
from seg_core.plan import Plan, Square, largest_square, squares
from seg_core.segmenter import Segmenter

SAMPLE = 8  # windows
SECONDS_PER_HOUR = 3600


def calibrate(
    plan: Plan, model: str, window: int, wanted: int | None, device: str, devices: int | None, price: float | None
) -> dict[str, Any]:
    """Rates of one device and its readers, and the hours, device-hours and cost of the whole plan with `devices`.

    Of windows as planned, or of smaller ones where none is `wanted` and a GPU's memory is small, as in a run.
    Without `devices` they are those of this machine, whose CPUs are shared out as in a run. Start-up is not counted.
    """
    segmenter, cpus = Segmenter(model, device, precision=plan.settings.precision), os.cpu_count() or 1
    on_gpu = segmenter.device.type == "cuda"
    plan = plan.decided(on_gpu)
    window = fit_window(window, wanted, plan.settings, segmenter, 1.0)
    here = torch.cuda.device_count() if on_gpu else -(-cpus // CPUS_PER_ACTOR)
    threads, readers = share_cores(cpus // here, on_gpu)
    torch.set_num_threads(threads)
    every = -(-plan.counts["parts"] // SAMPLE)
    # From the middle of each stretch, for the first and last parts of a scene are the small ones.
    parts = list(islice(plan.parts(), every // 2, None, every))
    chosen = [squares([part], window, largest_square(window))[0] for part in parts]

    def read(square: Square) -> int:
        stage_windows(square, plan.settings, segmenter)
        return sum(at.height * at.width for _, at in square)

    with ThreadPoolExecutor(readers) as pool:
        started = time.perf_counter()
        decode = sum(ahead(pool, read, chosen, readers)) / (time.perf_counter() - started)
    # Of each square the first, then the second ones.
    jobs = [job for job in chain.from_iterable(zip_longest(*chosen)) if job is not None][:SAMPLE]
    chips = [(at, stage_windows([(part, at)], plan.settings, segmenter)) for part, at in jobs]
    for some in (chips[:1], chips):  # the first one warms up
        started = time.perf_counter()
        under_way = [start_windows(chip, at, plan.settings, segmenter) for at, chip in some]
        for each in under_way:
            each.result()
    pixels = sum(at.height * at.width for at, _ in chips)
    rates = {"decode": decode, "model": pixels / (time.perf_counter() - started)}
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
