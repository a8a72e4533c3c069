"""Log events: a constant name and key/values, JSON in a pod, readable on a terminal.

Promise: one event is one line; message content, credentials and tokens are never among the values.
Must not be done here: deciding what is worth an event.
"""

from __future__ import annotations

import sys
from typing import Literal, Protocol, TextIO

import msgspec

from fleetlm_common.clock import Clock, SystemClock, iso_utc

Level = Literal["debug", "info", "warning", "error"]
Value = str | int | float | bool | None | list[str] | list[int]

_LEVELS: dict[Level, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Logger(Protocol):
    """Where components send their events."""

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        """Record that `name` happened."""
        ...


class StreamLogger:
    """Events as lines on a stream.

    Args:
        component: for example `shard-0`; stands in each line.
        stream: standard error by default.
        style: `json`, `text`, or `auto`: text on a terminal.
        level: events below it are dropped.
        clock: for the time in each line.
    """

    def __init__(
        self,
        component: str,
        *,
        stream: TextIO = sys.stderr,
        style: Literal["json", "text", "auto"] = "auto",
        level: Level = "info",
        clock: Clock | None = None,
    ) -> None:
        self._component = component
        self._stream = stream
        self._text = style == "text" or (style == "auto" and stream.isatty())
        self._level = _LEVELS[level]
        self._clock = clock or SystemClock()

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        """Write one line; a stream that is gone (closed terminal) is not worth dying for."""
        if _LEVELS[level] < self._level:
            return
        at = iso_utc(self._clock.now_us())
        if self._text:
            pairs = " ".join(f"{key}={value}" for key, value in values.items())
            line = f"{at[11:23]} {level:7} {self._component:12} {name} {pairs}\n"
        else:
            record = {"at": at, "level": level, "component": self._component, "event": name, **values}
            line = msgspec.json.encode(record).decode() + "\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):
            return


class NullLogger:
    """Drops every event (tests of pure parts)."""

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        """Drop it."""
