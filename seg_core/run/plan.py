"""The plan of a run: its settings, and the parts that its scenes are divided into."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from seg_core.errors import SegError
from seg_core.grey_levels import Normalization
from seg_core.grid import MIN_CHIP, Window, align, buffered, intersection, intersects, num_splits, split
from seg_core.imagery.mosaic import make_mosaic, place_on_grid
from seg_core.imagery.scene import Scene, fit_to_model
from seg_core.model.bundle import Bundle
from seg_core.processor import choose_precision
from seg_core.run.imagery_fit import ImageryFit
from seg_core.run.places import CACHED_SCENES, Places, relocate_scene

PACKED = np.int32  # type of a packed window's numbers, as in the tables of a run
MAX_WINDOW = 2048  # px; larger windows save little halo and take much memory


def check_threshold(threshold: float) -> None:
    """Raise SegError for a threshold that no pixel, or every pixel, reaches."""
    if not 0 < threshold < 1:
        raise SegError(f"--threshold {threshold}: use a probability between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that change the rows of a run. They are stored in `run.json`."""

    tile_size: int = 512  # px
    part: int = 4096  # px
    halo: int
    threshold: float
    resample: bool = False
    scale: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    keep_probability: bool = False
    precision: str = "auto"  # see Segmenter and Plan.for_device
    decode: str = "cpu"  # or `device`: the model's device decodes JPEG streams; or `auto`: see Plan.for_device
    mosaic: bool = False  # treat the scenes as one image
    window: int | None = None  # px; set only if the context exceeds the halo, because rows then depend on it
    alpha: int | None = None  # number of the alpha band; 0: there is none; None: the band that the file labels alpha
    normalize: str = "model"  # or region, scene: by the run's own imagery; or auto: see seg_core.run.normalization
    normalize_mean: tuple[float, ...] | None = None  # of the region, in grey levels; None: the model's, or each scene's
    normalize_std: tuple[float, ...] | None = None

    @property
    def context_exceeds_halo(self) -> bool:
        """Whether the model sees beyond the halo. The rows then depend on the window size, which is a setting."""
        return self.window is not None

    @property
    def normalization(self) -> Normalization | None:
        """Mean and deviation of the region; None if the model's apply, or those of each scene."""
        if self.normalize_mean is None or self.normalize_std is None:
            return None
        return Normalization(self.normalize_mean, self.normalize_std)

    def normalized(self, mode: str, normalization: Normalization | None) -> "Settings":
        """Return the settings with this normalization of the region."""
        mean, std = normalization or (None, None)
        return replace(self, normalize=mode, normalize_mean=mean, normalize_std=std)

    def named(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, so that adding a setting does not change older runs."""
        default = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    def check(self, stride: int) -> None:
        """Raise SegError for values that do not work with a model of this stride (px)."""
        for name, least in (("tile_size", stride), ("halo", 0)):
            value = getattr(self, name)
            if value < least or value % stride:
                raise SegError(
                    f"--{name.replace('_', '-')} {value}: the model's stride is {stride}: use a multiple of it"
                )
        if self.part < self.tile_size or self.part % self.tile_size:
            raise SegError(f"--part {self.part}: use a multiple of the tile size, {self.tile_size}")
        check_threshold(self.threshold)
        if self.scale is not None and not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise SegError(f"--scale {self.scale[0]:g} {self.scale[1]:g}: MIN must be less than MAX")

    @property
    def largest_window(self) -> int:
        """Side in px of the largest windows if the user asks for no size: see `seg_core.run.sizing`."""
        return max(1, min(MAX_WINDOW, self.part) // self.tile_size) * self.tile_size

    def check_window(self, window: int) -> None:
        """Raise SegError if windows of this side (px) do not consist of whole tiles."""
        if window < self.tile_size or window % self.tile_size:
            raise SegError(f"--window {window}: use a multiple of the tile size, {self.tile_size}")


@dataclass(frozen=True, slots=True)  # a region may have millions of them
class Part:
    """A block of whole tiles of one scene or mosaic, which is committed and resumed as a unit."""

    key: str
    scene: Scene  # the image on whose pixel grid `window` is
    window: Window
    sources: tuple[Scene, ...] = ()  # the scenes of a mosaic that the windows of this part reach
    planned: str = ""  # the version when it was planned, if its files have moved since

    @property
    def version(self) -> str:
        """Hash of the state of the part's files and of how they are read. It changes if either does."""
        return self.planned or _version_of((self.scene, *self.sources))

    def normalization(self, settings: Settings) -> Normalization | None:
        """Mean and deviation of its imagery; None if the model's apply."""
        return self.scene.normalization or settings.normalization

    def relocated(self, places: Places) -> "Part":
        """Return this part with the present paths of its scenes. Its version stays the same."""
        scene, *sources = (relocate_scene(each, places) for each in (self.scene, *self.sources))
        return replace(self, scene=scene, sources=tuple(sources), planned=self.version)


def pack_parts(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Return parts as plain values, to send to another process: their scenes once, and windows as integers."""
    packed = []
    for (scenes, planned), group in groupby(parts, lambda part: ((part.scene, *part.sources), part.planned)):
        members = list(group)
        windows = np.array([part.window for part in members], PACKED).tobytes()
        keys, text = "\n".join(part.key for part in members), json.dumps([scene.to_plain() for scene in scenes])
        packed.append({"scenes": text, "planned": planned, "keys": keys, "windows": windows})
    return packed


def unpack_parts(packed: Iterable[Mapping[str, Any]]) -> list[Part]:
    """Return the parts that `pack_parts` converted."""
    parts = []
    for group in packed:
        scene, *sources = map(Scene.from_plain, json.loads(group["scenes"]))
        windows = np.frombuffer(group["windows"], PACKED).reshape(-1, len(Window._fields)).tolist()
        for key, window in zip(group["keys"].split("\n"), windows, strict=True):
            parts.append(Part(key, scene, Window(*window), tuple(sources), str(group["planned"])))
    return parts


@dataclass(frozen=True)
class WindowTask:
    """A window to segment, and the part that it belongs to."""

    part: Part
    window: Window


@dataclass(frozen=True)
class ReadBlock:
    """Neighbouring windows of one part that are read together."""

    part: Part
    windows: tuple[Window, ...]

    @property
    def tasks(self) -> list[WindowTask]:
        """The windows, each with the part."""
        return [WindowTask(self.part, window) for window in self.windows]

    @property
    def num_pixels(self) -> int:
        """Number of pixels of all windows, without their halos."""
        return sum(window.num_pixels for window in self.windows)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does: its scenes, settings and model."""

    scenes: tuple[Scene, ...]  # for a mosaic, the first one is the image that the others form together
    settings: Settings
    model: str  # the bundle's hash
    class_name: str = ""  # of what the model finds; not part of the fingerprint
    fit: ImageryFit | None = None  # how the imagery compares with the model's; not part of the fingerprint
    places: Places = ()  # how to find scenes that have moved; not part of the fingerprint

    @property
    def found_class(self) -> str:
        """Name of what the run finds. One that an older version made does not say it: building."""
        return self.class_name or "building"

    @property
    def images(self) -> tuple[Scene, ...]:
        """The images that are divided into tiles: the scenes, or the one image that they form together."""
        return self.scenes[:1] if self.settings.mosaic else self.scenes

    def for_device(self, on_gpu: bool) -> "Plan":
        """Return the plan with the settings that are `auto` resolved: who decodes, and the precision."""
        decode, precision = self.settings.decode, self.settings.precision
        if decode == "auto":
            decode = "device" if on_gpu else "cpu"
        settings = replace(self.settings, decode=decode, precision=choose_precision(precision, on_gpu))
        return replace(self, settings=settings)

    def parts(self) -> Iterator[Part]:
        """Yield all parts, image by image. Parts of a mosaic that hold no pixel of any scene are left out."""
        for image in self.images:
            for window in sorted(self._reached) if self.settings.mosaic else split(image.window, self.settings.part):
                yield self._part(image, window)

    def part_at(self, image: int, row_off: int, col_off: int) -> Part:
        """Return the part of an image, given by its number in `images`, that begins at a pixel."""
        whole, size = self.images[image], self.settings.part
        return self._part(whole, intersection(Window(row_off, col_off, size, size), whole.window))

    def _part(self, image: Scene, window: Window) -> Part:
        part = Part(part_key(image, window), image, window, self._reached[window] if self.settings.mosaic else ())
        return part.relocated(self.places) if self.places else part

    @cached_property
    def _reached(self) -> dict[Window, tuple[Scene, ...]]:
        """For each part of a mosaic that holds a pixel of a scene: the scenes that its windows reach, in order."""
        if not self.scenes:  # all of them were refused
            return {}
        whole, *sources = self.scenes
        size, reach = self.settings.part, self.settings.halo + MIN_CHIP
        near: defaultdict[Window, list[Scene]] = defaultdict(list)
        filled: set[Window] = set()
        for scene in sources:
            at = place_on_grid(scene, whole)
            around = intersection(buffered(at, reach), whole.window)
            for window in split(align(around, size, whole.window), size):
                near[window].append(scene)
                if intersects(window, at):
                    filled.add(window)
        return {window: tuple(near[window]) for window in filled}

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers of scenes, parts, tiles and pixels."""
        settings, num_scenes = self.settings, max(0, len(self.scenes) - self.settings.mosaic)
        blocks = list(self._reached) if settings.mosaic else [scene.window for scene in self.scenes]
        return {
            "scenes": num_scenes,
            "parts": sum(num_splits(block, settings.part) for block in blocks),
            "tiles": sum(num_splits(block, settings.tile_size) for block in blocks),
            "pixels": sum(block.height * block.width for block in blocks),
        }

    def num_windows(self, window_size: int) -> int:
        """Return the number of windows of this side (px)."""
        return sum(num_splits(part.window, window_size) for part in self.parts())

    @property
    def fingerprint(self) -> str:
        """Hash of scenes, settings and model: 32 hexadecimal digits."""
        return _digest([[scene.to_plain() for scene in self.scenes], self.settings.named(), self.model])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@lru_cache(maxsize=CACHED_SCENES)
def _version_of(scenes: tuple[Scene, ...]) -> str:
    return _digest([scene.to_plain() for scene in scenes])


def part_key(image: Scene, window: Window) -> str:
    """Return the key of the part of an image that covers a window."""
    return f"{image_key(image)}-{window.row_off:07d}-{window.col_off:07d}"


def image_key(image: Scene) -> str:
    """Return the prefix of the keys of an image's parts."""
    return _key_of(image.scene_id)


@lru_cache(maxsize=CACHED_SCENES)
def _key_of(scene_id: str) -> str:
    return hashlib.sha256(scene_id.encode()).hexdigest()[:16]


def make_plan(
    scenes: Sequence[Scene], bundle: Bundle, settings: Settings, window: int | None = None
) -> tuple[Plan, list[str]]:
    """Plan a run over the scenes that fit the model. Also returns one line for each scene that does not.

    The window size (px) becomes a setting only if the halo does not cover the model's context, because it then changes
    the rows. Raises SegError for settings that do not work with the model.
    """
    settings.check(bundle.stride)
    bundle.check_precision(settings.precision)
    if window is not None:
        settings.check_window(window)
    if bundle.context_px is None or settings.halo < bundle.context_px:
        settings = replace(settings, window=window or settings.largest_window)
    # The scenes of a mosaic are read on the grid of the whole image, so only that must have the model's resolution.
    scenes, refused = _select_dtype(scenes, settings.scale)
    served, unfit = _fit(scenes, bundle, settings, None if settings.mosaic else bundle.gsd_m)
    refused += unfit
    if settings.mosaic and served:
        whole, pieces, off_grid = make_mosaic(served)
        fitted, unfit = _fit([whole], bundle, settings, bundle.gsd_m)
        served, refused = [*(fitted or [whole]), *pieces], refused + off_grid + unfit
    return Plan(scenes=tuple(served), settings=settings, model=bundle.hash, class_name=bundle.class_name), refused


def _select_dtype(scenes: Sequence[Scene], scale: tuple[float, float] | None) -> tuple[list[Scene], list[str]]:
    """Return the scenes with the data type of the first one, which `scale` is for, and a line for each other scene."""
    if scale is None:
        return list(scenes), []
    other = [scene for scene in scenes if scene.dtype != scenes[0].dtype]
    lines = [
        f"{scene.scene_id}: its pixels are {scene.dtype}, those of {scenes[0].scene_id} are {scenes[0].dtype}, and "
        "--scale applies to one type: segment it in a run of its own"
        for scene in other
    ]
    return [scene for scene in scenes if scene.dtype == scenes[0].dtype], lines


def _fit(
    scenes: Sequence[Scene], bundle: Bundle, settings: Settings, gsd_m: float | None
) -> tuple[list[Scene], list[str]]:
    """Return the scenes that fit the model, as it will read them, and a line for each other scene."""
    served, refused = [], []
    for scene in scenes:
        try:
            served.append(
                fit_to_model(
                    scene,
                    num_bands=bundle.bands,
                    dtype=bundle.dtype,
                    gsd_m=gsd_m,
                    bands=settings.bands,
                    scale=settings.scale,
                    resample=settings.resample,
                )
            )
        except SegError as error:
            refused.append(str(error))
    return served, refused
