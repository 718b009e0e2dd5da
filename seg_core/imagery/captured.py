"""When an image was taken, from what lies beside it or in its header: a STAC item, EXIF, or TIFFTAG_DATETIME."""

import json
import posixpath
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, time
from typing import Any

from rasterio.io import DatasetReader

from seg_core.errors import SegError
from seg_core.storage.files import is_remote, read_bytes, stat

ITEM_BYTES = 1_000_000  # a larger JSON file is no STAC item of one image
EXIF_TAGS = ("EXIF_DateTimeOriginal", "EXIF_DateTimeDigitized", "EXIF_DateTime")
YEARS = range(1850, 2200)  # others come from clocks that were never set
DATE = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)")  # EXIF and TIFF write colons


def read_capture_date(uri: str, dataset: DatasetReader, beside: Iterable[str]) -> datetime | None:
    """Return when an image was taken, or None if nothing says so. The time is UTC without a time zone.

    A STAC item beside the image (`scene.json` beside `scene.tif`) counts first, then EXIF, then TIFFTAG_DATETIME, whose
    times are those of the camera's clock. `beside` are the files beside a remote image.
    """
    item = _read_item(uri, beside)
    tags = dataset.tags()
    texts = [*_item_dates(item), *(tags.get(name) for name in EXIF_TAGS), tags.get("TIFFTAG_DATETIME")]
    return next((found for text in texts if (found := parse_date(text)) is not None), None)


def parse_date(value: object) -> datetime | None:
    """Return a date, or a date and time, as UTC without a time zone; None if it is none.

    It may be ISO 8601, or as EXIF and TIFF write it (`2013:07:01 12:30:00`), or a date or datetime of Python.
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(DATE.sub(r"\1-\2-\3", value.strip(), count=1))
        except ValueError:
            return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time.min)
    if not isinstance(value, datetime) or value.year not in YEARS:  # that of NaT of pandas is NaN
        return None
    moment = value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
    return datetime.fromisoformat(moment.isoformat(timespec="seconds"))


def _read_item(uri: str, beside: Iterable[str]) -> Any:
    """Return the JSON of a STAC item beside an image, or None."""
    path = f"{posixpath.splitext(uri)[0]}.json"
    if is_remote(uri) and path not in set(beside):
        return None
    try:
        status = stat(path)
        content = read_bytes(path) if status is not None and status.size <= ITEM_BYTES else None
        return json.loads(content) if content else None
    except (SegError, OSError, ValueError, RecursionError):  # it is no item, and the image can be read without it
        return None


def _item_dates(item: Any) -> list[object]:
    """Return the dates of a STAC item in order of preference."""
    if not isinstance(item, dict) or "stac_version" not in item or not isinstance(item.get("properties"), dict):
        return []
    return [item["properties"].get(name) for name in ("datetime", "start_datetime")]
