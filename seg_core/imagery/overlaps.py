"""Scenes that overlap: ground that lies in two of them is counted twice, unless they are read as one image."""

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

EDGE_TOLERANCE = 1.5  # px by which neighbours may overlap: edges are rounded if their grids differ
# Share of the smaller scene by which scenes in two CRSs may overlap: straight edges of one CRS are curved in the other.
MIN_OVERLAP_SHARE = 0.01
SAMPLE_BYTES = 2**12  # read at the beginning, middle and end of files of equal size to compare them first


class Overlap(NamedTuple):
    """Two scenes that cover common ground."""

    one: Scene
    other: Scene
    share: float  # share of the smaller one that lies in the other


def find_overlaps(scenes: Sequence[Scene]) -> list[Overlap]:
    """Return all pairs of scenes that overlap by more than rounding, the largest shares first.

    Frames are compared, not valid pixels. Nothing is counted twice if only the frames overlap. Scenes without a CRS are
    left out.
    """
    placed = [scene for scene in scenes if scene.crs is not None]
    if len(placed) < 2:
        return []
    outlines = [footprints(str(s.crs), s.transform, [(0, 0, s.height, s.width)])[0] for s in placed]
    frames, _ = split_at_antimeridian(np.array(outlines))
    tree, overlaps = shapely.STRtree(frames), []
    for one, other in zip(*tree.query(frames, predicate="intersects"), strict=True):
        if one < other and (share := _share(placed[one], placed[other], frames[one], frames[other])):
            overlaps.append(Overlap(placed[one], placed[other], share))
    return sorted(overlaps, key=lambda overlap: -overlap.share)


def describe_overlaps(scenes: Sequence[Scene]) -> tuple[list[str], list[str]]:
    """Return a line on how much of the region would be counted twice, if any, and a line for each other copy.

    Other copies are scenes of equal content that don't cover common ground.
    """
    overlaps, copies = find_overlaps(scenes), find_copies(scenes)
    overlapping = {frozenset((pair.one.scene_id, pair.other.scene_id)) for pair in overlaps}
    same = {frozenset((one.scene_id, other.scene_id)): (one, other) for one, other in copies}
    lines = []
    if overlaps:
        one, other, share = overlaps[0]
        copied = next((same[pair] for pair in overlapping if pair in same), None)
        finding = (
            f"{copied[0].scene_id} and {copied[1].scene_id} hold the same content"
            if copied
            else f"{one.scene_id} and {other.scene_id} overlap by {share:.0%} of the smaller one"
        )
        more = f" (and {len(overlaps) - 1:,} more pairs overlap)" if len(overlaps) > 1 else ""
        lines = [f"{finding}{more}: their common ground would count twice: add --mosaic or --overlap count"]
    elsewhere = [(one, other) for pair, (one, other) in same.items() if pair not in overlapping]
    return lines, [f"{one.scene_id}: {other.scene_id} holds the same content" for one, other in elsewhere]


def _share(one: Scene, other: Scene, frame: shapely.Polygon, other_frame: shapely.Polygon) -> float:
    """Return the share of the smaller of two scenes that lies in the other; 0 if it is no more than rounding."""
    same = one.crs == other.crs
    ours, theirs = (_outline(one), _outline(other)) if same else (frame, other_frame)
    common = shapely.intersection(ours, theirs)
    if same and common.is_empty:  # one continues beyond 180 degrees, the other begins at -180
        ours, theirs, common, same = frame, other_frame, shapely.intersection(frame, other_frame), False
    share = float(common.area / min(ours.area, theirs.area))
    if not same:
        return share if share > MIN_OVERLAP_SHARE else 0.0
    pixel = min(abs(s.transform[0] * s.transform[4] - s.transform[1] * s.transform[3]) ** 0.5 for s in (one, other))
    thickness = 2 * common.area / common.length if common.length else 0.0
    return share if thickness > EDGE_TOLERANCE * pixel else 0.0


def _outline(scene: Scene) -> shapely.Polygon:
    """Return the frame of a scene in its own CRS, where its edges are straight."""
    rows, cols = np.array([0, scene.height, scene.height, 0]), np.array([0, 0, scene.width, scene.width])
    return shapely.Polygon(np.stack(position(scene.transform, rows, cols), axis=-1))


def find_copies(scenes: Sequence[Scene]) -> list[tuple[Scene, Scene]]:
    """Return pairs of scenes whose files hold the same bytes, or have the same etag in S3.

    Files are compared as a whole only if their sizes and a few pieces of them are equal. Raises SegError if a file
    can't be read.
    """
    groups: list[list[Scene]] = [list(scenes)]
    for key in (_by_size, _by_pieces, _by_content):
        groups = [part for group in groups for part in _groups(group, key) if len(part) > 1]
    return [pair for group in groups for pair in pairwise(group)]


def _groups(scenes: Sequence[Scene], key: Callable[[Scene], object]) -> list[list[Scene]]:
    groups: defaultdict[object, list[Scene]] = defaultdict(list)
    for scene in scenes:
        groups[key(scene)].append(scene)
    return list(groups.values())


def _by_size(scene: Scene) -> object:
    """Return the key that the files of copies share, without reading them: the size, and in S3 also the etag."""
    return (scene.size, scene.version) if is_remote(scene.uri) else scene.size


def _by_pieces(scene: Scene) -> object:
    if is_remote(scene.uri):
        return None
    offsets = sorted({0, max(0, scene.size // 2 - SAMPLE_BYTES), max(0, scene.size - SAMPLE_BYTES)})
    return b"".join(read_ranges(scene.uri, [(offset, min(SAMPLE_BYTES, scene.size - offset)) for offset in offsets], 0))


def _by_content(scene: Scene) -> object:
    if is_remote(scene.uri):
        return None
    with open(scene.uri, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
