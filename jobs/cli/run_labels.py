"""Labels that the masks of a run are compared with."""

from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import absolute

from ..progress import waiting
from ..terminal import note
from .arguments import local_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seg_core.run.record import RunRecord
    from seg_core.run.score import SceneLabels


@contextmanager
def open_run_labels(
    run: str, path: str, data: str | None = None, aoi: str | None = None
) -> "Iterator[str | SceneLabels]":
    """Yield the polygons of a vector file as labels of a run's scenes, or the absolute path of raster labels.

    `path`, `data` and `aoi` are the values of --labels, --data and --aoi. Raises SegError for those that don't fit.
    """
    from seg_core.imagery.vector_formats import is_vector
    from seg_core.run.stored_plan import read_plan

    if not is_vector(path):
        if aoi:
            raise SegError(f"--aoi {aoi}: is for polygons, {path} is none: mark what is missing by nodata")
        yield absolute(path)
        return
    if data:
        raise SegError(f"--data: is for the colours of raster labels, {path} holds polygons: leave it out")
    from seg_core.datasets.labels import LabelSettings, describe_dropped, open_labels
    from seg_core.training.class_names import is_building

    plan = read_plan(run)
    if not is_building(plan.found_class):
        note(f"{path}: each of its polygons counts as {plan.found_class}, whatever its attributes say")
    settings = LabelSettings(area=local_path(aoi) if aoi else None)
    with ExitStack() as stack:
        with waiting("reading polygons"):
            labels = stack.enter_context(open_labels(local_path(path), plan.images, settings))
        assert labels.tally is not None
        if labels.tally.repaired:
            note(f"{path}: {labels.tally.repaired:,} invalid polygons were repaired")
        if dropped := describe_dropped(labels.tally):
            note(f"{path}: dropped, because they are no area: {dropped}")
        yield labels


def class_of(record: "RunRecord") -> str:
    """Return the name of the class that a run's masks show, as `read_classes` takes it; empty for buildings.

    Older records don't say it, but the run's model does. If that is gone, masks are taken for buildings, and a line
    says so.
    """
    from seg_core.model.bundle import BUILT_IN, read_bundle
    from seg_core.training.class_names import is_building

    # Labels may call buildings by another name than the model does.
    if record.class_name is not None:
        return "" if is_building(record.class_name) else record.class_name
    for path in (BUILT_IN, record.model.uri):
        with suppress(SegError):
            bundle = read_bundle(path)
            if bundle.hash == record.model.hash:
                return "" if is_building(bundle.class_name) else bundle.class_name
    note(
        f"{record.model.uri}: the run's model is not there: its masks are taken for buildings: if not, add --class NAME"
    )
    return ""
