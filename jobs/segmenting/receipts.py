"""What an actor tells the driver about each part that it has published."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .stopwatch import StageTimes


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A published part. What is on storage is the truth: a receipt is for progress and the run's record."""

    actor: str
    readers: int = 0  # threads of the actor that read
    started: float  # s since 1970
    ended: float
    windows: int = 0  # as planned: on a small device they may be cut smaller
    pixels: int
    failed: int = 0  # tiles
    seam_pixels: int = 0  # valid ones beside a border between windows that were looked at
    seam_differing: int = 0  # of them, those on which the neighbour differs
    decoded_on_cpu: int = 0  # windows that the device has not decoded, since the actor's last receipt
    exact: bool = True  # whether the rows are those that a CPU gives to the last bit
    times: StageTimes = field(default_factory=StageTimes)  # since the actor's last receipt

    def to_row(self) -> dict[str, Any]:
        """As plain values, to travel."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Receipt":
        """The receipt that was made a row."""
        return cls(**{**row, "times": StageTimes(**row["times"])})
