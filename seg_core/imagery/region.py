"""Regions: find the images of files, folders, prefixes, globs and manifests, and read their headers."""

import io
import math
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatch
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd

from seg_core.errors import ReadError, SegError
from seg_core.imagery.captured import parse_date
from seg_core.imagery.georef import position
from seg_core.imagery.headers import read_scene
from seg_core.imagery.open import SUFFIXES, TIFF_SUFFIXES
from seg_core.imagery.scene import Scene
from seg_core.storage.files import absolute, exists, expand, folder_of, is_remote, read_bytes, stat, walk

MANIFESTS = (".csv", ".parquet", ".txt")
DATE_COLUMNS = ("captured", "datetime", "acquired", "date")  # of a manifest
NUM_THREADS = 16  # for reading headers
# Words for a preview in the name of a file beside a scene.
PREVIEW_WORD = re.compile(r"[._ -]*(thumb|preview|quick-?_?look|browse|overview|[._-]ql\b|_small)")
PREVIEW_RATIO = 2  # a preview's pixels are at least so many times as wide as those of the scene on the same ground


def read_region(
    sources: Sequence[str], as_given: bool = False, alpha: int | None = None, include: Sequence[str] = ()
) -> tuple[list[Scene], list[str]]:
    """Return the scenes of a region in the order of their ids, and one line for each unreadable file.

    A source is a file, a folder (searched with its subfolders) or a glob, on disk or in S3, or a manifest (`.txt`: a
    path a line; `.csv` and `.parquet`: a column `uri`, `path` or `scene`, and perhaps one of DATE_COLUMNS that says
    when it was taken). With `as_given`, scenes are in the order of the sources, and scenes of a folder are in the order
    of their names. `alpha` is the argument of `seg_core.imagery.headers.read_scene`.

    A preview that was found beside its scene is left out, unless its name matches a pattern in `include`. The scene's
    doubts name it. Raises SegError if nothing is found.
    """
    found = [find_images(source) for source in sources]
    named = dict.fromkeys(uri for source in found for uri in source.images)
    dates = {uri: date for source in found for uri, date in source.captured.items()}
    uris = list(named) if as_given else sorted(named)
    if len({is_remote(uri) for uri in uris}) > 1:
        raise SegError("some scenes are on disk, some in S3: segment them in two runs")
    root = posixpath.commonpath([folder_of(uri) for uri in uris])

    def read(uri: str) -> Scene | str:
        try:
            scene = read_scene(uri, posixpath.relpath(uri, root), alpha)
            return replace(scene, captured=dates.get(uri, scene.captured))
        except ReadError as error:
            return str(error)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = list(pool.map(read, uris))
    scenes = [s for s in headers if isinstance(s, Scene)]
    by_id = {scene.scene_id: scene for scene in scenes}
    duplicate = next((scene for scene in scenes if by_id[scene.scene_id] is not scene), None)
    if duplicate is not None:  # such as s3://b//a.tif and s3://b/a.tif
        other = by_id[duplicate.scene_id].uri
        raise SegError(f"{duplicate.uri}, {other}: two files have the same name: segment them in two runs")
    given = {uri for source in found if not source.searched for uri in source.images}
    searched = [scene for scene in scenes if scene.uri not in given and not _is_included(scene.uri, include)]
    previews = find_previews(searched, scenes)
    kept = [_name_previews(scene, previews, root) for scene in scenes if scene.uri not in previews]
    return kept, [line for line in headers if isinstance(line, str)]


def _name_previews(scene: Scene, previews: Mapping[str, str], root: str) -> Scene:
    """Return the scene with a doubt for each of its previews that was left out."""
    names = [posixpath.relpath(preview, root) for preview, shown in previews.items() if shown == scene.uri]
    lines = [f"{name} beside it is left out as a preview: to segment it, add --include {name}" for name in names]
    return replace(scene, doubts=(*scene.doubts, *lines))


