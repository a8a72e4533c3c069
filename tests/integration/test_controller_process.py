"""The controller as a process: its environment, its operations port, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fleetlm_common.control import RingSpec
from fleetlm_common.filecontrol import FileControlPlane, create_ring
from tests.test_operator.views import announced, first_map

SPEC = RingSpec("ring-1", 12, 3)


async def started(**settings: str) -> asyncio.subprocess.Process:
    """A controller with these settings (`FLEETLM_CONTROLLER_…`)."""
    env = {**os.environ, **{f"FLEETLM_CONTROLLER_{name}": value for name, value in settings.items()}}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_operator", env=env, stderr=asyncio.subprocess.PIPE
    )


@asynccontextmanager
async def controller(folder: Path) -> AsyncGenerator[tuple[asyncio.subprocess.Process, str]]:
    """A controller of the ring in `folder`, and where its operations port is."""
    process = await started(CONTROL=f"file:{folder}", OPS_LISTEN="127.0.0.1:0")
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            event = json.loads(await process.stderr.readline())
        assert event["event"] == "started"
        yield process, f"http://127.0.0.1:{event['ops_port']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_reason(url: str, reason: str) -> dict[str, Any]:
    """Its health, once it gives this reason."""
    async with asyncio.timeout(30), aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/health/ready") as answer:
                found: dict[str, Any] = await answer.json()
            if found["reason"] == reason:
                return found
            await asyncio.sleep(0.02)


async def test_two_controllers_bring_a_ring_up_and_one_may_die(tmp_path: Path) -> None:
    """Each sees the same; one is killed in the middle; SIGTERM ends the other with 0."""
    create_ring(tmp_path, SPEC)
    plane = FileControlPlane(tmp_path)
    async with controller(tmp_path) as (one, one_url), controller(tmp_path) as (_, other_url):
        await until_reason(one_url, "WaitingForShards")
        for ordinal in range(3):
            await plane.announce(announced(ordinal))
            if ordinal == 1:
                await until_reason(one_url, "WaitingForShards")
                one.kill()
        steady = await until_reason(other_url, "Steady")
        assert steady["message"] == "steady at epoch 1, 12 slots on 3 shards, all ready"
        assert (await plane.read()).map == first_map()
        async with controller(tmp_path) as (third, third_url):
            await until_reason(third_url, "Steady")
            assert (await plane.read()).map == first_map()
            third.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(third.wait(), 10) == 0


async def test_a_ring_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    """Without a ring it is alive and not ready; a ring that is made meanwhile is looked after."""
    async with controller(tmp_path / "later") as (_, url):
        await until_reason(url, "ControlPlaneUnavailable")
        create_ring(tmp_path / "later", SPEC)
        await until_reason(url, "WaitingForShards")
        async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
            assert "fleetlm_operator_shards_wanted 3.0" in await answer.text()


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"OPS_LISTEN": "127.0.0.1:0"}, 78, "missing variable FLEETLM_CONTROLLER_CONTROL"),
        ({"CONTROL": "file:relative", "OPS_LISTEN": "127.0.0.1:0"}, 78, "FLEETLM_CONTROLLER_CONTROL: 'file:relative'"),
        ({"CONTROL": "file:/x", "OPS_LISTEN": "4000"}, 78, "FLEETLM_CONTROLLER_OPS_LISTEN: '4000' is not host:port"),
        ({"CONTROL": "file:/x", "OPS_LISTEN": "127.0.0.1:0", "LOG_LEVLE": "info"}, 78, "unknown variable"),
    ],
)
async def test_a_wrong_environment_is_named(settings: dict[str, str], status: int, words: str) -> None:
    """Status 78 and the variable's name; nothing is started."""
    process = await started(**settings)
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == status
    assert words in said.decode()


async def test_a_taken_port_may_come_free(tmp_path: Path) -> None:
    """Status 1: unlike a wrong configuration it is worth another try."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = await started(CONTROL=f"file:{tmp_path}", OPS_LISTEN=f"127.0.0.1:{server.getsockname()[1]}")
        _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "cannot listen on FLEETLM_CONTROLLER_OPS_LISTEN" in said.decode()
