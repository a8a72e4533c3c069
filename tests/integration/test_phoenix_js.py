"""The ordinary `phoenix` npm client, on Node, against the gateway: what existing clients do by themselves works."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.support.frontrig import FrontRig, front_rig, on_uvloop

FOLDER: Final = Path(__file__).parent / "phoenix_js"
SESSION: Final = "phoenix js/ü"
STEPS: Final = 11


@pytest.fixture(scope="module")
def node() -> str:
    """Node with the locked packages installed; fails with the reason when that cannot be."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.fail("this test needs node (20 or later) and npm on the PATH: https://nodejs.org")
    return found


async def _run(*command: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=FOLDER, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def _answer(rig: FrontRig, asked: list[str], draining: list[asyncio.Task[None]]) -> None:
    """Do what the script asks for."""
    if asked[0] == "drop":
        rig.front.hub.abort()
    elif asked[0] == "append":
        body = {"messages": [{"content": at} for at in range(int(asked[1]))]}
        url = f"{rig.url}/v1/sessions/phoenix%20js%2F%C3%BC/messages"
        async with rig.http.post(url, json=body, headers={"X-Participant-Id": "other"}) as answer:
            assert answer.status == 201, await answer.text()
    else:
        assert asked[0] == "drain"
        draining.append(asyncio.create_task(rig.front.drain()))


@pytest.mark.timeout(300)
@on_uvloop
async def test_the_phoenix_client_works_unchanged(node: str) -> None:
    """Join with cursor, append, receive, heartbeat, leave, rejoin, duplicate join, errors, reconnect, drain."""
    status, output = await _run("npm", "ci", "--no-audit", "--no-fund")
    assert status == 0, f"npm ci failed (is the npm registry reachable?):\n{output}"
    draining: list[asyncio.Task[None]] = []
    async with front_rig(drain_window_ms=300) as rig:
        script = await asyncio.create_subprocess_exec(
            node,
            "conformance.mjs",
            f"ws://127.0.0.1:{rig.port}/socket",
            SESSION,
            cwd=FOLDER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert script.stdin is not None
        assert script.stdout is not None
        said: list[str] = []
        try:
            async with asyncio.timeout(120):
                async for raw in script.stdout:
                    line = raw.decode().rstrip("\n")
                    said.append(line)
                    if line.startswith("ASK "):
                        await _answer(rig, line.split()[1:], draining)
                        script.stdin.write(b"done\n")
                await script.wait()
        finally:
            if script.returncode is None:
                script.kill()
                await script.wait()
        await asyncio.gather(*draining)
    assert script.returncode == 0, "\n".join(said)
    assert sum(line.startswith("HELD ") for line in said) == STEPS, "\n".join(said)
