"""The exceptions a user can meet.

SegError(ValueError)      wrong use or refused input: one line with the name, the value and the way out
└── ReadError             pixels that were planned can't be read: recorded as failed tiles, the run goes on
"""


class SegError(ValueError):
    """Wrong use or refused input. The text is one line, ready for the terminal."""


class ReadError(SegError):
    """Pixels of a planned window can't be read."""
