"""The library: imagery, models and tables. It knows nothing of Ray.

Its public names are imported when one of them is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg_core.api import Segmentation, load_model, segment_array, segment_file
    from seg_core.errors import SegError
    from seg_core.results import MaskWindow, Run, open_run

    __version__: str

__all__ = ["MaskWindow", "Run", "SegError", "Segmentation", "load_model", "open_run", "segment_array", "segment_file"]

_RESULTS = ("MaskWindow", "Run", "open_run")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from seg_core.version import code_version

        return code_version()
    if name in _RESULTS:
        from seg_core import results

        return getattr(results, name)
    if name in __all__:
        from seg_core import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
