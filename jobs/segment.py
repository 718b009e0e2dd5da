"""Bulk segmentation on Ray Data: plan ─▶ parts ─▶ actors that read ahead, segment and publish ─▶ receipts."""

import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from seg_core.errors import JobError, SegError
from seg_core.grid import num_splits
from seg_core.model.bundle import read_bundle
from seg_core.run.fence import PLAIN, Lease, Store
from seg_core.run.lease import acquire_lease
from seg_core.run.plan import Part, Plan, Settings, pack_parts
from seg_core.run.query import summary
from seg_core.run.record import RunRecord, SeamCounts, now, read_record, write_record
from seg_core.run.resume import changed_scenes, find_run, open_run, parts_to_do, with_choices_of_run
from seg_core.run.sizing import choose_window
from seg_core.storage.files import make_folder

from .ray_session import ray_session
from .resources import ActorResources, ExecutionOptions, size_actors
from .segmenting.actor import PartSegmenter
from .segmenting.monitor import RunMonitor
from .segmenting.receipts import Receipt
from .submitting.packages import lasting_name
from .terminal import add_log_field, note

FAILURES_ADVICE = "see seg query with SELECT * FROM failures; the same command tries them again"
TRACEBACK_END = re.compile(r"[\w.]+(Error|Exception): ")  # the last line of a traceback
# That of an error which is written for users, without the advice on retries that Ray adds to it (escaped by SegError).
OWN_ERROR = re.compile(r"seg_core\.errors\.\w+: (.*?)(?:\\nFailed to apply UDF transform.*)?$")
DEVICE_DECODER_LIMITS = (
    "--decode device is for JPEG GeoTIFFs of 8 bits, on a GPU YCbCr ones, without nodata value, alpha band, --mosaic or"
    " --resample"
)
# A Ray task costs the driver some 30 ms, and at its end an actor has nothing to read ahead: parts share one that takes
# seconds. When a process dies, those of its task are done again.
TASK_PIXELS = 2**26
TASK_PIXELS_GPU = 2**33
MAX_TASKS = 2**11  # and some 10 kB, so that the parts of a huge region share one as well
TASKS_WORTH_A_NODE = 4  # some minutes of work, which is what a node takes to start
RECEIPTS = 2**10  # of an actor that the driver has not taken yet
MAX_CHECKED_PARTS = 32  # at most, in which a border between windows is looked at
CHECK_EVERY_PARTS = 4  # parts: to look at one costs a fiftieth of the part


def segment(plan: Plan, model: str, out: str, execution: ExecutionOptions) -> tuple[RunRecord, int]:
    """Segment what is left of a plan into the run at `out`. Returns the run's record, and how many parts were to do.

    Raises SegError where `out` holds something else than this run, JobError where it can't be finished.
    """
    add_log_field("run", out)
    with _choose_settings(with_choices_of_run(out, plan), out, execution) as decided:
        return _segment(decided, model, out, execution)


@contextmanager
def _choose_settings(plan: Plan, out: str, execution: ExecutionOptions) -> Iterator[Plan]:
    """The plan of a run that begins with `auto` settings resolved, by whether it has GPUs: only Ray, which runs, knows.

    The precision on CPUs follows the processor of this machine. Other nodes compute in the same. Raises SegError for
    one in which GPUs don't compute, if there are some.
    """
    if find_run(out, plan):
        yield plan
        return
    with ray_session(execution.address, verbose=execution.verbose):
        resources = size_actors(execution)
        yield plan.for_device(on_gpu=resources.num_gpus > 0)


