"""Keeps processes running: starts them, sees when they are ready, starts them again, stops them in order.

Promise: a child that dies is started again (at once after it was ready, with growing pauses while it was not); five
deaths in a row before ready, or a refused configuration, end everything with `GaveUp`. Children may come (`add`) and go
(`remove`) meanwhile. `stop` ends children stage by stage, each with SIGTERM and all the time that it may take, then
SIGKILL. When `run` returns, no child is left.
Must not be done here: knowing what the children are (`children.py`), or talking to people (`say` does).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import aiohttp
import msgspec

from fleetlm_cli.childlog import ChildLog

DEATHS_MAX: Final = 5
"""Deaths in a row before ready: what is wrong will not go away by itself (design §10)."""
RESTART_S: Final = 0.05
"""Pause before a child that was ready is started again: clients wait for it."""
BACKOFF_FIRST_S: Final = 0.25
BACKOFF_MAX_S: Final = 5.0
"""After a death before ready, doubled with each: five deaths take some seconds, which a lingering port may need."""
READY_POLL_S: Final = 0.05
"""While a child starts."""
WATCH_POLL_S: Final = 1.0
"""While a child is ready: to tell people when it is not any more."""
LOG_POLL_S: Final = 0.25
"""How late a child's warning may reach the terminal."""
PROBE_TIMEOUT_S: Final = 2.0
"""One question for readiness."""
PATIENCE_S: Final = 5.0
"""A child that starts and is not ready for so long is worth a word, with its own reason."""
LAPSE_S: Final = 1.0
"""The same for one that was ready: one that is dying does not answer for a moment, and its end is told anyway."""
EXIT_CONFIG: Final = 78
"""A component's status for a configuration that it refuses: trying again cannot help."""

_WRAPPER: Final = Path(__file__).with_name("child.py")
_TIE: Final[Literal["signal", "pipe"]] = "signal" if sys.platform == "linux" else "pipe"


