"""Connect to a Ray cluster, or start one inside this process."""

import logging
import os
import shutil
import socket
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

import seg_core
from seg_core.environment import environment
from seg_core.errors import JobError, SegError
from seg_core.storage.s3 import SHARED
from seg_core.threads import count_cpus

from .processes import RayProcesses, own_ray
from .progress import waiting
from .ray_node import lean_node
from .terminal import Terminated, handle_stops, owns_process, restore_handlers, stoppable

# glibc gives large blocks back when they are freed, and half the time of inference on a CPU would go into fetching the
# same memory anew for the next layer: workers keep it, in huge pages. And a thread of torch's that waits for another
# would spin on a core that a reading thread could use. CUDA has 8 queues unless it is told otherwise, in one of which
# some of nvJPEG's 14 streams would always stand behind whole batches of the network.
WORKER_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONSAFEPATH": "1",  # processes that workers start do not import from the current folder either
}
DATA_THREADS = 5.0  # s that the threads of Ray Data are given to end
SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
MIN_TEMPORARY_SPACE = 50 * 10**6  # bytes that Ray's logs may take at the least
SHUTDOWN_TIMEOUT = 30.0  # s that Ray is given to end
AUTHENTICATION_ADVICE = (
    "the cluster asks for its token: set RAY_AUTH_MODE=token, with it in RAY_AUTH_TOKEN or ~/.ray/auth_token"
)
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}  # workers that train together listen on this interface
HEAD_TIMEOUT = 5.0  # s that the head of a cluster is given to answer


@contextmanager
def ray_session(address: str | None, num_cpus: int = 1, verbose: bool = False) -> Iterator[None]:
    """Ray for the time of a job: at `address`, at $RAY_ADDRESS (set inside a submitted job), or inside this process.

    Inside this process Ray is told of at least `num_cpus` CPUs, so that work for two starts on a machine of one.
    Does nothing where Ray runs already. Unless it is `verbose`, what Ray logs below errors is dropped. So is what its
    C++ core writes while it starts, where the process is the command line's: see `owns_process`.
    """
    if ray.is_initialized():
        yield
        return
    given, address = address, find_address(address)
    with _quiet_logger(verbose), warnings.catch_warnings(), stoppable(), _processes(address) as processes:
        warnings.simplefilter("ignore", FutureWarning)  # announcements of Ray's to its developers
        with environment(WORKER_ENVIRONMENT):  # inherited by a Ray that starts here, and by its workers from it
            _start(given, address, num_cpus, verbose)
        if processes is not None:
            processes.watch()
        try:
            yield
        except BaseException:
            if owns_process() and not verbose:
                drop_errors_of_ray()
            raise
        finally:
            if processes is None or processes.close():
                wait_for_data()
                _shut_down()


def find_address(given: str | None) -> str | None:
    """Return the address of the cluster that a job joins; None if it starts a Ray inside this process."""
    return given or os.environ.get("RAY_ADDRESS")


def _processes(address: str | None) -> AbstractContextManager[RayProcesses | None]:
    return nullcontext() if address else own_ray()


