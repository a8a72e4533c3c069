"""An event loop whose time jumps, and the processes that live on it.

Place: under everything else of the simulator. A `SimProcess` is a context: every callback and task that is made in it
belongs to it, so that a kill drops all of them at once (no `finally` of the dead runs) and a freeze keeps them back.
Promise: the order of events is a function of the program and the seed: time moves only when nothing is ready, timers of
one moment run in the order in which they were set, nothing waits for the machine.
Must not be done here: files, networks, faults (`disk.py`, `network.py`, `nemesis.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal, NoReturn, TypeVar, cast

from tests.sim.trace import Trace
from tests.support.faults import SimCrash

T = TypeVar("T")
State = Literal["running", "frozen", "dead"]

EVENTS_MAX: Final = 3_000_000
"""Callbacks of one run: more is a loop that spins without letting time pass."""


class Stuck(Exception):
    """The run cannot go on: nothing is left that could ever happen, or too much happened."""


class SimProcess:
    """One life of one process; a restarted one is another `SimProcess`.

    Args:
        loop: where it lives.
        name: of this life, used once, for example `shard-0/3`.
    """

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.state: State = "running"
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        self.on_kill: list[Callable[[], None]] = []
        self.on_thaw: list[Callable[[], None]] = []
        self.signals: dict[int, Callable[[], object]] = {}
        self.exit_status: int | None = None
        self._kept: list[_Item] = []

    def __repr__(self) -> str:
        """As it stands in traces."""
        return f"<{self.name} {self.state}>"

    @property
    def dead(self) -> bool:
        """Whether this life has ended."""
        return self.state == "dead"

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run a coroutine as a task of this process."""
        task: asyncio.Task[T] = self.loop.create_task(work, name=name, context=self.context.copy())
        return task

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Run a callback in this process."""
        self.loop.call_soon(callback, *args, context=self.context)

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        """Run a callback in this process later."""
        return self.loop.call_later(delay_s, callback, *args, context=self.context)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        if self.state == "dead":
            return
        self.state = "dead"
        self._kept.clear()
        self.loop.trace.add(self.name, "killed")
        acts, self.on_kill, self.on_thaw = self.on_kill, [], []
        for act in acts:
            act()

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.state == "running":
            self.state = "frozen"
            self.loop.trace.add(self.name, "frozen")

    def thaw(self) -> None:
        """SIGCONT: everything that became due meanwhile is due now, in its order."""
        if self.state != "frozen":
            return
        self.state = "running"
        self.loop.trace.add(self.name, "thawed")
        kept, self._kept = self._kept, []
        for item in kept:
            self.loop.again(item)
        for act in self.on_thaw:
            act()

    def keep(self, item: _Item) -> None:
        """From the loop: this is due while the process stands still."""
        self._kept.append(item)

    def exit(self, status: int) -> NoReturn:
        """The process ends itself (`os._exit`): raises, so that not another line of it runs."""
        self.exit_status = status
        self.kill()
        raise SimCrash(f"{self.name} exited with {status}")


_CURRENT: Final[contextvars.ContextVar[SimProcess | None]] = contextvars.ContextVar("sim_process", default=None)


def current() -> SimProcess | None:
    """The process whose code is running; None: the world itself."""
    return _CURRENT.get()


class _Item:
    """A callback that is or will be due: what `asyncio.Handle` is elsewhere, and no more than is asked of it."""

    __slots__ = ("args", "callback", "context", "dropped", "process", "when_s")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, when_s: float
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = context.get(_CURRENT)
        self.dropped = False
        self.when_s = when_s

    def cancel(self) -> None:
        """See `asyncio.Handle`; what it would have called may be freed at once."""
        self.dropped = True
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        """See `asyncio.Handle`."""
        return self.dropped

    def when(self) -> float:
        """See `asyncio.TimerHandle`."""
        return self.when_s


def _nothing() -> None:
    """In the place of what was cancelled."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        trace: where deaths and freezes are written down.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.faults: list[str] = []
        self.events = 0
        self.graveyard: list[asyncio.Task[Any]] = []
        self.executor_delay: Callable[[], float] = lambda: 0.0
        self.open_connection: Callable[..., Coroutine[Any, Any, Any]] | None = None
        self.open_listener: Callable[..., Any] | None = None
        self._now_s = 1000.0
        self._due: deque[_Item] = deque()
        self._timers: list[tuple[float, int, _Item]] = []
        self._timer_count = 0
        self._halted = False

    # --- time and callbacks

    def time(self) -> float:
        """Simulated seconds."""
        return self._now_s

    def call_soon(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """See asyncio."""
        item = _Item(callback, args, contextvars.copy_context() if context is None else context, self._now_s)
        self._due.append(item)
        return cast("asyncio.Handle", item)

    def call_soon_threadsafe(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """There is one thread."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        item = _Item(callback, args, contextvars.copy_context() if context is None else context, when)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, item))
        return cast("asyncio.TimerHandle", item)

    def again(self, item: _Item) -> None:
        """Queue what was kept back."""
        self._due.append(item)

    def _run_once(self) -> None:
        """From `run_forever`: run what is due, let time jump, until the loop is told to stop."""
        due = self._due
        self._halted = False
        while not self._halted:
            self._gather()
            self.events += len(due)
            if self.events > EVENTS_MAX:
                raise Stuck(f"more than {EVENTS_MAX} events")
            for _ in range(len(due)):
                item = due.popleft()
                process = item.process
                if item.dropped:
                    continue
                if process is None or process.state == "running":
                    self._run_item(item)
                elif process.state == "frozen":
                    process.keep(item)

    def stop(self) -> None:
        """See asyncio."""
        self._halted = True
        super().stop()

    def _gather(self) -> None:
        """Timers whose time has come are due; time jumps when nothing else is."""
        due, timers = self._due, self._timers
        if not due:
            while timers and timers[0][2].dropped:
                heapq.heappop(timers)
            if not timers:
                raise Stuck("nothing is left that could happen")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            due.append(heapq.heappop(timers)[2])

    def _run_item(self, item: _Item) -> None:
        try:
            item.context.run(item.callback, *item.args)
        except (SystemExit, KeyboardInterrupt, Stuck):
            raise
        except SimCrash:
            if item.process is not None:
                item.process.kill()
        except BaseException as error:  # noqa: BLE001  as asyncio: a broken callback is reported and the loop goes on
            self.call_exception_handler({"message": f"callback {item.callback!r}", "exception": error})

    def set_exception_handler(self, handler: Any) -> None:
        """One loop serves many processes: what one of them wants done with its faults must not hide them here."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Anything that nobody handles is a defect of the product."""
        error = context.get("exception")
        process = current()
        if isinstance(error, SimCrash) or (process is not None and process.dead):
            return
        self.faults.append(f"{process.name if process else 'world'}: {context.get('message')}: {error!r}")
        self.trace.add("loop", "fault", self.faults[-1])

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes."""

    def _write_to_self(self) -> None:
        """There is nobody to wake."""

    def _process_events(self, event_list: Any) -> None:
        """There are no files."""

    # --- what processes use

    def create_task(self, coro: Any, **settings: Any) -> Any:
        """A task; kept alive until the end, so that no `finally` of a dead process runs when memory is collected."""
        task = super().create_task(coro, **settings)
        self.graveyard.append(task)
        if len(self.graveyard) % 4096 == 0:
            self._look_into_graves()
        return task

    def _look_into_graves(self) -> None:
        """Let go of tasks that are done; an exception that nobody has asked for is a fault."""
        for task in self.graveyard:
            if task.done() and task._log_traceback:
                error = task.exception()
                if not isinstance(error, SimCrash | Stuck):
                    self.faults.append(f"nobody asked how task {task.get_name()!r} ended: {error!r}")
        self.graveyard = [each for each in self.graveyard if not each.done()]

    def all_faults(self) -> list[str]:
        """At the end of a run: everything that nobody handled."""
        self._look_into_graves()
        return list(self.faults)

    def bury(self) -> None:
        """Nobody tells asyncio that the tasks which are left were killed on purpose."""
        for task in self.graveyard:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        self.graveyard.clear()

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """A piece of blocking work: done in one step, after a while."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except SimCrash:
                raise
            except BaseException as error:  # noqa: BLE001  the border of a thread
                self.call_later(self.executor_delay() / 4, tell, None, error)
            else:
                self.call_later(self.executor_delay() / 4, tell, result, None)

        def tell(outcome: T | None, failed: BaseException | None) -> None:
            if future.done():
                return
            if failed is not None:
                future.set_exception(failed)
            else:
                future.set_result(outcome)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

        self.call_later(self.executor_delay(), work)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        """Kept for the nemesis to call."""
        process = current()
        assert process is not None
        process.signals[sig] = lambda: self.call_soon(callback, *args, context=process.context)

    def remove_signal_handler(self, sig: int) -> bool:
        """See asyncio."""
        process = current()
        return process is not None and process.signals.pop(sig, None) is not None

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Over the simulated network."""
        assert self.open_connection is not None
        return await self.open_connection(protocol_factory, host, port)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Over the simulated network."""
        assert self.open_listener is not None
        return self.open_listener(protocol_factory, host, port)