class FoundImages(NamedTuple):
    """The images that a source names."""

    images: list[str]  # absolute paths
    searched: bool  # whether they were found in a folder or by a glob, rather than named one by one
    captured: Mapping[str, datetime] = MappingProxyType({})  # when they were taken, by path, as a manifest says


def find_images(source: str) -> FoundImages:
    """Return the images that a source names. Raises SegError if it names none."""
    path = absolute(source)
    if stat(path) is not None:
        return _read_manifest(path) if path.lower().endswith(MANIFESTS) else FoundImages([path], searched=False)
    if any(letter in path for letter in "*?[") and not exists(path):
        images = [name for name in expand(path) if name.lower().endswith(SUFFIXES)]
        if not images:
            raise SegError(f"{source}: no such file or folder")
    else:
        images = sorted(name for name in walk(path) if _is_image(name))
        if not images and not exists(path):
            raise SegError(f"{source}: no such file or folder")
        if not images:
            raise SegError(f"{source}: no images in this folder (looked for {', '.join(SUFFIXES)})")
    return FoundImages(images, searched=True)


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not posixpath.basename(path).startswith(".")


def find_previews(searched: Sequence[Scene], scenes: Sequence[Scene]) -> dict[str, str]:
    """Return the URI of each preview among the scenes that were searched for, with the URI of its scene.

    A preview is in the same folder as its scene, is no larger, and has no more colour bands. It is recognised by its
    name (see `_shown_by_name`), or as a coarse image of the same ground.
    """
    by_name: defaultdict[str, dict[str, Scene]] = defaultdict(dict)
    by_frame: defaultdict[object, list[Scene]] = defaultdict(list)
    for scene in scenes:
        stem, suffix = posixpath.splitext(posixpath.basename(scene.uri).lower())
        if suffix in TIFF_SUFFIXES:
            by_name[folder_of(scene.uri)][stem] = scene
            by_frame[_frame(scene)].append(scene)
    shown_by = {}
    for scene in searched:
        shown = _shown_by_name(scene, by_name[folder_of(scene.uri)]) or _shown_by_place(scene, by_frame[_frame(scene)])
        if shown is not None:
            shown_by[scene.uri] = shown.uri
    return {preview: _follow(shown_by, preview) for preview in shown_by}


def _follow(shown_by: Mapping[str, str], uri: str) -> str:
    """Return the scene at the end of a chain of previews."""
    while uri in shown_by:
        uri = shown_by[uri]
    return uri


def _shown_by_name(scene: Scene, tiffs: Mapping[str, Scene]) -> Scene | None:
    """Return the GeoTIFF whose preview a PNG, JPEG or JPEG 2000 is, according to its name, else None.

    A preview has the GeoTIFF's stem, alone (`a.png` and `a.tif.jpg` beside `a.tif`) or followed by a word for a preview
    (`a_thumb.jpg`). If its whole name is such a word (`quicklook.png`), it belongs to the folder's first GeoTIFF.
    """
    stem, suffix = posixpath.splitext(posixpath.basename(scene.uri).lower())
    if suffix in TIFF_SUFFIXES or not tiffs:
        return None
    stem = stem.removesuffix(".tif").removesuffix(".tiff")
    if stem in tiffs:
        return tiffs[stem] if _may_show(scene, tiffs[stem]) else None
    word = PREVIEW_WORD.search(stem)
    if word is None:
        return None
    shown = tiffs[min(tiffs)] if word[0] == stem else tiffs.get(stem[: word.start()])
    return shown if shown is not None and _may_show(scene, shown) else None


def _shown_by_place(scene: Scene, tiffs: Sequence[Scene]) -> Scene | None:
    """Return the finest GeoTIFF of the same frame whose pixels are much smaller than the scene's, else None."""
    finer = [
        tiff
        for tiff in tiffs
        if PREVIEW_RATIO * scene.width <= tiff.width
        and PREVIEW_RATIO * scene.height <= tiff.height
        and _may_show(scene, tiff)
    ]
    return max(finer, key=lambda tiff: tiff.width * tiff.height, default=None)


