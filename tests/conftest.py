"""Fixtures: real imagery where it is, tiny rasters and models made on the spot, one Ray for the whole session."""

import itertools
import os
import secrets
import shutil
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from proxy import Proxy
from rasterio.enums import MaskFlags
from rasterio.transform import Affine
from rasterio.windows import Window

from seg_core.chips import WindowFigures, pack_validity
from seg_core.imagery.geotiff import write_geotiff
from seg_core.model.bundle import Bundle, Weights, write_bundle
from seg_core.training.dataset import MISSING, Sample

# Before torch is loaded: its threads, which take turns here with those of other tests, sleep while they wait.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# And so that no processor computes in bfloat16 unless a test asks for it: float32 gives the same bits on all of them.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

# Before Ray is loaded: its clients send the token that local clusters ask for. It is made in one step, for of several
# test processes that find none each would have Ray make another.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as the command line has it
TOKEN = Path.home() / ".ray" / "auth_token"
if not TOKEN.exists():
    TOKEN.parent.mkdir(exist_ok=True)
    draft = TOKEN.with_name(f"auth_token.{os.getpid()}")
    draft.write_text(secrets.token_hex(32))
    draft.chmod(0o600)
    with suppress(FileExistsError):
        os.link(draft, TOKEN)
    draft.unlink()

# Whoever runs the tests in the background has them ignore Ctrl-C, and all that they start, which is to be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared" / "data"
SQUARE = 384  # px
UTM = "EPSG:32633"
NORTH_UP = (1.0, 0.0, 400_000.0, 0.0, -1.0, 5_800_000.0)

# Of the ports below those that connections are given, the ones for this of several test processes, shuffled.
OWN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PORTS = iter(secrets.SystemRandom().sample(range(20_000 + OWN, 32_000, PROCESSES), 1_000))

LONG = {
    "test_chaos.py",
    "test_train.py",
    "test_demo.py",
    "test_submit.py",
    "test_bounds.py",
    "test_brookline.py",
    "test_readme.py",
    "test_scaling.py",
}

REGIONS = ("region/", "r/", "scenes/")  # folders of scenes that are segmented together

# What a bundle says of the imagery that it was trained on.
DATA_FIELDS: dict[str, Any] = {
    "classes": ("background", "building"),
    "building": 1,
    "bands": 3,
    "dtype": "uint8",
    "mean": (120.0, 121.0, 122.0),
    "std": (60.0, 61.0, 62.0),
    "gsd_m": 1.0,
}

