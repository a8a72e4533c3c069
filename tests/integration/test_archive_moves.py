"""Slots move while shards archive and anybody is killed, the database too: the archive equals the sessions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import asyncpg
import msgspec
import pytest

from tests.integration import moves
from tests.support.fleet import Fleet, fleet
from tests.support.load import clean

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
