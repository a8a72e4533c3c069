"""What a simulated process does to its volume, and when: lanes with latency, faults at any operation.

Place: between `support/simdisk.py` (the bytes) and the shard. Promise: a process can die before, freeze before, or be
refused any single file operation, inside a batch too; the order of work in a lane is the order of its submission.
Must not be done here: choosing faults (`nemesis.py`).
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fleetlm_shard.lanes import Lanes
from tests.sim.loop import SimProcess
from tests.support.faults import Op, SimCrash
from tests.support.simdisk import Entry, Loss, Page, SimVolume, Unit

T = TypeVar("T")


@dataclass
class Drive:
    """One shard's volume with its mood.

    Attributes:
        latency_s: of a piece of work.
        crash_in: operations until the process that does the last one dies.
        freeze_in: operations of the writer until it stands still inside a batch.
        fail_sync_in: syncs until one fails.
    """

    volume: SimVolume
    rng: random.Random
    latency_s: float = 0.0008
    crash_in: int | None = None
    freeze_in: int | None = None
    fail_sync_in: int | None = None
    frozen: Callable[[SimProcess], None] = lambda _: None
    processes: dict[str, SimProcess] = field(default_factory=dict[str, SimProcess])

    def __post_init__(self) -> None:
        """Watch every operation."""
        self.volume.hooks.append(self._on_op)

    def delay_s(self) -> float:
        """Of one piece of work."""
        return self.latency_s * (0.2 + self.rng.random() * 1.6) * (15 if self.rng.random() < 0.01 else 1)

    def _on_op(self, op: Op) -> None:
        process = self.processes.get(op.process)
        if process is None:
            return
        if process.dead:
            raise SimCrash(f"{op.process} is dead")
        baton = _BATON.get(threading.get_ident())
        if self.freeze_in is not None and baton is not None:
            self.freeze_in -= 1
            if self.freeze_in <= 0:
                self.freeze_in = None
                process.loop.trace.add(process.name, "freeze_at", f"{op.name} {op.path}")
                baton.pause()
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.crash_in = None
                process.loop.trace.add(process.name, "crash_at", f"{op.name} {op.path}")
                process.kill()
                raise SimCrash(f"{op.process} killed before {op.name} {op.path}")
        if op.name == "sync" and self.fail_sync_in is not None:
            self.fail_sync_in -= 1
            if self.fail_sync_in <= 0:
                self.fail_sync_in = None
                process.loop.trace.add(process.name, "sync_fails", op.path)
                raise OSError(errno.EIO, os.strerror(errno.EIO), op.path)

    def random_loss(self) -> Loss:
        """What a power loss may leave."""
        rng, units = self.rng, self.volume.unsynced()
        share = rng.choice((0.0, 0.5, 0.9, 1.0))
        kept: list[Unit] = [unit for unit in units if rng.random() < share]
        if rng.random() < 0.2:
            kind = rng.choice((Page, Entry))
            kept = [unit for unit in units if type(unit) is kind]
        return Loss("random", frozenset(kept), rng.choice(("whole", "whole", "head", "tail")))


_BATON: dict[int, Baton] = {}


class Baton:
    """A piece of work on a thread of its own that runs only while the loop waits for it: one of both, ever."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self.finished = False
        self.result: Any = None
        self.failed: BaseException | None = None

    def start(self) -> None:
        """Run until it is done or stands still."""
        threading.Thread(target=self._run, daemon=True).start()
        self._back.acquire()

    def resume(self) -> None:
        """Go on after a stop."""
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """On the thread: stand still."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        _BATON[threading.get_ident()] = self
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001  the border of a thread
            self.failed = error
        finally:
            del _BATON[threading.get_ident()]
            self.finished = True
            self._back.release()


class SimLane:
    """`Lane` with latency.

    Args:
        process: whose work it is.
        drive: how quick the disk is.
        writer: whether the process may freeze in the middle of its work.
    """

    def __init__(self, process: SimProcess, drive: Drive, *, writer: bool = False) -> None:
        self._process = process
        self._drive = drive
        self._writer = writer
        self._queue: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self._busy = False

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """See `Lane`."""
        self._queue.append((work, done))
        if not self._busy:
            self._busy = True
            self._process.call_later(self._drive.delay_s(), self._run)

    def _run(self) -> None:
        work, done = self._queue.popleft()
        if self._writer and self._drive.freeze_in is not None:
            self._run_on_thread(work, done)
            return
        result: Any = None
        failed: BaseException | None = None
        try:
            result = work()
        except SimCrash:
            raise
        except BaseException as error:  # noqa: BLE001  the border of a thread
            failed = error
        self._answer(done, result, failed)

    def _answer(self, done: Callable[[Any, BaseException | None], None], result: Any, failed: Any) -> None:
        def tell() -> None:
            if self._queue:
                self._process.call_later(self._drive.delay_s(), self._run)
            else:
                self._busy = False
            done(result, failed)

        self._process.call_later(self._drive.delay_s() / 8, tell)

    def _run_on_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        baton, process = Baton(work), self._process

        def ended() -> None:
            if not process.dead and not isinstance(baton.failed, SimCrash):
                self._answer(done, baton.result, baton.failed)

        def go_on() -> None:
            if not baton.finished:
                baton.resume()
                ended()

        baton.start()
        if baton.finished:
            if isinstance(baton.failed, SimCrash):
                raise baton.failed
            ended()
            return
        # Killed while it stands still: the thread wakes, finds itself dead at its next operation, and ends.
        process.on_kill.append(lambda: None if baton.finished else baton.resume())
        process.on_thaw.append(lambda: process.call_soon(go_on))
        process.freeze()
        self._drive.frozen(process)

    def close(self) -> None:
        """Nothing to end."""


def sim_lanes(process: SimProcess, drive: Drive) -> Lanes:
    """All lanes of one log."""
    return Lanes(
        writer=SimLane(process, drive, writer=True),
        preparer=SimLane(process, drive),
        background=SimLane(process, drive),
        readers=[SimLane(process, drive), SimLane(process, drive)],
        pause=lambda: None,
    )
