"""The demonstration: train, segment, verify and query a synthetic town. It needs no data and no network."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seg_core.errors import SegError
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.raster import read_whole
from seg_core.imagery.region import read_region
from seg_core.model.bundle import read_bundle
from seg_core.plots.pictures import Panel, assemble_mask, assemble_panels, coverage_panel, paint_mask
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import find_parts
from seg_core.run.plan import Settings, make_plan
from seg_core.run.query import query
from seg_core.run.score import score_run
from seg_core.run.verify import verify
from seg_core.storage.files import make_folder, publish
from seg_core.synthetic import draw_town
from seg_core.training.metrics import scores

from .ray_session import ray_session
from .resources import ExecutionOptions
from .segment import segment
from .train import train
from .training.settings import make_settings

CRS = "EPSG:32633"
WORKERS = 2
SCENE_SIDE = 2048  # px of the scene to segment
TRAINING_SETTINGS = {
    "width": 8,
    "patch": 1,
    "epochs": 2,
    "steps": 60,
    "batch": 12,
    "crop": 128,
    "lr": 5e-3,
    "ema": 0.95,
    "augment": "light",
    "workers": WORKERS,
}
EXAMPLE_QUERY = """
SELECT tile_row, tile_col, round(100 * coverage, 1) AS "building %", round(building_m2) AS building_m2
FROM tiles ORDER BY coverage DESC LIMIT 5
""".strip()


def demo(out: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the demonstration in the new folder `out`, and call `say` with a line for each step. Returns the figures.

    Raises SegError if the folder exists.
    """
    if Path(out).exists():
        raise SegError(f"{out}: exists already: choose another folder with --out")
    make_folder(out)
    started = time.monotonic()
    say("1. Drawing a town: 6 scenes to learn from, 2 to validate on, 1 to segment")
    draw_dataset(out)
    with ray_session(None, WORKERS):
        say(f"2. Training a narrow U-Net with {WORKERS} Ray Train workers")
        settings = make_settings("large", None, [TRAINING_SETTINGS])
        bundle = train(settings, f"{out}/data", f"{out}/bundle", f"{out}/bundle.train", draw=False)
        say(f"   bundle {bundle.hash[:8]}: building IoU {bundle.metrics['val_iou']:.3f} on validation")
        say("3. Segmenting a scene it has not seen with Ray Data")
        segment_scene(out)
    report = verify(f"{out}/run")
    say(f"4. Verifying: {report.num_done} of {report.num_planned} tiles done, {len(report.problems)} problems")
    say(f"5. Asking in SQL:\n{EXAMPLE_QUERY}")
    say(query(f"{out}/run", EXAMPLE_QUERY).to_pandas().to_string(index=False))
    figures = scores(score_run(f"{out}/run", f"{out}/truth.tif", None).counts)
    say(f"6. Building IoU against the known truth: {figures['iou']:.3f}")
    draw_picture(out)
    say(f"7. A picture to look at: {os.path.relpath(out)}/picture.png")
    return {**figures, "seconds": round(time.monotonic() - started, 1), "verified": report.ok}


def draw_dataset(out: str) -> None:
    """Draw a dataset in the layout of the Massachusetts Buildings dataset, the scene to segment, and its truth."""
    for split, seeds, side in (("train", range(6), 768), ("val", range(6, 8), 768)):
        make_folder(f"{out}/data/{split}")
        make_folder(f"{out}/data/{split}_labels")
        for seed in seeds:
            image, building, _ = draw_town(side, side, seed)
            write_scene(f"{out}/data/{split}/town_{seed}.tiff", image.transpose(2, 0, 1), seed, 255)
            write_scene(f"{out}/data/{split}_labels/town_{seed}.tif", np.repeat(building[None] * 255, 3, axis=0), seed)
    Path(out, "data", "label_class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nbuilding,255,255,255\n")
    image, building, valid = draw_town(SCENE_SIDE, SCENE_SIDE, 99)
    write_scene(f"{out}/scene.tif", image.transpose(2, 0, 1), 99, 255)
    write_scene(f"{out}/truth.tif", np.where(valid, building, 255)[None].astype(np.uint8), 99, 255)


def write_scene(path: str, pixels: np.ndarray[Any, np.dtype[np.uint8]], seed: int, nodata: int | None = None) -> None:
    """Write pixels `uint8 (bands, height, width)` as a GeoTIFF of 1 m per pixel, at a place that `seed` determines."""
    transform = (1.0, 0.0, 400_000.0 + 4096 * seed, 0.0, -1.0, 5_800_000.0)
    write_geotiff(path, np.ascontiguousarray(pixels), crs=CRS, transform=transform, nodata=nodata)


def segment_scene(out: str) -> None:
    """Segment `scene.tif` with the trained bundle."""
    bundle = read_bundle(f"{out}/bundle")
    scenes, _ = read_region([f"{out}/scene.tif"])
    plan, refused = make_plan(scenes, bundle, Settings(halo=bundle.halo, threshold=bundle.threshold, tile_size=256))
    assert not refused
    segment(plan, f"{out}/bundle", f"{out}/run", ExecutionOptions(window=1024))


def draw_picture(out: str) -> None:
    """Draw image, truth, prediction and coverage grid into `picture.png`."""
    image = np.asarray(read_whole(f"{out}/scene.tif"), np.uint8).transpose(1, 2, 0)
    truth = read_whole(f"{out}/truth.tif")[0] == 1
    rows = [row for location in find_parts(f"{out}/run").values() for row in read_rows(location)]
    panels = [
        Panel("image", image),
        Panel("truth", paint_mask(image, truth)),
        Panel("prediction", paint_mask(image, assemble_mask(rows, SCENE_SIDE, SCENE_SIDE))),
        coverage_panel("building coverage of each tile", rows, SCENE_SIDE, SCENE_SIDE),
    ]
    publish(f"{out}/picture.png", assemble_panels(panels))
