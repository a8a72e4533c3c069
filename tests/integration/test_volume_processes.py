"""The fence between real processes, with real files, locks and signals."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.integration.volume_holder import FAILED, FENCED, LEFT
from tests.support.eventually import eventually

WAIT_S = 30.0
NEVER_S = 3600.0
SHORT_S = 0.5


class Holder:
    """One process of `volume_holder`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), WAIT_S)).decode().strip()

    async def took(self) -> str:
        """Wait until it has the volume."""
        assert await self.line() == "waiting"
        return await self.line()

    async def ended(self) -> int:
        """Its exit status."""
        return await asyncio.wait_for(self.process.wait(), WAIT_S)


@asynccontextmanager
async def holder(folder: Path, boot_id: str, takeover_after_s: float) -> AsyncGenerator[Holder]:
    """A started process; it does not outlive the test."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.volume_holder",
        str(folder),
        boot_id,
        str(takeover_after_s),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Holder(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_stopped_elder_is_outwaited_and_ends_by_its_look_when_it_continues(tmp_path: Path) -> None:
    """SIGSTOP the elder, the younger takes over after the silence, SIGCONT the elder: it ends, the younger holds on."""
    async with holder(tmp_path, "elder", NEVER_S) as elder:
        assert await elder.took() == "took 1 elder"
        elder.process.send_signal(signal.SIGSTOP)
        async with holder(tmp_path, "younger", SHORT_S) as younger:
            assert await younger.took() == "took 2 elder"
            assert elder.process.returncode is None
            elder.process.send_signal(signal.SIGCONT)
            assert await elder.ended() == FENCED
            assert younger.process.returncode is None


async def test_a_taker_stopped_while_it_waits_does_not_take_what_another_got(tmp_path: Path) -> None:
    """A taker is frozen while it waits for a stopped owner, a third takes over; continued, it follows the third."""
    async with holder(tmp_path, "elder", NEVER_S) as elder:
        assert await elder.took() == "took 1 elder"
        elder.process.send_signal(signal.SIGSTOP)
        async with holder(tmp_path, "frozen", NEVER_S) as frozen:
            assert await frozen.line() == "waiting"
            request = tmp_path / "leave-0000000001"
            await eventually(request.exists, "the taker asks the owner to leave", timeout_s=WAIT_S)
            frozen.process.send_signal(signal.SIGSTOP)
            async with holder(tmp_path, "third", SHORT_S) as third:
                assert await third.took() == "took 2 elder"
                frozen.process.send_signal(signal.SIGCONT)
                assert await frozen.line() == "took 3 elder"
                assert await third.ended() == LEFT
                elder.process.send_signal(signal.SIGCONT)
                assert await elder.ended() == FENCED


async def test_a_dead_owner_is_followed_at_once(tmp_path: Path) -> None:
    """SIGKILL frees the lock: the next process does not wait for any silence, and finds the first one's volume id."""
    async with holder(tmp_path, "elder", NEVER_S) as elder:
        assert await elder.took() == "took 1 elder"
        elder.process.send_signal(signal.SIGKILL)
        assert await elder.ended() == -signal.SIGKILL
    async with holder(tmp_path, "younger", NEVER_S) as younger:
        assert await younger.took() == "took 2 elder"


async def test_a_living_owner_leaves_when_it_is_asked(tmp_path: Path) -> None:
    """The younger one asks, the elder exits by itself, no silence is waited for."""
    async with holder(tmp_path, "elder", NEVER_S) as elder:
        assert await elder.took() == "took 1 elder"
        async with holder(tmp_path, "younger", NEVER_S) as younger:
            assert await younger.took() == "took 2 elder"
            assert await elder.ended() == LEFT


async def test_an_owner_whose_volume_vanishes_ends(tmp_path: Path) -> None:
    """The folder is gone: the look finds no younger term, but the heartbeat or its error ends the process."""
    folder = tmp_path / "volume"
    folder.mkdir()
    async with holder(folder, "elder", NEVER_S) as elder:
        assert await elder.took() == "took 1 elder"
        shutil.rmtree(folder)
        folder.write_text("not a folder any more")
        assert await elder.ended() == FAILED