@contextmanager
def _quiet_logger(verbose: bool) -> Iterator[None]:
    """Ray's logger at the level that is wanted, meanwhile."""
    log = logging.getLogger("ray")
    before = log.level
    log.setLevel(logging.INFO if verbose else logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def check_temporary_folder() -> None:
    """Raise SegError where Ray can't put its sockets and logs: it would fail with an error about AF_UNIX, or hang."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = os.environ[name] if name else "/tmp"  # noqa: S108 - as Ray chooses
    where = f"{name}={folder}" if name else folder
    socket_path = f"{os.path.abspath(folder)}/ray/session_{'0' * 26}_{os.getpid()}/sockets/plasma_store"
    if len(os.fsencode(socket_path)) > SOCKET_PATH:
        most = SOCKET_PATH - len(os.fsencode(socket_path)) + len(os.fsencode(os.path.abspath(folder)))
        raise SegError(f"{where}: longer than the {most} bytes that Ray has room for: set RAY_TMPDIR to another folder")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise SegError(f"{where}: no folder that can be written to: set RAY_TMPDIR to one that is")
    free, needed = (number // 10**6 for number in (shutil.disk_usage(folder).free, MIN_TEMPORARY_SPACE))
    if free < needed:
        raise SegError(f"{where}: has {free} MB free, Ray needs {needed}: set RAY_TMPDIR to another folder")


def _start(given: str | None, address: str | None, num_cpus: int, verbose: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR
    # Ray prints what goes wrong on standard output, where results belong, even if it is not to log to the driver.
    ray._private.worker._worker_logs_enabled = verbose  # noqa: SLF001 - there is no other way
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "job_config": _JobConfig()}
    try:
        with (
            _silence_stderr() if owns_process() and not verbose else nullcontext(sys.stderr) as terminal,
            waiting("starting Ray", terminal),
        ):
            if address:
                _join(address, options)
            else:
                check_temporary_folder()
                with _loopback(), nullcontext() if verbose else lean_node():  # verbose: the log monitor is needed
                    ray.init("local", num_cpus=max(num_cpus, count_cpus()), include_dashboard=False, **options)
        handle_stops()  # as Ray has put a handler of its own in place
    except SystemExit as stopped:  # Ray's answer to SIGTERM while it starts
        raise Terminated from stopped
    except SegError:
        raise
    except (OSError, ValueError, AuthenticationError) as error:
        named = f"--address {given}" if given else f"RAY_ADDRESS={address}"
        where = f"{named}: no Ray cluster answers there" if address else "Ray can't be started here"
        cause = str(error.__cause__ or "").strip()  # may hold a traceback
        if address and "AuthenticationError" in f"{type(error).__name__} {cause}":
            raise SegError(f"{named}: {AUTHENTICATION_ADVICE}") from error
        reason = cause.splitlines()[-1] if cause else str(error).splitlines()[0]
        raise SegError(f"{where} ({reason})") from error
    except Exception as error:  # Ray's own class for it
        if "timed out during startup" not in str(error):
            raise
        load, cpus = os.getloadavg()[0], count_cpus()
        raise JobError(f"Ray has not started in time: {cpus} CPUs under a load of {load:.0f}: try again") from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Have a Ray that starts meanwhile listen on 127.0.0.1 alone, as it does on macOS and Windows by default."""
    before = ray._private.ray_constants.ENABLE_RAY_CLUSTER  # noqa: SLF001 - read from the environment at import
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # noqa: SLF001
    try:
        with environment(LOOPBACK_ENVIRONMENT):
            yield
    finally:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = before  # noqa: SLF001


def _shut_down() -> None:
    """Shut Ray down. Its C++ resets the handler of SIGTERM halfway, and a second `kill` would end us without a word."""
    closing = threading.Thread(target=ray.shutdown, daemon=True)
    closing.start()
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    while closing.is_alive() and time.monotonic() < deadline:
        restore_handlers()
        closing.join(0.01)
    restore_handlers()


class _JobConfig(JobConfig):
    """Keeps workers from importing from the folders that the driver runs in and was started from.

    Ray puts both first on their path, where a file named numpy.py is taken for the library, unless the job has a
    working_dir (https://github.com/ray-project/ray/issues/43182). A checkout that is not installed they do need.
    """

    def __init__(self) -> None:
        installed = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
        roots = {os.path.dirname(os.path.dirname(os.path.realpath(file))) for file in (__file__, seg_core.__file__)}
        super().__init__(_py_driver_sys_path=sorted(roots - installed))

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster. Of a port where nobody listens Ray would hope for ten minutes that a head starts there."""
    where = urlsplit(f"//{address}")
    near = False
    if where.hostname and where.port:
        _knock(where.hostname, where.port)
        near = where.hostname in {"127.0.0.1", "localhost"} and not _is_reached_from_afar(where.port)
    shared = {name: os.environ[name] for name in SHARED if name in os.environ}
    with environment({"RAY_gcs_server_port_wait_time_s": "1"}), _loopback() if near else nullcontext():
        ray.init(address, runtime_env={"env_vars": {**shared, **WORKER_ENVIRONMENT}}, **options)


def _knock(host: str, port: int) -> None:
    socket.create_connection((host, port), HEAD_TIMEOUT).close()


def _is_reached_from_afar(port: int) -> bool:
    """Whether a port of this machine answers at the address that others have for it, to which Ray would turn."""
    try:
        _knock(ray.util.get_node_ip_address(), port)
    except OSError:
        return False
    return True


def drop_errors_of_ray() -> None:
    """Drop what Ray's threads and finalizers raise from now on, in a process that ends because of another error.

    They meet a Ray that is shut down, and their tracebacks would follow the line that says why the command ends.
    """
    threading.excepthook = _without_ray(threading.excepthook)
    sys.unraisablehook = _without_ray(sys.unraisablehook)


def _without_ray(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    def filtered(args: Any) -> None:
        frames = traceback.walk_tb(args.exc_traceback)
        if not any(frame.f_globals.get("__name__", "").split(".")[0] == "ray" for frame, _ in frames):
            hook(args)

    return filtered


def wait_for_data() -> None:
    """Wait until the threads of Ray Data have ended, of which some outlive what they worked for by a tenth of a second.

    One that meets a Ray which is shut down ends the process, without a word and with exit code 1.
    """
    deadline = time.monotonic() + DATA_THREADS
    for thread in data_threads():
        thread.join(max(0.0, deadline - time.monotonic()))


def data_threads() -> list[threading.Thread]:
    """The threads of this process that are Ray Data's, but for those that it leaves asleep for good."""
    found = {thread: getattr(thread, "_target", None) or type(thread) for thread in threading.enumerate()}
    return [
        thread
        for thread, made in found.items()
        if str(made.__module__).startswith("ray.data.") and thread.name != "Prefetcher"
    ]


@contextmanager
def _silence_stderr() -> Iterator[TextIO]:
    """Drop what is written to standard error, by Ray's C++ core too, which announces that it is quiet.

    Yields a stream that still leads there.
    """
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    with os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(nothing, 2)
        try:
            yield terminal
        finally:
            sys.stderr.flush()
            os.dup2(terminal.fileno(), 2)
            os.close(nothing)
