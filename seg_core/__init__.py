"""The library: imagery, models and tables. It knows nothing of Ray."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from seg_core.version import code_version

        return code_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
