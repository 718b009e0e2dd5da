"""The READMEs as data: their commands, snippets, sentences, links and headings."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = "README.md"
NAMES = (
    README,
    "seg_core/README.md",
    "seg_core/CHANGELOG.md",
    "seg_core/imagery/README.md",
    "seg_core/run/README.md",
    "jobs/README.md",
    "jobs/training/README.md",
    "cluster/README.md",
    "tests/README.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
# Commands that need a cluster: tests/test_submit.py runs them, because it has one.
ON_CLUSTER = re.compile(r"python cluster/local\.py|seg (submit|jobs|logs|stop)\b")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return [text for found, text in BLOCK.findall(read(name)) if found == language]


def commands(name: str, on_cluster: bool = False) -> list[str]:
    """The shell commands, in order: those that need a cluster, or all others."""
    lines = [line for block in blocks(name, "sh") for line in block.splitlines() if line.strip()]
    return [line for line in lines if bool(ON_CLUSTER.match(line)) == on_cluster]


def headings(name: str) -> list[tuple[int, str]]:
    """The level and the text of each heading, in order."""
    found = re.findall(r"^(#+) (.+)$", BLOCK.sub("", read(name)), re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def anchor(heading: str) -> str:
    """The name under which GitHub links to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def inline_code(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(name)))


def sentences(name: str) -> Iterator[str]:
    """Each sentence of the paragraphs, list items and cells of tables; a link is its text."""
    text = LINK.sub(r"\1", BLOCK.sub("\n", read(name)))
    for line in _joined(text):
        for cell in line.strip("|").split("|") if line.startswith("|") else [line]:
            yield from filter(None, re.split(r"(?<=[.!?])[*)]*\s+", cell.strip()))


def _joined(text: str) -> Iterator[str]:
    """Paragraphs and list items in one line each, without headings."""
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"\n(?=- |\d+\. |\|)", paragraph) if not paragraph.startswith("#") else ()
