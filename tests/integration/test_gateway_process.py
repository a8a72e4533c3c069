"""`python -m fleetlm_gateway` as a process: configuration, readiness, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from pathlib import Path

import aiohttp
import pytest

from tests.support.frontrig import WHO

PREFIX = "FLEETLM_GATEWAY_"


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """What a gateway is given."""
    secret = folder / "credential"
    secret.write_text("a-secret-that-must-not-be-shown\n")
    given = {
        "CONTROL": f"file:{folder}/control",
        "CREDENTIAL_FILE": str(secret),
        "LISTEN": "127.0.0.1:0",
        "OPS_LISTEN": "127.0.0.1:0",
        "LOG_STYLE": "json",
        "DRAIN_WINDOW_MS": "200",
        **settings,
    }
    return {**os.environ, **{PREFIX + name: value for name, value in given.items() if value}}


async def start(env: dict[str, str]) -> Process:
    """A gateway process."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_gateway", env=env, stderr=asyncio.subprocess.PIPE
    )


async def ports(process: Process) -> tuple[int, int]:
    """Client and operations port, from its log."""
    assert process.stderr is not None
    async with asyncio.timeout(20):
        async for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "listening":
                return event["port"], event["ops_port"]
    raise AssertionError("the gateway ended before it listened")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CONTROL": ""}, "missing variable FLEETLM_GATEWAY_CONTROL"),
        ({"CONTROL": "http://x"}, "FLEETLM_GATEWAY_CONTROL"),
        ({"SOCKETZ": "1"}, "unknown variable FLEETLM_GATEWAY_SOCKETZ"),
        ({"SOCKETS": "0"}, "FLEETLM_GATEWAY_SOCKETS"),
        ({"SOCKETS": "many"}, "FLEETLM_GATEWAY_SOCKETS"),
        ({"LISTEN": "4000"}, "FLEETLM_GATEWAY_LISTEN"),
        ({"ORIGINS": "app.example"}, "FLEETLM_GATEWAY_ORIGINS"),
        ({"NAME": "a b"}, "FLEETLM_GATEWAY_NAME"),
        ({"LOG_LEVEL": "loud"}, "FLEETLM_GATEWAY_LOG_LEVEL"),
        ({"CREDENTIAL_FILE": "/does/not/exist"}, "FLEETLM_GATEWAY_CREDENTIAL_FILE"),
    ],
)
async def test_wrong_configuration_does_not_start(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    """A missing, unknown or impossible setting is named on standard error, status 78."""
    process = await start(environment(tmp_path, **settings))
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 78
    assert words in errors.decode()
    assert "a-secret" not in errors.decode()


async def test_taken_port_does_not_start(tmp_path: Path) -> None:
    """A port that cannot be had is named with its variable, status 74."""
    taken = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    address = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
    process = await start(environment(tmp_path, LISTEN=address))
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    taken.close()
    assert process.returncode == 74
    assert PREFIX + "LISTEN" in errors.decode()
    assert address in errors.decode()


async def test_life_of_a_gateway_without_a_ring(tmp_path: Path) -> None:
    """Alive but not ready with the reason; SIGTERM: unready, `draining`, sockets closed with 4000, status 0."""
    process = await start(environment(tmp_path, DRAIN_WINDOW_MS="1500"))
    port, ops_port = await ports(process)
    ops = f"http://127.0.0.1:{ops_port}"
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{ops}/health/live") as answer:
            assert answer.status == 200
        async with http.get(f"{ops}/health/ready") as answer:
            assert (answer.status, (await answer.json())["reason"]) == (503, "NoRingMap")
        async with http.get(f"{ops}/metrics") as answer:
            assert "fleetlm_gateway_ready 0.0" in await answer.text()
        sockets = [await http.ws_connect(f"http://127.0.0.1:{port}/socket/websocket?{WHO}") for _ in range(5)]
        process.send_signal(signal.SIGTERM)
        reason = ""
        async with asyncio.timeout(5):
            while reason != "Draining":
                async with http.get(f"{ops}/health/ready") as answer:
                    reason = (await answer.json())["reason"]
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(f"http://127.0.0.1:{port}/")
        for socket in sockets:
            message = await socket.receive(timeout=10)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4000)
            await socket.close()
    assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Who cannot wait for the window sends the signal again."""
    process = await start(environment(tmp_path, DRAIN_WINDOW_MS="600000"))
    port, ops_port = await ports(process)
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://127.0.0.1:{port}/socket/websocket?{WHO}"):
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            while True:
                async with http.get(f"http://127.0.0.1:{ops_port}/health/ready") as answer:
                    if (await answer.json())["reason"] == "Draining":
                        break
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 10) == 0
