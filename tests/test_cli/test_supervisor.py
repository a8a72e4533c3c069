"""Supervision of real processes: started again, given up in time, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from fleetlm_cli import ports
from fleetlm_cli.supervisor import ChildSpec, GaveUp, Supervisor
from tests.support import fakechild

FAKE = Path(fakechild.__file__)
ENTROPY = random.Random()


class Stage:
    """Fake children and what became of them.

    Args:
        folder: for journal, manners and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.changes = 0
        self.stop = asyncio.Event()
        self.specs: list[ChildSpec] = []
        self.supervisor: Supervisor | None = None

    def add(self, name: str, *manners: str, stage: int = 0, stop_s: float = 10.0) -> None:
        self.behave(name, *manners)
        port = ports.choose([name], chosen={}, remembered={}, entropy=ENTROPY)[name]
        fake = {"NAME": name, "PORT": str(port), "JOURNAL": str(self.journal), "MANNERS": str(self.manners(name))}
        env = {**os.environ, **{f"FAKE_{key}": value for key, value in fake.items()}}
        self.specs.append(ChildSpec(name, (str(FAKE),), env, f"http://127.0.0.1:{port}", stage, stop_s))

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def manners(self, name: str) -> Path:
        return self.folder / f"{name}.manners"

    def behave(self, name: str, *manners: str) -> None:
        """How the next start of a child behaves."""
        self.manners(name).write_text(" ".join(manners))

    def events(self, *names: str) -> list[str]:
        """`NAME EVENT` in the order in which they happened."""
        if not self.journal.exists():
            return []
        lines = (line.split() for line in self.journal.read_text().splitlines())
        return [f"{name} {event}" for name, event, _ in lines if not names or name in names]

    def pids(self) -> set[int]:
        """Of every process that ever started."""
        return {int(line.split()[2]) for line in self.journal.read_text().splitlines()}

    def started(self, *, tie: Literal["signal", "pipe"] = "signal") -> Supervisor:
        self.supervisor = Supervisor(
            self.specs, log_folder=self.folder, say=self.said.append, on_change=self.changed, tie=tie
        )
        return self.supervisor

    def changed(self) -> None:
        self.changes += 1

    def ready(self, name: str) -> bool:
        assert self.supervisor is not None
        return name in self.supervisor.ready()

    def pid(self, name: str) -> int:
        assert self.supervisor is not None
        return self.supervisor.pids()[name]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # other processes have no event for us
            await asyncio.sleep(0.01)


@asynccontextmanager
async def ready(stage: Stage, *, tie: Literal["signal", "pipe"] = "signal") -> AsyncGenerator[asyncio.Task[bool]]:
    """A supervisor whose children are all ready; stopped at the end if it still runs."""
    supervisor = stage.started(tie=tie)
    work = asyncio.create_task(supervisor.run(stage.stop))
    try:
        await until(lambda: supervisor.all_ready or work.done())
        yield work
    finally:
        stage.stop.set()
        await asyncio.gather(work, return_exceptions=True)
    assert not any(psutil.pid_exists(pid) for pid in stage.pids())


