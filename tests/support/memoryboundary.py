"""A `Boundary` in memory, with the semantics of the real one: order, keys, expected_seq, cursors, gaps, full sinks.

Promise: what it answers a real ring could answer. What tests need to steer stands in a few plain fields: `gate` holds
answers back, `refusal` refuses, `refusal_at_the_door` refuses appends before they are queued, `trim` forgets old
messages, `archived` takes the archive away, `lose` forgets what changed in it. Must not be done here: failing by
itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.clock import iso_utc
from fleetlm_common.errors import Conflict, FleetError, IdempotencyConflict, Invalid, NotFound
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import PAGE_BYTES_MAX
from fleetlm_common.ops import Health
from fleetlm_gateway.boundary import AppendDone, Boundary, FromCursor, FromTail, Sink, Start
from fleetlm_gateway.jsontext import encode

EPOCH: Final = 7
PAGE: Final = 100
"""Messages of one delivery during replay."""


class _Sender(msgspec.Struct):
    sender_id: str


@dataclass
class _Session:
    name: str
    messages: list[bytes] = field(default_factory=list)
    keys: dict[str, tuple[rpc.Ack, bytes]] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)
    places: set[MemoryPlace] = field(default_factory=set)
    metadata: bytes = b"{}"
    exists: bool = False
    earliest: int = 1
    last: int = 0
    active_us: int = 0

    def message(self, seq: int) -> bytes:
        return self.messages[seq - self.earliest]

    def sender(self, seq: int) -> str:
        return msgspec.json.decode(self.message(seq), type=_Sender).sender_id

    def wrote(self, participant: str) -> bool:
        return any(self.sender(seq) == participant for seq in range(self.earliest, self.last + 1))


def _page(session: _Session, first_seq: int) -> list[bytes]:
    """Messages from `first_seq`: at most `PAGE` of them and about `PAGE_BYTES_MAX`, at least one."""
    page: list[bytes] = []
    size = 0
    for seq in range(first_seq, min(first_seq + PAGE, session.last + 1)):
        page.append(session.message(seq))
        size += len(page[-1])
        if size >= PAGE_BYTES_MAX:
            break
    return page


class MemoryPlace:
    """A `Subscription`."""

    def __init__(self, session: _Session, info: rpc.InfoOk, cursor: int, sink: Sink) -> None:
        self.info = info
        self._session = session
        self._cursor = cursor
        self._sink: Sink | None = sink
        self._begun = self._caught_up = False
        self.refusals = 0

    def begin(self) -> None:
        """Start; pushes within this call, as the product does: a join's reply after it would be late."""
        assert not self._begun, "begin is called once"
        self._begun = True
        self._session.places.add(self)
        self.pump()

    def resume(self) -> None:
        """Go on."""
        asyncio.get_running_loop().call_soon(self.pump)

    def close(self) -> None:
        """End."""
        self._sink = None
        self._session.places.discard(self)

    def end(self, reason: str) -> None:
        """Have it end by itself."""
        sink = self._sink
        self.close()
        if sink is not None:
            sink.closed(reason)

    def told(self, participant: str, seq: int) -> None:
        """A read cursor moved."""
        if self._sink is not None and self._begun:
            self._sink.read(participant, seq)

    def pump(self) -> None:
        """Deliver what there is, until the sink is full."""
        session = self._session
        while self._sink is not None and self._begun:
            if self._cursor + 1 < session.earliest:
                missing = rpc.Gap("trimmed", self._cursor + 1, session.earliest, session.earliest, session.last)
                self._cursor = session.earliest - 1
                self._sink.gap(missing)
            elif self._cursor < session.last:
                page = _page(session, self._cursor + 1)
                if not self._sink.deliver(self._cursor + 1, len(page), b",".join(page)):
                    self.refusals += 1
                    return
                self._cursor += len(page)
            else:
                if not self._caught_up:
                    self._caught_up = True
                    self._sink.caught_up(self._cursor)
                return


