"""The archiver's loop: read the log where the archive ends, write it, say where it stands (docs/archive.md, "Worker").

    connect, migrate, position ─► wait for news ─► read a piece ─► write it ─┬─ done: the position has moved with it
         ▲                                                                  ├─ a row is refused: halves, then quarantine
         └──────────── back off, with jitter ◄── connection or server ──────┴─ another message there: halt its slot

Promise: the position moves in the transaction that it is true for; nothing is skipped but what was quarantined or
halted, and both are said. Must not be done here: SQL (`store.py`), files (`feed.py`), the process around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Literal

import asyncpg
import msgspec

from fleetlm_shard.archive.errors import ArchiveRefused, Diverged, FeedBroken, Superseded
from fleetlm_shard.archive.rows import rows_of
from fleetlm_shard.archive.store import RECORD_FAULTS, Slotted, Standing, Store, connect
from fleetlm_shard.records import Message

if TYPE_CHECKING:
    import random

    from asyncpg import Connection

    from fleetlm_shard.archive.feed import Piece
    from fleetlm_shard.archive.store import Volume
    from fleetlm_shard.records import Record

LINGER_S: Final = 0.05
"""Between two transactions: what came meanwhile shares the next one. A tenth of what the archive may lag."""
BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 10.0
"""Between two tries of a database that is away: it is found again soon after it returns."""
REFUSED_S: Final = 10.0
"""Between two tries of a database that a person has to look at."""
REASON_CHARS_MAX: Final = 500
"""Of PostgreSQL's words in a quarantine row."""

State = Literal["Connecting", "Archiving", "Away", "Refused", "FeedBroken"]


class Report(msgspec.Struct):
    """How the archive of one shard stands; sent to the shard whenever it changes.

    `pos` and `floor_pos` are -1 until the database has told them. `oldest_us`: when the oldest message that is known to
    wait was inserted, 0 if none waits.
    """

    state: State = "Connecting"
    why: str = ""
    pos: int = -1
    floor_pos: int = -1
    oldest_us: int = 0
    messages: int = 0
    batches: int = 0
    duplicates: int = 0
    failures: int = 0
    quarantined: int = 0
    damaged: int = 0
    halted: list[int] = msgspec.field(default_factory=list[int])


class Feed:
    """What the worker reads: set by whoever hears from the shard.

    Args:
        read: the piece at a position (`feed.read_piece` with the newest places).
    """

    def __init__(self, read: Callable[[int], Piece]) -> None:
        self.read = read
        self.durable_pos = -1
        self.news = asyncio.Event()

    def durable(self, pos: int) -> None:
        """The log is durable up to `pos`."""
        if pos > self.durable_pos:
            self.durable_pos = pos
            self.news.set()


class Worker:
    """Archives one volume. `run` is its one task.

    Args:
        dsn: of the database, as `connect` takes it.
        volume: whose log.
        feed: its records.
        report: called with the same `Report` object whenever it changed.
        entropy: jitter.
        sleep: the loop's.
    """

    def __init__(
        self,
        *,
        dsn: str,
        volume: Volume,
        feed: Feed,
        report: Callable[[Report], None],
        entropy: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._dsn = dsn
        self._volume = volume
        self._feed = feed
        self._say = report
        self._entropy = entropy
        self._sleep = sleep
        self._standing = Standing(0, {})
        self._fails = 0
        self.report = Report()

    async def run(self) -> None:
        """Archive until cancelled. Cancel-safe: a transaction under way is rolled back by the server, or was whole."""
        while True:
            wait_s = 0.0
            try:
                await self._connected()
            except Superseded as error:
                wait_s = self._failed("Away", str(error), BACKOFF_S_MAX)
            except ArchiveRefused as error:
                wait_s = self._failed("Refused", f"{error.reason}: {error}", REFUSED_S)
            except FeedBroken as error:
                wait_s = self._failed("FeedBroken", str(error), REFUSED_S)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
                wait_s = self._failed("Away", f"{type(error).__name__}: {error}", BACKOFF_S_MAX)
            await self._sleep(wait_s)

    def _failed(self, state: State, why: str, most_s: float) -> float:
        """Say it; returns how long to wait."""
        self._fails += 1
        report = self.report
        report.failures += 1
        report.state, report.why = state, why
        self._say(report)
        wait_s = (
            most_s if state in ("Refused", "FeedBroken") else min(most_s, BACKOFF_S_MIN * 2 ** min(self._fails, 10))
        )
        return wait_s * self._entropy.uniform(0.5, 1.0)

    async def _connected(self) -> None:
        connection = await connect(self._dsn, name=f"fleetlm {self._volume.shard}")
        try:
            await self._archive(connection)
        finally:
            # A server that does not answer must not keep the worker.
            connection.terminate()

    async def _archive(self, connection: Connection[asyncpg.Record]) -> None:
        store = Store(connection, self._volume)
        self._stand(await store.open())
        feed = self._feed
        while True:
            feed.news.clear()
            while self._standing.pos < feed.durable_pos:
                await self._piece(store)
                self._fails = 0
            await feed.news.wait()
            await self._sleep(LINGER_S)

    async def _piece(self, store: Store) -> None:
        pos = self._standing.pos
        piece = self._feed.read(pos)
        report = self.report
        oldest = next((record.inserted_at_us for _, record in piece.records if isinstance(record, Message)), 0)
        if oldest != report.oldest_us:
            report.oldest_us = oldest
            self._say(report)
        await self._write(store, piece.records, from_pos=pos, to_pos=piece.end_pos)
        report.damaged += piece.damaged
        report.batches += 1
        # How long the next message has waited is known when it is read.
        report.oldest_us = 0
        self._stand(Standing(piece.end_pos, self._standing.halted))

    def _stand(self, standing: Standing) -> None:
        self._standing = standing
        report = self.report
        report.state, report.why = "Archiving", ""
        report.pos, report.floor_pos = standing.pos, standing.floor_pos
        report.halted = sorted(standing.halted)
        self._say(report)

    async def _write(self, store: Store, records: list[tuple[int, Record]], *, from_pos: int, to_pos: int) -> None:
        """Write records; isolate those that are refused by halving. Only the last transaction moves the position."""
        while True:
            try:
                rows = rows_of(records, without=self._standing.halted)
                fresh = await store.write(rows, from_pos=from_pos, to_pos=to_pos)
            except Diverged as diverged:
                await store.halt(diverged, from_pos=self._standing.pos)
                halted = {**self._standing.halted, diverged.slot: self._standing.pos}
                self._stand(Standing(self._standing.pos, halted))
            except RECORD_FAULTS as fault:
                await self._isolate(store, records, fault, from_pos=from_pos, to_pos=to_pos)
                return
            else:
                self.report.messages += fresh
                self.report.duplicates += len(rows.messages) - fresh
                return

    async def _isolate(
        self, store: Store, records: list[tuple[int, Record]], fault: Exception, *, from_pos: int, to_pos: int
    ) -> None:
        if len(records) > 1:
            half = len(records) // 2
            await self._write(store, records[:half], from_pos=from_pos, to_pos=from_pos)
            await self._write(store, records[half:], from_pos=from_pos, to_pos=to_pos)
            return
        if not records:
            raise fault
        pos, record = records[0]
        assert isinstance(record, Slotted), "other records make no rows"
        await store.quarantine(pos, record, reason=f"{type(fault).__name__}: {fault}"[:REASON_CHARS_MAX])
        self.report.quarantined += 1
        await self._write(store, [], from_pos=from_pos, to_pos=to_pos)