async def test_a_stop_goes_from_those_who_send_to_those_who_keep(stage: Stage) -> None:
    """Every gateway has ended before the first shard is told, every shard before the controller."""
    stage.add("controller", stage=2)
    stage.add("shard-0", "slow", stage=1)
    stage.add("shard-1", stage=1)
    stage.add("gateway-0", "slow", stage=0)
    async with ready(stage) as work:
        stage.stop.set()
        assert await work
    ends = [event for event in stage.events() if not event.endswith("start")]
    assert ends[:2] == ["gateway-0 term", "gateway-0 end"]
    assert set(ends[2:6]) == {"shard-0 term", "shard-0 end", "shard-1 term", "shard-1 end"}
    assert ends[6:] == ["controller term", "controller end"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
async def test_a_child_that_dies_is_started_again(stage: Stage, number: signal.Signals) -> None:
    """Again and again after it was ready, more often than five times; whoever listens to changes learns the new pid."""
    stage.add("shard-0")
    async with ready(stage):
        for _ in range(7):
            old, changes = stage.pid("shard-0"), stage.changes
            os.kill(old, number)
            await until(lambda old=old: stage.pid("shard-0") != old)  # type: ignore[misc]
            assert stage.changes > changes
            await until(lambda: stage.ready("shard-0"))
    assert stage.events().count("shard-0 start") == 8


async def test_five_deaths_before_ready_end_everything(stage: Stage) -> None:
    """What is wrong will not go away: the others are stopped in order, the last words are kept."""
    stage.add("gateway-0", stage=0)
    stage.add("shard-0", "die", stage=1)
    work = asyncio.create_task(stage.started().run(stage.stop))
    with pytest.raises(GaveUp) as caught:
        await work
    assert (caught.value.child, caught.value.status, caught.value.deaths) == ("shard-0", 7, 5)
    assert caught.value.last_lines == ["I die because of the test"]
    assert stage.events("shard-0") == ["shard-0 start"] * 5
    assert stage.events("gateway-0") == ["gateway-0 start", "gateway-0 term", "gateway-0 end"]
    assert stage.said.count("shard-0 ended (status 7); starting it again") == 4


async def test_reaching_ready_forgives_the_deaths_before(stage: Stage) -> None:
    """Four deaths, ready, four deaths, ready: still supervised."""
    stage.add("shard-0", "die")
    work = asyncio.create_task(stage.started().run(stage.stop))
    for round_number in (1, 2):
        await until(lambda n=round_number: stage.events().count("shard-0 start") >= 5 * n - 2)  # type: ignore[misc]
        stage.behave("shard-0")
        await until(lambda: stage.ready("shard-0"))
        stage.behave("shard-0", "die")
        if round_number == 1:
            os.kill(stage.pid("shard-0"), signal.SIGKILL)
    assert not work.done()
    stage.stop.set()
    assert await work


async def test_a_refused_configuration_ends_everything_at_once(stage: Stage) -> None:
    """Status 78 is not tried again."""
    stage.add("shard-0", "refuse")
    with pytest.raises(GaveUp) as caught:
        await stage.started().run(stage.stop)
    assert (caught.value.status, caught.value.deaths) == (78, 1)
    assert stage.events() == ["shard-0 start"]


async def test_a_child_that_does_not_end_is_killed(stage: Stage) -> None:
    """SIGTERM, its time, SIGKILL; and the stop was not a clean one."""
    stage.add("shard-0", "deaf", stop_s=0.3)
    async with ready(stage) as work:
        stage.stop.set()
        assert not await work
    assert stage.events() == ["shard-0 start", "shard-0 term"]
    assert "shard-0 did not end within 0.3 s; killing it" in stage.said


async def test_a_cancel_ends_everything_at_once(stage: Stage) -> None:
    """A second Ctrl-C: SIGKILL for all, also while a slow one is being waited for."""
    stage.add("gateway-0", "deaf")
    stage.add("shard-0", stage=1)
    async with ready(stage) as work:
        stage.stop.set()
        await until(lambda: "gateway-0 term" in stage.events())
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert not any(psutil.pid_exists(pid) for pid in stage.pids())
    assert "shard-0 term" not in stage.events()


async def test_a_stop_during_the_start_leaves_nobody(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at each step of the event loop while starting takes some of them: whoever was being started has ended."""
    start = asyncio.create_subprocess_exec

    async def start_slowly(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)
        for _ in range(8):
            await asyncio.sleep(0)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
    stage.add("gateway-0", "die")
    stage.add("shard-0", stage=1)
    for steps in range(25):
        stage.stop = asyncio.Event()
        work = asyncio.create_task(stage.started().run(stage.stop))
        for _ in range(steps):
            await asyncio.sleep(0)
        stage.stop.set()
        assert await asyncio.wait_for(work, 10)
        mine = psutil.Process().children(recursive=True)
        assert not [child for child in mine if str(FAKE) in child.cmdline()]


async def test_complaints_reach_the_terminal_and_the_rest_the_log(stage: Stage) -> None:
    """Warnings, errors and lines that are no events, with the child's name; everything is in its log."""
    stage.add("shard-0", "noisy")
    async with ready(stage):
        await until(lambda: "shard-0 | a plain line" in stage.said)
    assert "shard-0 | warning warning_event n=1" in stage.said
    assert not any("info_event" in line for line in stage.said)
    assert "info_event" in (stage.folder / "shard-0.log").read_text()


async def test_a_child_that_is_not_ready_says_why(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reason, once, when it takes longer than a start should."""
    monkeypatch.setattr("fleetlm_cli.supervisor.PATIENCE_S", 0.2)
    stage.add("shard-0", "unready")
    work = asyncio.create_task(stage.started().run(stage.stop))
    await until(lambda: any("Sulking" in line for line in stage.said))
    stage.stop.set()
    await work
    assert stage.said.count("shard-0 is not ready: Sulking: so it is") == 1
    assert stage.supervisor is not None
    assert not stage.supervisor.all_ready


SUPERVISE = """
import asyncio, os, sys
from pathlib import Path
from tests.test_cli.test_supervisor import Stage
async def main():
    stage = Stage(Path(sys.argv[1]))
    stage.add("shard-0", "deaf")
    stage.add("shard-1", "die")
    await stage.started(tie=sys.argv[2]).run(stage.stop)
asyncio.run(main())
"""


@pytest.mark.parametrize("tie", ["signal", "pipe"])
@pytest.mark.parametrize("pause_s", [0.0, 0.02, 0.05, 0.15, 0.6])
def test_no_child_outlives_a_killed_parent(tmp_path: Path, *, tie: str, pause_s: float) -> None:
    """SIGKILL of the supervisor at many moments, also in the middle of starts: all children are gone in a moment."""
    parent = psutil.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), tie], cwd=Path(__file__).parents[2])
    deadline_s = time.monotonic() + 30
    while not parent.children():
        assert time.monotonic() < deadline_s
    with suppress(psutil.TimeoutExpired):
        parent.wait(timeout=pause_s)
    parent.suspend()  # so that the list of its children is complete
    children = parent.children(recursive=True)
    parent.kill()
    parent.wait(timeout=10)
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


async def test_children_do_not_hear_the_terminals_ctrl_c(stage: Stage) -> None:
    """They live in sessions of their own: only `up` hears it, which knows the order."""
    stage.add("shard-0")
    async with ready(stage):
        assert os.getsid(stage.pid("shard-0")) != os.getsid(0)
        assert os.getpgid(stage.pid("shard-0")) != os.getpgid(0)


async def test_the_pipe_ties_as_well(stage: Stage) -> None:
    """Where the kernel has no death signal the children still start, get ready and stop."""
    stage.add("shard-0")
    async with ready(stage, tie="pipe") as work:
        stage.stop.set()
        assert await work
    assert stage.events() == ["shard-0 start", "shard-0 term", "shard-0 end"]


async def test_children_come_and_go_while_others_run(stage: Stage) -> None:
    """One that is removed gets all the time that it may take, is not started again and is no more; the rest stays."""
    stage.add("shard-0")
    async with ready(stage):
        assert stage.supervisor is not None
        kept = stage.pid("shard-0")
        stage.add("shard-1", "slow")
        stage.supervisor.add(stage.specs[-1])
        await until(lambda: stage.ready("shard-1"))
        assert stage.supervisor.names() == {"shard-0", "shard-1"}
        changes = stage.changes
        await stage.supervisor.remove("shard-1")
        assert stage.events("shard-1") == ["shard-1 start", "shard-1 term", "shard-1 end"]
        assert stage.supervisor.names() == set(stage.supervisor.pids()) == {"shard-0"}
        assert stage.changes > changes
        stage.supervisor.add(stage.specs[-1])
        await until(lambda: stage.ready("shard-1"))
        assert stage.pid("shard-0") == kept


async def test_one_that_came_later_is_stopped_with_the_others(stage: Stage) -> None:
    """And one that keeps dying is given up like those of the beginning."""
    stage.add("shard-0")
    async with ready(stage) as work:
        assert stage.supervisor is not None
        stage.add("shard-1", "die")
        stage.supervisor.add(stage.specs[-1])
        with pytest.raises(GaveUp, match="shard-1"):
            await work
