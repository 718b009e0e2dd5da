"""Where scenes are now that have moved since a run was planned."""

import posixpath
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from seg_core.imagery.scene import Scene
from seg_core.storage.files import is_remote

CACHED_SCENES = 64

Places = tuple[tuple[str, str], ...]  # pairs of URI prefixes: when the run was planned, and now


def relocate(uri: str, places: Places) -> str:
    """Return the present URI of a scene. The first pair whose old prefix is the URI or a folder above it applies."""
    for old, new in places:
        if uri == old or uri.startswith(f"{old.rstrip('/')}/"):
            return new.rstrip("/") + uri[len(old.rstrip("/")) :]
    return uri


@lru_cache(maxsize=CACHED_SCENES)
def relocate_scene(scene: Scene, places: Places) -> Scene:
    """Return a scene with its present URI, and those of its sidecars."""
    uri = relocate(scene.uri, places)
    return replace(scene, uri=uri, sidecars=sidecars_at(uri, scene.sidecars) if is_remote(uri) else ())


def sidecars_at(uri: str, sidecars: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the sidecars of a scene if the scene is at `uri`."""
    return tuple(posixpath.join(posixpath.dirname(uri), posixpath.basename(path)) for path in sidecars)
