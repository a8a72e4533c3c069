"""Deletion by age: whole weeks of messages, by hand (`fleetlm archive prune`) or as a setting of the shards.

Promise: nothing goes that is younger than asked by this machine's clock *and* by the database's: one clock that jumps
ahead deletes nothing. Any number of processes may prune at once. Must not be done here: talking to people.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import asyncpg

from fleetlm_shard.archive.schema import MIGRATION_LOCK, WEEK_US, partition_name
from fleetlm_shard.archive.store import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncpg import Connection, Record

    from fleetlm_common.clock import Clock
    from fleetlm_common.logs import Logger

FIRST_S: Final = 60.0
"""After a start: an archiver that dies and starts again does not spend its life looking."""
EVERY_S: Final = 3600.0
"""Between two looks: weeks end once a week."""


async def prune(dsn: str, *, age_us: int, now_us: int) -> list[int]:
    """Delete the weeks that ended `age_us` microseconds ago or earlier; returns them (weeks since 1970).

    Args:
        dsn: of the database, as `connect` takes it.
        age_us: how long messages are kept at least.
        now_us: this machine's clock, in microseconds since 1970.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError: the database cannot be used; what was dropped before is gone.
    """
    connection = await connect(dsn, name="fleetlm archive prune")
    try:
        theirs_us = await connection.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        before_us = min(now_us, theirs_us) - age_us
        gone = [week for week in await _weeks(connection) if (week + 1) * WEEK_US <= before_us]
        for week in gone:
            # One transaction a week: the lock on the table of all messages is held for a moment each.
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
                await connection.execute(
                    "UPDATE fleetlm.archive SET pruned_before_us = greatest(pruned_before_us, $1)", (week + 1) * WEEK_US
                )
                await connection.execute(f"DROP TABLE IF EXISTS fleetlm.{partition_name(week)}")
        return gone
    finally:
        await connection.close()


async def prune_on(
    dsn: str, *, age_us: int, clock: Clock, events: Logger, sleep: Callable[[float], Awaitable[None]]
) -> None:
    """Prune now and then, until cancelled; a database that is away is asked again at the next look."""
    await sleep(FIRST_S)
    while True:
        try:
            gone = await prune(dsn, age_us=age_us, now_us=clock.now_us())
            if gone:
                events.event("archive.pruned", weeks=len(gone))
        except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            events.event("archive.not_pruned", level="warning", error=f"{type(error).__name__}: {error}")
        await sleep(EVERY_S)


async def _weeks(connection: Connection[Record]) -> list[int]:
    """The weeks that have a partition, ascending."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = 'fleetlm.messages'::regclass"
    )
    return sorted(int(row["relname"].removeprefix(partition_name(0)[:-1])) for row in rows)
