"""The clock of an open loop: says when appends are due, at a constant rate, whether or not earlier ones were answered.

Promise: the k-th append is due at `begin + k / rate`; `tick` is called in the loop soon after (a thread sleeps until
then: the loop's own timers know milliseconds only), and what was due and could not be sent stays due. Must not be done
here: sending.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Final

SLEEP_MIN_S: Final = 0.0002
"""Appends that are due within it leave together: waking the loop for each would cost more than it measures."""


class Pace:
    """Calls `tick` in the loop when something is due, from `start` to `stop`."""

    def __init__(self, rate: float, *, tick: Callable[[], None]) -> None:
        self._rate = rate
        self._tick = tick
        self._loop = asyncio.get_running_loop()
        self._ended = threading.Event()
        self._waiting = False
        self._thread = threading.Thread(target=self._run, name="bench-pace", daemon=True)
        self._begin_s = 0.0

    def start(self) -> None:
        """From now on."""
        self._begin_s = time.perf_counter()
        self._thread.start()

    def stop(self) -> None:
        """No more ticks."""
        self._ended.set()

    def due(self) -> int:
        """How many should have been sent by now; the first is due at the start."""
        return int((time.perf_counter() - self._begin_s) * self._rate) + 1

    def due_at_s(self, number: int) -> float:
        """When that one should be sent (0: the first)."""
        return self._begin_s + number / self._rate

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            now_s = time.perf_counter()
            number = max(number + 1, int((now_s - self._begin_s) * self._rate) + 1)
            time.sleep(max(self.due_at_s(number) - now_s, SLEEP_MIN_S))
            if not self._waiting:
                self._waiting = True
                try:
                    self._loop.call_soon_threadsafe(self._on_time)
                except RuntimeError:  # the loop has ended
                    return

    def _on_time(self) -> None:
        self._waiting = False
        if not self._ended.is_set():
            self._tick()