def _segment(plan: Plan, model: str, out: str, execution: ExecutionOptions) -> tuple[RunRecord, int]:
    record = find_run(out, plan)
    for scene in changed_scenes(out, plan) if record else ():
        note(f"{scene.scene_id} has changed since: its tiles are done again", scene=scene.scene_id)
    todo = parts_to_do(out, plan)
    started = time.time()
    if todo:
        with ray_session(execution.address, verbose=execution.verbose):
            resources = size_actors(execution)
            window = choose_window(execution.window, plan.settings, read_bundle(model), resources.window_memory)
            make_folder(out)
            with _lease_of(out) as lease:
                record = open_run(out, plan, lasting_name(model), lease)
                todo = parts_to_do(out, plan)  # another driver may have been at work until now
                if todo:
                    windows = sum(num_splits(part.window, window) for part in todo)
                    pipe = run_pipe(todo, model, out, plan.settings, window, resources, execution, lease)
                    with RunMonitor(out, windows, resources) as monitor:
                        on_cpu = _follow(_watch(pipe, out, execution.max_failures), monitor, record, lease)
                    if plan.settings.decode != "cpu" and on_cpu:
                        note(f"{on_cpu:,} windows were decoded by the CPU: {DEVICE_DECODER_LIMITS}")
                    record.bottleneck = monitor.bottleneck()
                    note(record.bottleneck["advice"])
                    _finish(record, lease, started)
    assert record is not None  # a plan has parts, so either they are published or they were to do
    if not record.finished:  # the driver was killed after the last part
        with _lease_of(out) as lease:
            record = read_record(out)  # another driver may have finished the run until now
            if not record.finished:
                _finish(record, lease, started)
    return record, len(todo)


@contextmanager
def _lease_of(out: str) -> Iterator[Lease]:
    """Hold the lease of a run. Errors from then on are JobErrors, since the run has begun and is no longer refused."""
    begun = False
    try:
        with acquire_lease(out) as lease:
            begun = True
            yield lease
    except SegError as error:
        if not begun or isinstance(error, JobError):
            raise
        raise JobError(f"{error}: the run has begun, and the same command goes on") from error


def _follow(receipts: Iterable[Receipt], monitor: RunMonitor, record: RunRecord, lease: Lease) -> int:
    """Take the receipts of a run: what they say goes into its record, and to the monitor.

    Returns how many windows no device has decoded.
    """
    record.exact = record.exact is not False
    if record.finished:  # no more, should this driver die
        record.finished = None
        write_record(lease.run, record, lease)
    seams, on_cpu = record.seams or SeamCounts(), 0
    differing: dict[str, None] = {}  # in their order
    for receipt in receipts:
        monitor.take(receipt)
        seams = seams.add(receipt.part, receipt.seam_pixels, receipt.seam_differing)
        before = record.exact, dict(record.software or {})
        record.exact = record.exact and receipt.exact
        differing |= dict.fromkeys(record.add_software(receipt.software))
        if before != (record.exact, record.software or {}):
            write_record(lease.run, record, lease)  # now: another device may finish what this one began
        on_cpu += receipt.decoded_on_cpu
    for line in differing:
        note(f"{lease.run}: {line}: they may differ a little")
    record.seams = seams
    return on_cpu


def _finish(record: RunRecord, lease: Lease, started: float) -> None:
    """Note in the record of a run that all of its parts are there. Raises JobError if some are not."""
    record.seconds = round((record.seconds or 0) + time.time() - started, 3)
    record.counts = summary(lease.run)
    missing = record.counts["missing"]
    record.finished = None if missing else now()
    write_record(lease.run, record, lease)
    if missing:
        raise JobError(
            f"{lease.run}: {missing:,} tiles are missing, though workers have segmented them: their files are on "
            "another disk, or were removed: use an --out that all nodes share, or in S3; the same command goes on"
        )


def _watch(receipts: Iterable[Receipt], out: str, max_failures: int | None) -> Iterator[Receipt]:
    """The receipts. Raises JobError where too many tiles have failed, or the workers can't go on."""
    failed = 0
    try:
        for receipt in receipts:
            yield receipt
            failed += receipt.failed
            if max_failures is not None and failed > max_failures:
                raise JobError(
                    f"{out}: {failed} tiles failed, more than --max-failures {max_failures}: {FAILURES_ADVICE}"
                )
    except ray.exceptions.RayError as error:
        raise JobError(f"{out}: the run stopped: {_reason(error)}: the same command goes on from here") from error


