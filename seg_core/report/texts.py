"""Figures as people read them on the page."""

UNKNOWN = "–"


def count_text(number: int | None) -> str:
    """Return a number with separators of thousands."""
    return UNKNOWN if number is None else f"{number:,}"


def tile_text(scene: str, row: int, col: int) -> str:
    """Return how a tile is called: after its scene and its place there."""
    return f"{scene}, tile {row}, {col}"


def share_text(share: float | None) -> str:
    """Return a share as a percentage. One that is not 0 never reads as 0."""
    if share is None:
        return UNKNOWN
    return "below 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def area_text(km2: float | None, pixels: int | None) -> str:
    """Return an area in square kilometres, in square metres if it is small, or in pixels if it has no area."""
    if km2 is None:
        return UNKNOWN if pixels is None else f"{pixels:,} px"
    return f"{km2:,.2f} km²" if km2 >= 1 else f"{km2 * 1e6:,.0f} m²"


def duration_text(seconds: float | None) -> str:
    """Return a duration in hours, minutes and seconds."""
    if seconds is None:
        return UNKNOWN
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "min"), (left, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def moment_text(iso: str) -> str:
    """Return a moment that is given as ISO 8601 in UTC."""
    return iso.replace("T", " ").replace("Z", " UTC")
