"""Time, passed in: logic asks a `Clock`, never the `time` module, so that the simulator owns time.

Promise: `monotonic_s` never goes back; `now_ms` may (people set clocks), nothing about correctness may rest on it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What logic may know of time."""

    def now_ms(self) -> int:
        """Milliseconds since 1970, for people and for `inserted_at`."""
        ...

    def now_us(self) -> int:
        """Microseconds since 1970."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since some moment, never going back; for deadlines and ages."""
        ...


class SystemClock:
    """`Clock` of the machine."""

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def now_us(self) -> int:
        """Microseconds since 1970."""
        return time.time_ns() // 1_000

    def monotonic_s(self) -> float:
        """The machine's monotonic clock."""
        return time.monotonic()


def iso_utc(now_us: int) -> str:
    """RFC 3339 text in UTC with microseconds, for example `2026-11-23T23:08:56.123456Z`."""
    seconds, micros = divmod(now_us, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{micros:06d}Z"
