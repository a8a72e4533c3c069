"""Faults at chosen file operations of a simulated volume: death, errors, freezes, as hooks.

Place: beside `simdisk.py`, which calls each hook before each operation. Promise: a hook counts on its own, so the same
script stops at the same operation each time. Must not be done here: state of the volume.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


class SimCrash(BaseException):
    """The process dies here. Not an `Exception`: no handler of the product may survive its own death."""


@dataclass(frozen=True, slots=True)
class Op:
    """One file operation about to happen; `number` counts the volume's from 1, a link's `path` is its target."""

    number: int
    process: str
    name: str
    path: str


Hook = Callable[[Op], None]
"""Called before each operation, outside the volume's own lock: it may raise `SimCrash` or `OSError`, or block."""


def crash_at(number: int, *, process: str | None = None, only: Collection[str] = ()) -> Hook:
    """A hook: the process dies before its `number`-th operation (of the named kinds, of the named process)."""

    def die(op: Op) -> None:
        raise SimCrash(f"killed before {op.name} {op.path}")

    return _at(number, die, process=process, only=only)


def fail_at(
    number: int,
    code: int,
    *,
    process: str | None = None,
    only: Collection[str] = (),
    path: str = "",
    then: Literal["once", "always"] = "once",
) -> Hook:
    """A hook: the `number`-th operation fails with errno `code` (of those kinds, on paths that contain `path`)."""

    def fail(op: Op) -> None:
        raise OSError(code, os.strerror(code), op.path)

    return _at(number, fail, process=process, only=only, path=path, then=then)


def _at(
    number: int,
    act: Hook,
    *,
    process: str | None,
    only: Collection[str],
    path: str = "",
    then: Literal["once", "always"] = "once",
) -> Hook:
    seen = 0

    def hook(op: Op) -> None:
        nonlocal seen
        if (process is not None and op.process != process) or (only and op.name not in only) or path not in op.path:
            return
        seen += 1
        if seen == number or (then == "always" and seen > number):
            act(op)

    return hook


class Freeze:
    """A hook that holds a process (a thread) before its `number`-th operation: SIGSTOP, until `thaw`.

    The test waits for `frozen` (a `threading.Event`), does what the younger one does, and thaws.
    """

    def __init__(
        self, number: int, *, process: str | None = None, only: Collection[str] = (), deadline_s: float = 30.0
    ) -> None:
        self.frozen = threading.Event()
        self._thawed = threading.Event()
        self._deadline_s = deadline_s
        self._hook = _at(number, self._hold, process=process, only=only)

    def __call__(self, op: Op) -> None:
        self._hook(op)

    def _hold(self, op: Op) -> None:
        self.frozen.set()
        if not self._thawed.wait(self._deadline_s):
            raise AssertionError(f"nobody thawed {op.process} before {op.name} {op.path}")

    def thaw(self) -> None:
        """SIGCONT."""
        self._thawed.set()


@contextmanager
def quiet_crashes() -> Generator[None]:
    """Threads that end by `SimCrash` end without a word; every other exception is reported as ever."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SimCrash):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