MakeBundle = Callable[..., str]
MakeScene = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that of several processes none is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is shown after 10 s: on a busy machine it would stand in the output of commands that are quick."""
    monkeypatch.setattr("aerial_seg.progress.LOG_INTERVAL", 3600.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery."""
    if not SHARED.is_dir():
        pytest.skip(f"no real imagery at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def dataset(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square of each of a few real images, about a fifth of it missing: a dataset on which training takes seconds."""
    data, source = tmp_path_factory.mktemp("massachusetts"), shared / "massachusetts-buildings"
    (data / "label_class_dict.csv").symlink_to(source / "label_class_dict.csv")
    for split, number in (("train", 8), ("val", 2)):
        images, labels = (sorted((source / folder).iterdir())[:number] for folder in (split, f"{split}_labels"))
        for image, label in zip(images, labels, strict=True):
            square = find_square(image, SQUARE, 0.8)
            for path in (image, label):
                (data / path.parent.name).mkdir(exist_ok=True)
                cut(path, data / path.parent.name / path.name, square)
    return data


def find_square(path: Path, side: int, share: float) -> Window:
    """The square of an image, among some that are spread over it, of which about that share is valid."""
    with rasterio.open(path) as image:
        valid = image.dataset_mask() > 0
    corners = itertools.product(*(range(0, length - side + 1, side // 2) for length in valid.shape))
    row, col = min(corners, key=lambda at: abs(valid[at[0] : at[0] + side, at[1] : at[1] + side].mean() - share))
    return Window(col, row, side, side)


def cut(source: Path, target: Path, square: Window) -> None:
    """Write that part of an image without loss, with its mask."""
    with rasterio.open(source) as image:
        a, b, x, d, e, y = image.transform[:6]
        transform = Affine(a, b, x + a * square.col_off, d, e, y + e * square.row_off)
        profile = {"driver": "GTiff", "count": image.count, "dtype": "uint8", "crs": image.crs, "compress": "deflate"}
        profile |= {"width": square.width, "height": square.height, "transform": transform}
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(target, "w", **profile) as part:
            part.write(image.read(window=square))
            if image.mask_flag_enums[0] != [MaskFlags.all_valid]:
                part.write_mask(image.dataset_mask(window=square))


@pytest.fixture
def make_scene(tmp_path: Path) -> MakeScene:
    """Write a seeded random GeoTIFF, uint8 and 1 m a pixel unless told otherwise, and return its path.

    Scenes of a region, such as region/a.tif and region/north/b.tif, lie 10 km apart, unless they have a transform.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)

    def make(
        name: str = "scene.tif",
        height: int = 100,
        width: int = 120,
        *,
        bands: int = 3,
        dtype: str = "uint8",
        seed: int = 0,
        pixels: np.ndarray[Any, Any] | None = None,
        **options: Any,
    ) -> str:
        if pixels is None:
            high = 250 if dtype == "uint8" else 4000
            pixels = np.random.default_rng(seed).integers(0, high, (bands, height, width)).astype(dtype)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        a, b, x, d, e, y = NORTH_UP
        if name.startswith(REGIONS):
            beside = names[name.partition("/")[0]]
            beside.extend([name] * (name not in beside))
            y -= 10_000 * beside.index(name)
        write_geotiff(str(path), pixels, **{"crs": UTM, "transform": (a, b, x, d, e, y), **options})
        return str(path)

    return make


@pytest.fixture
def region(make_scene: MakeScene) -> str:
    """A folder of two scenes of several parts, one with a missing corner."""
    pixels = np.random.default_rng(1).integers(0, 250, (3, 300, 420)).astype(np.uint8)
    pixels[:, :100, :150] = 255
    make_scene("region/north.tif", pixels=pixels, nodata=255)
    return str(Path(make_scene("region/south/scene.tif", 130, 200)).parents[1])


@pytest.fixture
def without_actors(monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:  # noqa: ARG001
    """Parts are segmented in this process: for tests of what runs hold. Those of how Ray runs use `ray_cluster`."""
    from parts import segment_in_this_process

    segment_in_this_process(monkeypatch)


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:  # noqa: ARG001
    """Training runs in this process: for tests of what it makes. Those of how Ray Train runs it do without."""
    from local_training import train_in_this_process

    train_in_this_process(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:  # noqa: ARG001
    """A folder with a region of two scenes of several parts, one with a missing corner, a model, its finished run."""
    from seg_command import SMALL

    from aerial_seg.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    pixels = np.random.default_rng(1).integers(0, 250, (3, 300, 420)).astype(np.uint8)
    pixels[:, :100, :150] = 255
    a, b, x, d, e, y = NORTH_UP
    (folder / "region" / "south").mkdir(parents=True)
    write_geotiff(str(folder / "region" / "north.tif"), pixels, crs=UTM, transform=NORTH_UP, nodata=255)
    south = np.ascontiguousarray(pixels[:, 100:230, 200:400])
    write_geotiff(str(folder / "region/south/scene.tif"), south, crs=UTM, transform=(a, b, x, d, e, y - 10_000))
    write_untrained(str(folder / "model"), width=4, depth=2)
    command = ["segment", folder / "region", "--model", folder / "model", "--out", folder / "run", *SMALL]
    assert main([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Write the bundle of an untrained U-Net of width 4 and depth 2, seeded, and return its path."""

    def make(name: str = "bundle", *, width: int = 4, depth: int = 2, seed: int = 0, **fields: Any) -> str:
        return write_untrained(str(tmp_path / name), width=width, depth=depth, seed=seed, **fields)

    return make


def window_figures(
    probability: NDArray[np.float32],
    valid: NDArray[np.bool_],
    tile_size: int,
    threshold: float = 0.5,
    *,
    keep: bool = False,
) -> WindowFigures:
    """The figures of a window's tiles, from the probability of its pixels."""
    height, width = probability.shape
    held = np.where(valid, probability, 0.0).astype(np.float64)
    building = (probability >= threshold) & valid
    counts, sums, num_valid = (
        np.array(
            [
                [each[row : row + tile_size, col : col + tile_size].sum() for col in range(0, width, tile_size)]
                for row in range(0, height, tile_size)
            ]
        )
        for each in (building, held, valid)
    )
    lines = np.zeros((height, counts.shape[1], tile_size), np.bool_)
    for number, col in enumerate(range(0, width, tile_size)):
        lines[:, number, : min(tile_size, width - col)] = building[:, col : col + tile_size]
    levels = (held * 255).round().astype(np.uint8) if keep else None
    bits = np.packbits(lines, axis=-1)
    return WindowFigures(bits, counts, sums, num_valid, levels, pack_validity(valid, tile_size))


def outside_environment(**further: str) -> dict[str, str]:
    """This process's environment without settings of Ray or workers, the interpreter's folder first on the path.

    On top come `further` variables.
    """
    ray_free = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GLIBC_", "OMP_"))}
    return {**ray_free, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **further}


def free_port() -> int:
    """A port of this machine that nobody listens on, nor was told of: servers take seconds until they listen."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is left")


def write_untrained(path: str, *, width: int, depth: int, seed: int = 0, **fields: Any) -> str:
    """Write the bundle of an untrained U-Net that calls half of the pixels of random noise building."""
    described, weights = make_untrained(width, depth, seed)
    write_bundle(path, Bundle(**{**described, **DATA_FIELDS, "threshold": 0.5, **fields}), weights)
    return path


@cache
def make_untrained(width: int, depth: int, seed: int) -> tuple[dict[str, Any], Weights]:
    """What a bundle says of that network, and its weights."""
    import torch

    from seg_core.model.networks import build_model, find_min_chip, measure_network

    torch.manual_seed(seed)
    architecture = {"name": "unet", "in_channels": 3, "classes": 1, "width": width, "depth": depth}
    model = build_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.inference_mode():
        model.head.weight.normal_()
        model.head.bias -= model.eval()(torch.randn(1, 3, 256, 256)).median()
    described = {"architecture": architecture, **vars(measure_network(model, 3))}
    described["min_chip"] = find_min_chip(model, 3)  # a network so small needs no larger chips
    return described, {name: weight.numpy() for name, weight in model.state_dict().items()}


def random_sample(seed: int, height: int = 40, width: int = 40, missing: float = 0.2, bands: int = 3) -> Sample:
    """A random image with a label of two classes, of which about the share `missing` holds no data."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, (height, width), dtype=np.uint8)
    label[rng.random((height, width)) < missing] = MISSING
    return Sample(rng.integers(0, 256, (height, width, bands), dtype=np.uint8), label)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: more would only wait for each other over networks as small as those of tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in this process: a child takes half a second to start, and tests/test_isolated.py has them."""
    read_in_this_process(monkeypatch)


def read_in_this_process(patch: pytest.MonkeyPatch) -> None:
    def plainly(function: Callable[[Any], Any], _: object, items: Sequence[Any], threads: object) -> Iterator[Any]:
        del threads
        return map(function, items)

    for module in ("normalization", "tables", "verify"):
        patch.setattr(f"seg_core.run.{module}.for_each_isolated", plainly)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an empty bucket on a real S3 server (SeaweedFS), to which the AWS environment leads."""
    from weed import BUCKET, Weed

    server = Weed(tmp_path_factory.mktemp("weed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield f"s3://{BUCKET}"
        finally:
            server.stop()


def forget_clients() -> None:
    """Have clients of S3 made anew, as the environment says now."""
    from seg_core.storage import s3 as store

    for cached in (store._session, store._client, store._arrow, store._region):
        cached.cache_clear()


@pytest.fixture
def other_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Changes to the AWS environment, for clients that are made anew."""
    forget_clients()
    yield monkeypatch
    monkeypatch.undo()
    forget_clients()


@pytest.fixture
def proxied(s3: str, other_environment: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: ARG001
    """A proxy that the AWS environment of this process leads through."""
    with Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        other_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        forget_clients()
        yield proxy


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[None]:  # noqa: ARG001 - its processes inherit the way to S3
    """One Ray of two CPUs inside this process, for all tests that need no other."""
    import ray

    from aerial_seg.cli.main import QUIET_RAY_ENVIRONMENT
    from aerial_seg.ray_session import ray_session

    os.environ.update(QUIET_RAY_ENVIRONMENT, RAY_metrics_report_interval_ms="5000")
    with ray_session(None, num_cpus=2):
        yield
    assert not ray.is_initialized()
