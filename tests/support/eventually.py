"""Waiting in tests: for a condition, with a deadline, never for a time.

Promise: returns as soon as it holds, fails with words when it does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

POLL_S = 0.005


async def eventually(holds: Callable[[], bool], what: str, *, timeout_s: float = 10.0) -> None:
    """Wait until `holds()`.

    Raises:
        AssertionError: not within `timeout_s`; says `what`.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        if holds():
            return
        assert asyncio.get_running_loop().time() < end_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


async def poll(holds: Callable[[], bool], *, every_s: float = POLL_S) -> None:
    """Wait until `holds()`, for ever: for loads whose run has a deadline of its own."""
    while True:
        if holds():
            return
        await asyncio.sleep(every_s)
