"""The modules of the project, and what each imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules(folder: str) -> dict[str, Path]:
    """The modules of a folder by their full names."""
    paths = (path for path in (ROOT / folder).rglob("*.py") if path.name != "_version.py")  # which is generated
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(name: str, path: Path, top_only: bool = False) -> set[str]:
    """The full names of all modules, and names in them, that a module imports, also within functions."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def is_ours(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in {"seg_core", "jobs", "aerial_seg", "tests"}


EVERY = [(name, path) for folder in ("seg_core", "jobs") for name, path in sorted(modules(folder).items())]
