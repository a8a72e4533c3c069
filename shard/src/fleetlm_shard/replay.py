"""Replay: one function that merges what holds a session's messages and proves that nothing is missing between them.

    ring (memory) → log (disk) → archive (PostgreSQL, if there is one)

Promise: a page's messages have contiguous seqs from `first_seq`; whatever lies between the asked cursor and them is
said as a `Gap`; a hole after some messages ends the page, so that the next one begins with the gap. Only what is
durable is shown. Must not be done here: ownership, looks at the term (the server does both before it answers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetlm_common.errors import Invalid
from fleetlm_common.limits import PAGE_BYTES_MAX, REPLAY_LIMIT_MAX
from fleetlm_common.rpc import Gap, Page, Read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetlm_shard.archive.cold import Cold
    from fleetlm_shard.log_types import Missing, StoredMessage
    from fleetlm_shard.sessions import Session, Sessions


class Replay:
    """Reads messages of sessions.

    Args:
        sessions: hot state.
        cold: where everything durable is: the log, and the archive behind it.
    """

    def __init__(self, sessions: Sessions, cold: Cold) -> None:
        self._sessions = sessions
        self._cold = cold
        self.pages = 0
        self.pages_cold = 0
        self.gaps = 0

    async def page(self, request: Read) -> Page:
        """One page.

        Raises:
            Invalid: `cursor_ahead` and malformed requests. A look must have been done after the request came in.
            LogError: the log cannot be read.
        """
        _check(request)
        self.pages += 1
        if request.after is not None:
            page = await self._after(request.session, request.after, request.limit)
        else:
            before = request.before
            if before is None:
                before = self._sessions.get(request.session).seq_durable + 1
            limit = request.limit if request.tail is None else min(request.tail, request.limit)
            page = await self._before(request.session, before, limit)
        self.gaps += page.gap is not None
        return page

    async def message(self, session_id: str, seq: int) -> bytes | None:
        """One durable message; None if it is not held any more.

        Raises:
            LogError: the log cannot be read.
        """
        session = self._sessions.get(session_id)
        if seq >= session.ring_first_seq:
            return session.ring[seq - session.ring_first_seq]
        found = await self._cold.read(
            session_id,
            first_seq=seq,
            last_seq=session.seq_durable,
            limit=1,
            bytes_max=PAGE_BYTES_MAX,
            slot=session.slot,
        )
        return found.messages[0].json if found.messages and found.messages[0].seq == seq else None

    async def earliest_seq(self, session_id: str) -> int:
        """The first seq that is still held; one past `seq_durable` if none is.

        Raises:
            LogError: the log cannot be read.
        """
        session = self._sessions.get(session_id)
        trim_pos = self._cold.trim_pos
        # What a source trimmed before the session came here may be in the archive.
        elsewhere = session.trimmed_seq > 0 and self._cold.shelves is not None
        if not elsewhere:
            if session.first_seq == 0 or (session.last_pos < trim_pos and self._cold.shelves is None):
                return session.seq_durable + 1
            if session.first_pos >= trim_pos:
                return session.first_seq
        if session.earliest_trim_pos != trim_pos:
            earliest = await self._cold.earliest(session_id, slot=session.slot)
            session = self._sessions.get(session_id)
            # A message that came meanwhile changes nothing: what is held only grows at the other end.
            session.earliest_seq = session.seq_durable + 1 if earliest is None else earliest
            session.earliest_trim_pos = trim_pos
        return session.earliest_seq

    async def _after(self, session_id: str, after: int, limit: int) -> Page:
        session = self._sessions.get(session_id)
        if after > session.seq_durable:
            raise cursor_ahead("after", after, last_seq=session.seq_durable)
        earliest_seq = await self.earliest_seq(session_id)
        session = self._sessions.get(session_id)
        first_seq = after + 1
        missing: Sequence[Missing] = ()
        jsons: list[bytes] = []
        if first_seq < session.ring_first_seq:
            self.pages_cold += 1
            found = await self._cold.read(
                session_id,
                first_seq=first_seq,
                last_seq=session.seq_durable,
                limit=limit,
                bytes_max=PAGE_BYTES_MAX,
                slot=session.slot,
            )
            session = self._sessions.get(session_id)
            run = _first_run(found.messages)
            first_seq, missing = run[0].seq if run else session.ring_first_seq, found.missing
            jsons = [message.json for message in run]
        if not jsons:
            jsons = _that_fit(session.ring_slice(first_seq, limit))
        last_seq = first_seq + len(jsons) - 1
        if last_seq == session.seq_durable:
            self._sessions.remember(session, jsons)
        return Page(
            first_seq=first_seq,
            messages=jsons,
            has_more=last_seq < session.seq_durable,
            last_seq=session.seq_durable,
            earliest_seq=earliest_seq,
            gap=_gap(session, after + 1, first_seq, earliest_seq, missing),
        )

    async def _before(self, session_id: str, before: int, limit: int) -> Page:
        """The messages directly before `before`; a hole below them is said as the page's gap."""
        earliest_seq = await self.earliest_seq(session_id)
        session = self._sessions.get(session_id)
        before = min(before, session.seq_durable + 1)
        hole_from = max(1, before - limit)
        missing: Sequence[Missing] = ()
        if hole_from >= session.ring_first_seq:
            jsons = _that_fit(session.ring_slice(hole_from, before - hole_from), newest=True)
            hole_from = before - len(jsons)
        else:
            self.pages_cold += 1
            asked_from, held, missing = await self._ending_at(session_id, hole_from, before, session.slot)
            session = self._sessions.get(session_id)
            jsons = [message.json for message in _last_run(held, before=before)]
            below = held[: len(held) - len(jsons)]
            hole_from = below[-1].seq + 1 if below else asked_from
            if before == session.seq_durable + 1:
                self._sessions.remember(session, jsons)
        first_seq = before - len(jsons)
        return Page(
            first_seq=first_seq,
            messages=jsons,
            has_more=min(hole_from, first_seq) > earliest_seq,
            last_seq=session.seq_durable,
            earliest_seq=earliest_seq,
            gap=_gap(session, hole_from, first_seq, earliest_seq, missing),
        )

    async def _ending_at(
        self, session_id: str, first_seq: int, before: int, slot: int
    ) -> tuple[int, list[StoredMessage], Sequence[Missing]]:
        """The seq from which it was looked, what is held from there up to `before` - 1, and the known holes.

        The log cuts a page that is too large at its newer end, which is the end we want: ask for fewer until it fits.
        """
        while True:
            found = await self._cold.read(
                session_id,
                first_seq=first_seq,
                last_seq=before - 1,
                limit=before - first_seq,
                bytes_max=PAGE_BYTES_MAX,
                slot=slot,
            )
            cut_short = found.has_more and bool(found.messages) and found.messages[-1].seq + 1 < before
            if not cut_short or first_seq + 1 >= before:
                # Where the beginning is missing the count reaches beyond what was asked for.
                return first_seq, [each for each in found.messages if each.seq < before], found.missing
            first_seq = max(first_seq + 1, before - max(1, len(found.messages) // 2))


def cursor_ahead(field: str, seq: int, *, last_seq: int) -> Invalid:
    """Somebody has seen a message that this ring does not hold: never paper over it."""
    return Invalid(
        f"{field} {seq} is beyond the session's last_seq {last_seq}",
        field=field,
        reason="cursor_ahead",
        last_seq=last_seq,
    )


def _check(request: Read) -> None:
    given = [name for name in ("after", "before", "tail") if getattr(request, name) is not None]
    if len(given) != 1:
        raise Invalid("exactly one of after, before and tail must be given", field="after")
    if not 1 <= request.limit <= REPLAY_LIMIT_MAX:
        raise Invalid(f"limit must be 1 to {REPLAY_LIMIT_MAX}", field="limit", limit=REPLAY_LIMIT_MAX)
    if getattr(request, given[0]) < (1 if given[0] == "before" else 0):
        raise Invalid(f"{given[0]} is too small", field=given[0])


def _first_run(messages: Sequence[StoredMessage]) -> list[StoredMessage]:
    """The leading messages whose seqs follow each other."""
    run: list[StoredMessage] = []
    for message in messages:
        if run and message.seq != run[-1].seq + 1:
            break
        run.append(message)
    return run


def _last_run(messages: Sequence[StoredMessage], *, before: int) -> list[StoredMessage]:
    """The trailing messages whose seqs end at `before` - 1 without a hole."""
    run: list[StoredMessage] = []
    for message in reversed(messages):
        if message.seq != before - 1 - len(run):
            break
        run.append(message)
    return run[::-1]


def _that_fit(messages: list[bytes], *, newest: bool = False) -> list[bytes]:
    """As many as a page may hold, at least one: the oldest, or the newest."""
    total_bytes = 0
    for count, json in enumerate(reversed(messages) if newest else messages):
        total_bytes += len(json)
        if count and total_bytes > PAGE_BYTES_MAX:
            return messages[-count:] if newest else messages[:count]
    return messages


def _gap(session: Session, from_seq: int, next_seq: int, earliest_seq: int, missing: Sequence[Missing]) -> Gap | None:
    """What is missing from `from_seq` to just before `next_seq`, if anything."""
    if from_seq >= next_seq:
        return None
    reason: str | None = "trimmed" if next_seq <= session.trimmed_seq + 1 else None
    reason = reason or next((hole.reason for hole in missing if hole.from_seq <= from_seq <= hole.to_seq), None)
    if reason is None:
        reason = "trimmed" if next_seq <= earliest_seq else "damaged"
    return Gap(
        reason=reason,
        from_seq=from_seq,
        next_seq=next_seq,
        earliest_seq=earliest_seq,
        last_seq=session.seq_durable,
    )
