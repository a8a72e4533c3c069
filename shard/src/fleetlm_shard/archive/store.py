"""Writing to PostgreSQL: one transaction a batch, with the position in the log that it reaches (docs/archive.md).

    lock the batch's sessions ─► compare what is there already ─► COPY the rest ─► sessions, participants, changes
    ─► position

Promise: a batch is there whole or not at all, and as often as it is written it is there once. The lock on its
sessions' rows orders everybody who archives one session (an elder process, the other side of a move). A message that
stands in the archive is never overwritten. Must not be done here: deciding what to do about a refusal (`worker.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg

from fleetlm_shard.archive.errors import Diverged, Superseded
from fleetlm_shard.archive.rows import Rows, sender_of
from fleetlm_shard.archive.schema import WEEK_US, make_partitions, migrate
from fleetlm_shard.records import CursorMoved, Message, SessionCreated, SessionImported, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncpg import Connection, Record

Slotted = Message | SessionCreated | CursorMoved | SessionImported
"""Records that make rows."""

CONNECT_S: Final = 10.0
"""For a connection with its handshake."""
COMMAND_S: Final = 60.0
"""For one statement: past it the connection is taken for dead (half-open)."""
_SETTINGS: Final = {
    # A worker that is frozen in mid-transaction must not keep others from its sessions' rows.
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "10s",
    # A question whose asker has gone is not worked on.
    "client_connection_check_interval": "1s",
    "timezone": "UTC",
}
RECORD_FAULTS: Final = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.RaiseError,
    asyncpg.exceptions.DataError,
)
"""What PostgreSQL says when a row, not the connection or the server, is at fault."""
CHANGES_KEPT_S: Final = 300
"""Gateways with inboxes ask several times a second what has changed; whoever was away for longer reads anew."""
_SWEEP_BATCHES: Final = 200
"""Transactions between two deletions of old rows of `changes`: some ten seconds of a busy log."""
_COLUMNS: Final = ("session", "seq", "inserted_at_us", "sender", "key", "content_hash", "body")


@dataclass(frozen=True, slots=True)
class Volume:
    """Whose log is archived: positions belong to a volume, and a later term of it goes first."""

    ring_uid: str
    shard: str
    volume_id: str
    term: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the archive of a volume stands: archived below `pos`, but for halted slots (slot → from which position)."""

    pos: int
    halted: dict[int, int]

    @property
    def floor_pos(self) -> int:
        """All records below it are in the archive: their segments may go."""
        return min([self.pos, *self.halted.values()])


async def connect(dsn: str, *, name: str, settings: Mapping[str, str] | None = None) -> Connection[Record]:
    """A connection.

    Args:
        dsn: the database's URL, or `file:/PATH` of a file that holds it, read each time: passwords change.
        name: for the server's list of connections.
        settings: of the server for this connection, besides our own.

    Raises:
        OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError: there is none.
    """
    return await asyncpg.connect(
        _url(dsn),
        timeout=CONNECT_S,
        command_timeout=COMMAND_S,
        server_settings={**_SETTINGS, **(settings or {}), "application_name": name},
    )


def _url(dsn: str) -> str:
    if not dsn.startswith("file:"):
        return dsn
    url = Path(dsn.removeprefix("file:")).read_text().strip()
    if not url:
        raise ValueError(f"{dsn.removeprefix('file:')} is empty")
    return url


