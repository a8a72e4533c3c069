"""The source's side of moves (docs/moves.md): what it tells the targets, and its seal.

    map shows a move away ──► tracker: which sessions changed since they were told, what each one's last seq is
    map shows it sealing  ──► SEALED in the log, behind everything that was queued; durable ──► `sealed` is answered

Promise: nothing is told that was not synced and looked at; `sealed` is answered only when SEALED is durable, and then
counts every session of the slots. Reads are paced and served one at a time: appends come first. A tracker that a reader
does not know (we restarted, another one began) says so; nothing is guessed. Must not be done here: what is sealed
(`ownership.py` decides), the target's side (`importer.py`).
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_common.errors import Invalid, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import PAGE_BYTES_MAX, REPLAY_LIMIT_MAX
from fleetlm_common.rpc import (
    Export,
    ExportChanged,
    Exported,
    ExportedAll,
    ExportedMessages,
    ExportMessages,
    ExportSealed,
    SessionState,
)
from fleetlm_shard.log_types import LogStopped
from fleetlm_shard.reader import Wanted
from fleetlm_shard.records import SlotsSealed, message_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from fleetlm_common.ids import ShardName, Slot
    from fleetlm_common.ring import Move, RingMap
    from fleetlm_shard.holdings import Holdings
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.log import Log
    from fleetlm_shard.log_types import ReadResult
    from fleetlm_shard.sessions import Session, Sessions
    from fleetlm_shard.writes import Writes

STATES_MAX: Final = 1000
"""Sessions of one answer."""
STATES_AT_ONCE: Final = 16
"""Sessions of which rows are looked up in one go: half a millisecond."""
OTHERS_MAX: Final = 7
"""Further sessions whose messages one answer may hold: with 31 it is no faster, and appends wait longer for it."""
SCAN_NAMES: Final = 512
"""Names looked at in one go: a fraction of a millisecond."""
SCAN_PAGE_NAMES: Final = 16 * SCAN_NAMES
"""Names looked at for one answer: on a shard of a million sessions most of them are of other slots."""
PACE: Final = 1.0
"""Pause after an answer, as a part of the time that it took: exports take at most about half of what they could."""
PACE_S_MAX: Final = 0.05
"""Longest pause: a disk that is slow needs none."""
PACE_S_MIN: Final = 0.001
"""Shortest pause while somebody appends: without it their answers took a fifth longer, with it a twentieth."""
WRITING_S: Final = 1.0
"""So long after an append somebody appends."""


class Tracker:
    """What one move away from here has been told, and what it has not."""

    def __init__(self, move: Move) -> None:
        self.id = move.id
        self.slots = frozenset(move.slots)
        self.reader = ""
        self.round = 0
        self.complete = False
        """The pass of `reader` has named every session."""
        self.told: dict[str, int] = {}
        """Session → its last seq, of all that were named by a pass or changed: complete when a pass is."""
        self.dirty: dict[str, None] = {}
        """Changed since the last round was answered, in that order."""
        self.pending: set[str] = set()
        """In the answer to the last round, which may not have arrived."""
        self.changed: list[str] = []
        """Sessions in memory that no checkpoint had when the pass began, ascending."""
        self.sealing = False
        self.sealed = asyncio.Event()
        self.over = False

    def note(self, session: Session) -> None:
        """A session of the slots changed, durably."""
        self.dirty[session.id] = None
        self.told[session.id] = session.seq_durable

    def begin(self, reader: str, changed: list[str]) -> None:
        """A pass begins; what changes from now on is in a round after it."""
        self.reader, self.round, self.complete = reader, 0, False
        self.changed = changed

    def check(self, reader: str) -> None:
        """Refuse a reader that we know nothing of."""
        if reader != self.reader:
            raise Invalid("this source knows no pass of that reader", field="reader", reason="unknown_round")

    def next_round(self, number: int) -> list[str]:
        """What changed since round `number` - 1 was answered, at most `STATES_MAX` sessions."""
        if number == self.round + 1 and self.complete:
            self.pending.clear()
            self.round = number
        elif number != self.round or number == 0:
            raise Invalid(f"round {number} does not follow {self.round}", field="round", reason="unknown_round")
        fresh = (name for name in self.dirty if name not in self.pending)
        self.pending.update(list(islice(fresh, STATES_MAX - len(self.pending))))
        for name in self.pending:
            self.dirty.pop(name, None)
        return sorted(self.pending)


class Exporter:
    """All moves away from this shard.

    Args:
        shard: this shard's name.
        log: where the messages are.
        writes: the way into the log.
        sessions: hot state.
        keys: the idempotency window.
        holdings: what the log says about slots.
        slot_of: the slot of a session id in this ring.
        refresh: reads the map if the given epoch is newer than ours.
        synced: the log's policy is to sync before it acknowledges.
        monotonic: seconds.
        sleep: as `asyncio.sleep`.
        spawn: runs a coroutine as a task of the shard.
    """

    def __init__(
        self,
        *,
        shard: ShardName,
        log: Log,
        writes: Writes,
        sessions: Sessions,
        keys: KeyWindow,
        holdings: Holdings,
        slot_of: Callable[[SessionId], Slot],
        refresh: Callable[[int], Awaitable[None]],
        synced: bool,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._shard = shard
        self._log = log
        self._writes = writes
        self._sessions = sessions
        self._keys = keys
        self._holdings = holdings
        self._slot_of = slot_of
        self._refresh = refresh
        self._synced = synced
        self._monotonic = monotonic
        self._sleep = sleep
        self._spawn = spawn
        self._serving = asyncio.Lock()
        self._queued_pos = -1
        self._writing_until_s = 0.0
        self.trackers: dict[str, Tracker] = {}
        self.exported_messages = 0
        self.exported_bytes = 0
        self.seals = 0

    # The map ---------------------------------------------------------------------------------------------------------

    def on_map(self, ring: RingMap, sealed: dict[Slot, str]) -> None:
        """Begin and end trackers; queue SEALED for what `sealed` says, behind all that is queued now."""
        moves = {move.id: move for move in ring.moves if move.source == self._shard}
        for gone in [move for move in self.trackers if move not in moves]:
            tracker = self.trackers.pop(gone)
            tracker.over = True
            tracker.sealed.set()
            for slot in tracker.slots:
                self._sessions.watched.pop(slot, None)
        for move in moves.values():
            tracker = self.trackers.setdefault(move.id, Tracker(move))
            self._sessions.watched.update(dict.fromkeys(tracker.slots, tracker.note))
            if not tracker.sealing and all(sealed.get(slot) == move.id for slot in move.slots):
                self._seal(tracker, ring.epoch)

    def _seal(self, tracker: Tracker, epoch: int) -> None:
        tracker.sealing = True
        record = SlotsSealed(tracker.id, epoch, sorted(int(slot) for slot in tracker.slots))
        self._writes.own(record, lambda _: self._holdings.apply(record))
        self._spawn(self._sealed(tracker))

    async def _sealed(self, tracker: Tracker) -> None:
        try:
            await self._writes.all_settled()
            await self._shown()
        except LogStopped:
            return  # the process is ending; nobody is told that it is sealed
        if not tracker.over:
            self.seals += 1
            # By another way than `note`: what we forgot to tell makes count or sum differ, and nobody confirms.
            for session in self._sessions.hot_of(tracker.slots):
                if session.exists:
                    tracker.told[session.id] = session.seq_durable
        tracker.sealed.set()

    async def _shown(self) -> None:
        """Wait until what is visible is on disk too, and the term was looked at after that."""
        if self._synced:
            await self._log.look()
        else:
            await self._log.sync()

    # Requests --------------------------------------------------------------------------------------------------------

    async def _tracker(self, move: str, epoch: int) -> Tracker:
        await self._refresh(epoch)
        tracker = self.trackers.get(move)
        if tracker is None:
            raise Invalid(f"{self._shard}'s map shows no move {move} away from it", field="move", reason="unknown_move")
        return tracker

    async def export(self, request: Export) -> Exported:
        """States of the move's sessions in the order of their ids."""
        tracker = await self._tracker(request.move, request.epoch)
        async with self._serving:
            began_s = self._monotonic()
            if not request.after:
                tracker.begin(request.reader, self._sessions.changed_of(tracker.slots))
            tracker.check(request.reader)
            limit = min(max(request.limit, 1), STATES_MAX)
            names, after, more = await self._names(tracker, request.after, limit)
            states, cut = _that_fit(await self._states(names))
            if cut:
                after, more = states[-1].session, True
            for state in states:
                tracker.told[state.session] = max(state.last_seq, tracker.told.get(state.session, 0))
            tracker.complete = not more
            await self._pause(began_s)
            await self._shown()
        return Exported(states, more, after)

    async def _names(self, tracker: Tracker, after: str, limit: int) -> tuple[list[str], str, bool]:
        """Up to `limit` ids of the tracker's slots after `after`; where to go on, and whether."""
        found: set[str] = set()
        at, looked = after, 0
        ended = False
        while len(found) < limit and looked < SCAN_PAGE_NAMES and not ended:
            names = list(islice(self._log.names(at), SCAN_NAMES))
            found.update(name for name in names if self._slot_of(SessionId(name)) in tracker.slots)
            at, looked = names[-1] if names else at, looked + len(names)
            ended = len(names) < SCAN_NAMES
            await self._sleep(0)
        # Ids that no checkpoint has: all of them if the checkpoint's are at their end, else those before its cursor.
        found.update(name for name in tracker.changed if name > after and (ended or name <= at))
        names = sorted(found)
        if len(names) > limit:
            return names[:limit], names[limit - 1], True
        return names, at, not ended

    async def _states(self, names: list[str]) -> list[SessionState]:
        states: list[SessionState] = []
        for start in range(0, len(names), STATES_AT_ONCE):
            for name in names[start : start + STATES_AT_ONCE]:
                state = await self._state(name)
                if state is not None:
                    states.append(state)
            await self._sleep(0)
        return states

    async def _state(self, name: str) -> SessionState | None:
        session = self._sessions.seen(name)
        if not session.exists:
            return None
        trim_pos = self._log.trim_pos
        last_seq = session.seq_durable
        if not session.first_seq or session.last_pos < trim_pos:
            earliest_seq = last_seq + 1
        elif session.first_pos >= trim_pos:
            earliest_seq = session.first_seq
        else:
            first = await self._log.earliest(name, from_pos=self._log.released_pos(session.slot))
            session = self._sessions.seen(name)
            last_seq = session.seq_durable
            earliest_seq = last_seq + 1 if first is None else first[0]
        return SessionState(
            name, last_seq, earliest_seq, session.inserted_at_us, session.metadata, dict(session.cursors)
        )

    async def changed(self, request: ExportChanged) -> Exported:
        """States of what changed since the round before."""
        tracker = await self._tracker(request.move, request.epoch)
        async with self._serving:
            tracker.check(request.reader)
            names = tracker.next_round(request.round)
            states, cut = _that_fit(await self._states(names))
            if cut:
                said = {state.session for state in states}
                left = [name for name in names if name not in said]
                tracker.pending.difference_update(left)
                tracker.dirty.update(dict.fromkeys(left))
            await self._shown()
        return Exported(states, cut or len(names) >= STATES_MAX, "")

    async def messages(self, request: ExportMessages) -> ExportedMessages:
        """Messages of sessions as the log holds them."""
        tracker = await self._tracker(request.move, request.epoch)
        wanted = [
            self._wanted(tracker, session, after)
            for session, after in ((request.session, request.after), *request.others[:OTHERS_MAX])
        ]
        async with self._serving:
            began_s = self._monotonic()
            found = await self._log.read_each(
                wanted,
                limit=min(max(request.limit, 1), REPLAY_LIMIT_MAX),
                bytes_max=min(max(request.bytes_max, 1), PAGE_BYTES_MAX),
                whole=True,
            )
            pages = [self._page(each.session, page) for each, page in zip(wanted, found, strict=False)]
            await self._pause(began_s)
            await self._shown()
        return msgspec.structs.replace(pages[0], others=pages[1:])

    def _wanted(self, tracker: Tracker, session: str, after: int) -> Wanted:
        slot = self._slot_of(SessionId(session))
        if slot not in tracker.slots:
            raise Invalid(f"session {session!r} is not in the move's slots", field="session")
        return Wanted(session, after + 1, self._log.released_pos(slot))

    def _page(self, session: str, found: ReadResult) -> ExportedMessages:
        bodies = [each.json for each in found.messages]
        windowed = [self._is_windowed(session, each.seq, each.json) for each in found.messages]
        self.exported_messages += len(bodies)
        self.exported_bytes += sum(map(len, bodies))
        return ExportedMessages(bodies, windowed, found.has_more)

    def _is_windowed(self, session: str, seq: int, body: bytes) -> bool:
        known = self._keys.get(session, message_key(body))
        return known is not None and known.seq == seq

    async def sealed(self, request: ExportSealed) -> ExportedAll:
        """Wait for the seal; then how much there is."""
        tracker = await self._tracker(request.move, request.epoch)
        tracker.check(request.reader)
        await tracker.sealed.wait()
        if tracker.over:
            raise TryAgain("the move is over", reason="moving")
        tracker.check(request.reader)
        if not tracker.complete:
            raise Invalid("the pass is not complete", field="reader", reason="unknown_round")
        await self._shown()
        return ExportedAll(len(tracker.told), sum(tracker.told.values()))

    async def _pause(self, began_s: float) -> None:
        now_s, queued_pos = self._monotonic(), self._writes.queued_pos
        if queued_pos != self._queued_pos:
            self._queued_pos, self._writing_until_s = queued_pos, now_s + WRITING_S
        least_s = PACE_S_MIN if now_s < self._writing_until_s else 0.0
        await self._sleep(min(max(PACE * (now_s - began_s), least_s), PACE_S_MAX))


def _that_fit(states: list[SessionState]) -> tuple[list[SessionState], bool]:
    """As many as an answer may hold, at least one; whether some are left."""
    size_bytes = 0
    for count, state in enumerate(states):
        size_bytes += 200 + len(state.metadata) + sum(len(name) + 16 for name in state.cursors)
        if count and size_bytes > PAGE_BYTES_MAX:
            return states[:count], True
    return states, False
