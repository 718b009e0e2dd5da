"""What figures and pictures have in common: colours, and how they become a PNG."""

import io

from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "0.6"
DPI = 100


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG of DPI pixels an inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()
