"""Threads of the log, as lanes: each does one thing after the other and answers in the event loop.

    writer      batches, syncs, looks: what acknowledgements wait for, and nothing else; where the kernel syncs without
                a thread (`syncs`), new segments only
    preparer    zero-fills the next segment
    background  indexes, checkpoints, deletions
    readers     messages read back

Promise: `done` is called in the loop, once, in the order of the submissions to that lane. Simulations use `InlineLane`.
Must not be done here: anything about the log.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from fleetlm_shard.kernelsync import open_kernel_sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetlm_shard.disk import File

T = TypeVar("T")
Synced = Callable[[BaseException | None], None]
"""What a sync said: nothing, or its error."""

SLICE_S: Final = 0.0005
"""Longest that background work holds the interpreter: the loop would wait for the switch interval (5 ms) otherwise."""
PAUSE_S: Final = 0.0005
"""How long it then leaves it alone."""


class Lane(Protocol):
    """Does pieces of work one after the other."""

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Do `work`, then call `done(result, None)` or `done(None, error)` in the loop."""
        ...

    def close(self) -> None:
        """Take nothing more; what was submitted is still done."""
        ...


class Syncs(Protocol):
    """Syncs files, one at a time, without a lane."""

    def start(self, file: File, done: Synced) -> bool:
        """Begin; `done` is called in the loop. False: nothing was begun, a lane must do it."""
        ...

    def close(self) -> None:
        """End; a sync that is under way is waited for, blocking, and said."""
        ...


class ThreadLane:
    """`Lane` with a thread of its own.

    Args:
        loop: where `done` is called.
        name: of the thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            item()

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Hand the work to the thread."""

        def item() -> None:
            result: T | None = None
            failed: BaseException | None = None
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  the border of a thread: nothing may be swallowed by it
                failed = error
            try:
                self._loop.call_soon_threadsafe(done, result, failed)
            except RuntimeError:
                # The loop is closed: nobody waits any more.
                return

        self._queue.put(item)

    def close(self) -> None:
        """End the thread after what is queued, and wait for it."""
        self._queue.put(None)
        self._thread.join()


class InlineLane:
    """`Lane` without a thread: the work runs in the loop, in a callback of its own. For simulations."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Queue the work as a callback."""

        def item() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  as in a thread
                self._loop.call_soon(done, None, error)
                return
            self._loop.call_soon(done, result, None)

        self._loop.call_soon(item)

    def close(self) -> None:
        """Nothing to end."""


class InlineSyncs:
    """`Syncs` in a callback of the loop. For simulations."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def start(self, file: File, done: Synced) -> bool:
        """Queue it as a callback."""

        def sync() -> None:
            try:
                file.sync()
            except BaseException as error:  # noqa: BLE001  as in a thread
                self._loop.call_soon(done, error)
                return
            self._loop.call_soon(done, None)

        self._loop.call_soon(sync)
        return True

    def close(self) -> None:
        """Nothing to end."""


def run_on(lane: Lane, work: Callable[[], T], loop: asyncio.AbstractEventLoop) -> asyncio.Future[T]:
    """Do `work` on the lane; the future may be cancelled, the work is done all the same."""
    future: asyncio.Future[T] = loop.create_future()

    def done(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  None is T's own

    lane.submit(work, done)
    return future


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """All lanes of one log. `pause` is called between small pieces of background work; it sleeps when it is time to."""

    writer: Lane
    preparer: Lane
    background: Lane
    readers: Sequence[Lane]
    pause: Callable[[], None]
    syncs: Syncs | None = None

    def all(self) -> list[Lane]:
        """Every lane."""
        return [self.writer, self.preparer, self.background, *self.readers]

    def close(self) -> None:
        """End all; blocks until their queues are done."""
        for lane in self.all():
            lane.close()
        if self.syncs is not None:
            self.syncs.close()


class _Pacer(threading.local):
    """`pause` for threads: each has its own slice of time."""

    def __init__(self) -> None:
        super().__init__()
        self._until_s = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._until_s:
            time.sleep(PAUSE_S)
            self._until_s = time.monotonic() + SLICE_S


def thread_lanes(loop: asyncio.AbstractEventLoop, *, readers: int) -> Lanes:
    """Lanes with threads, and syncs by the kernel where it does them."""
    return Lanes(
        writer=ThreadLane(loop, "log-writer"),
        preparer=ThreadLane(loop, "log-preparer"),
        background=ThreadLane(loop, "log-background"),
        readers=[ThreadLane(loop, f"log-reader-{number}") for number in range(readers)],
        pause=_Pacer(),
        syncs=open_kernel_sync(loop),
    )


def inline_lanes(loop: asyncio.AbstractEventLoop) -> Lanes:
    """Lanes without threads, deterministic."""
    lane = InlineLane(loop)
    return Lanes(
        writer=lane, preparer=lane, background=lane, readers=[lane], pause=lambda: None, syncs=InlineSyncs(loop)
    )
