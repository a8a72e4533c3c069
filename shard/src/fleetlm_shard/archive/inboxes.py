"""Sessions by participant: listing, inboxes with unread counts, and what changed in them; answered from the archive.

    participated   ids of a participant's sessions, in their order
    inbox          the same with counts, newest activity first
    changes        which sessions of some participants were archived since a place in the stream of transactions
    entries        what an inbox shows of given sessions

Any shard answers for the whole ring: the archive is one. Promise: an answer is one moment of the archive. Nothing that
was archived after a place is missing from the changes since it: a place is the oldest transaction that had not ended
then, so what others had begun is told afterwards (some of it twice). Each page is bounded in sessions, bytes and
messages counted. Must not be done here: who may ask (the gateway), messages (`library.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetlm_common.errors import Invalid, NotFound
from fleetlm_common.limits import INBOX_LIMIT_MAX, PAGE_BYTES_MAX, REPLAY_LIMIT_MAX, SEQ_MAX, UNREAD_MAX
from fleetlm_common.rpc import (
    Changed,
    ChangesPlace,
    EntriesOk,
    InboxEntry,
    InboxPage,
    ParticipatedOk,
)
from fleetlm_shard.archive.store import CHANGES_KEPT_S

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from fleetlm_common.rpc import Changes, Entries, Inbox, Participated
    from fleetlm_shard.archive.asking import Asker

PARTICIPANTS_MAX: Final = 1000
"""Of one CHANGES."""
CHANGED_MAX: Final = 5000
"""Pairs of one CHANGED; past it the inboxes are read anew."""
LOST_AFTER_S: Final = CHANGES_KEPT_S - 100
"""A place so old is lost: with a transaction's longest life (a minute) before its rows may be deleted."""

_PARTICIPATED: Final = (
    "SELECT session FROM fleetlm.participants WHERE participant = $1 AND session > $2 ORDER BY session LIMIT $3"
)
_INBOX: Final = (
    "SELECT $1::bytea AS participant, p.read_seq, s.session, s.last_seq, s.inserted_at_us, s.active_at_us, s.metadata"
    " FROM fleetlm.participants p JOIN fleetlm.sessions s USING (session)"
    " WHERE p.participant = $1 AND (s.active_at_us, s.session) < ($2, $3)"
    " ORDER BY s.active_at_us DESC, s.session DESC LIMIT $4"
)
_ENTRIES: Final = (
    "SELECT p.participant, p.read_seq, s.session, s.last_seq, s.inserted_at_us, s.active_at_us, s.metadata"
    " FROM unnest($1::bytea[], $2::bytea[]) AS asked(participant, session)"
    " JOIN fleetlm.participants p USING (participant, session) JOIN fleetlm.sessions s USING (session)"
)


_COUNTED: Final = (
    "SELECT one.*, count.seen, count.unread FROM (SESSIONS) AS one CROSS JOIN LATERAL ("
    " SELECT count(*) AS seen, count(*) FILTER (WHERE sender <> one.participant) AS unread FROM ("
    "  SELECT m.sender FROM fleetlm.messages m WHERE one.read_seq < one.last_seq"
    "  AND m.session = one.session AND m.seq > one.read_seq ORDER BY m.seq LIMIT LOOKED"
    " ) AS looked) AS count"
).replace("LOOKED", str(UNREAD_MAX + 1))
"""Rows of SESSIONS with their unread messages counted."""
_INBOX_COUNTED: Final = _COUNTED.replace("SESSIONS", _INBOX) + " ORDER BY one.active_at_us DESC, one.session DESC"
_ENTRIES_COUNTED: Final = _COUNTED.replace("SESSIONS", _ENTRIES)
_NOW: Final = (
    "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xid,"
    " (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS at_us"
)
_CHANGED: Final = (
    "SELECT DISTINCT p.participant, p.session, s.last_seq, p.read_seq FROM fleetlm.changes c"
    " CROSS JOIN LATERAL unnest(c.sessions) AS changed(session)"
    " JOIN fleetlm.participants p ON p.session = changed.session JOIN fleetlm.sessions s ON s.session = p.session"
    " WHERE c.xid >= $1::text::xid8 AND p.participant = ANY($2::bytea[]) LIMIT $3"
)


