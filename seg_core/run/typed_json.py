"""Read JSON values as the types that a dataclass says its fields have."""

from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class WrongTypeError(Exception):
    """A value is not of the type of its field."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__(name, value)
        self.name, self.value = name, value


def parse_fields(kind: type[Any], values: object, name: str = "") -> dict[str, Any]:
    """The fields of a dataclass that a JSON object holds, by name, each as its type. Others are left out.

    `name` is that of the object itself. Raises WrongTypeError for a field of another type, and for one that is missing
    and has no default.
    """
    if not isinstance(values, Mapping):
        raise WrongTypeError(name, values)
    types, found = get_type_hints(kind), {}
    for each in fields(kind):
        optional = each.default is not NO_DEFAULT or each.default_factory is not NO_DEFAULT
        if each.name in values or not optional:
            within = f"{name}.{each.name}" if name else each.name
            found[each.name] = _parse(types[each.name], values.get(each.name), within)
    return found


def _parse(kind: Any, value: Any, name: str) -> Any:
    """A value as a type: a dataclass, a plain type, a tuple or dict of those, or one of them or None."""
    if is_dataclass(kind) and isinstance(kind, type):
        return kind(**parse_fields(kind, value, name))
    origin, inner = get_origin(kind), get_args(kind)
    if origin in {Union, UnionType}:
        (some,) = (each for each in inner if each is not type(None))
        return None if value is None else _parse(some, value, name)
    if origin is tuple:
        return _parse_tuple(inner, value, name)
    if origin is dict and isinstance(value, dict):
        return {key: _parse(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    if kind is not Any and not _is_plain(kind, value):
        raise WrongTypeError(name, value)
    return value


def _parse_tuple(inner: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise WrongTypeError(name, value)
    kinds = (inner[0],) * len(value) if inner[1:] == (...,) else inner
    if len(kinds) != len(value):
        raise WrongTypeError(name, value)
    return tuple(_parse(each, item, name) for each, item in zip(kinds, value, strict=True))


def _is_plain(kind: Any, value: object) -> bool:
    if isinstance(value, bool):  # which is an int to Python
        return kind is bool
    if kind is float:  # JSON has one kind of number
        return isinstance(value, int | float)
    return isinstance(kind, type) and isinstance(value, kind)
