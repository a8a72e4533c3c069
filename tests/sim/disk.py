"""What a simulated process does to its volume, and when: lanes with latency, faults at any operation.

Place: between `support/simdisk.py` (the bytes) and the shard. Promise: a process can die before, freeze before, or be
refused any single file operation, inside a batch too; the order of work in a lane is the order of its submission.
Must not be done here: choosing faults (`nemesis.py`).
"""

from __future__ import annotations

import contextvars
import errno
import os
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fleetlm_shard.lanes import Lanes
from tests.sim.loop import SimProcess
from tests.support.faults import Op, SimCrash
from tests.support.simdisk import Entry, Loss, Page, SimVolume, Unit

T = TypeVar("T")


DELAY_S_MAX = 2.5
"""What a piece of work may take on the worst of disks: what began before the healing is over soon after it."""


@dataclass
class Drive:
    """One shard's volume with its mood.

    Attributes:
        usual_latency_s: of a piece of work, when the disk is well.
        latency_s: of a piece of work now.
        prepare_s: what a segment's preparation takes beside that.
        round_s: what a round of the writer takes beside that.
        crash_in: operations until the process that does the last one dies.
        freeze_in: operations of the writer until it stands still inside a batch.
        freeze_writes_only: only before a write: what the batch holds is not even in the cache then.
        fail_sync_in: syncs until one fails.
        fail_writer_only: only syncs of batches count for that.
        power_in: operations until the machine loses its power.
        only: what counts for `crash_in` and `power_in`, if not every operation does.
        frozen: told which process stands still inside a batch.
        lose_power: what ends everything on the machine.
    """

    volume: SimVolume
    rng: random.Random
    usual_latency_s: float = 0.0008
    latency_s: float = 0.0008
    prepare_s: float = 0.0
    round_s: float = 0.0
    crash_in: int | None = None
    freeze_in: int | None = None
    freeze_writes_only: bool = False
    fail_sync_in: int | None = None
    fail_writer_only: bool = False
    writing: bool = False
    power_in: int | None = None
    only: frozenset[str] | None = None
    lose_power: Callable[[], None] = lambda: None
    frozen: Callable[[SimProcess], None] = lambda _: None
    processes: dict[str, SimProcess] = field(default_factory=dict[str, SimProcess])

    def __post_init__(self) -> None:
        """Watch every operation."""
        self.volume.hooks.append(self._on_op)

    def calm(self) -> None:
        """No fault is pending any more."""
        self.crash_in = self.freeze_in = self.fail_sync_in = self.power_in = self.only = None
        self.latency_s = self.usual_latency_s
        self.prepare_s = self.round_s = 0.0
        self.volume.capacity_bytes = 1 << 40

    def delay_s(self) -> float:
        """Of one piece of work."""
        delay_s = self.latency_s * (0.2 + self.rng.random() * 1.6) * (15 if self.rng.random() < 0.01 else 1)
        return min(delay_s, DELAY_S_MAX)

    def _on_op(self, op: Op) -> None:
        process = self.processes.get(op.process)
        if process is None:
            return
        if process.dead:
            raise SimCrash(f"{op.process} is dead")
        baton = _BATON.get(threading.get_ident())
        may_freeze = baton is not None and (op.name.startswith("pwrite") or not self.freeze_writes_only)
        if baton is not None and may_freeze and self._counted("freeze_in", process, op):
            baton.pause()
        if self.only is None or op.name in self.only:
            if self._counted("crash_in", process, op):
                process.kill()
            if self._counted("power_in", process, op):
                self.lose_power()
        if process.dead:
            raise SimCrash(f"{op.process} ended before {op.name} {op.path}")
        counts = op.name == "sync" and (self.writing or not self.fail_writer_only)
        if counts and self._counted("fail_sync_in", process, op):
            raise OSError(errno.EIO, os.strerror(errno.EIO), op.path)

    def _counted(
        self, what: Literal["crash_in", "freeze_in", "power_in", "fail_sync_in"], by: SimProcess, op: Op
    ) -> bool:
        """Count one down; whether this is the operation."""
        left: int | None = getattr(self, what)
        if left is None:
            return False
        setattr(self, what, left - 1 if left > 1 else None)
        if left <= 1:
            by.loop.trace.add(by.name, what.removesuffix("_in") + "_at", f"{op.name} {op.path}")
        return left <= 1

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
    """A piece of work on a thread of its own that runs only while the loop waits for it: one of both, ever.

    Args:
        work: what it does.
        context: whose it is: what the work starts in the loop belongs to its process.
    """

    def __init__(self, work: Callable[[], Any], context: contextvars.Context) -> None:
        self._work = work
        self._context = context
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
        """Go on after a stop; nothing to do for work that is over, or that calls this itself while it is killed."""
        if self.finished or _BATON.get(threading.get_ident()) is self:
            return
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """On the thread: stand still."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        _BATON[threading.get_ident()] = self
        try:
            self.result = self._context.run(self._work)
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
        late_s: what its work takes beside the disk's latency.
    """

    def __init__(
        self, process: SimProcess, drive: Drive, *, writer: bool = False, late_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._process = process
        self._drive = drive
        self._writer = writer
        self._late_s = late_s
        self._queue: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self._busy = False

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """See `Lane`."""
        self._queue.append((work, done))
        if not self._busy:
            self._busy = True
            self._process.call_later(self._drive.delay_s() + self._late_s(), self._run)

    def _run(self) -> None:
        work, done = self._queue.popleft()
        if self._writer and self._drive.freeze_in is not None:
            self._run_on_thread(work, done)
            return
        result: Any = None
        failed: BaseException | None = None
        self._drive.writing = self._writer
        try:
            result = work()
        except SimCrash:
            raise
        except BaseException as error:  # noqa: BLE001  the border of a thread
            failed = error
        finally:
            self._drive.writing = False
        self._answer(done, result, failed)

    def _answer(self, done: Callable[[Any, BaseException | None], None], result: Any, failed: Any) -> None:
        def tell() -> None:
            if self._queue:
                self._process.call_later(self._drive.delay_s() + self._late_s(), self._run)
            else:
                self._busy = False
            done(result, failed)

        self._process.call_later(self._drive.delay_s() / 8, tell)

    def _run_on_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        process = self._process
        baton = Baton(work, process.context.copy())

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
        process.on_kill.append(baton.resume)
        process.on_thaw.append(lambda: process.call_soon(go_on))
        process.freeze()
        self._drive.frozen(process)

    def close(self) -> None:
        """Nothing to end."""


def sim_lanes(process: SimProcess, drive: Drive) -> Lanes:
    """All lanes of one log."""
    return Lanes(
        writer=SimLane(process, drive, writer=True, late_s=lambda: drive.round_s),
        preparer=SimLane(process, drive, late_s=lambda: drive.prepare_s),
        background=SimLane(process, drive),
        readers=[SimLane(process, drive), SimLane(process, drive)],
        pause=lambda: None,
    )
