"""Score a model on a labelled split, or a run's stored masks against labels."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from seg_core.ahead import ahead
from seg_core.dataset import MISSING, find_pairs, read_classes, read_pair
from seg_core.errors import SegError
from seg_core.metrics import Counts, count, scores
from seg_core.raster import read_chip
from seg_core.scenes import fit_to_model
from seg_core.segmenter import Segmenter
from seg_core.tiling import chip_window, split

WINDOW = 1024  # px


def evaluate_bundle(path: str, data: str, split_name: str, device: str = "auto") -> dict[str, Any]:
    """Building scores of a bundle over the valid pixels of all images of a split, segmented as in a bulk run."""
    segmenter = Segmenter(path, device)
    bundle, classes = segmenter.bundle, read_classes(data)
    if classes.names != bundle.classes:
        raise SegError(f"{data}: its classes are {', '.join(classes.names)}, the model's {', '.join(bundle.classes)}")
    pairs = find_pairs(data, split_name)
    total = Counts()
    with ThreadPoolExecutor(1) as pool:
        for sample, header in ahead(pool, lambda pair: read_pair(pair, classes), pairs, 2):
            scene = fit_to_model(
                header, num_bands=bundle.bands, gsd_m=bundle.gsd_m, bands=None, scaled=False, resample=False
            )
            for window in split(scene.window, WINDOW):
                pixels, valid = read_chip(scene, chip_window(window, bundle.halo, bundle.stride))
                probability = segmenter(pixels, valid, bundle.halo, window.height, window.width)
                label = sample.label[window.row_off :, window.col_off :][: window.height, : window.width]
                building = probability >= bundle.threshold
                total = total.plus(count(building, label == bundle.building, label != MISSING))
    return {"images": len(pairs), **scores(total), **total._asdict()}
