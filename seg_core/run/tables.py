"""Write and read the tables of a run, which are the only truth about it; compacted parts are read by `parts`.

RUN/scenes/scenes.parquet      one row per scene
RUN/tiles/part-<key>.parquet   one row per planned tile (GeoParquet 1.1), one file per part
"""

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import CorruptFileError
from seg_core.imagery.scene import Scene
from seg_core.run.fence import PLAIN, Store
from seg_core.run.isolated import for_each_isolated
from seg_core.run.parquet import read_file, read_table
from seg_core.run.rows import Row
from seg_core.run.schema import GEO, SCENES, SPLIT, TILES, check_columns
from seg_core.storage.files import stat
from seg_core.threads import NUM_FILE_THREADS

OWN, SUFFIX = "part-", ".parquet"  # how the name of a part's file begins and ends
VERSION = b"scene_version"  # key in the metadata of a part's file
REWRITE_ADVICE = "the seg segment command of the run rewrites it"
REPAIR_ADVICE = f": seg repair removes it, and {REWRITE_ADVICE}"


def part_name(key: str) -> str:
    """Return the name of a part's file, which also names the part within a compacted file."""
    return f"{OWN}{key}{SUFFIX}"


def part_path(run: str, key: str) -> str:
    """Return the path of a part's file."""
    return f"{run}/tiles/{part_name(key)}"


def write_part(run: str, key: str, rows: Iterable[Row], model: str, version: str, store: Store = PLAIN) -> bytes:
    """Publish the rows of a part, sorted by tile, and return the content of its file. The same rows give the same one.

    `model` is the bundle's hash. `version` is the part's (see `Part.version`), and goes into the file's metadata.
    """
    ordered = sorted(rows, key=lambda row: (row["tile_row"], row["tile_col"]))
    schema = TILES.with_metadata({b"geo": json.dumps(_geo(ordered)), VERSION: version})
    content = encode_table(pa.Table.from_pylist([{"model": model, **row} for row in ordered], schema))
    store.publish(part_path(run, key), content)
    return content


def _geo(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the GeoParquet metadata for rows. Tiles across the antimeridian have two polygons."""
    boxes = [row["bbox"] for row in rows if row["bbox"]]
    if not any(box["xmin"] > box["xmax"] for box in boxes):
        return GEO
    return {**GEO, "columns": {"geometry": SPLIT}}


State = tuple[bool, str] | None  # whether all tiles of a part are done, and its version; None if it is damaged


def read_states(paths: Sequence[str]) -> dict[str, State]:
    """Return the state of each part by its path. This reads only the footers of the files.

    Raises SegError if the store is unavailable, or if a newer version of this program wrote a file.
    """
    return dict(zip(paths, for_each_isolated(_read_state, lambda _: None, paths, NUM_FILE_THREADS), strict=True))


def _read_state(path: str) -> State:
    try:
        return read_file(path, _state_of)
    except CorruptFileError:
        return None


def _state_of(file: Any) -> State:
    """Read the state from the footer: the greatest status of a part without failed tiles is `done`."""
    footer = pq.read_metadata(file)
    check_columns(footer.schema.to_arrow_schema(), TILES)
    index = footer.schema.names.index("status")
    groups = [footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups)]
    return all(group is not None and group.max == "done" for group in groups), version_of(footer.metadata)


def crashes_its_reader(path: str) -> CorruptFileError:
    """Return the error for a part that crashes the process that reads it."""
    return CorruptFileError(f"{posixpath.basename(path)}: can't be read: it crashes the process that reads it")


def write_scenes(run: str, scenes: Sequence[Scene], store: Store = PLAIN, decode: str = "cpu") -> None:
    """Publish the scenes table. `decode` is the setting of the run."""
    import rasterio  # here, because other commands than those that read imagery do without

    versions = {
        "gdal_version": rasterio.__gdal_version__,
        "decoder_version": f"torchvision {version('torchvision')}" if decode == "device" else None,
    }
    rows = [{**scene.to_row(), **versions} for scene in scenes]
    store.publish(scenes_path(run), encode_table(pa.Table.from_pylist(rows, schema=SCENES)))


def encode_table(table: pa.Table) -> bytes:
    """Encode a table as a Parquet file."""
    stream = pa.BufferOutputStream()  # Arrow writes to it without taking the interpreter's lock
    pq.write_table(table, stream, compression="zstd")
    content: bytes = stream.getvalue().to_pybytes()
    return content


def scenes_path(run: str) -> str:
    """Return the path of the scenes table."""
    return f"{run}/scenes/scenes.parquet"


def read_scenes(run: str) -> list[Scene]:
    """Read the scenes of a run, as they were planned.

    Raises CorruptFileError if the file is missing or damaged. Raises SegError if the store is unavailable, or if a
    newer version of this program wrote the file.
    """
    path = scenes_path(run)
    if stat(path) is None:
        raise CorruptFileError(f"{path}: can't be read: no such file: {REWRITE_ADVICE}")
    try:
        return read_file(path, _scenes_of)
    except CorruptFileError as error:
        raise CorruptFileError(f"{posixpath.dirname(path)}/{error}: {REWRITE_ADVICE}") from error


def _scenes_of(file: Any) -> list[Scene]:
    return [Scene.from_plain(row) for row in read_table(file, SCENES).to_pylist()]


def version_of(metadata: Mapping[bytes, bytes] | None) -> str:
    """Return the version of a part (see `Part.version`) from the metadata of its file."""
    return (metadata or {}).get(VERSION, b"").decode()
