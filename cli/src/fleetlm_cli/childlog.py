"""One child's log file: bounded, and read again for what people should see.

The child writes to the file itself (append mode), so that a frozen or killed `up` neither blocks it nor loses a line.

Promise: file and its predecessor (`.1`) stay under `LOG_BYTES_MAX` each (plus what is written between two looks);
`news` shows each line once, and at most `NEWS_LINES_MAX` a look. Must not be done here: printing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import msgspec

LOG_BYTES_MAX: Final = 8 * 1024 * 1024
"""A few days of warnings and errors; two files a child."""
NEWS_LINES_MAX: Final = 20
"""Lines a look that reach the terminal; the rest is counted, the file has it."""
NEWS_BYTES_MAX: Final = 256 * 1024
"""Bytes a look; a child that writes faster is skipped over, the file has it."""
LAST_LINES: Final = 15
"""Shown when a child ends `up`."""
_LEVELS_SHOWN: Final = frozenset({"warning", "error"})


class _Line(msgspec.Struct):
    """What is needed of an event."""

    level: str
    event: str
    at: str = ""
    component: str = ""


class ChildLog:
    """The log of one child.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        self._partial = b""
        self._boot_bytes = 0

    def open(self) -> int:
        """A descriptor for a child that starts now; the caller closes it."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._boot_bytes = os.fstat(descriptor).st_size
        return descriptor

    def skip_old(self) -> None:
        """What earlier runs of `up` wrote is no news."""
        self._read_bytes = self.path.stat().st_size if self.path.exists() else 0

    def news(self) -> list[str]:
        """Warnings, errors and lines that are no events, written since the last look."""
        size_bytes = self.path.stat().st_size
        if size_bytes < self._read_bytes:  # somebody cut it
            self._read_bytes = 0
        if size_bytes - self._read_bytes > NEWS_BYTES_MAX:
            self._read_bytes = size_bytes - NEWS_BYTES_MAX
            self._partial = b""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read(NEWS_BYTES_MAX)
        self._read_bytes += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-NEWS_BYTES_MAX:]
        shown = [text for line in lines if (text := _shown(line)) is not None]
        if len(shown) > NEWS_LINES_MAX:
            more = len(shown) - NEWS_LINES_MAX
            shown = [*shown[:NEWS_LINES_MAX], f"… {more} lines more in {self.path}"]
        return shown

    def last_lines(self) -> list[str]:
        """The end of what the newest start of the child wrote."""
        try:
            with self.path.open("rb") as file:
                size_bytes = file.seek(0, os.SEEK_END)
                file.seek(max(min(self._boot_bytes, size_bytes), size_bytes - NEWS_BYTES_MAX))
                lines = file.read(NEWS_BYTES_MAX).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [_readable(line) for line in lines[-LAST_LINES:]]

    def bound(self) -> None:
        """Keep the file short: copy it away and cut it, for the child goes on writing to it.

        What the child writes between copy and cut is lost; nothing but people reads these files.
        """
        if self.path.stat().st_size <= LOG_BYTES_MAX:
            return
        shutil.copyfile(self.path, self.path.with_name(self.path.name + ".1"))
        self.path.with_name(self.path.name + ".1").chmod(0o600)
        os.truncate(self.path, 0)
        self._read_bytes = self._boot_bytes = 0
        self._partial = b""


def _shown(line: bytes) -> str | None:
    """What of a line belongs on the terminal."""
    if not line.strip():
        return None
    try:
        event = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError:
        return line.decode(errors="replace")
    return _readable(line.decode(errors="replace")) if event.level in _LEVELS_SHOWN else None


def _readable(line: str) -> str:
    """An event as `level event key=value …`; any other line as it is."""
    try:
        values = msgspec.json.decode(line, type=dict[str, object])
        head = f"{values.pop('level')} {values.pop('event')}"
    except (msgspec.DecodeError, KeyError):
        return line
    for known in ("at", "component"):
        values.pop(known, None)
    return " ".join([head, *(f"{key}={value}" for key, value in values.items())])
