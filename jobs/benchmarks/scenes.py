"""A synthetic scene for benchmarks, and a temporary folder to put it in."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from seg_core.imagery.geotiff import write_repeated
from seg_core.model.bundle import Bundle
from seg_core.storage.files import absolute, is_remote, make_folder, remove, upload, walk
from seg_core.synthetic import draw_town

TOWN_SIDE = 2048  # px; a larger scene repeats the town
CRS = "EPSG:32633"


@contextmanager
def scratch_folder(parent: str | None) -> Iterator[str]:
    """Yield a new folder below the folder or prefix `parent`, or a temporary folder, and delete it afterwards."""
    if parent is None or not is_remote(parent):
        if parent is not None:
            make_folder(absolute(parent))
        with tempfile.TemporaryDirectory(dir=None if parent is None else absolute(parent)) as folder:
            yield folder
        return
    prefix = f"{absolute(parent)}/bench-{uuid.uuid4().hex}"
    make_folder(prefix)
    try:
        yield prefix
    finally:
        for path in list(walk(prefix)):
            remove(path)


def make_scene(folder: str, codec: str, side: int, bundle: Bundle) -> str:
    """Write a square scene of `side` px, which the model can read, into a folder or prefix. Returns its path."""
    town_side = min(TOWN_SIDE, max(64, side))
    image, _, valid = draw_town(town_side, town_side, seed=0)
    image[~valid] = image[::-1, ::-1][~valid]  # fills the missing corner, since missing pixels are not inferred
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[[band % 3 for band in range(bundle.bands)]])
    with tempfile.TemporaryDirectory() as local:
        target = local if is_remote(folder) else folder
        write_repeated(f"{target}/scene.tif", pixels, side, codec, crs=CRS, gsd_m=bundle.gsd_m or 1.0)
        if target == local:
            upload(local, f"{folder}/scenes")
            return f"{folder}/scenes/scene.tif"
    return f"{folder}/scene.tif"
