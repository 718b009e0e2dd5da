"""How fast a region is segmented, against a plain loop over the same windows in the same run."""

import time
from collections.abc import Callable
from typing import Any

import torch

from jobs.segment import Speed, run_pipe
from jobs.session import make_crew, ray_session
from seg_core.bundle import read_bundle
from seg_core.raster import read_chip
from seg_core.run import Plan, choose_window, open_run, parts_to_do
from seg_core.scenes import Scene
from seg_core.segmenter import Segmenter
from seg_core.tiling import Window, chip_window, split

Visit = Callable[[Scene, Window], object]


def bench(plan: Plan, model: str, out: str, speed: Speed) -> dict[str, Any]:
    """Useful megapixels a second of decoding alone, of a plain loop and of the whole pipe, start-up apart.

    The loop is rasterio and the same model, one window after the other, in this process with as many threads as an
    actor has. `out` is a new run folder that the pipe fills.
    """
    bundle = read_bundle(model)
    with ray_session(speed.address, verbose=speed.verbose):
        crew = make_crew(speed.actors, speed.gpus_per_actor, speed.device)
        window = choose_window(speed.window, plan.settings, bundle, crew.memory)
        open_run(out, plan, model)
        todo = parts_to_do(out, plan)
        receipts = list(run_pipe(todo, model, out, plan.settings, window, crew, speed.device))
    pipe = max(r["ended"] for r in receipts) - min(r["started"] for r in receipts)
    torch.set_num_threads(crew.threads)
    segmenter = Segmenter(model, speed.device)
    halo, stride = plan.settings.halo, bundle.stride

    def read(scene: Scene, at: Window) -> Any:
        return read_chip(scene, chip_window(at, halo, stride), plan.settings.scale)

    def infer(scene: Scene, at: Window) -> object:
        pixels, valid = read(scene, at)
        return segmenter(pixels, valid, halo, at.height, at.width)

    rates = {
        "decode": _rate(plan, window, read),
        "loop": _rate(plan, window, infer),
        "pipe": plan.counts["pixels"] / pipe / 1e6,
    }
    return {
        **{f"{name}_mpx_s": round(rate, 3) for name, rate in rates.items()},
        "pipe_to_loop": round(rates["pipe"] / rates["loop"], 3),
        "window": window,
        "threads": crew.threads,
        "actors": crew.most,
        "pixels": plan.counts["pixels"],
    }


def _rate(plan: Plan, window: int, visit: Visit) -> float:
    started = time.perf_counter()
    for part in plan.parts():
        for at in split(part.window, window):
            visit(part.scene, at)
    return plan.counts["pixels"] / (time.perf_counter() - started) / 1e6
