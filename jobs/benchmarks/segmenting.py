"""Measure the throughput of segmentation: of the whole pipeline, of each stage alone, and of a plain loop.

Stages and loop run in actors that have the number and the resources of the pipeline's actors.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, cycle
from statistics import median
from typing import Any

import ray

from seg_core.grid import num_splits
from seg_core.model.bundle import read_bundle
from seg_core.run.plan import Part, Plan, pack_parts
from seg_core.run.resume import open_run
from seg_core.run.sizing import choose_window

from ..progress import waiting
from ..ray_session import ray_session
from ..resources import ActorResources, ExecutionOptions, size_actors
from ..segment import run_pipe
from ..segmenting.bottleneck import Spans, widen
from ..segmenting.receipts import Receipt
from ..spread import get_result
from .peak import Peak

MIN_PARTS_PER_ACTOR = 3  # one to warm up, and two to measure
MAX_SAMPLED_PARTS = 64  # that the stages are measured on
STAGES = ("decode", "copy", "model", "loop")  # methods of Stages
Figures = dict[str, Any]


def bench_segment(
    plan: Plan, model: str, folder: str, execution: ExecutionOptions, seconds: float, rounds: int
) -> Figures:
    """Measure each stage, a plain loop and the whole pipeline. Returns rates in useful Mpx/s, and start-up apart.

    Useful pixels are those of windows, without halos. Each measurement takes at least about `seconds` per round.
    Figures are medians over the rounds, so that other programs on the machine distort the comparison less. The
    pipeline segments the plan's parts repeatedly, into runs in `folder`.
    """
    started = time.time()
    with ray_session(execution.address, verbose=execution.verbose):
        bench = Bench(plan, model, folder, execution)
        session_seconds = time.time() - started
        results = []
        with waiting("measuring") as report:
            for number in range(rounds):
                report(f"round {number + 1} of {rounds}")
                results.append(_measure_round(bench, seconds))
    start_up = round(results[0]["start_up_s"] + session_seconds, 3)  # only the first round starts Ray
    medians: Figures = {
        name: None if None in (values := [figures[name] for figures in results]) else median(values)
        for name in results[0]
        if name != "start_up_s"
    }
    slower = _slower({name: medians[f"{name}_mpx_s"] for name in STAGES})
    return {**medians, "start_up_s": start_up, "slower": slower, "rounds": rounds, **bench.describe()}


def _measure_round(bench: "Bench", seconds: float) -> Figures:
    """Measure all rates once: the stages half before the pipeline and half after it, in the opposite order.

    A machine that gets faster or slower during the round thus favours none of them.
    """
    before = bench.measure_stages(STAGES, seconds / 2)
    pipe = bench.measure_pipe(pixels=seconds * before[_slower(before)] * 1e6)
    after = bench.measure_stages(STAGES[::-1], seconds / 2)
    rates: Figures = {
        name: None if before[name] is None else round((before[name] + after[name]) / 2, 3) for name in STAGES
    }
    return {
        **{f"{name}_mpx_s": rate for name, rate in rates.items()},
        **pipe,
        "efficiency": round(pipe["pipe_mpx_s"] / rates[_slower(rates)], 3),
        "pipe_to_loop": round(pipe["pipe_mpx_s"] / rates["loop"], 3),
    }


def _slower(rates: Figures) -> str:
    """Return the slower of the two stages that a pipeline runs at once: decode or model."""
    return min(("decode", "model"), key=rates.__getitem__)


def bench_scale(
    plan: Plan,
    model: str,
    folder: str,
    execution: ExecutionOptions,
    sizes: Sequence[int],
    actors: Sequence[int],
    windows: Sequence[int],
    seconds: float,
) -> list[Figures]:
    """Measure throughput and memory for each number of actors, each window size in px, and each number of windows.

    Without `actors` or `windows`, those of `execution` are measured. `sizes` are numbers of windows, which are rounded
    up to whole parts. Each stage is measured for at least `seconds`. Raises SegError for a window size that can't be.
    """
    points = []
    for side in windows:
        plan.settings.check_window(side)
    with ray_session(execution.address, verbose=execution.verbose), waiting("measuring") as report:
        for number in actors or (None,):
            for window in windows or (execution.window,):
                bounds = execution.actors if number is None else (number, number)
                settings = replace(plan.settings, window=window if plan.settings.context_exceeds_halo else None)
                measured = replace(plan, settings=settings)
                bench = Bench(measured, model, folder, replace(execution, actors=bounds, window=window))
                rates = bench.measure_stages(("decode", "model"), seconds)
                slower = _slower(rates)
                for size in sizes:
                    report(f"{size} windows of {bench.window} px with {bench.resources.max_actors} actors")
                    pipe = bench.measure_pipe(windows=size)
                    efficiency = round(pipe["pipe_mpx_s"] / rates[slower], 3)
                    points.append({**bench.describe(), **pipe, "slower": slower, "efficiency": efficiency})
    return points


class Bench:
    """The measurements of a plan with actors of one size."""

    run_numbers = count()  # so that each run has its own folder

    def __init__(self, plan: Plan, model: str, folder: str, execution: ExecutionOptions) -> None:
        sized = size_actors(execution)
        self.resources: ActorResources = replace(sized, max_actors=sized.min_actors)
        self.plan, self.model, self.folder = plan.for_device(on_gpu=self.resources.num_gpus > 0), model, folder
        compile_first = execution.compiling == "auto" and self.resources.num_gpus > 0  # before the time is taken
        self.execution = replace(execution, compiling="yes") if compile_first else execution
        self.window = choose_window(execution.window, plan.settings, read_bundle(model), self.resources.window_memory)
        self.parts = list(plan.parts())

    def describe(self) -> Figures:
        """Return window size in px, windows per batch, number of actors and torch threads per actor."""
        resources = self.resources
        return {
            "window": self.window,
            "batch": self.execution.batch,
            "actors": resources.max_actors,
            "threads": resources.threads,
        }

    def measure_stages(self, names: Sequence[str], seconds: float) -> dict[str, Any]:
        """Return the Mpx/s of each stage, summed over all actors at once; None for a stage that the device lacks."""
        from .stages import Stages  # imports torch

        resources, step = self.resources, -(-len(self.parts) // MAX_SAMPLED_PARTS)
        parts = pack_parts(self.parts[::step])
        actor_class = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)(Stages)
        arguments = (self.model, parts, self.plan.settings, self.window, resources, self.execution)
        actors: list[Any] = [actor_class.remote(*arguments) for _ in range(resources.max_actors)]
        try:
            for actor in actors:  # the batch size that the first actor finds is used by the others and the pipeline
                batch = get_result(actor.choose_batch.remote(self.execution.batch))
                self.execution = replace(self.execution, batch=batch)
            measured = {name: get_result([getattr(actor, name).remote(seconds) for actor in actors]) for name in names}
        finally:
            for actor in actors:
                ray.kill(actor)
        return {name: None if None in rates else round(sum(rates), 3) for name, rates in measured.items()}

    def measure_pipe(self, pixels: float = 0, windows: int = 0) -> Figures:
        """Measure the whole pipeline over at least so many pixels and windows, and MIN_PARTS_PER_ACTOR."""
        out, resources = f"{self.folder}/run-{next(self.run_numbers)}", self.resources
        open_run(out, self.plan, self.model)
        todo = list(self._repeat_parts(pixels, windows))
        started, cpu = time.time(), time.process_time()
        with Peak() as peak:
            pipe = run_pipe(todo, self.model, out, self.plan.settings, self.window, resources, self.execution)
            receipts = list(pipe)
        return {
            "pipe_mpx_s": round(steady_rate(_without_warm_up(receipts)), 3),
            "start_up_s": round(min(r.started for r in receipts) - started, 3),
            "seconds": round(max(r.ended for r in receipts) - min(r.started for r in receipts), 3),
            "windows": sum(r.windows for r in receipts),
            "pixels": sum(r.pixels for r in receipts),
            "host_peak_mb": peak.host_mb,
            "device_peak_mb": peak.device_mb,
            "driver_cpu_s": round(time.process_time() - cpu, 3),
        }

    def _repeat_parts(self, pixels: float, windows: int) -> Iterator[Part]:
        """Yield the parts again and again with new keys, until there are enough of them."""
        for number, part in enumerate(cycle(self.parts)):
            if pixels <= 0 and windows <= 0 and number >= MIN_PARTS_PER_ACTOR * self.resources.max_actors:
                return
            yield replace(part, key=f"{part.key}-{number}")
            pixels -= part.window.num_pixels
            windows -= num_splits(part.window, self.window)


def _without_warm_up(receipts: Sequence[Receipt]) -> Sequence[Receipt]:
    """Return the receipts without the first one of each actor, unless an actor has no others."""
    numbers = Counter(receipt.actor for receipt in receipts)
    if min(numbers.values()) == 1:
        return receipts
    started = {actor: min(r.started for r in receipts if r.actor == actor) for actor in numbers}
    return [receipt for receipt in receipts if receipt.started > started[receipt.actor]]


def steady_rate(receipts: Sequence[Receipt]) -> float:
    """Return the Mpx/s while all actors were at work: from the last start of an actor to the first end of one.

    A part that lies only partly in that interval counts with the fraction of its time in it. A part may have taken no
    time, because it had been published before its predecessor was: it counts if it ended in the interval.
    """
    spans: Spans = {}
    for receipt in receipts:
        widen(spans, receipt)
    first, last = max(began for began, _ in spans.values()), min(ended for _, ended in spans.values())
    if last <= first:  # the actors worked one after the other
        first, last = min(began for began, _ in spans.values()), max(ended for _, ended in spans.values())
    return float(sum(r.pixels * _fraction_between(r, first, last) for r in receipts) / (last - first) / 1e6)


def _fraction_between(receipt: Receipt, first: float, last: float) -> float:
    """Return the fraction of a part's time that lies between two moments, in seconds since 1970."""
    started, ended = receipt.started, receipt.ended
    if ended <= started:
        return float(first < ended <= last)
    return float(max(0.0, min(ended, last) - max(started, first)) / (ended - started))
