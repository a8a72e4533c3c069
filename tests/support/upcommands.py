"""What a person does beside a running `fleetlm up`: a command, an append over REST.

Promise: the real command in a process of its own. Must not be done here: starting `up` (`fleet.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Final

import aiohttp

from tests.support.fleet import Fleet

RUN_TIMEOUT_S: Final = 60.0


def fleetlm(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fleetlm_cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )


async def append(running: Fleet, text: str) -> int:
    """Append to a session over REST; returns the seq."""
    async with (
        aiohttp.ClientSession(headers={"X-Participant-Id": "alice"}) as http,
        http.post(f"{running.url}/v1/sessions/demo/messages", json={"content": text}) as answer,
    ):
        assert answer.status == 201, await answer.text()
        found: dict[str, Any] = await answer.json()
        return int(found["seq"])
