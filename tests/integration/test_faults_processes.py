"""Processes that stop, run out of descriptors or memory, are overrun by clients, or whose clock jumps, under load."""

from __future__ import annotations

import asyncio
import resource
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from tests.fuzz import wsclient
from tests.integration.kills import Plan
from tests.support.clockstep import ClockStep
from tests.support.faultload import FaultRun, under_load
from tests.support.load import clean
from tests.support.procwatch import sample, settled

PROBE = "/openapi.json"


def limited(run: FaultRun, name: str, what: int, value: int) -> None:
    """Lower a limit of a living process (its soft one: it can be raised again)."""
    process = psutil.Process(run.fleet.pid(name))
    _, hard = process.rlimit(what)
    process.rlimit(what, (value, hard))


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_each_process_is_frozen_and_goes_on(tmp_path: Path) -> None:
    """SIGSTOP of a shard, a gateway, the controller for longer than every heartbeat; then all at once."""

    async def script(run: FaultRun) -> None:
        for names in (["shard-0"], ["gateway-0"], ["controller"], run.fleet.names):
            for name in names:
                run.fleet.kill(name, signal.SIGSTOP)
            await asyncio.sleep(6)
            for name in names:
                run.fleet.kill(name, signal.SIGCONT)
            await run.progress()

    clean(await under_load(tmp_path, script))


@pytest.mark.timeout(120)
async def test_a_gateway_without_descriptors(tmp_path: Path) -> None:
    """New clients do not get in, or are closed; those who are in notice nothing; later everybody gets in again."""

    async def script(run: FaultRun) -> None:
        url = urlsplit(run.urls[0])
        before = psutil.Process(run.fleet.pid("gateway-0")).num_fds()
        limited(run, "gateway-0", resource.RLIMIT_NOFILE, before + 4)
        crowd = [await asyncio.open_connection(url.hostname, url.port) for _ in range(60)]
        await run.progress()
        for _, writer in crowd:
            writer.transport.abort()
        limited(run, "gateway-0", resource.RLIMIT_NOFILE, 20_000)
        await run.progress()
        timeout = aiohttp.ClientTimeout(20)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(run.urls[0] + PROBE) as answer:
            assert answer.status == 200

    report = await under_load(tmp_path, script)
    clean(report)
    assert report.reconnects == 0, "those who were in were disturbed"


@pytest.mark.timeout(120)
async def test_a_shard_without_descriptors(tmp_path: Path) -> None:
    """It cannot open the files that it needs: it refuses or ends, and what it acknowledged is there afterwards."""

    async def script(run: FaultRun) -> None:
        pid = run.fleet.pid("shard-0")
        limited(run, "shard-0", resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds())
        await _write_much(run)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).rlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
        await run.progress()

    clean(await under_load(tmp_path, script, env={"FLEETLM_SHARD_SEGMENT_BYTES": str(4 * 1024 * 1024)}))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["shard-0", "gateway-0"])
async def test_a_process_at_its_memory_limit(tmp_path: Path, name: str) -> None:
    """No further page (RLIMIT_AS): it refuses or dies and is started again; nothing acknowledged is lost or doubled."""

    async def script(run: FaultRun) -> None:
        pid = run.fleet.pid(name)
        limited(run, name, resource.RLIMIT_AS, psutil.Process(pid).memory_info().vms + 1024 * 1024)
        await _write_much(run)
        with suppress(psutil.NoSuchProcess):
            limited(run, name, resource.RLIMIT_AS, resource.RLIM_INFINITY)
        await run.progress()

    clean(await under_load(tmp_path, script))


async def _write_much(run: FaultRun) -> None:
    """12 MiB into many sessions over REST, and their first messages read back; every request is answered somehow."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(25), headers={"X-Participant-Id": "much"}) as http:

        async def one(number: int) -> None:
            url = f"{run.urls[number % len(run.urls)]}/v1/sessions/much-{number % 20}/messages"
            with suppress(aiohttp.ClientError, TimeoutError):
                async with http.post(url, json={"content": "x" * 60_000}) as answer:
                    await answer.read()
                async with http.get(url, params={"after": 0, "limit": 20}) as answer:
                    await answer.read()

        for begin in range(0, 200, 20):
            await asyncio.gather(*(one(number) for number in range(begin, begin + 20)))


async def _crowd(tmp_path: Path, count: int) -> None:
    async def script(run: FaultRun) -> None:
        url = urlsplit(run.urls[0])
        assert url.hostname is not None
        assert url.port is not None
        before = await sample(run.fleet)

        async def come() -> wsclient.Socket:
            while True:
                try:
                    async with asyncio.timeout(60):
                        return await wsclient.connect(url.hostname or "", url.port or 0)
                except (OSError, TimeoutError, wsclient.BadServer, asyncio.IncompleteReadError):
                    await asyncio.sleep(0.1)

        async with asyncio.timeout(150):
            crowd = await asyncio.gather(*(come() for _ in range(count)))
        await run.progress()
        for socket in crowd:
            socket.drop()
        assert await settled(run.fleet, before, slack=8, within_s=60) == []

    plan = Plan(kills=0, seed=1, shards=1, gateways=1, sessions=2, writers=2, readers=2, write_pause_s=0.05)
    report = await under_load(tmp_path, script, plan=plan, env={"FLEETLM_GATEWAY_SOCKETS": str(count + 100)})
    clean(report)
    assert report.reconnects == 0, report.as_json()


@pytest.mark.timeout(120)
async def test_a_thousand_connects_at_once(tmp_path: Path) -> None:
    """All get in, those who are in go on, and everything is given back when they leave."""
    await _crowd(tmp_path, 1_000)


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_ten_thousand_connects_at_once(tmp_path: Path) -> None:
    """The same with as many as one gateway holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 12_000, f"the machine allows {hard} descriptors only"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        await _crowd(tmp_path, 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.timeout(120)
async def test_the_wall_clock_jumps(tmp_path: Path) -> None:
    """A day back, two forward, back again, while everything runs and over a restart: only time stamps show it."""
    clock = ClockStep(tmp_path)

    async def script(run: FaultRun) -> None:
        url = f"{run.urls[0]}/v1/sessions/stamps/messages"
        stamps: list[str] = []
        async with aiohttp.ClientSession(headers={"X-Participant-Id": "clock"}) as http:
            for step_s in (-86_400, 172_800, -10, 0):
                clock.set(step_s)
                await run.progress()
                async with http.post(url, json={"content": step_s}) as answer:
                    stamps.append((await answer.json())["inserted_at"])
                run.fleet.kill("shard-0")
                await run.fleet.wait_ready("shard-0")
                await run.progress()
        days = [datetime.fromisoformat(stamp).date().toordinal() for stamp in stamps]
        assert days[1] - days[0] == 3, "the clock did not jump"

    clean(await under_load(tmp_path, script, env=clock.env))
