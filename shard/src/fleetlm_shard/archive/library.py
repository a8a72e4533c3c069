"""Reading messages back from the archive, for cold replays.

Promise: bytes as they were acknowledged, quarantined ones too; memory is bounded by the page; whoever asks gets an
answer or `TRY_AGAIN unavailable` within `ASK_S`, never "nothing is there" from a database that did not answer.
Connections are made when they are needed and few. Must not be done here: merging with the log (`cold.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg

from fleetlm_common.errors import TryAgain
from fleetlm_shard.archive.store import connect
from fleetlm_shard.log_types import StoredMessage

if TYPE_CHECKING:
    from asyncpg import Connection, Record

ASK_S: Final = 5.0
"""For one page, well under a request's deadline."""
CONNECTIONS_MAX: Final = 2
"""Of one shard: cold replays are rare, and take their turns."""
PREFETCH_ROWS: Final = 32
"""Rows fetched at once: a row may hold 64 KiB and more."""

RANGE: Final = (
    "SELECT seq, body FROM ("
    " (SELECT seq, body FROM fleetlm.messages WHERE session = $1 AND seq BETWEEN $2 AND $3 ORDER BY seq LIMIT $4)"
    " UNION ALL (SELECT seq, body FROM fleetlm.quarantine WHERE session = $1 AND seq BETWEEN $2 AND $3"
    " AND body IS NOT NULL ORDER BY seq LIMIT $4)) AS held ORDER BY seq"
)
SETTINGS: Final = {
    # Walk the partitions' indexes in order and stop: the planner must not think that all of a long session is wanted.
    "plan_cache_mode": "force_custom_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "max_parallel_workers_per_gather": "0",
}
_EARLIEST: Final = (
    "SELECT least((SELECT seq FROM fleetlm.messages WHERE session = $1 ORDER BY seq LIMIT 1),"
    " (SELECT seq FROM fleetlm.quarantine WHERE session = $1 AND body IS NOT NULL ORDER BY seq LIMIT 1))"
)

T = TypeVar("T")


class Library:
    """The archive as a place to read from. Used by the shard's loop.

    Args:
        dsn: of the database, as `connect` takes it.
        name: for its list of connections.
    """

    def __init__(self, dsn: str, *, name: str) -> None:
        self._dsn = dsn
        self._name = name
        self._free: list[Connection[Record]] = []
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)

    async def read(
        self, session: str, *, first_seq: int, last_seq: int, limit: int, bytes_max: int
    ) -> list[StoredMessage]:
        """Messages of `[first_seq, last_seq]`, ascending, as many as fit `limit` and `bytes_max` (at least one).

        Cancel-safe.

        Raises:
            TryAgain: the database does not answer.
        """

        async def page(connection: Connection[Record]) -> list[StoredMessage]:
            messages: list[StoredMessage] = []
            total_bytes = 0
            async with connection.transaction(readonly=True):
                rows = connection.cursor(RANGE, session.encode(), first_seq, last_seq, limit, prefetch=PREFETCH_ROWS)
                async for row in rows:
                    if messages and messages[-1].seq == row["seq"]:
                        continue
                    messages.append(StoredMessage(row["seq"], 0, row["body"]))
                    total_bytes += len(row["body"])
                    if len(messages) >= limit or total_bytes >= bytes_max:
                        break
            return messages

        return await self._ask(page)

    async def earliest(self, session: str) -> int | None:
        """The first seq that is held; cancel-safe.

        Raises:
            TryAgain: the database does not answer.
        """

        async def first(connection: Connection[Record]) -> int | None:
            seq: int | None = await connection.fetchval(_EARLIEST, session.encode())
            return seq

        return await self._ask(first)

    async def _ask(self, question: Callable[[Connection[Record]], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(ASK_S), self._turns:
                connection = (
                    self._free.pop() if self._free else await connect(self._dsn, name=self._name, settings=SETTINGS)
                )
                try:
                    answer = await question(connection)
                except BaseException:
                    # In mid-question, or cancelled there: its state is not known.
                    connection.terminate()
                    raise
                self._free.append(connection)
                return answer
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            raise TryAgain(
                "older messages are in the archive, which does not answer", reason="unavailable", retry_after_ms=1000
            ) from error

    def close(self) -> None:
        """End the connections."""
        while self._free:
            self._free.pop().terminate()
