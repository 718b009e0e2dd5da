"""What the names of a dataset's classes say of a model that finds one of them."""

from collections.abc import Sequence


def describe_class(names: Sequence[str], positive: int) -> str | None:
    """Return what a model of these classes finds and what its figures mean; None for buildings against one other class.

    `positive` is the index of the class that it finds.
    """
    name = names[positive]
    if is_building(name) and len(names) == 2:
        return None
    others = [each for each in names if each != name and not each.lower().startswith("background")]
    counted = f", and {', '.join(others)} {'count' if others[1:] else 'counts'} as background" if others else ""
    meant = "" if is_building(name) else f": building_px, building_m2, coverage and masks are of {name}"
    return f"finds the class {name} alone{counted}{meant}"


def is_building(name: str) -> bool:
    """Whether this name of a class makes it the positive class where no other is chosen."""
    return name.lower().startswith("building")
