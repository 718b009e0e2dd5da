"""Bulk segmentation on Ray Data: plan ─▶ parts ─▶ actors that read ahead, segment and publish ─▶ receipts."""

import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from jobs.busy import Busy, Stopwatch
from jobs.progress import Progress
from jobs.session import Crew, make_crew, ray_session
from jobs.windows import Answer, Chip, infer_window, read_window, seam, window_rows
from seg_core.ahead import ahead
from seg_core.attempts import Attempt, begin, end, touch
from seg_core.bundle import read_bundle
from seg_core.coverage import Failure, Row, failed_rows
from seg_core.errors import JobError, ReadError
from seg_core.lease import hold
from seg_core.plan import Part, Plan, Settings, choose_depth, choose_window
from seg_core.query import summary
from seg_core.results import write_part
from seg_core.run import changed_scenes, find_run, now, open_run, parts_to_do, write_record
from seg_core.storage import make_folder
from seg_core.tiling import Window, num_splits, round_up, split

WHY = "see seg query with SELECT * FROM failures; the same command tries them again"
RAISED = re.compile(r"[\w.]+(Error|Exception): ")  # the last line of a traceback
TASK_PIXELS = 2**24  # a Ray task costs the driver some 30 ms, so small parts share one
MAX_TASKS = 2**11  # and some 10 kB, so that the parts of a huge region share one as well
SEAM_PARTS = 32  # in which a border between windows is looked at


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Options that only change how fast the rows come."""

    window: int | None = None  # px; None: as large as memory allows, up to 2048
    actors: tuple[int, int] | None = None
    gpus_per_actor: float = 1.0
    device: str = "auto"
    max_failures: int | None = None  # tiles; more end the run
    address: str | None = None
    verbose: bool = False


def segment(plan: Plan, model: str, out: str, speed: Speed) -> dict[str, Any]:
    """Segment what is left of a plan into the run at `out`. Returns the run's record, with `num_new` parts.

    Raises SegError where `out` holds something else than this run, JobError where it can't be finished.
    """
    record = find_run(out, plan)
    for scene in changed_scenes(out, plan) if record else ():
        print(f"{scene.scene_id} has changed since: its tiles are done again", file=sys.stderr)
    todo = parts_to_do(out, plan)
    started = time.time()
    if todo:
        with ray_session(speed.address, verbose=speed.verbose):
            crew = make_crew(speed.actors, speed.gpus_per_actor, speed.device)
            window = choose_window(speed.window, plan.settings, read_bundle(model), crew.memory)
            make_folder(out)
            with hold(out) as check:
                record = open_run(out, plan, model)
                seams = Counter(record.get("seams") or {})
                progress = Progress(sum(num_splits(part.window, window) for part in todo))
                busy = Busy()
                pipe = run_pipe(todo, model, out, plan.settings, window, crew, speed.device)
                for receipt in _watch(pipe, out, speed.max_failures):
                    progress.update(receipt["windows"], receipt["pixels"], receipt["started"])
                    seams.update(pixels=receipt["seam_pixels"], differing=receipt["seam_differing"])
                    busy.add(receipt)
                    record["exact"] = record.get("exact", True) and receipt["exact"]
                    check()
                progress.end()
                record |= {"seams": dict(seams), "bottleneck": busy.figures(crew.readers)}
                print(record["bottleneck"]["advice"], file=sys.stderr)
    assert record is not None  # a plan has parts, so either they are published or they were to do
    if todo or not record["finished"]:
        seconds = round(record.get("seconds", 0) + time.time() - started, 3)
        record |= {"finished": now(), "seconds": seconds, "counts": summary(out)}
        write_record(out, record)
    return {**record, "num_new": len(todo)}


def _watch(receipts: Iterable[Row], out: str, max_failures: int | None) -> Iterator[Row]:
    """The receipts. Raises JobError where too many tiles have failed, or the workers can't go on."""
    failed = 0
    try:
        for receipt in receipts:
            yield receipt
            failed += receipt["failed"]
            if max_failures is not None and failed > max_failures:
                raise JobError(f"{out}: {failed} tiles failed, more than --max-failures {max_failures}: {WHY}")
    except ray.exceptions.RayError as error:
        raise JobError(f"{out}: the run stopped: {_reason(error)}: the same command goes on from here") from error


