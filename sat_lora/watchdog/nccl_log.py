"""What NCCL's own watchdog prints when a collective times out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sat_lora.errors import ConfigError

_LINE = re.compile(
    r"\[Rank (?P<rank>\d+)\] Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(?P<number>\d+), "
    r"OpType=(?P<operation>\w+), NumelIn=(?P<given>\d+), NumelOut=(?P<taken>\d+), Timeout\(ms\)=\d+\) "
    r"ran for (?P<milliseconds>\d+) milliseconds"
)


@dataclass(frozen=True)
class LoggedTimeout:
    """A collective that NCCL's watchdog has given up."""

    rank: int
    number: int
    operation: str
    elements: int
    seconds: float

    @property
    def words(self) -> str:
        """The rank, the seconds and the collective, as a sentence without its full stop."""
        return (
            f"NCCL: rank {self.rank} waited {self.seconds:.0f} s for collective {self.number}, {self.operation} of "
            f"{self.elements:,} elements"
        )


def read_timeouts(logs: Iterable[str | Path]) -> list[LoggedTimeout]:
    """Return the timeouts in the logs, one per rank and collective, in the order of the files.

    Raises ConfigError if a file cannot be read.
    """
    timeouts: dict[LoggedTimeout, None] = {}
    for log in logs:
        try:
            text = Path(log).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigError(f"--log: {log} cannot be read: {error}") from error
        for match in _LINE.finditer(text):
            timeout = LoggedTimeout(
                rank=int(match["rank"]),
                number=int(match["number"]),
                operation=match["operation"],
                elements=int(match["given"]),
                seconds=int(match["milliseconds"]) / 1000,
            )
            timeouts[timeout] = None
    return list(timeouts)
