"""A scene to measure with: a drawn town, repeated."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from seg_core.imagery.geotiff import write_repeated
from seg_core.model.bundle import Bundle
from seg_core.storage.files import absolute, is_remote, make_folder, remove, upload, walk
from seg_core.synthetic import draw_town

TOWN = 2048  # px
CRS = "EPSG:32633"


@contextmanager
def scratch(at: str | None) -> Iterator[str]:
    """A new folder, temporary or below the folder or prefix `at`, that is gone afterwards."""
    if at is None or not is_remote(at):
        if at is not None:
            make_folder(absolute(at))
        with tempfile.TemporaryDirectory(dir=None if at is None else absolute(at)) as folder:
            yield folder
        return
    prefix = f"{absolute(at)}/bench-{uuid.uuid4().hex}"
    make_folder(prefix)
    try:
        yield prefix
    finally:
        for path in list(walk(prefix)):
            remove(path)


def make_scene(folder: str, codec: str, side: int, bundle: Bundle) -> str:
    """Write a square scene that the model can read into a folder or under a prefix. Returns its path."""
    town = min(TOWN, max(64, side))
    image, _, valid = draw_town(town, town, seed=0)
    image[~valid] = image[::-1, ::-1][~valid]  # the missing corner: what is missing is not inferred
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[[band % 3 for band in range(bundle.bands)]])
    with tempfile.TemporaryDirectory() as local:
        target = local if is_remote(folder) else folder
        write_repeated(f"{target}/scene.tif", pixels, side, codec, crs=CRS, gsd_m=bundle.gsd_m or 1.0)
        if target == local:
            upload(local, f"{folder}/scenes")
            return f"{folder}/scenes/scene.tif"
    return f"{folder}/scene.tif"