class MemoryBoundary(Boundary):
    """The inner half, in memory."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal: FleetError | None = None
        self.refusal_at_the_door: FleetError | None = None
        self.health = Health(ok=True, reason="Ready")
        self.reads_under_way = 0
        self.reads_at_once = 0
        self.archived = True
        self._changes: list[str] = []
        """Sessions in the order in which they changed."""
        self._lost = False
        self.asked = 0
        """Questions to the archive."""
        self._all: dict[str, _Session] = {}
        self._now_us = 1_700_000_000_000_000
        self._appending: asyncio.Queue[tuple[SessionId, list[rpc.Draft], int | None, AppendDone]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        """Of the ring."""
        return EPOCH

    def ready(self) -> Health:
        """As told."""
        return self.health

    async def start(self) -> None:
        """Take appends."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Take no more."""
        if self._worker is not None:
            self._worker.cancel()

    def session(self, name: str) -> _Session:
        """The session's state, for tests."""
        return self._all.setdefault(name, _Session(name))

    def trim(self, name: str, earliest: int) -> None:
        """Forget what lies before `earliest`."""
        session = self.session(name)
        del session.messages[: earliest - session.earliest]
        session.earliest = earliest

    async def _work(self) -> None:
        while True:
            session, drafts, expected_seq, done = await self._appending.get()
            await self.gate.wait()
            try:
                acks = self._append(self.session(session), drafts, expected_seq)
            except FleetError as error:
                done(error)
            else:
                done(acks)
            for place in list(self.session(session).places):
                place.pump()

    def _append(self, session: _Session, drafts: list[rpc.Draft], expected_seq: int | None) -> list[rpc.Ack]:
        if self.refusal is not None:
            raise self.refusal
        known = [session.keys.get(draft.key) for draft in drafts]
        for draft, found in zip(drafts, known, strict=True):
            if found is not None and found[1] != draft.fragment:
                raise IdempotencyConflict("the key was used for other content", field="idempotency_key")
        if all(known):
            return [rpc.Ack(found[0].seq, found[0].id, found[0].inserted_at, True) for found in known if found]
        if expected_seq is not None and expected_seq != session.last:
            raise Conflict("others wrote", last_seq=session.last)
        return [self._add(session, draft) for draft in drafts]

    def _add(self, session: _Session, draft: rpc.Draft) -> rpc.Ack:
        session.exists = True
        session.last += 1
        self._now_us += 1
        ack = rpc.Ack(session.last, f"00000000-0000-7000-8000-{session.last:012x}", iso_utc(self._now_us), False)
        session.messages.append(
            b'{"id":"%b","session_id":%b,"seq":%d,%b,"inserted_at":"%b"}'
            % (ack.id.encode(), encode(session.name), ack.seq, draft.fragment, ack.inserted_at.encode())
        )
        session.keys[draft.key] = ack, draft.fragment
        session.active_us = self._now_us
        self._changes.append(session.name)
        return ack

    def append_then(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None, done: AppendDone
    ) -> None:
        """Append; refused at the door when told to."""
        if self.refusal_at_the_door is not None:
            done(self.refusal_at_the_door)
        else:
            self._appending.put_nowait((session, drafts, expected_seq, done))

    async def append(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None
    ) -> list[rpc.Ack]:
        """Append."""
        answer: asyncio.Future[list[rpc.Ack] | FleetError] = asyncio.get_running_loop().create_future()

        def done(outcome: list[rpc.Ack] | FleetError) -> None:
            if not answer.done():
                answer.set_result(outcome)

        self.append_then(session, drafts, expected_seq=expected_seq, done=done)
        outcome = await answer
        if isinstance(outcome, FleetError):
            raise outcome
        return outcome

    async def _pass(self) -> None:
        await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal

    async def read(
        self,
        session: SessionId,
        *,
        after: int | None = None,
        before: int | None = None,
        tail: int | None = None,
        limit: int,
    ) -> rpc.Page:
        """A page."""
        self.reads_under_way += 1
        self.reads_at_once = max(self.reads_at_once, self.reads_under_way)
        try:
            await self._pass()
        finally:
            self.reads_under_way -= 1
        found = self.session(session)
        gap = None
        if after is not None:
            _refuse_ahead(found, after, "after")
            first, end = after + 1, min(after + limit, found.last)
            if first < found.earliest:
                gap = rpc.Gap("trimmed", first, found.earliest, found.earliest, found.last)
                first, end = found.earliest, min(found.earliest + limit - 1, found.last)
            more = end < found.last
        else:
            end = found.last if before is None else min(before - 1, found.last)
            first = max(found.earliest, end + 1 - (limit if tail is None else min(tail, limit)))
            more = first > found.earliest
        return rpc.Page(
            first, [found.message(seq) for seq in range(first, end + 1)], more, found.last, found.earliest, gap
        )

    async def info(self, session: SessionId, *, cursor: int | None = None) -> rpc.InfoOk:
        """The session."""
        await self._pass()
        found = self.session(session)
        if cursor is not None:
            _refuse_ahead(found, cursor, "cursor")
        return self._info(found)

    def _info(self, found: _Session) -> rpc.InfoOk:
        return rpc.InfoOk(found.exists, found.last, found.earliest, iso_utc(self._now_us), found.metadata, EPOCH)

    async def mark_read(self, session: SessionId, participant: str, seq: int) -> int:
        """Set a cursor."""
        await self._pass()
        found = self.session(session)
        _refuse_ahead(found, seq, "seq")
        if seq > found.cursors.get(participant, 0):
            found.cursors[participant] = seq
            self._changes.append(found.name)
            for place in list(found.places):
                place.told(participant, seq)
        return found.cursors.get(participant, 0)

    async def create(self, session: SessionId, metadata: bytes) -> rpc.Created:
        """Make a session."""
        await self._pass()
        found = self.session(session)
        if found.exists and found.metadata != metadata:
            raise Conflict("it exists with other metadata", reason="session_exists", last_seq=found.last)
        created, found.exists, found.metadata = not found.exists, True, metadata
        return rpc.Created(created, self._info(found))

    async def sessions(self, *, after: str, limit: int) -> list[tuple[str, rpc.InfoOk]]:
        """List."""
        await self._pass()
        names = sorted(
            (name for name, found in self._all.items() if found.exists and name.encode() > after.encode()),
            key=str.encode,
        )
        return [(name, self._info(self._all[name])) for name in names[:limit]]

    def lose(self) -> None:
        """What changed so far cannot be told any more."""
        self._lost = True

    async def _pass_archive(self) -> None:
        self.asked += 1
        await self._pass()
        if not self.archived:
            raise NotFound("this ring has no archive", reason="no_archive")

    def _of(self, participant: str) -> list[_Session]:
        return [found for found in self._all.values() if participant in found.cursors or found.wrote(participant)]

    def _entry(self, found: _Session, participant: str) -> rpc.InboxEntry:
        read = found.cursors.get(participant, 0)
        others = [
            seq for seq in range(max(read + 1, found.earliest), found.last + 1) if found.sender(seq) != participant
        ]
        return rpc.InboxEntry(
            found.name, found.last, found.active_us, found.active_us, found.metadata, read, len(others), False
        )

    async def sessions_of(
        self, participant: str, *, after: str, limit: int
    ) -> tuple[list[tuple[str, rpc.InfoOk]], bool]:
        """List."""
        await self._pass_archive()
        found = sorted((one for one in self._of(participant) if one.name > after), key=lambda one: one.name)
        return [(one.name, self._info(one)) for one in found[:limit]], len(found) > limit

    async def inbox(self, participant: str, *, after: rpc.InboxPlace | None, limit: int) -> rpc.InboxPage:
        """A page."""
        await self._pass_archive()
        found = sorted(self._of(participant), key=lambda one: (one.active_us, one.name), reverse=True)
        if after is not None:
            found = [one for one in found if (one.active_us, one.name) < (after.active_at_us, after.session)]
        return rpc.InboxPage([self._entry(one, participant) for one in found[:limit]], len(found) > limit)

    async def changes(self, participants: list[str], since: rpc.ChangesPlace) -> rpc.Changed:
        """News."""
        await self._pass_archive()
        now = rpc.ChangesPlace(len(self._changes) + 1, self._now_us)
        if since.xid == 0:
            return rpc.Changed([], now, lost=False)
        if self._lost:
            self._lost = False
            return rpc.Changed([], now, lost=True)
        changed = set(self._changes[since.xid - 1 :])
        pairs = [
            (participant, one.name, one.last, one.cursors.get(participant, 0))
            for participant in participants
            for one in self._of(participant)
            if one.name in changed
        ]
        return rpc.Changed(pairs, now, lost=False)

    async def entries(self, pairs: list[tuple[str, str]]) -> list[tuple[str, rpc.InboxEntry]]:
        """What inboxes show."""
        await self._pass_archive()
        return [(participant, self._entry(self._all[session], participant)) for participant, session in pairs]

    async def subscribe(self, session: SessionId, *, start: Start, sink: Sink) -> MemoryPlace:
        """Open a place."""
        await self._pass()
        found = self.session(session)
        cursor = found.last
        if isinstance(start, FromCursor):
            _refuse_ahead(found, start.seq, "cursor")
            cursor = start.seq
        elif isinstance(start, FromTail):
            cursor = max(found.earliest - 1, found.last - start.count)
        return MemoryPlace(found, self._info(found), cursor, sink)


def _refuse_ahead(found: _Session, seq: int, name: str) -> None:
    if seq > found.last:
        raise Invalid(f"{name} is beyond last_seq", reason="cursor_ahead", field=name, last_seq=found.last)
