"""Which windows of a run a user means, by tile or in pixels."""

from collections.abc import Sequence
from typing import NamedTuple

from seg_core.errors import SegError
from seg_core.grid import Window, intersection
from seg_core.imagery.scene import Scene
from seg_core.report.texts import tile_text
from seg_core.run.plan import Plan

MAX_VIEWS = 24  # of a picture
MAX_SIDE = 4096  # px of a window, which is drawn with 640 px
MAX_NAME = 24  # characters of a scene's name in a title


class Place(NamedTuple):
    """A place in a run, as a user names it."""

    option: str  # with its value, for messages
    scene_id: str | None  # None: the only one
    tile: tuple[int, int] | None  # row and column; None: it is a window
    window: Window | None


class View(NamedTuple):
    """A window of an image that is drawn, and its title."""

    image: Scene
    window: Window
    title: str


def choose_views(plan: Plan, places: Sequence[Place]) -> list[View]:
    """Return the windows of places. Raises SegError for one that is not in the plan, and for too many."""
    if len(places) > MAX_VIEWS:
        raise SegError(f"--tile, --window: {len(places)} places: a picture has room for {MAX_VIEWS}")
    return [_choose_view(plan, place) for place in places]


def _choose_view(plan: Plan, place: Place) -> View:
    image = _find_image(plan, place)
    name = image.scene_id if len(image.scene_id) <= MAX_NAME else f"...{image.scene_id[3 - MAX_NAME :]}"
    if place.tile is not None:
        (row, col), size = place.tile, plan.settings.tile_size
        window = intersection(Window(row * size, col * size, size, size), image.window)
        if min(window.height, window.width) < 1:
            last = f"{(image.height - 1) // size},{(image.width - 1) // size}"
            raise SegError(f"{place.option}: {image.scene_id} has the tiles 0,0 to {last} (row,column)")
        return View(image, window, tile_text(name, row, col))
    assert place.window is not None
    window = place.window
    if min(window.height, window.width) < 1 or intersection(window, image.window) != window:
        raise SegError(f"{place.option}: not within {image.scene_id}, which is {image.width} x {image.height} px")
    if max(window.height, window.width) > MAX_SIDE:
        raise SegError(f"{place.option}: a window has at most {MAX_SIDE:,} px a side")
    return View(image, window, f"{name}, {window.width} x {window.height} px at x {window.col_off}, y {window.row_off}")


def _find_image(plan: Plan, place: Place) -> Scene:
    ids = [image.scene_id for image in plan.images]
    known = ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "")
    if place.scene_id is None and len(ids) != 1:
        raise SegError(f"{place.option}: say which scene, as SCENE:...: {known}")
    if place.scene_id is not None and place.scene_id not in ids:
        raise SegError(f"{place.option}: no scene of this run is {place.scene_id}: it has {known}")
    return plan.images[0 if place.scene_id is None else ids.index(place.scene_id)]
