"""The exceptions a user can meet.

SegError(ValueError)      wrong use or refused input: one line with the name, the value and the way out
├── ReadError             pixels that were planned can't be read: recorded as failed tiles, the run goes on
│   └── StoreUnavailableError   an object store did not answer, or broke off: worth another try
├── CorruptFileError          a file of a run can be read, but is not what it should be
└── JobError              a job that began can't be finished: what it has published stays
"""


class SegError(ValueError):
    """Wrong use or refused input. The text is one line, ready for the terminal."""

    def __str__(self) -> str:
        """The text; what can't be printed in it, such as a line break in a file's name, is escaped."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ReadError(SegError):
    """Pixels of a planned window can't be read."""

    attempts = 1  # how often it was tried
    in_places = False  # whether the file was there, and others of its pixels may well be readable


class CorruptFileError(SegError):
    """A file of a run that can be read, but is not what it should be."""


class StoreUnavailableError(ReadError):
    """An object store did not answer, or broke off."""


class JobError(SegError):
    """A job that began can't be finished."""