class Store:
    """The archive of one volume over one connection, used by one task.

    Args:
        connection: of `connect`; closed by whoever made it.
        volume: whose log it is.
    """

    def __init__(self, connection: Connection[Record], volume: Volume) -> None:
        self._connection = connection
        self._volume = volume
        self._weeks: set[int] = set()
        self._unswept = 0

    async def open(self) -> Standing:
        """Migrate, and read where the archive stands; this term takes over.

        Raises:
            ArchiveRefused, Superseded, asyncpg.PostgresError, OSError: it cannot be used.
        """
        volume, connection = self._volume, self._connection
        await migrate(connection, ring_uid=volume.ring_uid)
        row = await connection.fetchrow(
            "INSERT INTO fleetlm.positions AS p (volume_id, shard, term, pos) VALUES ($1, $2, $3, 0)"
            " ON CONFLICT (volume_id) DO UPDATE SET term = excluded.term, shard = excluded.shard"
            " WHERE p.term <= excluded.term RETURNING pos",
            volume.volume_id, volume.shard, volume.term,
        )  # fmt: skip
        if row is None:
            raise Superseded(f"a later process than term {volume.term} archives this volume")
        halted = await connection.fetch(
            "SELECT slot, from_pos FROM fleetlm.halted WHERE volume_id = $1", volume.volume_id
        )
        return Standing(row["pos"], {each["slot"]: each["from_pos"] for each in halted})

    async def write(self, rows: Rows, *, from_pos: int, to_pos: int) -> int:
        """One transaction; returns how many messages were new. `from_pos` = `to_pos`: the position stays.

        Raises:
            Diverged: another message stands there; nothing was written.
            Superseded: the position is not `from_pos`, or a later term took over; nothing was written.
            RECORD_FAULTS: a row is refused; nothing was written.
            asyncpg.PostgresError, OSError, TimeoutError: it may have been written, or not; `open` a new connection.
        """
        weeks = {message.inserted_at_us // WEEK_US for message in rows.messages.values()}
        fresh_weeks = weeks - self._weeks
        if fresh_weeks:
            await self._make_partitions(fresh_weeks)
        self._unswept += 1
        if self._unswept >= _SWEEP_BATCHES:
            self._unswept = 0
            await self._sweep_changes()
        try:
            return await self._write_once(rows, from_pos, to_pos)
        except RECORD_FAULTS:
            if not weeks - fresh_weeks:
                raise
        # A prune may have dropped a week's table since it was made.
        await self._make_partitions(weeks)
        return await self._write_once(rows, from_pos, to_pos)

    async def _make_partitions(self, weeks: set[int]) -> None:
        await make_partitions(self._connection, weeks)
        self._weeks |= weeks

    async def _write_once(self, rows: Rows, from_pos: int, to_pos: int) -> int:
        async with self._connection.transaction():
            fresh = await self._write_rows(rows)
            await self._move(from_pos, to_pos)
        return fresh

    async def _write_rows(self, rows: Rows) -> int:
        if not rows.sessions:
            return 0
        archived = await self._lock_sessions(rows)
        fresh = await self._without_archived(rows, archived)
        if fresh:
            await self._copy(fresh)
        await self._update_sessions(rows)
        await self._update_participants(rows)
        names = sorted(rows.sessions)
        await self._connection.execute("INSERT INTO fleetlm.changes (sessions) VALUES ($1::bytea[])", names)
        return len(fresh)

    async def _sweep_changes(self) -> None:
        """Two volumes' sweeps take different rows: none waits for the other, whatever else it has locked."""
        await self._connection.execute(
            "DELETE FROM fleetlm.changes WHERE ctid = ANY(ARRAY("
            " SELECT ctid FROM fleetlm.changes WHERE at < now() - make_interval(secs => $1) FOR UPDATE SKIP LOCKED))",
            float(CHANGES_KEPT_S),
        )

    async def halt(self, diverged: Diverged, *, from_pos: int) -> None:
        """Archive nothing more of a slot from a position on, until a person has looked."""
        await self._connection.execute(
            "INSERT INTO fleetlm.halted (volume_id, slot, from_pos, session, seq) VALUES ($1, $2, $3, $4, $5)"
            " ON CONFLICT DO NOTHING",
            self._volume.volume_id, diverged.slot, from_pos, diverged.session, diverged.seq,
        )  # fmt: skip

    async def quarantine(self, pos: int, record: Slotted, *, reason: str) -> None:
        """Keep a record that PostgreSQL refuses, with its words; readers get its message from there."""
        await self._connection.execute(
            "INSERT INTO fleetlm.quarantine (volume_id, pos, session, seq, reason, record, body)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
            self._volume.volume_id, pos, record.session.encode(), getattr(record, "seq", 0), reason, encode(record),
            record.json if isinstance(record, Message) else None,
        )  # fmt: skip

    async def _lock_sessions(self, rows: Rows) -> dict[bytes, int]:
        """The last archived seq of each session; their rows are made and locked, always in one order."""
        names = sorted(rows.sessions)
        await self._connection.execute(
            "INSERT INTO fleetlm.sessions (session, slot, inserted_at_us)"
            " SELECT * FROM unnest($1::bytea[], $2::integer[], $3::bigint[]) ON CONFLICT DO NOTHING",
            names,
            [rows.sessions[name].slot for name in names],
            [rows.sessions[name].inserted_at_us for name in names],
        )
        found = await self._connection.fetch(
            "SELECT session, last_seq FROM fleetlm.sessions WHERE session = ANY($1::bytea[]) ORDER BY session"
            " FOR UPDATE",
            names,
        )
        return {row["session"]: row["last_seq"] for row in found}

    async def _without_archived(self, rows: Rows, archived: dict[bytes, int]) -> list[Message]:
        """Messages that are not there yet; those that are must be the same."""
        suspects = [place for place in rows.messages if place[1] <= archived[place[0]]]
        if not suspects:
            return list(rows.messages.values())
        there = await self._connection.fetch(
            "SELECT m.session, m.seq, m.body FROM fleetlm.messages m"
            " JOIN unnest($1::bytea[], $2::bigint[]) AS asked(session, seq) USING (session, seq)",
            [session for session, _ in suspects],
            [seq for _, seq in suspects],
        )
        known: set[tuple[bytes, int]] = set()
        for row in there:
            place = (row["session"], row["seq"])
            message = rows.messages[place]
            if row["body"] != message.json:
                raise Diverged(slot=message.slot, session=place[0], seq=place[1])
            known.add(place)
        return [message for place, message in rows.messages.items() if place not in known]

    async def _copy(self, messages: list[Message]) -> None:
        await self._connection.copy_records_to_table(
            "messages",
            schema_name="fleetlm",
            columns=_COLUMNS,
            records=[
                (
                    each.session.encode(),
                    each.seq,
                    each.inserted_at_us,
                    sender_of(each),
                    each.key.encode(),
                    each.content_hash,
                    each.json,
                )
                for each in messages
            ],
        )

    async def _update_sessions(self, rows: Rows) -> None:
        items = sorted(rows.sessions.items())
        await self._connection.execute(
            "UPDATE fleetlm.sessions AS s SET last_seq = greatest(s.last_seq, n.last_seq),"
            " first_seq = CASE WHEN s.first_seq = 0 OR n.first_seq BETWEEN 1 AND s.first_seq THEN n.first_seq"
            " ELSE s.first_seq END,"
            " inserted_at_us = CASE WHEN s.inserted_at_us = 0 OR n.inserted_at_us BETWEEN 1 AND s.inserted_at_us"
            " THEN n.inserted_at_us ELSE s.inserted_at_us END, metadata = coalesce(n.metadata, s.metadata),"
            " active_at_us = greatest(s.active_at_us, n.active_at_us)"
            " FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bytea[], $6::bigint[])"
            " AS n(session, first_seq, last_seq, inserted_at_us, metadata, active_at_us) WHERE s.session = n.session",
            [session for session, _ in items],
            [row.first_seq for _, row in items],
            [row.last_seq for _, row in items],
            [row.inserted_at_us for _, row in items],
            [row.metadata for _, row in items],
            [row.active_at_us for _, row in items],
        )

    async def _update_participants(self, rows: Rows) -> None:
        places = sorted({*rows.sent, *rows.read})
        if places:
            await self._connection.execute(
                "INSERT INTO fleetlm.participants AS p (participant, session, sent_seq, read_seq)"
                " SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::bigint[])"
                " ON CONFLICT (participant, session) DO UPDATE SET sent_seq = greatest(p.sent_seq, excluded.sent_seq),"
                " read_seq = greatest(p.read_seq, excluded.read_seq)",
                [participant for participant, _ in places],
                [session for _, session in places],
                [rows.sent.get(place, 0) for place in places],
                [rows.read.get(place, 0) for place in places],
            )

    async def _move(self, from_pos: int, to_pos: int) -> None:
        """Also when the position stays: nobody writes for a volume that a later term has taken over."""
        moved = await self._connection.fetchval(
            "UPDATE fleetlm.positions SET pos = $3, updated_at = now()"
            " WHERE volume_id = $1 AND pos = $2 AND term = $4 RETURNING 1",
            self._volume.volume_id, from_pos, to_pos, self._volume.term,
        )  # fmt: skip
        if moved is None:
            raise Superseded(f"the position of volume {self._volume.volume_id} is not {from_pos}, or not ours any more")
