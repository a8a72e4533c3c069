"""A volume that is lost for good: its shard goes on with what the archive has, and says which tail may be missing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest

from fleetlm_shard.archive.restore import TAIL
from tests.support.eventually import eventually
from tests.support.fleet import Fleet, descendants, fleet
from tests.support.upcommands import fleetlm

SESSIONS = [f"s{number}" for number in range(12)]
"""With so many each of two shards has some."""
ALICE = {"X-Participant-Id": "alice"}


async def ask(running: Fleet, method: str, path: str, body: object = None) -> dict[str, Any]:
    """A request over REST that succeeds."""
    async with (
        aiohttp.ClientSession(headers=ALICE) as http,
        http.request(method, f"{running.url}/v1/sessions/{path}", json=body) as answer,
    ):
        assert answer.status in {200, 201}, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def append(running: Fleet, session: str, text: str, *, key: str) -> int:
    """Append; returns the seq."""
    sent = {"content": text, "idempotency_key": key}
    return int((await ask(running, "POST", f"{session}/messages", sent))["seq"])


async def replayed(running: Fleet, session: str, *, after: int = 0) -> tuple[list[str], list[tuple[int, int]], int]:
    """All of a session after a cursor: contents, gaps, the last seq."""
    contents: list[str] = []
    gaps: list[tuple[int, int]] = []
    last_seq: int = (await ask(running, "GET", session))["last_seq"]
    while after < last_seq:
        page = await ask(running, "GET", f"{session}/messages?after={after}")
        if "gap" in page:
            gaps.append((page["gap"]["from_seq"], page["gap"]["next_seq"] - 1))
            after = page["gap"]["next_seq"] - 1
        contents += [message["content"] for message in page["messages"]]
        after = page["messages"][-1]["seq"] if page["messages"] else after
    return contents, gaps, last_seq


async def archived(running: Fleet, count: int) -> None:
    """Wait until the archive has so many messages."""
    connection = await asyncpg.connect((running.data / "archive-url").read_text().strip())
    try:
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT to_regclass('fleetlm.messages') IS NULL, pg_sleep(0.1)"):
                pass
            while await connection.fetchval("SELECT count(*), pg_sleep(0.1) FROM fleetlm.messages") < count:
                pass
    finally:
        await connection.close()


@asynccontextmanager
async def locked(running: Fleet) -> AsyncGenerator[None]:
    """Nobody reads the archive's sessions meanwhile."""
    connection = await asyncpg.connect((running.data / "archive-url").read_text().strip())
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE fleetlm.sessions IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


def restoring(running: Fleet) -> bool:
    """Whether `up` has said that shard-1 does."""
    return "shard-1 is not ready: Restoring" in running.output.read_text()


def shard_pid(running: Fleet) -> int:
    """Of shard-1; `up.json` is not there before everything was ready once."""
    for child in descendants(running.process.pid):
        if child.environ().get("FLEETLM_SHARD_NAME") == "shard-1" and "fleetlm_shard" in child.cmdline():
            return child.pid
    raise AssertionError("there is no shard-1")


def volume_lost(running: Fleet) -> bool:
    """Whether `up` has said so."""
    return "shard-1 is not ready: VolumeLost" in running.output.read_text()


@pytest.mark.timeout(300)
async def test_a_lost_volume_is_restored_from_the_archive(tmp_path: Path) -> None:
    """Messages, keys, cursors are there; a tail that never reached the archive is a gap, no seq is used again."""
    ring = tmp_path / "ring"
    async with fleet(ring, shards=2, slots=16, archive="embedded") as running:
        for session in SESSIONS:
            for number in range(1, 6):
                assert await append(running, session, f"{session} {number}", key=f"{session}-{number}") == number
            await ask(running, "PUT", f"{session}/read", {"seq": 3})
        await archived(running, 5 * len(SESSIONS))
    async with fleet(ring, shards=2, slots=16, archive="none") as running:
        # What comes now never reaches the archive.
        for session in SESSIONS:
            assert await append(running, session, "unarchived", key="late") == 6
    shutil.rmtree(ring / "shard-1")
    async with fleet(ring, shards=2, slots=16, archive="embedded", wait=False) as running:
        await eventually(lambda: volume_lost(running), "it says what it lacks", timeout_s=60)
        refused = fleetlm("shards", "restore", "shard-0", "--data", str(ring), "--yes")
        assert (refused.returncode, "has not lost its volume" in refused.stderr) == (1, True)
        async with locked(running):
            asked = fleetlm("shards", "restore", "shard-1", "--data", str(ring), "--yes", "--no-wait")
            assert asked.returncode == 0, asked.stderr
            await eventually(lambda: restoring(running), "it begins", timeout_s=60)
            os.kill(shard_pid(running), signal.SIGKILL)
        await running.wait_up()
        found = {session: await replayed(running, session) for session in SESSIONS}
        restored = [session for session in SESSIONS if found[session][2] > TAIL]
        assert 0 < len(restored) < len(SESSIONS), "the sessions of one of two shards"
        for session in SESSIONS:
            contents, gaps, last_seq = found[session]
            texts = [f"{session} {number}" for number in range(1, 6)]
            if session in restored:
                assert (contents, gaps, last_seq) == (texts, [(6, 5 + TAIL)], 5 + TAIL)
                assert await append(running, session, f"{session} 5", key=f"{session}-5") == 5, "its key is remembered"
                assert await append(running, session, "new", key="new") == 6 + TAIL
            else:
                assert (contents, gaps, last_seq) == ([*texts, "unarchived"], [], 6)
        running.kill("shard-1")
        await running.wait_ready("shard-1")
        assert await replayed(running, restored[0], after=6) == (["new"], [(7, 5 + TAIL)], 6 + TAIL)
        shown = msgspec.json.decode(fleetlm("ring", "--data", str(ring), "--json").stdout)
        assert [row["reason"] for row in shown["shards"]] == ["Ready", "Ready"]
    shutil.rmtree(ring / "shard-1")
    async with fleet(ring, shards=2, slots=16, archive="embedded", wait=False) as running:
        await eventually(lambda: volume_lost(running), "the wish was for the other volume", timeout_s=60)
