"""Regions: find the images that a person names, by files, folders, prefixes, globs or manifests."""

import io
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from seg_core.errors import ReadError, SegError
from seg_core.scenes import SUFFIXES, Scene, read_scene
from seg_core.storage import absolute, exists, expand, folder_of, is_remote, read_bytes, stat, walk

MANIFESTS = (".csv", ".parquet", ".txt")
READERS = 16  # threads to read headers with


def read_region(sources: Sequence[str], as_given: bool = False) -> tuple[list[Scene], list[str]]:
    """Scenes of a region in the order of their ids, and one line for each file that is no readable image.

    With `as_given` they are in the order in which the sources name them, those of a folder by name.

    A source is a file, a folder (searched with its subfolders), a glob, each on disk or in S3, or a manifest (`.txt`: a
    path a line; `.csv` and `.parquet`: a column `uri`, `path` or `scene`). Raises SegError where nothing is found.
    """
    named = dict.fromkeys(uri for source in sources for uri in find_images(source))
    uris = list(named) if as_given else sorted(named)
    if len({is_remote(uri) for uri in uris}) > 1:
        raise SegError("some scenes are on disk, some in S3: make two runs of them")
    root = posixpath.commonpath([folder_of(uri) for uri in uris])

    def read(uri: str) -> Scene | str:
        try:
            return read_scene(uri, posixpath.relpath(uri, root))
        except ReadError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, uris))
    scenes = [s for s in found if isinstance(s, Scene)]
    by_id = {scene.scene_id: scene for scene in scenes}
    twin = next((scene for scene in scenes if by_id[scene.scene_id] is not scene), None)
    if twin is not None:  # such as s3://b//a.tif and s3://b/a.tif
        raise SegError(f"{twin.uri}, {by_id[twin.scene_id].uri}: two files of one name: make two runs of them")
    return scenes, [line for line in found if isinstance(line, str)]


def find_images(source: str) -> list[str]:
    """Absolute paths of the images that a source names. Raises SegError where it names none."""
    path = absolute(source)
    if stat(path) is not None:
        return _read_manifest(path) if path.lower().endswith(MANIFESTS) else [path]
    if any(letter in path for letter in "*?[") and not exists(path):
        found = [name for name in expand(path) if name.lower().endswith(SUFFIXES)]
        if not found:
            raise SegError(f"{source}: no such file or folder")
        return found
    found = sorted(name for name in walk(path) if _is_image(name))
    if not found and not exists(path):
        raise SegError(f"{source}: no such file or folder")
    if not found:
        raise SegError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
    return found


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not posixpath.basename(path).startswith(".")


def _read_manifest(path: str) -> list[str]:
    uris = [absolute(uri, folder_of(path)) for uri in _manifest_entries(path)]
    if not uris:
        raise SegError(f"{path}: this manifest names no scene")
    with ThreadPoolExecutor(READERS) as pool:
        missing = next((uri for uri, found in zip(uris, pool.map(stat, uris), strict=True) if found is None), None)
    if missing:
        raise SegError(f"{path}: it names {missing}, which is no file")
    return uris


def _manifest_entries(path: str) -> list[str]:
    content = read_bytes(path) or b""
    try:
        if path.lower().endswith(".txt"):
            lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
            return [line for line in lines if line and not line.startswith("#")]
        if path.lower().endswith(".parquet"):
            table = pd.read_parquet(io.BytesIO(content))
        else:  # as text, for a name may be a number, or NA
            table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:  # what is no text, no table or no Parquet is a ValueError to pandas
        raise SegError(f"{path}: not a manifest that can be read: {str(error).strip()}") from error
    column = next((name for name in table.columns if str(name).lower() in {"uri", "path", "scene"}), None)
    if column is None:
        names = ", ".join(map(str, table.columns))
        raise SegError(f"{path}: a manifest needs a column uri, path or scene; it has {names or 'none'}")
    rows = table.reset_index(drop=True).dropna(how="all")  # spreadsheets leave empty rows at the end
    entries = ["" if pd.isna(uri) else str(uri).strip() for uri in rows[column]]
    if "" in entries:
        number = rows.index[entries.index("")] + 1
        raise SegError(f"{path}: row {number} below the header names no scene: fill in its {column}, or delete it")
    return entries