def _may_show(preview: Scene, scene: Scene) -> bool:
    """Whether a picture has no more pixels or colours than a scene: a photo is no preview of a terrain model."""
    smaller = preview.width <= scene.width and preview.height <= scene.height
    return smaller and len(preview.bands) <= len(scene.bands)


def _frame(scene: Scene) -> object:
    """Return a key that scenes of one folder, CRS and (rounded) extent share. Without a CRS it is the scene's URI."""
    if scene.crs is None:
        return scene.uri
    corners = np.array([*position(scene.transform, 0, 0), *position(scene.transform, scene.height, scene.width)])
    digits = 2 - math.ceil(math.log10(np.hypot(*(corners[2:] - corners[:2]))))
    return folder_of(scene.uri), scene.crs, *corners.round(digits).tolist()


def _is_included(path: str, include: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}") for pattern in include)


def _read_manifest(path: str) -> FoundImages:
    entries = _manifest_entries(path)
    uris = [absolute(uri, folder_of(path)) for uri, _ in entries]
    if not uris:
        raise SegError(f"{path}: this manifest names no scene: add one")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        missing = next((uri for uri, status in zip(uris, pool.map(stat, uris), strict=True) if status is None), None)
    if missing:
        raise SegError(f"{path}: it names {missing}, which is not a file: correct or remove it")
    dates = {uri: date for uri, (_, date) in zip(uris, entries, strict=True) if date is not None}
    return FoundImages(uris, searched=False, captured=dates)


Entry = tuple[str, datetime | None]  # a path of a manifest, and when the image was taken


def _manifest_entries(path: str) -> list[Entry]:
    content = read_bytes(path) or b""
    try:
        if path.lower().endswith(".txt"):
            lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
            return [(line, None) for line in lines if line and not line.startswith("#")]
        return _column_entries(path, _read_table(path, content))
    except UnicodeDecodeError as error:
        raise SegError(f"{path}: this manifest is not UTF-8: save it as UTF-8") from error


def _read_table(path: str, content: bytes) -> pd.DataFrame:
    try:
        if path.lower().endswith(".parquet"):
            return pd.read_parquet(io.BytesIO(content))
        # Read as text, because a name may be a number, or NA.
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, na_values=[""])
    except UnicodeDecodeError:
        raise
    except (ValueError, OSError) as error:  # pandas raises ValueError for what is not a table or not Parquet
        raise SegError(f"{path}: this manifest can't be read: {str(error).strip()}") from error


def _column_entries(path: str, table: pd.DataFrame) -> list[Entry]:
    column = next((name for name in table.columns if str(name).lower() in {"uri", "path", "scene"}), None)
    if column is None:
        names = ", ".join(map(str, table.columns))
        raise SegError(f"{path}: a manifest needs a column uri, path or scene; it has {names or 'none'}")
    rows = table.reset_index(drop=True).dropna(how="all")  # spreadsheets leave empty rows at the end
    entries = ["" if pd.isna(uri) else _text(uri).strip() for uri in rows[column]]
    if "" in entries:
        number = rows.index[entries.index("")] + 1
        raise SegError(f"{path}: row {number} below the header names no scene: fill in its {column}, or delete it")
    return list(zip(entries, _column_dates(path, rows), strict=True))


def _column_dates(path: str, rows: pd.DataFrame) -> list[datetime | None]:
    """Return the dates of a manifest's column of dates, None where there is none."""
    column = next((name for name in rows.columns if str(name).lower() in DATE_COLUMNS), None)
    if column is None:
        return [None] * len(rows)
    found = []
    for number, value in zip(rows.index, rows[column], strict=True):
        date = None if pd.isna(value) else parse_date(value)
        if date is None and not pd.isna(value):
            raise SegError(
                f"{path}: row {number + 1} below the header: {column} is {value!r}: say 2013-07-01, or nothing"
            )
        found.append(date)
    return found


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