class Inboxes:
    """What is asked about participants.

    `asker` is None where there is no archive: then every question is refused. It is set before anything is served.
    """

    def __init__(self) -> None:
        self.asker: Asker | None = None

    async def participated(self, request: Participated) -> ParticipatedOk:
        """Ids of sessions, ascending by their bytes."""
        _check_limit(request.limit, REPLAY_LIMIT_MAX + 1)

        async def page(connection: Connection[Record]) -> ParticipatedOk:
            rows = await connection.fetch(
                _PARTICIPATED, request.participant.encode(), request.after.encode(), request.limit
            )
            return ParticipatedOk([row["session"].decode() for row in rows])

        return await self._asker().ask(page)

    async def inbox(self, request: Inbox) -> InboxPage:
        """A page, newest activity first."""
        _check_limit(request.limit, INBOX_LIMIT_MAX)
        place = (
            (SEQ_MAX, b"") if request.after is None else (request.after.active_at_us, request.after.session.encode())
        )

        async def page(connection: Connection[Record]) -> InboxPage:
            # One more than is shown: only that proves that there is more.
            rows = await connection.fetch(_INBOX_COUNTED, request.participant.encode(), *place, request.limit + 1)
            entries: list[InboxEntry] = []
            size_bytes = 0
            for row in rows[: request.limit]:
                if size_bytes >= PAGE_BYTES_MAX:
                    break
                entries.append(_entry(row))
                size_bytes += len(row["metadata"])
            return InboxPage(entries, more=len(rows) > len(entries))

        return await self._asker().ask(page)

    async def changes(self, request: Changes) -> Changed:
        """What was archived since a place."""
        if len(request.participants) > PARTICIPANTS_MAX:
            raise Invalid(f"more than {PARTICIPANTS_MAX} participants", field="participants", limit=PARTICIPANTS_MAX)
        since = request.since

        async def look(connection: Connection[Record]) -> Changed:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                row = await connection.fetchrow(_NOW)
                assert row is not None
                now = ChangesPlace(row["xid"], row["at_us"])
                if since == ChangesPlace(0, 0):
                    return Changed([], now, lost=False)
                # A database that was put back to an earlier state begins its transactions anew.
                if since.xid > now.xid or now.at_us - since.at_us > LOST_AFTER_S * 1_000_000:
                    return Changed([], now, lost=True)
                names = [name.encode() for name in request.participants]
                rows = await connection.fetch(_CHANGED, str(since.xid), names, CHANGED_MAX + 1)
            if len(rows) > CHANGED_MAX:
                return Changed([], now, lost=True)
            pairs = [
                (each["participant"].decode(), each["session"].decode(), each["last_seq"], each["read_seq"])
                for each in rows
            ]
            return Changed(pairs, now, lost=False)

        return await self._asker().ask(look)

    async def entries(self, request: Entries) -> EntriesOk:
        """What inboxes show of these sessions now."""
        _check_limit(len(request.pairs), INBOX_LIMIT_MAX)

        async def page(connection: Connection[Record]) -> EntriesOk:
            rows = await connection.fetch(
                _ENTRIES_COUNTED,
                [participant.encode() for participant, _ in request.pairs],
                [session.encode() for _, session in request.pairs],
            )
            return EntriesOk([(row["participant"].decode(), _entry(row)) for row in rows])

        return await self._asker().ask(page)

    def _asker(self) -> Asker:
        if self.asker is None:
            raise NotFound("this ring has no archive, which lists sessions by participant", reason="no_archive")
        return self.asker


def _check_limit(limit: int, most: int) -> None:
    if not 1 <= limit <= most:
        raise Invalid(f"limit must be 1 to {most}", field="limit", limit=most)


def _entry(row: Record) -> InboxEntry:
    return InboxEntry(
        session=row["session"].decode(),
        last_seq=row["last_seq"],
        inserted_at_us=row["inserted_at_us"],
        active_at_us=row["active_at_us"],
        metadata=row["metadata"],
        last_read_seq=row["read_seq"],
        unread=min(row["unread"], UNREAD_MAX),
        unread_more=row["seen"] > UNREAD_MAX,
    )