def _reason(error: ray.exceptions.RayError) -> str:
    """The worker's own last word, which Ray wraps in pages of its own."""
    # Not str(error), which is one line where Ray has mixed a SegError into the error's class.
    text = getattr(error, "traceback_str", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if ours := [found[1] for line in lines if (found := OWN_ERROR.match(line))]:
        return ours[-1]
    own = [line for line in lines if TRACEBACK_END.match(line) and not line.startswith("ray.")]
    return (own or lines or [type(error).__name__])[-1]


def share_out(parts: Sequence[Part], actors: int, pixels: int) -> list[Sequence[Part]]:
    """The parts of each task: of at least so many pixels, or fewer, so that who begins or ends early gets more."""
    total = sum(part.window.num_pixels for part in parts)
    tasks = min(len(parts), max(2 * actors if actors > 1 else 1, min(total // pixels, MAX_TASKS)))
    return [parts[len(parts) * task // tasks : len(parts) * (task + 1) // tasks] for task in range(tasks)]


def choose_watched(parts: Sequence[Part]) -> frozenset[str]:
    """The keys of some parts, spread over all, in each of which a border between windows is looked at."""
    return frozenset(part.key for part in parts[:: max(CHECK_EVERY_PARTS, -(-len(parts) // MAX_CHECKED_PARTS))])


def size_pool(resources: ActorResources, asked_for: bool, num_tasks: int) -> int:
    """Return how many actors are to be started: those for which there is no room yet start when further nodes come.

    Meanwhile they wait, and autoscalers start nodes for them. No more are started than there are tasks. Unless their
    number was `asked_for`, no more wait than have enough to do to be worth the start of a node.
    """
    worthwhile = num_tasks if asked_for else max(resources.min_actors, num_tasks // TASKS_WORTH_A_NODE)
    return min(resources.max_actors, worthwhile, num_tasks)


def run_pipe(
    todo: Sequence[Part],
    model: str,
    out: str,
    settings: Settings,
    window: int,
    resources: ActorResources,
    execution: ExecutionOptions,
    store: Store = PLAIN,
) -> Iterable[Receipt]:
    """Parts to receipts. The rows themselves go from the actors to the store, and never through the driver."""
    aim = resources.max_actors if execution.actors else resources.min_actors
    shares = share_out(todo, aim, TASK_PIXELS_GPU if resources.num_gpus else TASK_PIXELS)
    actors = size_pool(resources, execution.actors is not None, len(shares))
    tasks = [{"parts": pack_parts(share)} for share in shares]
    watched = choose_watched(todo)
    arguments = (model, out, settings, window, resources, execution, uuid.uuid4().hex, watched, store)
    return stream_receipts(tasks, PartSegmenter, arguments, actors, resources.num_cpus, resources.num_gpus)


def stream_receipts(
    tasks: list[dict[str, Any]],
    actor: Any,
    arguments: tuple[Any, ...],
    num_actors: int,
    num_cpus: float,
    num_gpus: float = 0,
) -> Iterable[Receipt]:
    """Have actors, each of which takes `num_cpus` and `num_gpus`, carry out tasks. Yields the receipts of their parts.

    `actor` is a class like PartSegmenter, that is made of `arguments`.
    """
    receipts = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )
    receipts.context.execution_no_progress_timeout_s = -1  # a run waits for nodes, and for parts that take long
    receipts.context.target_max_block_size = 1  # bytes: receipts come as soon as they are passed on
    # An actor would wait a tenth of a second for the driver to take each one, and its device with it.
    receipts.context._max_num_blocks_in_streaming_gen_buffer = RECEIPTS  # noqa: SLF001 - there is no other way
    return (Receipt.from_row(receipt) for row in receipts.iter_rows() for receipt in row["receipts"])
