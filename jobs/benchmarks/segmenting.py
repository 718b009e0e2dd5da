"""How fast a region is segmented, against each stage alone and a loop by hand, and how that grows.

Everything is measured in one run, by actors as the pipe has them: as many, with the same share of each node.
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
from seg_core.run.plan import Part, Plan
from seg_core.run.resume import open_run
from seg_core.run.sizing import choose_window

from ..progress import waiting
from ..ray_session import ray_session
from ..resources import ActorResources, ExecutionOptions, size_actors
from ..segment import run_pipe
from ..segmenting.bottleneck import Spans, widen
from ..segmenting.receipts import Receipt
from .peak import Peak

LEAST_PARTS = 3  # of an actor: one to warm up, and two to measure
SAMPLE = 64  # parts, at most, that the stages are measured on
STAGES = ("decode", "copy", "model", "loop")  # methods of Stages
Figures = dict[str, Any]


def bench_segment(
    plan: Plan, model: str, folder: str, execution: ExecutionOptions, seconds: float, rounds: int
) -> Figures:
    """Useful megapixels a second of each stage alone, of a loop by hand and of the whole pipe, start-up apart.

    Each runs for about `seconds` at least, in each of so many rounds: figures are the medians, so that a machine that
    others use too does not favour any. The pipe segments the plan's parts over and over, into runs in `folder`.
    """
    began = time.time()
    with ray_session(execution.address, verbose=execution.verbose):
        bench = Bench(plan, model, folder, execution)
        ready = time.time() - began
        found = []
        with waiting("measuring") as say:
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}")
                found.append(_round(bench, seconds))
    found[0]["start_up_s"] = round(found[0]["start_up_s"] + ready, 3)  # only the first one starts Ray
    medians = {
        name: None if None in (each := [figures[name] for figures in found]) else median(each)
        for name in found[0]
        if name not in {"slower", "start_up_s"}
    }
    slower = Counter(figures["slower"] for figures in found).most_common(1)[0][0]
    return {**medians, "start_up_s": found[0]["start_up_s"], "slower": slower, "rounds": rounds, **bench.describe()}


def _round(bench: "Bench", seconds: float) -> Figures:
    """All rates once: of the stages half before the pipe and half after it, in the opposite order.

    A machine that gets faster or slower meanwhile thus favours none of them.
    """
    before = bench.stages(STAGES, seconds / 2)
    slower = min(("decode", "model"), key=before.__getitem__)
    pipe = bench.pipe(pixels=seconds * before[slower] * 1e6)
    after = bench.stages(STAGES[::-1], seconds / 2)
    rates = {name: None if before[name] is None else round((before[name] + after[name]) / 2, 3) for name in STAGES}
    return {
        **{f"{name}_mpx_s": rate for name, rate in rates.items()},
        **pipe,
        "efficiency": round(pipe["pipe_mpx_s"] / rates[slower], 3),
        "pipe_to_loop": round(pipe["pipe_mpx_s"] / rates["loop"], 3),
        "slower": slower,
    }


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
    """Rate and memory for each number of actors and each window size (none named: as `execution` says).

    A size is the number of windows, rounded up to whole parts.
    """
    points = []
    for side in windows:
        plan.settings.check_window(side)
    with ray_session(execution.address, verbose=execution.verbose), waiting("measuring") as say:
        for number in actors or (None,):
            for window in windows or (execution.window,):
                resources = execution.actors if number is None else (number, number)
                settings = replace(plan.settings, window=window if plan.settings.context_exceeds_halo else None)
                measured = replace(plan, settings=settings)
                bench = Bench(measured, model, folder, replace(execution, actors=resources, window=window))
                rates = bench.stages(("decode", "model"), seconds)
                slower = min(rates, key=lambda name: rates[name])
                for size in sizes:
                    say(f"{size} windows of {bench.window} px with {bench.resources.most} actors")
                    pipe = bench.pipe(windows=size)
                    efficiency = round(pipe["pipe_mpx_s"] / rates[slower], 3)
                    points.append({**bench.describe(), **pipe, "slower": slower, "efficiency": efficiency})
    return points


class Bench:
    """A plan, and the actors that it is measured with."""

    numbers = count()  # of runs, so that each has a folder of its own

    def __init__(self, plan: Plan, model: str, folder: str, execution: ExecutionOptions) -> None:
        self.resources: ActorResources = size_actors(execution.actors, execution.gpus_per_actor, execution.device)
        self.plan, self.model, self.folder = plan.with_decoder(on_gpu=self.resources.num_gpus > 0), model, folder
        at_once = execution.compiling == "auto" and self.resources.num_gpus > 0  # before a clock runs
        self.execution = replace(execution, compiling="yes") if at_once else execution
        self.window = choose_window(execution.window, plan.settings, read_bundle(model), self.resources.window_memory)
        self.parts = list(plan.parts())

    def describe(self) -> Figures:
        """What was measured."""
        resources = self.resources
        return {
            "window": self.window,
            "batch": self.execution.batch,
            "actors": resources.most,
            "threads": resources.threads,
        }

    def stages(self, names: Sequence[str], seconds: float) -> dict[str, Any]:
        """Megapixels a second of each stage, by all actors at once; None for a stage that there is not."""
        from .stages import Stages  # torch comes with it

        resources, step = self.resources, -(-len(self.parts) // SAMPLE)
        parts = [part.to_row() for part in self.parts[::step]]
        actor_class = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)(Stages)
        given = (self.model, parts, self.plan.settings, self.window, resources, self.execution)
        actors: list[Any] = [actor_class.remote(*given) for _ in range(resources.most)]
        try:
            for actor in actors:  # what the first one finds holds for the others, and for the pipe
                self.execution = replace(self.execution, batch=ray.get(actor.settle_batch.remote(self.execution.batch)))
            found = {name: ray.get([getattr(actor, name).remote(seconds) for actor in actors]) for name in names}
        finally:
            for actor in actors:
                ray.kill(actor)
        return {name: None if None in rates else round(sum(rates), 3) for name, rates in found.items()}

    def pipe(self, pixels: float = 0, windows: int = 0) -> Figures:
        """The whole pipe over so many pixels and windows at least."""
        out, resources = f"{self.folder}/run-{next(self.numbers)}", self.resources
        open_run(out, self.plan, self.model)
        todo = list(self._enough(pixels, windows))
        began, cpu = time.time(), time.process_time()
        with Peak() as peak:
            pipe = run_pipe(todo, self.model, out, self.plan.settings, self.window, resources, self.execution)
            receipts = list(pipe)
        return {
            "pipe_mpx_s": round(steady_rate(_warm(receipts)), 3),
            "start_up_s": round(min(receipt.started for receipt in receipts) - began, 3),
            "seconds": round(
                max(receipt.ended for receipt in receipts) - min(receipt.started for receipt in receipts), 3
            ),
            "windows": sum(receipt.windows for receipt in receipts),
            "pixels": sum(receipt.pixels for receipt in receipts),
            "host_peak_mb": peak.host_mb,
            "device_peak_mb": peak.device_mb,
            "driver_cpu_s": round(time.process_time() - cpu, 3),
        }

    def _enough(self, pixels: float, windows: int) -> Iterator[Part]:
        """The parts, over and over, under names of their own."""
        for number, part in enumerate(cycle(self.parts)):
            if pixels <= 0 and windows <= 0 and number >= LEAST_PARTS * self.resources.most:
                return
            yield replace(part, key=f"{part.key}-{number}")
            pixels -= part.window.num_pixels
            windows -= num_splits(part.window, self.window)


def _warm(receipts: Sequence[Receipt]) -> Sequence[Receipt]:
    """The receipts but for the first of each actor, where all have further ones."""
    number = Counter(receipt.actor for receipt in receipts)
    if min(number.values()) == 1:
        return receipts
    started = {actor: min(r.started for r in receipts if r.actor == actor) for actor in number}
    return [receipt for receipt in receipts if receipt.started > started[receipt.actor]]


def steady_rate(receipts: Sequence[Receipt]) -> float:
    """Megapixels a second while all actors were at work: from when the last one began to when the first one ended.

    A part that was begun before, or not ended by then, counts with its share. One that had been published while its
    actor waited for the part before it took no time: it counts where it ended meanwhile.
    """
    spans: Spans = {}
    for receipt in receipts:
        widen(spans, receipt)
    first, last = max(began for began, _ in spans.values()), min(ended for _, ended in spans.values())
    if last <= first:  # they followed each other
        first, last = min(began for began, _ in spans.values()), max(ended for _, ended in spans.values())
    return float(sum(receipt.pixels * _share(receipt, first, last) for receipt in receipts) / (last - first) / 1e6)


def _share(receipt: Receipt, first: float, last: float) -> float:
    """How much of a part's time was between two moments."""
    started, ended = receipt.started, receipt.ended
    if ended <= started:
        return float(first < ended <= last)
    return float(max(0.0, min(ended, last) - max(started, first)) / (ended - started))
