"""A process that could not get memory ends at once.

An allocation may fail between any two lines: between taking a batch out of a queue and writing it, between a seq and
its record. No code can be written against that. What was acknowledged is on disk; the rest is asked again.

Promise: a `MemoryError` that reaches the event loop ends the process there, with its trace and without a further word
to anybody, before the next callback could build on what is half done. Must not be done here: handling other errors.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def end_when_out_of_memory(
    loop: asyncio.AbstractEventLoop, *, status: int, end: Callable[[int], Any] = os._exit
) -> None:
    """Install it.

    Args:
        loop: the process's.
        status: exit status.
        end: ends the process; does not return.
    """

    def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fatal = isinstance(context.get("exception"), MemoryError)
        with suppress(MemoryError):
            loop.default_exception_handler(context)
            sys.stderr.flush()
        if fatal:
            end(status)

    loop.set_exception_handler(on_error)
