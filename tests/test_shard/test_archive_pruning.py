"""Deletion by age on a real PostgreSQL: whole weeks, and never because one clock is wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fleetlm_cli.postgres import Postgres
from fleetlm_common.clock import SystemClock
from fleetlm_shard.archive.pruning import EVERY_S, FIRST_S, prune, prune_on
from fleetlm_shard.archive.rows import rows_of
from fleetlm_shard.archive.schema import WEEK_US
from tests.support.frontrig import EventList
from tests.support.logkit import message
from tests.support.postgres import empty_database, running
from tests.test_shard.test_archive_store import a_store, fetch, of

YEAR_US = 52 * WEEK_US


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    """One server for this module."""
    async with running(tmp_path_factory.mktemp("archive")) as postgres:
        yield postgres


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def filled(server: Postgres) -> tuple[str, int]:
    """An archive with a message of now and one of each of three weeks before; and now."""
    dsn, now_us = await empty_database(server), time.time_ns() // 1000
    async with a_store(dsn) as (store, _):
        messages = [message("s", 4 - weeks, at_us=now_us - weeks * WEEK_US) for weeks in (3, 2, 1, 0)]
        await store.write(rows_of(of(*messages), without=()), from_pos=0, to_pos=10)
    return dsn, now_us


async def seqs(dsn: str) -> list[object]:
    """What is left."""
    return [seq for (seq,) in await fetch(dsn, "SELECT seq FROM fleetlm.messages ORDER BY seq")]


async def test_whole_weeks_go(server: Postgres) -> None:
    """A week that has not ended so long ago stays whole."""
    dsn, now_us = await filled(server)
    assert await prune(dsn, age_us=YEAR_US, now_us=now_us) == []
    newest = now_us // WEEK_US
    assert await prune(dsn, age_us=now_us - (newest - 1) * WEEK_US, now_us=now_us) == [newest - 3, newest - 2]
    assert await seqs(dsn) == [3, 4]
    assert await fetch(dsn, "SELECT pruned_before_us FROM fleetlm.archive") == [((newest - 1) * WEEK_US,)]


async def test_a_clock_that_jumps_ahead_deletes_nothing(server: Postgres) -> None:
    """The database's own clock has a word, and so has ours when the database's is wrong."""
    dsn, now_us = await filled(server)
    assert await prune(dsn, age_us=YEAR_US, now_us=now_us + 2 * YEAR_US) == []
    assert await prune(dsn, age_us=0, now_us=now_us - YEAR_US) == []
    assert await seqs(dsn) == [1, 2, 3, 4]


async def test_a_shard_prunes_now_and_then(server: Postgres) -> None:
    """Not at once, then every hour; a database that is away ends nothing."""
    dsn, now_us = await filled(server)
    events, slept = EventList(), list[float]()
    enough = asyncio.Event()

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if len(slept) == 2:
            enough.set()
            await asyncio.Event().wait()

    for where in ("postgresql://fleetlm@/none?host=/nowhere", dsn):
        slept.clear()
        enough.clear()
        age_us = now_us - now_us // WEEK_US * WEEK_US
        task = asyncio.create_task(prune_on(where, age_us=age_us, clock=SystemClock(), events=events, sleep=sleep))
        async with asyncio.timeout(20):
            await enough.wait()
        task.cancel()
        assert slept == [FIRST_S, EVERY_S]
    assert events.said == [("archive.not_pruned", "warning"), ("archive.pruned", "info")]
    assert await seqs(dsn) == [4]
