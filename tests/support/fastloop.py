"""An event loop whose time runs faster than the wall's, with real sockets: a deadline of 10 s passes in half a second.

Promise: everything that asks the loop for time (timers, timeouts, `loop.time`) sees the same faster time. Must not be
used where real time is measured.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

SPEED: Final = 20.0
"""Slow enough that a millisecond of scheduling on a busy machine does not look like a time-out."""

T = TypeVar("T")


class _FastSelector(selectors.DefaultSelector):
    """Waits a shorter time than it is asked to."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(None if timeout is None else timeout / SPEED)


class FastLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        super().__init__(_FastSelector())

    def time(self) -> float:
        """Seconds, `SPEED` of them in each real one."""
        return super().time() * SPEED


def run_fast(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine on a `FastLoop`; exceptions that nobody retrieved fail the test."""
    lost: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        return await work

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        result = runner.run(watched())
    assert not lost, lost
    return result