class GaveUp(Exception):
    """A child keeps dying, or refuses its configuration.

    Args:
        child: its name.
        status: its last exit status (negative: the signal).
        deaths: how often in a row it died before ready.
        last_lines: the end of its log.
    """

    def __init__(self, child: str, *, status: int, deaths: int, last_lines: list[str]) -> None:
        super().__init__(f"{child} ended with status {status}")
        self.child = child
        self.status = status
        self.deaths = deaths
        self.last_lines = last_lines


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run.

    `arguments` are the interpreter's (`-m`, module). `ops_url` answers `/health/ready`. Children of a lower `stage` are
    stopped first, and get `stop_s` seconds between SIGTERM and SIGKILL.
    """

    name: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    ops_url: str
    stage: int
    stop_s: float


@dataclass(slots=True)
class _Child:
    """What is known of a running child."""

    spec: ChildSpec
    log: ChildLog
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    was_ready: bool = False
    deaths: int = 0
    told: str = ""
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    """It is not to be started again."""


class _Answer(msgspec.Struct):
    """What `/health/ready` says."""

    ok: bool
    reason: str
    message: str = ""


class Supervisor:
    """Runs children until told to stop.

    Args:
        specs: what to run.
        log_folder: where each child's log goes; it exists.
        say: a line for people.
        on_change: called after each start of a child and when all are ready for the first time (`all_ready`).
        tie: how children learn that this process died (`child.py`).
    """

    def __init__(
        self,
        specs: list[ChildSpec],
        *,
        log_folder: Path,
        say: Callable[[str], None],
        on_change: Callable[[], None],
        tie: Literal["signal", "pipe"] = _TIE,
    ) -> None:
        self._log_folder = log_folder
        self._by_name = {spec.name: self._child(spec) for spec in specs}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._gave_up = asyncio.Event()
        self._say = say
        self._on_change = on_change
        self._tie = tie
        self._stopping = asyncio.Event()
        self.all_ready = False

    @property
    def _children(self) -> list[_Child]:
        return list(self._by_name.values())

    def _child(self, spec: ChildSpec) -> _Child:
        return _Child(spec, ChildLog(self._log_folder / f"{spec.name}.log"))

    @property
    def stopping(self) -> bool:
        """Whether all children are being stopped."""
        return self._stopping.is_set()

    def names(self) -> set[str]:
        """Every child, also one that is being stopped."""
        return set(self._by_name)

    def add(self, spec: ChildSpec) -> None:
        """One more child, while `run` runs; its name is free."""
        assert spec.name not in self._by_name, spec.name
        if not self._stopping.is_set():
            child = self._by_name[spec.name] = self._child(spec)
            child.log.skip_old()
            self._launch(child)

    async def remove(self, name: str) -> None:
        """Stop a child for good, as `run` does at the end. Cancelled, the child still ends, with `run`."""
        child = self._by_name[name]
        child.ending.set()
        await self._stop(child)
        await asyncio.wait({self._keepers[name]})
        if not self._stopping.is_set():
            del self._by_name[name], self._keepers[name]
            self._on_change()

    def pids(self) -> dict[str, int]:
        """The pid of each child that was started, by name."""
        return {child.spec.name: child.process.pid for child in self._children if child.process is not None}

    def ready(self) -> set[str]:
        """The names of the children that called themselves ready when last asked, and live."""
        return {child.spec.name for child in self._children if child.ready}

    async def run(self, stop: asyncio.Event) -> bool:
        """Supervise until `stop` is set, then stop all children.

        Must not be cancelled, except to end all children at once (they get SIGKILL).

        Returns:
            True if every child ended by itself in its time.

        Raises:
            GaveUp: a child keeps dying or refuses its configuration; the others have been stopped.
        """
        for child in self._children:
            child.log.skip_old()
        logs = asyncio.create_task(self._follow_logs())
        for child in self._children:
            self._launch(child)
        ends = [asyncio.create_task(event.wait()) for event in (stop, self._gave_up)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            in_time = await self._stop_all()
            await asyncio.wait(self._keepers.values())
        finally:
            self._kill_all()
            tasks = (logs, *ends, *self._keepers.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._reap()
            self._tell_news()
        for keeper in self._keepers.values():
            keeper.result()
        return in_time

    def _launch(self, child: _Child) -> None:
        keeper = self._keepers[child.spec.name] = asyncio.create_task(self._keep(child))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self._gave_up.set()

        keeper.add_done_callback(ended)

    async def _keep(self, child: _Child) -> None:
        """Start a child again and again until it is to stop."""
        while not child.ending.is_set():
            child.ready = child.was_ready = False
            process = child.process = await self._start(child)
            if child.ending.is_set():  # `_stop_all` has not seen this one, and it has done nothing yet
                process.kill()
                await process.wait()
                return
            self._on_change()
            probe = asyncio.create_task(self._probe(child))
            try:
                status = await process.wait()
            finally:
                probe.cancel()
                await asyncio.gather(probe, return_exceptions=True)
            child.ready = False
            if child.ending.is_set():
                return
            self._count(child, status)
            with suppress(TimeoutError):
                async with asyncio.timeout(_backoff_s(child.deaths)):
                    await child.ending.wait()

    def _count(self, child: _Child, status: int) -> None:
        """Reaching ready forgives every death before it."""
        child.deaths = 0 if child.was_ready else child.deaths + 1
        if status == EXIT_CONFIG or child.deaths >= DEATHS_MAX:
            raise GaveUp(child.spec.name, status=status, deaths=child.deaths, last_lines=child.log.last_lines())
        self._say(f"{child.spec.name} ended ({status_text(status)}); starting it again")

    async def _start(self, child: _Child) -> asyncio.subprocess.Process:
        """One more process for a child.

        In a session of its own, so that Ctrl-C on the terminal reaches `up` only, which knows the order. From the
        thread of the event loop, which must be the main one: the kernel ties a child to the *thread* that made it.
        """
        # The wrapper needs no site-packages in `signal` mode, which makes it quick; in `pipe` mode it stays.
        flags = ("-I", "-S") if self._tie == "signal" else ("-P",)
        arguments = (*flags, str(_WRAPPER), self._tie, str(os.getpid()), *child.spec.arguments)
        log = child.log.open()
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL if self._tie == "signal" else asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(child.spec.env),
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _probe(self, child: _Child) -> None:
        """Ask a child whether it is ready, for as long as it lives; tell people when that changes."""
        loop = asyncio.get_running_loop()
        ready_s = loop.time()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)) as http:
            while True:
                answer = await _ask(http, child.spec.ops_url)
                child.ready = answer.ok
                if answer.ok:
                    child.was_ready = True
                    ready_s = loop.time()
                    self._look_whether_all_ready()
                if answer.ok or loop.time() - ready_s > (LAPSE_S if child.was_ready else PATIENCE_S):
                    self._tell(child, answer)
                await asyncio.sleep(WATCH_POLL_S if answer.ok else READY_POLL_S)

    def _tell(self, child: _Child, answer: _Answer) -> None:
        """A change of readiness in one line; ready at first start is no news."""
        text = "ready" if answer.ok else f"not ready: {answer.reason}{': ' * bool(answer.message)}{answer.message}"
        known = child.told or "ready"
        child.told = text
        if text != known:
            self._say(f"{child.spec.name} is {text}")

    def _look_whether_all_ready(self) -> None:
        if not self.all_ready and all(child.ready for child in self._children):
            self.all_ready = True
            self._on_change()

    async def _follow_logs(self) -> None:
        """Bring what children complain of to the terminal, and keep their logs short."""
        while True:
            await asyncio.sleep(LOG_POLL_S)
            self._tell_news()

    def _tell_news(self) -> None:
        for child in self._children:
            with suppress(OSError):  # a full or lost disk is told by the children's readiness
                for line in child.log.news():
                    self._say(f"{child.spec.name} | {line}")
                child.log.bound()

    async def _stop_all(self) -> bool:
        """Stage by stage: those who send work first, those who keep it last."""
        self._end_all()
        in_time = True
        for stage in sorted({child.spec.stage for child in self._children}):
            children = [child for child in self._children if child.spec.stage == stage]
            in_time &= all(await asyncio.gather(*(self._stop(child) for child in children)))
        return in_time

    async def _stop(self, child: _Child) -> bool:
        """SIGTERM, wait, SIGKILL."""
        process = child.process
        if process is None or process.returncode is not None:
            return True
        process.terminate()
        try:
            async with asyncio.timeout(child.spec.stop_s):
                await process.wait()
        except TimeoutError:
            self._say(f"{child.spec.name} did not end within {child.spec.stop_s:g} s; killing it")
            process.kill()
            await process.wait()
            return False
        return True

    def _end_all(self) -> None:
        self._stopping.set()
        for child in self._children:
            child.ending.set()

    def _kill_all(self) -> None:
        self._end_all()
        for child in self._children:
            if child.process is not None and child.process.returncode is None:
                with suppress(ProcessLookupError):
                    child.process.kill()

    async def _reap(self) -> None:
        for child in self._children:
            if child.process is not None:
                await child.process.wait()


def _backoff_s(deaths: int) -> float:
    """Pause before the next start."""
    return min(BACKOFF_FIRST_S * 2.0 ** (deaths - 1), BACKOFF_MAX_S) if deaths else RESTART_S


def status_text(status: int) -> str:
    """An exit status in words."""
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


async def _ask(http: aiohttp.ClientSession, ops_url: str) -> _Answer:
    """One question; no answer is an answer."""
    try:
        async with http.get(f"{ops_url}/health/ready") as answer:
            return msgspec.json.decode(await answer.read(), type=_Answer)
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
        return _Answer(ok=False, reason="NoAnswer", message="its operations port does not answer")
