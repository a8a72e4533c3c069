"""Waiting for the world: a poll with a deadline, the only pause of the harness."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from tests.cluster.say import ClusterError

POLL_S: Final = 0.1


def until(
    what: str, holds: Callable[[], bool], *, timeout_s: float = 60.0, watch: Callable[[], None] | None = None
) -> float:
    """Returns the seconds that passed until `holds()`; an error of it counts as no.

    Args:
        what: a sentence for the error.
        holds: asked again and again, so it must be cheap and change nothing.
        timeout_s: after it, the error.
        watch: called before each question; raises to end the wait early (a process that has died will never be ready).

    Raises:
        ClusterError: the deadline passed; carries the last error that `holds` raised.
    """
    began_s = time.monotonic()
    never = threading.Event()
    last: Exception | None = None
    while time.monotonic() - began_s < timeout_s:
        if watch is not None:
            watch()
        try:
            if holds():
                return time.monotonic() - began_s
        except (ClusterError, OSError, ValueError, KeyError) as error:
            last = error
        never.wait(POLL_S)
    raise ClusterError(f"{what}: not within {timeout_s:.0f} s" + (f"; last: {last}" if last else ""))
