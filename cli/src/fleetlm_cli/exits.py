"""Exit statuses of the command `fleetlm`, and the one way in which a command fails.

Promise: scripts can rely on these numbers; docs/cli.md lists them. A command that cannot do its work raises `Failure`;
`main` alone turns it into words on standard error and a status. Must not be done here: printing.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What a status means."""

    DONE = 0
    """It was done."""
    FAILED = 1
    """It was not done, for a reason of its own; standard error says which."""
    USAGE = 2
    """The command line is wrong, or asks for what this ring cannot be; nothing was done."""
    NOT_RUNNING = 3
    """Nothing runs there, or it cannot be reached."""
    REFUSED = 4
    """The system refused: was not and will not be done (`INVALID`, `CONFLICT`, …)."""
    TRY_AGAIN = 5
    """Not now; whether it was done is unknown: try again with the same key."""
    DAMAGED = 6
    """`verify` found damage, or a reader met a gap and was asked to fail on it."""
    CONFIG = 78
    """A process that `up` starts refused its configuration (EX_CONFIG)."""
    INTERRUPTED = 130
    """Ended at once by a second Ctrl-C."""


class Failure(Exception):
    """A command cannot do its work.

    Args:
        message: for people: what is wrong and what to do next.
        status: for scripts.
    """

    def __init__(self, message: str, *, status: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
