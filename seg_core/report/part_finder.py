"""Which part of a run holds a tile."""

from seg_core.grid import Window
from seg_core.run.plan import Part, Plan


class PartFinder:
    """Finds the part of a tile, by its image and by its place in the grid of parts of that image."""

    def __init__(self, plan: Plan) -> None:
        self._size = plan.settings.part
        self._numbers = {image.scene_id: number for number, image in enumerate(plan.images)}
        self._parts = {self._place(self._numbers[part.scene.scene_id], part.window): part for part in plan.parts()}

    def find(self, image: int, tile: Window) -> Part:
        """Return the part that holds a tile of an image, which is given by its number in the plan."""
        return self._parts[self._place(image, tile)]

    def _place(self, image: int, window: Window) -> tuple[int, int, int]:
        return image, window.row_off // self._size, window.col_off // self._size
