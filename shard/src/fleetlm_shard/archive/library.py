"""Reading messages back from the archive, for cold replays.

Promise: bytes as they were acknowledged, quarantined ones too; memory is bounded by the page; a database that does not
answer is said, within seconds (`asking.py`). Must not be done here: merging with the log (`cold.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetlm_shard.archive.asking import Asker
from fleetlm_shard.log_types import StoredMessage

if TYPE_CHECKING:
    from asyncpg import Connection, Record

PREFETCH_ROWS: Final = 32
"""Rows fetched at once: a row may hold 64 KiB and more."""

RANGE: Final = (
    "SELECT seq, body FROM ("
    " (SELECT seq, body FROM fleetlm.messages WHERE session = $1 AND seq BETWEEN $2 AND $3 ORDER BY seq LIMIT $4)"
    " UNION ALL (SELECT seq, body FROM fleetlm.quarantine WHERE session = $1 AND seq BETWEEN $2 AND $3"
    " AND body IS NOT NULL ORDER BY seq LIMIT $4)) AS held ORDER BY seq"
)
_EARLIEST: Final = (
    "SELECT least((SELECT seq FROM fleetlm.messages WHERE session = $1 ORDER BY seq LIMIT 1),"
    " (SELECT seq FROM fleetlm.quarantine WHERE session = $1 AND body IS NOT NULL ORDER BY seq LIMIT 1))"
)


class Library:
    """The archive as a place to read from. Used by the shard's loop.

    Args:
        dsn: of the database, as `connect` takes it.
        name: for its list of connections.
    """

    def __init__(self, dsn: str, *, name: str) -> None:
        self._asker = Asker(dsn, name=name, what="older messages are")

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

        return await self._asker.ask(page)

    async def earliest(self, session: str) -> int | None:
        """The first seq that is held; cancel-safe.

        Raises:
            TryAgain: the database does not answer.
        """

        async def first(connection: Connection[Record]) -> int | None:
            seq: int | None = await connection.fetchval(_EARLIEST, session.encode())
            return seq

        return await self._asker.ask(first)

    def close(self) -> None:
        """End the connections."""
        self._asker.close()
