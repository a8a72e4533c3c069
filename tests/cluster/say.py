"""What the harness prints, and the one error that it raises.

Every step that may take more than a moment prints its name when it begins and its time when it ends, so that a person
who waits sees what for, and the log of a run that hung ends with the step that hung.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class ClusterError(RuntimeError):
    """The cluster cannot be made, changed or stopped; the text says what failed, in the failing program's words."""


def say(text: str) -> None:
    """Prints one line at once, so that a pipe's reader sees it when it happens."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Step:
    """Times one step: `with Step("build etcd"): …` prints the name now and the seconds at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began_s = 0.0

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        say(f"{self._name} …")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = "done" if kind is None else "FAILED"
        say(f"{self._name}: {state} in {time.monotonic() - self._began_s:.1f} s")
