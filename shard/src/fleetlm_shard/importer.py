"""The target's side of one move (docs/moves.md): bring everything over, say how far it is, confirm.

    pass (states of all sessions, what of each is missing) ─► rounds (what changed since) ─► Ready
    map says Sealing ─► `sealed` ─► last rounds ─► count and sum agree ─► CONFIRMED durable, looked at ─► Confirmed

Promise: what lies in our log of a slot is a true prefix of it, whatever becomes of the move, so nothing that is here is
asked for again; messages keep bytes, seq, key, hash and time; a hole at the source stays one. `Confirmed` is said after
the record of it is durable and the term was looked at, never before the source's own seal. One task runs it; cancelling
it leaves what is here for the next move. Must not be done here: opening slots (`ownership.py`, by the map).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fleetlm_common.control import MoveProgress
from fleetlm_common.errors import FleetError, Invalid
from fleetlm_common.ids import SessionId
from fleetlm_common.rpc import (
    Export,
    ExportChanged,
    Exported,
    ExportedAll,
    ExportedMessages,
    ExportMessages,
    ExportSealed,
    Hello,
    Kind,
    SessionState,
)
from fleetlm_shard.keys import KnownKey
from fleetlm_shard.log_types import LogBusy, LogDiskFull
from fleetlm_shard.peer import Peer, PeerLost
from fleetlm_shard.records import Imported, MoveConfirmed, SessionImported, SlotsReleased, imported, message_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Literal

    from fleetlm_common.clock import Clock
    from fleetlm_common.control import ShardEndpoint
    from fleetlm_common.ids import Slot
    from fleetlm_common.logs import Logger
    from fleetlm_common.ring import Move
    from fleetlm_shard.holdings import Holdings
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.log import Log
    from fleetlm_shard.sessions import Session, Sessions
    from fleetlm_shard.writes import Writes

STATES: Final = 500
"""Sessions asked for at once."""
PAGE_BYTES: Final = 256 * 1024
"""Of messages asked for at once by each of `PULLS_MAX`: together the 1 MiB in flight that bounds both sides' memory."""
PAGE_MESSAGES: Final = 500
"""The same, counted."""
PULLS_MAX: Final = 4
"""Requests for messages under way at once."""
TOGETHER_MAX: Final = 8
"""Sessions whose messages are asked for with one request: small ones cost a fraction of a request each."""
ROUND_S: Final = 0.1
"""Between two rounds, while the map says Copying: a seal then finds little that is missing."""
READY_S: Final = 0.25
"""A round that takes no longer than this will take no longer under the seal, either: the source may seal."""
RETRY_S: Final = 0.25
"""Between two tries to reach the source."""
BUSY_S: Final = 0.02
"""Our own log has as much to write as it can hold: clients come first."""
MISMATCHES_MAX: Final = 3
"""Count and sum may disagree once when a round was lost; that it happens again is a mistake of ours: say so."""


class GaveUp(Exception):
    """This move will not be done by us: a stable word, and words for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class _Again(Exception):
    """Begin with a new pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportParts:
    """What imports get from their shard."""

    log: Log
    writes: Writes
    sessions: Sessions
    keys: KeyWindow
    holdings: Holdings
    clock: Clock
    sleep: Callable[[float], Awaitable[None]]
    events: Logger
    slot_of: Callable[[SessionId], Slot]
    source_of: Callable[[Move], tuple[ShardEndpoint, Hello]]
    """Where the source is and how to introduce ourselves; raises PeerLost if nobody knows."""
    reader: Callable[[], str]
    """A name that nobody had before."""
    epoch: Callable[[], int]
    """Of the newest map."""
    synced: bool
    """The log's policy is to sync before it acknowledges."""
    changed: Callable[[], None]
    """Told when the state of a move is another one: it must be announced at once."""


