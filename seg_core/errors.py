"""The exceptions that a user can meet.

SegError(ValueError)      wrong use or refused input: one line with the name, the value and the way out
├── ReadError             planned pixels can't be read: they become failed tiles, and the run goes on
│   └── StoreUnavailableError   an object store did not answer, or broke off: another attempt may succeed
├── CorruptFileError      a file of a run can be read, but its content is wrong
└── JobError              a job that started can't be finished: its published results stay
"""


class SegError(ValueError):
    """Wrong use or refused input. The text is one line, ready for the terminal."""

    def __str__(self) -> str:
        """Return the text with escapes for characters that can't be printed, such as a line break in a file's name."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ReadError(SegError):
    """The pixels of a planned window can't be read."""

    attempts = 1  # number of times that the read was tried
    is_partial = False  # whether the file was opened, so that other pixels of it may be readable


class CorruptFileError(SegError):
    """A file of a run can be read, but its content is wrong."""


class StoreUnavailableError(ReadError):
    """An object store did not answer, or broke off."""


class JobError(SegError):
    """A job that started can't be finished."""
