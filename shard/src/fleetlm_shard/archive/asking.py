"""Asking the archive's database: few connections, made when they are needed, and an answer in time.

Promise: whoever asks gets an answer or `TRY_AGAIN unavailable` within `ASK_S`, never "nothing is there" from a database
that did not answer. Must not be done here: questions (`library.py`, `inboxes.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg

from fleetlm_common.errors import TryAgain
from fleetlm_shard.archive.store import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncpg import Connection, Record

ASK_S: Final = 5.0
"""For one page, well under a request's deadline."""
CONNECTIONS_MAX: Final = 2
"""Of one asker: who asks more at once takes turns."""
SETTINGS: Final = {
    # Walk the partitions' indexes in order and stop: the planner must not think that all of a long session is wanted.
    "plan_cache_mode": "force_custom_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "max_parallel_workers_per_gather": "0",
}

T = TypeVar("T")


class Asker:
    """A few connections for questions. Used by the shard's loop.

    Args:
        dsn: of the database, as `connect` takes it.
        name: for its list of connections.
        what: what is in the archive, for the refusal of a question.
    """

    def __init__(self, dsn: str, *, name: str, what: str) -> None:
        self._dsn = dsn
        self._name = name
        self._what = what
        self._free: list[Connection[Record]] = []
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)

    async def ask(self, question: Callable[[Connection[Record]], Awaitable[T]]) -> T:
        """Have a question answered; cancel-safe.

        Raises:
            TryAgain: the database does not answer.
        """
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
                f"{self._what} in the archive, which does not answer", reason="unavailable", retry_after_ms=1000
            ) from error

    def close(self) -> None:
        """End the connections."""
        while self._free:
            self._free.pop().terminate()
