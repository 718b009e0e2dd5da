"""Scenes that lie on each other: what is in both is counted twice, unless they are one image."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import shapely

from seg_core.imagery.georef import footprints, position, split_at_antimeridian
from seg_core.imagery.scene import Scene
from seg_core.storage.files import is_remote, read_ranges

EDGE_TOLERANCE = 1.5  # px that neighbours may overlap by: where their grids differ, edges are rounded
# Share of the smaller scene by which scenes in two CRSs may overlap: edges that are straight in one are curved in the
# other.
MIN_OVERLAP_SHARE = 0.01
SAMPLE_BYTES = 2**12  # bytes at the beginning, middle and end by which files of one size are first compared


class Overlap(NamedTuple):
    """Two scenes that share ground."""

    one: Scene
    other: Scene
    share: float  # of the smaller one that lies in the other


def find_overlaps(scenes: Sequence[Scene]) -> list[Overlap]:
    """All pairs of scenes that overlap by more than rounding, the largest shares first.

    By their frames: where frames overlap and their valid pixels do not, nothing is counted twice. Scenes without a CRS
    are left out.
    """
    placed = [scene for scene in scenes if scene.crs is not None]
    if len(placed) < 2:
        return []
    outlines = [footprints(str(s.crs), s.transform, [(0, 0, s.height, s.width)])[0] for s in placed]
    frames, _ = split_at_antimeridian(np.array(outlines))
    tree, found = shapely.STRtree(frames), []
    for one, other in zip(*tree.query(frames, predicate="intersects"), strict=True):
        if one < other and (share := _share(placed[one], placed[other], frames[one], frames[other])):
            found.append(Overlap(placed[one], placed[other], share))
    return sorted(found, key=lambda each: -each.share)


def describe_overlaps(scenes: Sequence[Scene]) -> tuple[list[str], list[str]]:
    """A line that says how much of the region would be counted twice, if any; and a line for each copy elsewhere."""
    overlaps, copies = find_overlaps(scenes), find_copies(scenes)
    placed = {frozenset((pair.one.scene_id, pair.other.scene_id)) for pair in overlaps}
    same = {frozenset((one.scene_id, other.scene_id)): (one, other) for one, other in copies}
    lines = []
    if overlaps:
        one, other, share = overlaps[0]
        twice = next((same[pair] for pair in placed if pair in same), None)
        what = (
            f"{twice[0].scene_id} and {twice[1].scene_id} hold the same content"
            if twice
            else f"{one.scene_id} and {other.scene_id} overlap by {share:.0%} of the smaller one"
        )
        more = f" (and {len(overlaps) - 1:,} more pairs overlap)" if len(overlaps) > 1 else ""
        lines = [f"{what}{more}: their common ground would count twice: add --mosaic or --overlap count"]
    elsewhere = [(one, other) for pair, (one, other) in same.items() if pair not in placed]
    return lines, [f"{one.scene_id}: {other.scene_id} holds the same content" for one, other in elsewhere]


def _share(one: Scene, other: Scene, frame: shapely.Polygon, other_frame: shapely.Polygon) -> float:
    """What share of the smaller of two scenes lies in the other; 0 where it is no more than rounding."""
    same = one.crs == other.crs
    ours, theirs = (_outline(one), _outline(other)) if same else (frame, other_frame)
    common = shapely.intersection(ours, theirs)
    if same and common.is_empty:  # where longitudes go on beyond 180 degrees, and begin again at -180
        ours, theirs, common, same = frame, other_frame, shapely.intersection(frame, other_frame), False
    share = float(common.area / min(ours.area, theirs.area))
    if not same:
        return share if share > MIN_OVERLAP_SHARE else 0.0
    pixel = min(abs(s.transform[0] * s.transform[4] - s.transform[1] * s.transform[3]) ** 0.5 for s in (one, other))
    thickness = 2 * common.area / common.length if common.length else 0.0
    return share if thickness > EDGE_TOLERANCE * pixel else 0.0


def _outline(scene: Scene) -> shapely.Polygon:
    """The frame of a scene in its own CRS, whose edges are straight there."""
    rows, cols = np.array([0, scene.height, scene.height, 0]), np.array([0, 0, scene.width, scene.width])
    return shapely.Polygon(np.stack(position(scene.transform, rows, cols), axis=-1))


def find_copies(scenes: Sequence[Scene]) -> list[tuple[Scene, Scene]]:
    """Pairs of scenes whose files hold the same bytes; in S3, have the same etag. Raises SegError as reading does.

    Files are compared whole only where their sizes, and a few pieces of them, are the same.
    """
    alike: list[list[Scene]] = [list(scenes)]
    for key in (_by_size, _by_pieces, _by_content):
        alike = [group for some in alike for group in _groups(some, key) if len(group) > 1]
    return [pair for group in alike for pair in pairwise(group)]


def _groups(scenes: Sequence[Scene], key: Callable[[Scene], object]) -> list[list[Scene]]:
    found: defaultdict[object, list[Scene]] = defaultdict(list)
    for scene in scenes:
        found[key(scene)].append(scene)
    return list(found.values())


def _by_size(scene: Scene) -> object:
    return (scene.size, scene.version) if is_remote(scene.uri) else scene.size


def _by_pieces(scene: Scene) -> object:
    if is_remote(scene.uri):
        return None
    offsets = sorted({0, max(0, scene.size // 2 - SAMPLE_BYTES), max(0, scene.size - SAMPLE_BYTES)})
    return b"".join(read_ranges(scene.uri, [(at, min(SAMPLE_BYTES, scene.size - at)) for at in offsets], 0))


def _by_content(scene: Scene) -> object:
    if is_remote(scene.uri):
        return None
    with open(scene.uri, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