def _reason(error: ray.exceptions.RayError) -> str:
    """The worker's own last word, which Ray wraps in pages of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if RAISED.match(line) and not line.startswith("ray.")]
    return (own or lines or [type(error).__name__])[-1]


def run_pipe(
    todo: Sequence[Part], model: str, out: str, settings: Settings, window: int, crew: Crew, device: str
) -> Iterable[Row]:
    """Parts to receipts. The rows themselves go from the actors to storage, and never through the driver."""
    pixels = sum(part.window.height * part.window.width for part in todo)
    enough = max(TASK_PIXELS, 2 * crew.readers * window**2)  # so that all readers have something to do
    tasks = min(len(todo), max(2 * crew.most, min(pixels // enough, MAX_TASKS)))
    watched = frozenset(part.key for part in todo[:: -(-len(todo) // SEAM_PARTS)])
    return (
        ray.data.from_items([part.to_row() for part in todo], override_num_blocks=tasks)
        .map_batches(
            PartSegmenter,
            fn_constructor_args=(model, out, settings, window, crew, device, uuid.uuid4().hex, watched),
            batch_size=len(todo) // tasks,
            compute=ActorPoolStrategy(min_size=crew.least, max_size=crew.most),
            num_cpus=crew.num_cpus,
            num_gpus=crew.num_gpus or None,
        )
        .iter_rows()
    )


class PartSegmenter:
    """An actor with a model: reads the windows of its parts ahead in threads, segments them, publishes the rows."""

    def __init__(
        self,
        model: str,
        out: str,
        settings: Settings,
        window: int,
        crew: Crew,
        device: str,
        session: str,
        watched: frozenset[str] = frozenset(),
    ) -> None:
        # torch and OpenCV come late, so that the driver doesn't pay for them.
        import cv2
        import torch

        from seg_core.segmenter import Segmenter

        torch.set_num_threads(crew.threads)
        cv2.setNumThreads(1)
        self.segmenter = Segmenter(model, device, precision=settings.precision)
        self.out, self.settings, self.window, self.session = out, settings, window, session
        self.watched, self.seams = watched, Counter[str]()
        self.pool = ThreadPoolExecutor(crew.readers)  # GDAL releases the GIL
        self.depth = choose_depth(window, settings, self.segmenter.bundle, crew.memory, crew.readers)
        self.name, self.clock = uuid.uuid4().hex, Stopwatch()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Receipts of a batch of parts."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        receipts = list(self.segment_parts([Part.from_row(row) for row in rows]))
        return {key: [receipt[key] for receipt in receipts] for key in receipts[0]}

    def segment_parts(self, parts: Sequence[Part]) -> Iterator[Row]:
        """Segment and publish parts; yields a receipt for each."""
        started, size = time.time(), self.window
        known = list(self.pool.map(lambda part: begin(self.out, part.key, self.session), parts))
        work = [
            (part, window)
            for part, attempt in zip(parts, known, strict=True)
            if attempt is None
            for window in split(part.window, size)
        ]
        read = zip(work, ahead(self.pool, self.read, work, self.depth), strict=True)
        for part, attempt in zip(parts, known, strict=True):
            count = num_splits(part.window, size)
            if attempt is None:
                rows = [row for (_, window), chip in islice(read, count) for row in self.rows(part, window, chip)]
            else:
                self.watched -= {part.key}  # a neighbour could end the process in this window's name
                rows = [row for window in split(part.window, size) for row in self.careful_rows(part, window, attempt)]
            with self.clock.on("writing"):
                write_part(self.out, part.key, rows, self.segmenter.bundle.hash, part.version)
                end(self.out, part.key)
            failed, ended = sum(row["status"] == "failed" for row in rows), time.time()
            pixels = part.window.height * part.window.width
            receipt = {"windows": count, "pixels": pixels, "failed": failed, "started": started, "ended": ended}
            seams = {f"seam_{name}": self.seams.pop(name, 0) for name in ("pixels", "differing")}
            yield {**receipt, **seams, "exact": self.segmenter.exact, "actor": self.name, **self.clock.take()}
            started = ended

    def read(self, work: tuple[Part, Window]) -> Chip | Failure:
        """The chip of a window, or why it can't be read."""
        part, window = work
        try:
            with self.clock.on("reading"):
                return read_window(part, window, self.settings, self.segmenter.bundle.stride)
        except ReadError as error:
            return Failure(type(error).__name__, str(error), error.attempts)
        except Exception as error:  # whatever a damaged file makes of its reader: the other windows go on
            return Failure(type(error).__name__, f"{part.scene.uri}: {error}")

    def rows(self, part: Part, window: Window, chip: Chip | Failure) -> Iterable[Row]:
        """The rows of a window's tiles."""
        settings = self.settings
        if isinstance(chip, Failure):
            return failed_rows(part.scene, window, settings.tile_size, chip)
        try:
            with self.clock.on("model"):
                answer = infer_window(chip, window, settings, self.segmenter)
        except (RuntimeError, MemoryError) as error:  # torch's, of memory too, are RuntimeErrors
            return self.smaller_rows(part, window, error)
        if part.key in self.watched and window[:2] == part.window[:2]:
            self.watch(part, window, answer)
        with self.clock.on("writing"):
            return list(window_rows(part, window, answer, settings))

    def watch(self, part: Part, window: Window, answer: Answer) -> None:
        """Note how well the window fits its neighbour."""
        try:
            pixels, differing = seam(part, window, answer, self.settings, self.segmenter)
        except Exception:  # the neighbour's own rows will say so
            return
        self.seams.update(pixels=pixels, differing=differing)

    def smaller_rows(self, part: Part, window: Window, error: Exception) -> Iterator[Row]:
        """The rows of a window that is too much for the device: of windows half as wide, from here on."""
        settings = self.settings
        half = round_up(max(window.height, window.width) // 2, settings.tile_size)
        out_of_memory = "memory" in str(error).lower() or isinstance(error, MemoryError)
        if not out_of_memory or settings.window is not None or half >= max(window.height, window.width):
            failure = Failure(
                type(error).__name__, f"{part.scene.uri}: {(str(error) or 'out of memory').splitlines()[0]}"
            )
            yield from failed_rows(part.scene, window, settings.tile_size, failure)
            return
        self.segmenter.free_memory()
        self.window = min(self.window, half)
        for smaller in split(window, half):
            yield from self.rows(part, smaller, self.read((part, smaller)))

    def careful_rows(self, part: Part, window: Window, attempt: Attempt) -> Iterable[Row]:
        """The rows of a window of a part over which a process died: failed ones where it is the window's fault."""
        name = f"{window.row_off} {window.col_off}"
        if attempt.is_deadly(name):
            text = f"{part.scene.uri}: to read or segment this window ended the process"
            failure = Failure("Crash", text, attempt.deaths[name])
            return failed_rows(part.scene, window, self.settings.tile_size, failure)
        touch(self.out, part.key, attempt, name)
        return self.rows(part, window, self.read((part, window)))
