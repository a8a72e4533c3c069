"""What happened, in order: what two runs of a seed are compared by, and what people read when one failed.

Promise: a line holds simulated time, who, what, and values; nothing of it depends on addresses, hashes or the machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

from fleetlm_common.logs import Level, Value

Line = tuple[float, str, str, str]
_MACHINE: Final = frozenset({"pid", "seconds"})


class Trace:
    """The lines of one run."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.now: Callable[[], float] = lambda: 0.0
        self.over = False
        self.told: dict[str, Callable[[str], None]] = {}
        """What → who is told at once of who did it."""

    def add(self, who: str, what: str, text: str = "") -> None:
        """Write a line down."""
        if not self.over:
            self.lines.append((self.now(), who, what, text))
            if what in self.told:
                self.told[what](who)

    def close(self) -> None:
        """The run is over: nothing is added any more, and the lines do not keep the run in memory."""
        self.over = True
        self.now = lambda: 0.0
        self.told.clear()

    def digest(self) -> str:
        """A number for all of it."""
        return f"{zlib.crc32(repr(self.lines).encode()):08x}-{len(self.lines)}"

    def tail(self, count: int, *, without: frozenset[str] = frozenset({"bytes"})) -> list[str]:
        """The newest lines for people."""
        chosen = [line for line in self.lines if line[2] not in without][-count:]
        return [f"{at_s - 1000:10.4f}  {who:<14} {what} {text}".rstrip() for at_s, who, what, text in chosen]


class TraceLogger:
    """`Logger` of one process."""

    def __init__(self, trace: Trace, who: str) -> None:
        self._trace = trace
        self._who = who

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        """See `Logger`."""
        text = " ".join(f"{key}={value}" for key, value in values.items() if key not in _MACHINE)
        self._trace.add(self._who, name, text if level == "info" else f"[{level}] {text}")
