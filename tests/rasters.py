"""GeoTIFFs with what write_geotiff does not offer: alpha bands, masks, GDAL's options, JPEG blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from conftest import NORTH_UP, UTM
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from seg_core.grid import Window
from seg_core.imagery.headers import read_scene
from seg_core.imagery.jpeg_streams import read_streams
from seg_core.imagery.scene import Scene
from seg_core.model.segmenter import Segmenter
from seg_core.synthetic import draw_town

COLOURS = {
    1: [ColorInterp.gray],
    3: [ColorInterp.red, ColorInterp.green, ColorInterp.blue],
    4: [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined],
}
HEIGHT, WIDTH = 300, 420
WINDOWS = [Window(0, 0, HEIGHT, WIDTH), Window(-40, -30, 200, 130), Window(130, 250, 200, 200), Window(200, 300, 10, 7)]


def write_raw(
    path: Path,
    pixels: NDArray[Any],
    *,
    nodata: float | None = None,
    alpha: NDArray[Any] | None = None,
    mask: NDArray[np.bool_] | None = None,
    **options: Any,
) -> Scene:
    """Write a GeoTIFF with an alpha band, an internal mask or GDAL's options, which write_geotiff does not offer."""
    bands, height, width = pixels.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=bands + (alpha is not None),
            dtype=pixels.dtype.name,
            crs=UTM,
            transform=Affine(*NORTH_UP),
            nodata=nodata,
            **options,
        ) as dataset,
    ):
        if alpha is not None:
            dataset.colorinterp = [*COLOURS[bands], ColorInterp.alpha]
            dataset.write(alpha.astype(pixels.dtype), bands + 1)
        dataset.write(pixels, list(range(1, bands + 1)))
        if mask is not None:
            dataset.write_mask(mask)
    return read_scene(str(path), path.name)


def write_jpeg(
    path: Path,
    bands: int = 3,
    valid: NDArray[np.bool_] | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
    **options: Any,
) -> Scene:
    """Write a town as a GeoTIFF of JPEG blocks."""
    side = max(512, height, width)
    pixels = np.moveaxis(draw_town(side, side, seed=3)[0], -1, 0)[:, :height, :width]
    blocks = {"tiled": True, "blockxsize": 128, "blockysize": 64, "interleave": "pixel"}
    options = {**blocks, "compress": "jpeg", "photometric": "ycbcr", **options}
    return write_raw(path, pixels[[0, 1, 2, 0][:bands]], mask=valid, **options)


def decode(segmenter: Segmenter, scene: Scene, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The pixels of a chip, decoded by the device, and which of them hold data."""
    streams = read_streams(scene, window, segmenter.decodes_rgb)
    assert streams is not None
    staged = segmenter.stage_streams(streams)
    assert staged.decoded
    if staged.ready is not None:
        staged.ready.synchronize()
    return staged.image.cpu().numpy(), staged.valid


def damage(path: Path, blocks: set[tuple[int, int]] | None = None, bands: tuple[int, ...] = (1, 2, 3)) -> None:
    """Make nonsense of blocks `(column, row)`, of all without `blocks`."""
    with rasterio.open(path) as dataset:
        found = set()
        for (row, col), _ in dataset.block_windows(1):
            if blocks is None or (col, row) in blocks:
                for band in bands:
                    size, at = (
                        dataset.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=band)
                        for what in ("SIZE", "OFFSET")
                    )
                    found |= {(int(at), int(size))} if at else set()
    assert found
    with path.open("r+b") as file:
        for at, size in found:
            file.seek(at)
            file.write(b"\xff" * size)
