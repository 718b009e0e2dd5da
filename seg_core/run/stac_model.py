"""Describe the model of a run as a STAC item, by the Machine Learning Model extension.

https://github.com/stac-extensions/mlm
"""

import logging
import posixpath
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from seg_core.errors import SegError
from seg_core.imagery.captured import parse_date
from seg_core.model.bundle import BUILT_IN, BUILT_IN_NAME, HEADER, WEIGHTS, Bundle, find_bundle, read_bundle
from seg_core.run.record import RunRecord
from seg_core.run.stac_terms import JSON, date_fields, extension, find_period, plain_name

if TYPE_CHECKING:
    import pystac

EXTENSIONS = [extension("mlm/v1.5.2"), extension("file/v2.1.0")]
TASKS = ["semantic-segmentation"]
SHA256 = "1220"  # what a multihash begins with: SHA-256, 32 bytes
HYPERPARAMETERS = ("threshold", "temperature", "halo", "stride")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """The bundle that a run was made with, and where it is."""

    name: str
    uri: str
    bundle: Bundle
    run_created: datetime  # UTC without a time zone


def find_model(record: RunRecord, created: datetime, given: str | None) -> Model | None:
    """Return the model of a run that was `created` then, from the bundle at `given`, or where it was.

    Returns None, with a warning, if it has moved. Raises SegError if `given` is another bundle, or none.
    """
    wanted = record.model.hash
    for uri in [given] if given else [find_bundle(record.model.uri), BUILT_IN]:
        try:
            bundle = read_bundle(uri)
        except SegError:
            if given:
                raise
            continue
        if bundle.hash == wanted:
            return Model(_name(uri), uri, bundle, created)
    if given:
        raise SegError(f"--model: is {bundle.hash[:8]}, but the run was made with {wanted[:8]}: name that model")
    log.warning("--stac: the model is not at %s: it is left out: name its folder with --model", record.model.uri)
    return None


def _name(uri: str) -> str:
    """Return the name of a bundle as the extension wants it: two or more plain characters, of which the first is one.

    It is that of its folder.
    """
    name = BUILT_IN_NAME if uri == BUILT_IN else plain_name(posixpath.basename(uri.rstrip("/")), "bundle")
    return name if re.match(r"[A-Za-z].+[0-9A-Za-z]$", name) else f"model-{name.strip('_')}"


def make_model_item(model: Model) -> "pystac.Item":
    """Return the STAC item of a model. It has no place on Earth, since a bundle doesn't say where it was trained."""
    import pystac

    bundle = model.bundle
    dates = date_fields(find_period([parse_date(bundle.provenance.get("created"))], model.run_created))
    item = pystac.Item(
        bundle.hash, None, None, **dates, properties=_properties(model), stac_extensions=list(EXTENSIONS)
    )
    described = {
        "mlm:artifact_type": "safetensors.torch.save_file",
        "file:checksum": SHA256 + bundle.weights_sha256,
        "bands": _bands(bundle),  # STAC allows those of an item only where an asset has some
    }
    roles, media_type = ["mlm:model", "mlm:weights"], "application/octet-stream; framework=pytorch"
    item.add_asset("model", pystac.Asset(f"{model.uri}/{WEIGHTS}", "Weights", None, media_type, roles, described))
    item.add_asset("bundle", pystac.Asset(f"{model.uri}/{HEADER}", "Description", None, JSON, ["metadata"]))
    return item


def _properties(model: Model) -> dict[str, Any]:
    bundle = model.bundle
    architecture = {"unet": "U-Net"}.get(bundle.architecture["name"], bundle.architecture["name"].removeprefix("smp:"))
    return {
        "title": model.name,
        **({"gsd": bundle.gsd_m} if bundle.gsd_m else {}),
        "bands": _bands(bundle),
        "mlm:name": model.name,
        "mlm:architecture": architecture,
        "mlm:framework": "PyTorch",
        "mlm:tasks": TASKS,
        "mlm:accelerator": None,
        "mlm:hyperparameters": {name: getattr(bundle, name) for name in HYPERPARAMETERS},
        "mlm:input": [_input(bundle)],
        "mlm:output": [_output(bundle)],
    }


def _bands(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the bands of the imagery, which a bundle knows by their order."""
    return [{"name": f"band-{number}", "data_type": bundle.dtype} for number in range(1, bundle.bands + 1)]


def _input(bundle: Bundle) -> dict[str, Any]:
    """Return what the network takes: chips of any number and size, normalized by mean and deviation of each band."""
    scaling = [
        {"type": "z-score", "mean": mean, "stddev": std} for mean, std in zip(bundle.mean, bundle.std, strict=True)
    ]
    shape = {"shape": [-1, bundle.bands, -1, -1], "dim_order": ["batch", "bands", "height", "width"]}
    return {
        "name": "imagery",
        "description": f"Heights and widths are multiples of {bundle.stride}. Missing pixels are 0 after scaling.",
        "bands": [band["name"] for band in _bands(bundle)],
        "input": {**shape, "data_type": "float32"},
        "value_scaling": scaling,
        "resize_type": None,
        "pre_processing_function": None,
    }


def _output(bundle: Bundle) -> dict[str, Any]:
    """Return what the network gives: logits of the second of two classes alone, or of each class."""
    number = int(bundle.architecture["classes"])
    what = f"logit of the class {bundle.classes[1]}" if number == 1 else "logit of each class"
    classes = [
        {"value": value, "name": plain_name(name, f"class-{value}"), "description": name}
        for value, name in enumerate(bundle.classes)
    ]
    shape = {"shape": [-1, number, -1, -1], "dim_order": ["batch", "class", "height", "width"]}
    return {
        "name": "logits",
        "description": f"The {what}, to be divided by the temperature.",
        "tasks": TASKS,
        "result": {**shape, "data_type": "float32"},
        "classification:classes": classes,
        "post_processing_function": None,
    }
