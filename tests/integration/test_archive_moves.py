"""Slots move while shards archive and anybody is killed, the database too: the archive equals the sessions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import asyncpg
import msgspec
import psutil
import pytest

from tests.integration import moves
from tests.support.fleet import Fleet, fleet
from tests.support.load import clean
from tests.support.upcommands import fleetlm

WAIT_S = 90.0


async def replayed(running: Fleet) -> dict[str, list[object]]:
    """Every session as a client reads it."""
    found: dict[str, list[object]] = {}
    async with aiohttp.ClientSession(headers={"X-Participant-Id": "judge"}, base_url=running.url) as http:
        async with http.get("/v1/sessions?limit=1000") as answer:
            names = [each["session_id"] for each in (await answer.json())["sessions"]]
        for name in names:
            messages = found.setdefault(name, [])
            more = True
            while more:
                async with http.get(f"/v1/sessions/{name}/messages?after={len(messages)}&limit=1000") as answer:
                    page = await answer.json()
                assert "gap" not in page
                messages += page["messages"]
                more = page["has_more"]
    return found


async def archived(running: Fleet) -> dict[str, list[object]]:
    """Every session as it stands in the database."""
    connection = await asyncpg.connect((running.data / "archive-url").read_text().strip())
    try:
        rows = await connection.fetch("SELECT session, body FROM fleetlm.messages ORDER BY session, seq")
        for table in ("halted", "quarantine"):
            assert await connection.fetchval(f"SELECT count(*) FROM fleetlm.{table}") == 0
    except asyncpg.UndefinedTableError:  # nobody has archived yet
        return {}
    finally:
        await connection.close()
    found: dict[str, list[object]] = {}
    for row in rows:
        found.setdefault(row["session"].decode(), []).append(msgspec.json.decode(row["body"]))
    return found


@pytest.mark.timeout(400)
async def test_the_archive_equals_the_sessions_wherever_they_went(tmp_path: Path) -> None:
    """Up, down, up again before any of it ended, with kills: each message is there once, in its place."""
    outcome = await moves.moves_run(tmp_path, moves.mind, kills=True, seed=7, archive="embedded")
    clean(outcome.report)
    async with fleet(tmp_path / "ring", shards=3, slots=16, archive="") as running:
        wanted = await replayed(running)
        assert sum(map(len, wanted.values())) > 0
        found: dict[str, list[object]] = {}
        async with asyncio.timeout(WAIT_S):
            while sum(map(len, found.values())) < sum(map(len, wanted.values())):
                found = await archived(running)
        assert found == wanted


@pytest.mark.timeout(300)
async def test_an_elder_that_slept_archives_what_it_gave_away(tmp_path: Path) -> None:
    """Its archiver sleeps, its slots go, it sleeps itself; the target archives all, and so does it when it wakes."""
    sessions = [f"s{number}" for number in range(12)]
    async with fleet(tmp_path / "ring", shards=2, slots=16, archive="embedded") as running:

        async def append(first: int) -> None:
            async with aiohttp.ClientSession(headers={"X-Participant-Id": "writer"}, base_url=running.url) as http:
                for number in range(first, first + 5):
                    for session in sessions:
                        body = {"content": number, "idempotency_key": f"{session}-{number}"}
                        async with http.post(f"/v1/sessions/{session}/messages", json=body) as answer:
                            assert (await answer.json())["seq"] == number

        async def archived_all(last: int) -> None:
            async with asyncio.timeout(WAIT_S):
                while sum(map(len, (await archived(running)).values())) < last * len(sessions):
                    pass

        await append(1)
        await archived_all(5)
        elder = psutil.Process(running.pid("shard-0"))
        [archiver] = elder.children()
        try:
            archiver.suspend()
            await append(6)
            moved = await asyncio.to_thread(fleetlm, "move", "0-15", "--to", "shard-1", "--data", str(running.data))
            assert moved.returncode == 0, moved.stderr
            assert await lag(running, "shard-0") > 0
            elder.suspend()
            await append(11)
            await archived_all(15)
        finally:
            elder.resume()
            archiver.resume()
        async with asyncio.timeout(WAIT_S):
            while await lag(running, "shard-0") or await lag(running, "shard-1"):
                pass
        assert await archived(running) == await replayed(running)


async def lag(running: Fleet, shard: str) -> float:
    """Bytes that a shard's archiver has before it."""
    return (await running.metrics(shard))["fleetlm_shard_archive_lag_bytes"]
