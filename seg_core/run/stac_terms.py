"""What all files of a STAC catalogue share: links, names, dates, and how a file is written."""

import json
import posixpath
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from seg_core.errors import SegError
from seg_core.imagery.captured import YEARS
from seg_core.storage.files import publish

SCHEMAS = "https://stac-extensions.github.io"
JSON, GEOJSON = "application/json", "application/geo+json"

Period = tuple[datetime, datetime]
Result = tuple[str, SegError | None]
"""The path of a file, and why it could not be written."""


def check_library() -> None:
    """Raise SegError if pystac is not installed."""
    try:
        import pystac  # noqa: F401
    except ImportError as error:
        raise SegError("--stac: needs the package pystac: pip install 'aerial-seg[stac]'") from error


def extension(name: str) -> str:
    """Return the URL that stands for an extension with its version, such as `raster/v2.0.0`."""
    return f"{SCHEMAS}/{name}/schema.json"


def plain_id(text: str) -> str:
    """Return a text as an id, which is a single step of a URL: its letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^\w.-]+", "-", text)


def plain_name(text: str, otherwise: str) -> str:
    """Return a text as a name of ASCII letters, digits, `_` and `-`, or another one if it has none of these."""
    return re.sub(r"[^0-9A-Za-z_-]+", "-", text).strip("-") or otherwise


def relative_link(path: str, start: str) -> str:
    """Return the link to a path from the file at `start`."""
    found = posixpath.relpath(path, posixpath.dirname(start))
    return found if found.startswith("../") else f"./{found}"


def find_period(dates: Sequence[datetime | None], latest: datetime) -> Period:
    """Return from when to when something was made. If a date is not known, it was made before the `latest` one."""
    known = [each for each in dates if each is not None]
    if len(known) == len(dates):
        return min(known), max(known)
    return datetime(YEARS.start, 1, 1), max([latest, *known])  # noqa: DTZ001 - UTC, as `Scene.captured`


def date_fields(period: Period) -> dict[str, Any]:
    """Return the arguments of an item: one date, or the first and the last of a period."""
    start, end = period
    return {"datetime": start} if start == end else {"datetime": None, "start_datetime": start, "end_datetime": end}


def write_json(path: str, content: dict[str, Any]) -> Result:
    """Write a JSON file. Returns its path, and the error if it can't be written."""
    try:
        publish(path, json.dumps(content, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        return path, SegError(f"{path}: can't be written: {error.strerror}")
    except SegError as error:
        return path, error
    return path, None