class Import:
    """One move to here.

    Attributes:
        imported_messages: messages brought over by it.
        mismatches: times that count or sum were not the source's.
    """

    def __init__(self, move: Move, parts: ImportParts) -> None:
        self.move = move
        self._parts = parts
        self._slots = frozenset(move.slots)
        self._state: Literal["Copying", "Ready", "Confirmed", "Failed"] = "Copying"
        self._reason = ""
        self._message = ""
        self._behind = 0
        self._named: set[str] = set()
        self._here: dict[str, int] = {}
        """Session → last seq here, durably, of all that the source has named."""
        self._sealing = asyncio.Event()
        self.mismatches = 0
        self.imported_messages = 0
        self.imported_bytes = 0
        if move.state == "Sealing":
            self._sealing.set()

    def on_map(self, move: Move) -> None:
        """A newer map shows the move."""
        if move.state == "Sealing":
            self._sealing.set()

    @property
    def progress(self) -> MoveProgress:
        """What is announced."""
        return MoveProgress(
            id=self.move.id,
            state=self._state,
            done=len(self._here),
            total=len(self._named),
            behind=self._behind,
            reason=self._reason,
            message=self._message,
        )

    def _say(
        self, state: Literal["Copying", "Ready", "Confirmed", "Failed"], reason: str = "", words: str = ""
    ) -> None:
        if (state, reason) != (self._state, self._reason):
            self._parts.events.event("move.target", move=self.move.id, state=state, reason=reason, why=words)
            self._state, self._reason, self._message = state, reason, words
            self._parts.changed()

    def give_up(self, reason: str, words: str) -> None:
        """This move will not be done by us."""
        self._say("Failed", reason, words)

    async def run(self) -> None:
        """Do it; returns when it is confirmed or given up. Cancel-safe.

        Raises:
            LogStopped: the process is ending.
        """
        try:
            # A release of these slots, or an import that was cut off, may still be on its way to the disk.
            await self._parts.writes.all_settled()
            if self._is_confirmed():
                await self._shown()
                self._say("Confirmed")
                return
            await self._forget_damaged()
            while not await self._try():
                await self._parts.sleep(RETRY_S)
        except GaveUp as error:
            self.give_up(error.reason, error.message)

    async def _try(self) -> bool:
        """One connection; whether the move is confirmed.

        Raises:
            GaveUp: no further try makes sense.
        """
        parts = self._parts
        try:
            endpoint, hello = parts.source_of(self.move)
            peer = await Peer.connect(endpoint, hello)
        except (PeerLost, FleetError) as error:
            self._say("Copying", "unreachable", str(error))
            return False
        try:
            await self._bring_all(peer)
        except _Again:
            return False
        except LogDiskFull as error:
            raise GaveUp("disk_full", str(error)) from error
        except Invalid as error:
            # It restarted, or does not know the move yet (or any more: then our map will say so, too).
            self._say("Copying", "", error.message)
            return False
        except (PeerLost, FleetError) as error:
            self._say("Copying", "unreachable", str(error))
            return False
        finally:
            peer.close()
        return True

    def _is_confirmed(self) -> bool:
        confirmed = self._parts.holdings.confirmed
        return all(confirmed.get(slot) == self.move.id for slot in self._slots)

    async def _forget_damaged(self) -> None:
        """What was lost of an earlier copy nobody would ask the source for: drop such a copy, and begin anew."""
        parts = self._parts
        damaged_pos = max((each.to_pos for each in parts.log.damage), default=0)
        hurt = sorted(slot for slot in self._slots if parts.log.released_pos(slot) < damaged_pos)
        if hurt:
            record = SlotsReleased([int(slot) for slot in hurt])

            def visible(_: int) -> None:
                parts.sessions.release(self._slots.intersection(hurt))
                parts.holdings.apply(record)

            parts.writes.own(record, visible)
            await parts.writes.all_settled()

    # Bringing over ---------------------------------------------------------------------------------------------------

    async def _bring_all(self, peer: Peer) -> None:
        reader = self._parts.reader()
        await self._pass(peer, reader)
        number, settled = 0, False
        while not settled:
            sealed = self._sealing.is_set()
            everything = await self._hear_all(peer, reader) if sealed else None
            number = await self._rounds(peer, reader, number)
            if everything is not None:
                await self._confirm(everything)
                settled = True
            elif not self._sealing.is_set():
                await self._pause()

    async def _pause(self) -> None:
        """Until the next round, or until the map says Sealing."""
        waiting = asyncio.ensure_future(self._sealing.wait())
        slept = asyncio.ensure_future(self._parts.sleep(ROUND_S))
        try:
            await asyncio.wait({waiting, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            slept.cancel()

    async def _pass(self, peer: Peer, reader: str) -> None:
        """Every session of the slots: its state, and what of its messages is missing here."""
        after, more = "", True
        while more:
            request = Export(self.move.id, self._parts.epoch(), reader, after, STATES)
            found = await peer.ask(Kind.EXPORT, request, Kind.EXPORTED, Exported)
            await self._bring(peer, found.sessions)
            if found.more and found.after <= after:
                raise PeerLost("the source's pass does not go on")
            after, more = found.after, found.more

    async def _rounds(self, peer: Peer, reader: str, number: int) -> int:
        """What changed since; again while it was a full answer. Returns the number of the last round."""
        while True:
            number += 1
            request = ExportChanged(self.move.id, self._parts.epoch(), reader, number)
            began_s = self._parts.clock.monotonic_s()
            found = await peer.ask(Kind.EXPORT_CHANGED, request, Kind.EXPORTED, Exported)
            await self._bring(peer, found.sessions)
            if not found.more:
                if self._parts.clock.monotonic_s() - began_s <= READY_S:
                    self._say("Ready")
                return number

    async def _bring(self, peer: Peer, states: list[SessionState]) -> None:
        """Bring these sessions to their state, some at once; durable when it returns."""
        todo = deque(states)
        failed: list[Exception] = []
        self._named.update(state.session for state in states)
        self._behind = len(todo)
        together = min(TOGETHER_MAX, -(-len(states) // PULLS_MAX))

        async def worker() -> None:
            while todo and not failed:
                try:
                    await self._sessions(peer, [todo.popleft() for _ in range(min(together, len(todo)))])
                except (PeerLost, FleetError, LogDiskFull, GaveUp, _Again) as error:
                    failed.append(error)
                self._behind = len(todo)

        workers = [asyncio.ensure_future(worker()) for _ in range(min(PULLS_MAX, len(states)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()
        if failed:
            raise failed[0]
        await self._parts.writes.all_settled()

    async def _sessions(self, peer: Peer, states: list[SessionState]) -> None:
        """Bring some sessions to their state: with one request if they are small, page by page if not."""
        wanted: deque[SessionState] = deque()
        for state in states:
            if self._last_seq_here(state) < state.last_seq:
                wanted.append(state)
            else:
                await self._take_state(state)
        while wanted:
            (session, after), *others = [(state.session, self._last_seq_here(state)) for state in wanted]
            request = ExportMessages(
                self.move.id, self._parts.epoch(), session, after, PAGE_MESSAGES, PAGE_BYTES, others
            )
            page = await peer.ask(Kind.EXPORT_MESSAGES, request, Kind.EXPORTED_MESSAGES, ExportedMessages)
            for each in (page, *page.others):
                if not wanted:
                    raise PeerLost("the source answers more sessions than it was asked for")
                if not await self._take_page(wanted[0], each):
                    await self._parts.writes.all_settled()
                    break
                await self._take_state(wanted.popleft())

    def _last_seq_here(self, state: SessionState) -> int:
        if self._parts.slot_of(SessionId(state.session)) not in self._slots:
            raise PeerLost(f"the source names session {state.session!r}, which is not in the move's slots")
        after = self._parts.sessions.get(state.session).seq_assigned
        if after > state.last_seq:
            raise GaveUp(
                "diverged", f"session {state.session!r} has seq {after} here and {state.last_seq} at the source"
            )
        return after

    async def _take_page(self, state: SessionState, page: ExportedMessages) -> bool:
        """Take in what it has up to the state; whether the session needs no other page."""
        after = self._last_seq_here(state)
        for body, windowed in zip(page.bodies, page.windowed, strict=True):
            record = self._checked(body, state, after, windowed=windowed)
            if record.seq > state.last_seq:
                return True
            await self._append(record)
            after = record.seq
        return after >= state.last_seq or not page.more

    def _checked(self, body: bytes, state: SessionState, after: int, *, windowed: bool) -> Imported:
        try:
            record = imported(self._parts.slot_of(SessionId(state.session)), body, windowed=windowed)
        except ValueError as error:
            raise PeerLost(f"a message of session {state.session!r} cannot be read: {error}") from error
        if record.session != state.session or record.seq <= after:
            raise PeerLost(f"the source answers seq {record.seq} of {record.session!r} after {after}")
        return record

    async def _append(self, record: Imported) -> None:
        parts = self._parts
        session = parts.sessions.get(record.session)
        assert record.seq > session.seq_assigned, "one task brings a session over"

        def visible(pos: int) -> None:
            parts.sessions.imported_durable(session, seq=record.seq, pos=pos, at_us=record.inserted_at_us)
            parts.holdings.apply(record)
            self.imported_messages += 1
            self.imported_bytes += len(record.json)

        pos = await self._queue(record, session, visible)
        session.seq_assigned = record.seq
        if record.windowed:
            known = KnownKey(record.seq, record.inserted_at_us, record.content_hash, message_id(record.json))
            parts.keys.take(record.session, record.key, known, pos=pos, at_s=parts.clock.monotonic_s())

    async def _queue(self, record: Imported | SessionImported, session: Session, visible: Callable[[int], None]) -> int:
        """Queue a record behind our clients' own.

        Raises:
            LogDiskFull: what is left is for our own clients: a move that fails harms nobody, a full disk does.
        """
        if not self._parts.log.spacious:
            raise LogDiskFull(f"{self._parts.log.stats.free_bytes} bytes are free: they are left to clients")
        # Held while we wait: the session must be the one that everybody finds.
        session.pending += 1
        try:
            while True:
                try:
                    return self._parts.writes.other(record, session, visible)
                except LogBusy:
                    await self._parts.sleep(BUSY_S)
        finally:
            session.pending -= 1

    async def _take_state(self, state: SessionState) -> None:
        """All of the session but its messages, if it is not here already."""
        parts = self._parts
        session = parts.sessions.get(state.session)
        trimmed_seq = max(session.trimmed_seq, state.earliest_seq - 1)
        record = SessionImported(
            session.slot,
            state.session,
            state.last_seq,
            trimmed_seq,
            state.inserted_at_us,
            state.metadata,
            state.cursors,
        )

        def visible(pos: int) -> None:
            parts.sessions.state_durable(session, record, pos)
            parts.holdings.apply(record)
            self._here[record.session] = session.seq_durable

        there = (state.last_seq, trimmed_seq, state.inserted_at_us, state.metadata, state.cursors)
        here = (
            session.seq_durable, session.trimmed_seq, session.inserted_at_us, session.metadata, session.cursors
        )  # fmt: skip
        if here == there and not session.pending:
            self._here[state.session] = session.seq_durable
        else:
            await self._queue(record, session, visible)

    # Confirming ------------------------------------------------------------------------------------------------------

    async def _hear_all(self, peer: Peer, reader: str) -> ExportedAll:
        request = ExportSealed(self.move.id, self._parts.epoch(), reader)
        return await peer.ask(Kind.EXPORT_SEALED, request, Kind.EXPORTED_ALL, ExportedAll)

    async def _confirm(self, everything: ExportedAll) -> None:
        parts = self._parts
        here = ExportedAll(len(self._here), sum(self._here.values()))
        if here != everything:
            self.mismatches += 1
            words = f"{here.sessions} sessions and {here.total} messages here, {everything} at the source"
            parts.events.event("move.mismatch", level="error", move=self.move.id, why=words)
            self._here.clear()
            if self.mismatches >= MISMATCHES_MAX:
                raise GaveUp("mismatch", words)
            raise _Again
        record = MoveConfirmed(self.move.id, parts.epoch(), list(self.move.slots))
        parts.writes.own(record, lambda _: parts.holdings.apply(record))
        await parts.writes.all_settled()
        await self._shown()
        self._say("Confirmed")

    async def _shown(self) -> None:
        if self._parts.synced:
            await self._parts.log.look()
        else:
            await self._parts.log.sync()
