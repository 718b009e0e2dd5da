"""The message that an actor sends to the driver for each part that it has published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .stopwatch import StageTimes


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A published part. Receipts serve progress and the run's record; the truth is in the files."""

    actor: str
    part: str = ""  # its key
    scene: str = ""  # its scene_id
    window: Sequence[int] = ()  # its row_off, col_off, height and width, in px
    readers: int = 0  # reading threads of the actor
    started: float  # s since 1970
    ended: float
    windows: int = 0  # as planned; a device with little memory may have used smaller ones
    pixels: int
    failed: int = 0  # tiles
    seam_pixels: int = 0  # valid pixels beside borders of windows that were compared
    seam_differing: int = 0  # those of them for which the neighbouring window gives another result
    decoded_on_cpu: int = 0  # windows since the actor's last receipt that the device has not decoded
    exact: bool = True  # whether the rows are exact to the last bit: see Segmenter
    software: dict[str, str] = field(default_factory=dict)  # what decodes and computes, with versions
    times: StageTimes = field(default_factory=StageTimes)  # since the actor's last receipt

    def to_row(self) -> dict[str, Any]:
        """Return plain values, to send to another process."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Receipt":
        """Return the receipt that `to_row` converted."""
        return cls(**{**row, "times": StageTimes(**row["times"]), "window": tuple(map(int, row["window"]))})
