"""A whole FleetLM on this machine for tests: `fleetlm up` on a folder of its own and free ports.

Promise: real processes, started as people start them; when the context ends every process has ended too, or the test
fails. Must not be done here: judging what clients saw (`history.py`).

    async with fleet(tmp_path / "ring", shards=3) as running:
        running.kill("shard-0")                 # SIGKILL
        await running.wait_ready("shard-0")     # the one that `up` started in its place
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fleetlm_cli import upfile
from fleetlm_cli.upfile import Up

READY_TIMEOUT_S: Final = 60.0
"""Two cores that other tests share."""
STOP_TIMEOUT_S: Final = 45.0
"""A child that was left frozen is killed by `up` after 30 s."""
POLL_S: Final = 0.02


class FleetError(AssertionError):
    """The fleet did not do what the test needs; carries what it printed."""


@dataclass(slots=True)
class Fleet:
    """A running `fleetlm up`."""

    data: Path
    process: asyncio.subprocess.Process
    output: Path
    start: Callable[[], Awaitable[asyncio.subprocess.Process]]
    """The same command once more."""
    killed: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def up(self) -> Up:
        """What `up.json` says now."""
        found = upfile.read(self.data)
        if found is None:
            raise FleetError(f"no up.json in {self.data}:\n{self.printed()}")
        return found

    @property
    def url(self) -> str:
        """REST of gateway-0."""
        return self.up.url

    @property
    def websocket_url(self) -> str:
        """Sockets of gateway-0."""
        return self.up.websocket_url

    @property
    def names(self) -> list[str]:
        """Every child."""
        return [process.name for process in self.up.processes]

    def pid(self, name: str) -> int:
        """A child's pid."""
        return self.up.process(name).pid

    def ops_url(self, name: str) -> str:
        """A child's operations port."""
        found = self.up.process(name).ops_url
        assert found is not None
        return found

    def printed(self) -> str:
        """What `up` printed, and the end of each child's log."""
        logs = sorted((self.data / "logs").glob("*.log"))
        tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs]
        return "\n".join([self.output.read_text(errors="replace"), *tails])

    async def metrics(self, name: str) -> dict[str, float]:
        """What a child shows on `/metrics`, by series; labels are left out, so the last one of a name stands."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.ops_url(name)}/metrics") as answer:
            text = await answer.text()
        return {each.name: each.value for family in text_string_to_metric_families(text) for each in family.samples}

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a child; `wait_ready` then waits for another pid unless it was SIGSTOP or SIGCONT.

        Returns:
            The pid that was signalled.
        """
        pid = self.pid(name)
        if number not in {signal.SIGSTOP, signal.SIGCONT}:
            self.killed[name] = pid
        os.kill(pid, number)
        return pid

    async def kill_all(self) -> None:
        """SIGKILL of `up` and of every child at once; returns when all are gone."""
        pids = [self.process.pid, *(process.pid for process in self.up.processes)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.process.wait()
        dying: list[psutil.Process] = []
        for pid in pids[1:]:
            with suppress(psutil.NoSuchProcess):
                dying.append(psutil.Process(pid))
        _, alive = await asyncio.to_thread(psutil.wait_procs, dying, timeout=5)
        if alive:
            raise FleetError(f"outlived SIGKILL: {alive}")

    async def start_again(self) -> None:
        """The same `up` on the same folder after `kill_all`; returns when everything is ready."""
        self.process = await self.start()
        self.killed.clear()
        await self.wait_up()

    async def wait_ready(self, name: str | None = None, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until a child (None: each) is one that was not killed, and calls itself ready."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            for each in self.names if name is None else [name]:
                await self._wait_one(http, each, timeout_s=timeout_s)

    async def _wait_one(self, http: aiohttp.ClientSession, name: str, *, timeout_s: float) -> None:
        async def ready() -> bool:
            if self.pid(name) == self.killed.get(name):
                return False
            try:
                async with http.get(f"{self.ops_url(name)}/health/ready") as answer:
                    return answer.status == 200
            except (aiohttp.ClientError, TimeoutError):
                return False

        await self._until(ready, f"{name} is ready", timeout_s=timeout_s)

    async def _until(self, holds: Callable[[], Awaitable[bool]], what: str, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not await holds():
                    if self.process.returncode is not None:
                        raise FleetError(f"up ended with {self.process.returncode}:\n{self.printed()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise FleetError(f"not within {timeout_s:g} s: {what}\n{self.printed()}") from error

    async def wait_up(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for the first `up.json` of this `up` (everything is ready then)."""

        async def written() -> bool:
            found = upfile.read(self.data)
            return found is not None and found.pid == self.process.pid

        await self._until(written, "up.json", timeout_s=timeout_s)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End `up` as people do.

        Returns:
            Its exit status.
        """
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await self.process.wait()
        except TimeoutError as error:
            raise FleetError(f"up did not end within {STOP_TIMEOUT_S:g} s\n{self.printed()}") from error


@asynccontextmanager
async def fleet(  # every keyword is one option of `up`
    data: Path,
    *,
    shards: int = 3,
    gateways: int = 1,
    slots: int = 64,
    env: Mapping[str, str] | None = None,
    archive: str = "none",
    options: tuple[str, ...] = (),
    wait: bool = True,
) -> AsyncGenerator[Fleet]:
    """Start `fleetlm up --data data` on free ports and wait until everything is ready.

    Args:
        data: the ring's folder; a second `fleet` on it continues the same ring.
        shards: how many.
        gateways: how many.
        slots: a small ring is quicker to look at.
        env: more environment; children of `up` inherit it (FLEETLM_SHARD_…, FLEETLM_GATEWAY_…, FLEETLM_CONTROLLER_…).
        archive: option `--archive` ("": left out).
        options: more options of `up`.
        wait: False when the test expects it not to come up.
    """
    data.parent.mkdir(parents=True, exist_ok=True)
    output = data.parent / f"{data.name}.up.out"
    numbers = ["--port", "0", "--shards", str(shards), "--gateways", str(gateways), "--slots", str(slots)]
    if archive:
        numbers += ["--archive", archive]

    async def start() -> asyncio.subprocess.Process:
        with output.open("ab") as sink:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fleetlm_cli.main", "up", "--data", str(data), *numbers, *options,
                stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink, env={**os.environ, **(env or {})},
            )  # fmt: skip

    running = Fleet(data, await start(), output, start)
    try:
        if wait:
            await running.wait_up()
        yield running
    finally:
        await _end(running)


async def _end(running: Fleet) -> None:
    """Stop it; whoever is still there afterwards is a failure, and does not stay."""
    children = descendants(running.process.pid) if running.process.returncode is None else []
    try:
        await running.stop()
    finally:
        if running.process.returncode is None:
            running.process.kill()
            await running.process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
    for process in alive:
        process.kill()
    if alive:
        raise FleetError(f"outlived up: {alive}\n{running.printed()}")


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below `pid` now."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
