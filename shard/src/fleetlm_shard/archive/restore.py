"""A volume that takes the place of one that people gave up: what the archive has of its slots (docs/archive.md).

    every session of the slots: messages of the key window ─► log     state with a later seq ─► log
    then CONFIRMED durable ─► the slots are opened, older messages are read from the archive

Promise: a seq that may have been given out and did not reach the archive is never given out again: each session goes on
`TAIL` later, and readers are told of the gap. Nothing is served before all of it is durable; a process that dies begins
again where it was. Must not be done here: deciding that a volume is lost for good (people do, in the ring's spec).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from fleetlm_common.ids import Slot
from fleetlm_common.ops import Health
from fleetlm_common.ring import is_restored
from fleetlm_shard.archive.store import connect
from fleetlm_shard.keys import KnownKey
from fleetlm_shard.log_types import LogBusy, LogDiskFull
from fleetlm_shard.records import Imported, MoveConfirmed, SessionImported, message_id

if TYPE_CHECKING:
    import random

    from fleetlm_common.clock import Clock
    from fleetlm_common.logs import Logger
    from fleetlm_shard.holdings import Holdings
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.ownership import Ownership
    from fleetlm_shard.records import Record
    from fleetlm_shard.sessions import Session, Sessions
    from fleetlm_shard.writes import Writes

TAIL: Final = 1_000_000
"""Messages of one session that may have been acknowledged and not archived: more than a session gets in the hours that
an archive may be away, and nothing beside 2^53."""
PREFETCH_ROWS: Final = 500
RETRY_S: Final = (0.5, 5.0)
"""Between two tries, drawn at random: the database is away, or the disk is full."""
BUSY_S: Final = 0.02

_SESSIONS: Final = (
    "SELECT session, slot, last_seq, inserted_at_us, metadata FROM fleetlm.sessions"
    " WHERE slot = ANY($1) ORDER BY session"
)
_CURSORS: Final = (
    "SELECT p.session, p.participant, p.read_seq FROM fleetlm.participants p JOIN fleetlm.sessions s USING (session)"
    " WHERE s.slot = ANY($1) AND p.read_seq > 0 ORDER BY p.session"
)
_WINDOW: Final = (
    "SELECT m.session, m.seq, m.inserted_at_us, m.key, m.content_hash, m.body"
    " FROM fleetlm.messages m JOIN fleetlm.sessions s USING (session)"
    " WHERE s.slot = ANY($1) AND m.inserted_at_us >= $2 ORDER BY m.session, m.seq"
)

Row = Any
"""A row of asyncpg, which has no types for columns."""


class Restore:
    """One restore. `run` is its one task.

    Args:
        dsn: of the archive, as `connect` takes it; empty: there is none.
        writes: the way into the log.
        sessions: hot state.
        keys: the idempotency window.
        holdings: what the log says about slots.
        ownership: whose `unconfirmed` slots wait for it.
        clock: for the window.
        entropy: jitter.
        events: for events.
        sleep: the loop's.

    Attributes:
        done: the slots are opened.
        restored: sessions brought so far.
    """

    def __init__(
        self,
        dsn: str,
        *,
        writes: Writes,
        sessions: Sessions,
        keys: KeyWindow,
        holdings: Holdings,
        ownership: Ownership,
        clock: Clock,
        entropy: random.Random,
        events: Logger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._dsn = dsn
        self._writes = writes
        self._sessions = sessions
        self._keys = keys
        self._holdings = holdings
        self._ownership = ownership
        self._clock = clock
        self._entropy = entropy
        self._events = events
        self._sleep = sleep
        self._trouble = ""
        self.done = False
        self.restored = 0

    def health(self) -> Health:
        """Why the shard is not ready."""
        if not self._dsn:
            words = "the volume was given up and this shard has no archive: tell it where one is"
        else:
            words = f"{self.restored} sessions were brought from the archive"
        return Health(ok=False, reason="Restoring", message="; ".join(filter(None, (words, self._trouble))))

    async def run(self) -> None:
        """Restore, confirm, open; returns then.

        Raises:
            LogStopped, VolumeError: the process is ending.
        """
        if not self._dsn:
            return
        while not self.done:
            try:
                await self._all()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
                await self._failed(f"{type(error).__name__}: {error}")
            except LogDiskFull as error:
                await self._failed(str(error))

    async def _failed(self, why: str) -> None:
        self._trouble = why
        self._events.event("restore.failed", level="warning", why=why)
        await self._sleep(self._entropy.uniform(*RETRY_S))

    async def _all(self) -> None:
        wanted = {slot: via for slot, via in self._ownership.unconfirmed.items() if is_restored(via)}
        slots = sorted(wanted)
        self.restored = 0
        connection = await connect(self._dsn, name=f"fleetlm {self._ownership.shard} restore")
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                since_us = self._clock.now_us() - round(self._keys.window_s * 1e6)
                recent = _Grouped(connection.cursor(_WINDOW, slots, since_us, prefetch=PREFETCH_ROWS))
                cursors = _Grouped(connection.cursor(_CURSORS, slots, prefetch=PREFETCH_ROWS))
                async for row in connection.cursor(_SESSIONS, slots, prefetch=PREFETCH_ROWS):
                    await self._session(row, recent, cursors)
        finally:
            connection.terminate()
        await self._writes.all_settled()
        await self._confirm(wanted)

    async def _session(self, row: Row, recent: _Grouped, cursors: _Grouped) -> None:
        session = self._sessions.get(row["session"].decode())
        if session.seq_assigned >= row["last_seq"] + TAIL:
            self.restored += 1
            return  # by an earlier process of ours
        async for each in recent.of(row["session"]):
            if each["seq"] > session.seq_assigned:
                await self._message(session, each)
        record = SessionImported(
            session.slot,
            session.id,
            row["last_seq"] + TAIL,
            0,
            row["inserted_at_us"],
            row["metadata"],
            {each["participant"].decode(): each["read_seq"] async for each in cursors.of(row["session"])},
        )

        def visible(pos: int) -> None:
            self._sessions.state_durable(session, record, pos)
            self._holdings.apply(record)

        await self._queue(record, session, visible)
        session.seq_assigned = record.last_seq
        self.restored += 1

    async def _message(self, session: Session, row: Row) -> None:
        """A message whose key may still come again."""
        record = Imported(
            session.slot, session.id, row["seq"], row["inserted_at_us"], row["key"].decode(), row["content_hash"],
            row["body"], True,
        )  # fmt: skip

        def visible(pos: int) -> None:
            self._sessions.imported_durable(session, seq=record.seq, pos=pos, at_us=record.inserted_at_us)
            self._holdings.apply(record)

        pos = await self._queue(record, session, visible)
        session.seq_assigned = record.seq
        known = KnownKey(record.seq, record.inserted_at_us, record.content_hash, message_id(record.json))
        self._keys.take(record.session, record.key, known, pos=pos, at_s=self._clock.monotonic_s())

    async def _queue(self, record: Record, session: Session, visible: Callable[[int], None]) -> int:
        # Held while we wait: the session must be the one that everybody finds.
        session.pending += 1
        try:
            while True:
                try:
                    return self._writes.other(record, session, visible)
                except LogBusy:
                    await self._sleep(BUSY_S)
        finally:
            session.pending -= 1

    async def _confirm(self, wanted: dict[Slot, str]) -> None:
        by_via: defaultdict[str, list[int]] = defaultdict(list)
        for slot, via in sorted(wanted.items()):
            by_via[via].append(int(slot))
        for via, slots in by_via.items():
            record = MoveConfirmed(via, int(self._ownership.epoch), slots)

            def visible(_: int, record: MoveConfirmed = record) -> None:
                self._holdings.apply(record)

            self._writes.own(record, visible)
        await self._writes.all_settled()
        await self._ownership.act_again()
        self.done = True
        self._events.event("restored", level="warning", sessions=self.restored, slots=len(wanted), tail=TAIL)


class _Grouped:
    """Rows of a cursor that ascend by session, asked for session by session in the same order."""

    def __init__(self, rows: AsyncIterator[Row] | Any) -> None:
        self._rows = aiter(rows)
        self._next: Row = None
        self._begun = False

    async def of(self, session: bytes) -> AsyncGenerator[Row]:
        """The session's rows; those of sessions before it are gone."""
        if not self._begun:
            self._begun = True
            await self._step()
        while self._next is not None and self._next["session"] <= session:
            if self._next["session"] == session:
                yield self._next
            await self._step()

    async def _step(self) -> None:
        self._next = await anext(self._rows, None)
