"""What travels with a job: our code, and the bundle that its command names by a local path."""

import shutil
from pathlib import Path

import seg_core
from seg_core.model.bundle import BUILT_IN, BUILT_IN_NAME, read_bundle
from seg_core.version import code_version

PACKAGE = Path(__file__).parents[1]
SENT_BUNDLE = PACKAGE / "sent_bundle"  # where a job finds the bundle that came with it
ORIGIN = "origin.txt"  # holds the path that the bundle has on the machine it was sent from


def copy_packages(folder: str, bundle: str | None) -> list[str]:
    """Copy our packages into a folder under their import names, with their version and, inside, a bundle.

    Returns the paths of the copies.
    """
    sources = {"seg_core": Path(seg_core.__file__).parent, "aerial_seg": PACKAGE}
    for name, source in sources.items():
        shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", SENT_BUNDLE.name))
    Path(folder, "seg_core", "_version.py").write_text(f"version = {code_version()!r}\n", encoding="utf-8")
    if bundle is not None:
        copy = Path(folder, "aerial_seg", SENT_BUNDLE.name)
        copy.mkdir()
        for name in read_bundle(bundle).files:
            shutil.copyfile(Path(bundle, name), copy / name)
        (copy / ORIGIN).write_text(bundle, encoding="utf-8")
    return [str(Path(folder, name)) for name in sources]


def lasting_name(bundle: str) -> str:
    """Return what to call a bundle so that it is still found when this job and its code are gone.

    `bundle` is the absolute path of a folder. The name is `built-in`, or the path on the machine that it was sent from.
    """
    if bundle == BUILT_IN:
        return BUILT_IN_NAME
    if bundle == str(SENT_BUNDLE):
        return (SENT_BUNDLE / ORIGIN).read_text(encoding="utf-8")
    return bundle
