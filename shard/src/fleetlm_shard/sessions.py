"""The hot state of sessions: what is durable, what is assigned, the newest messages, read cursors, subscribers.

A session that is not here is loaded from its checkpoint row; one that changed since the last checkpoint stays until the
next one has its row. Memory has a budget: the least recently used sessions lose their newest messages first (the log
has them), then leave if nothing holds them. A `Session` may be kept across an `await` only by who holds it (`pending`,
`subscribers`); everybody else asks again.

Promise: names say which state they carry: `…_assigned` may still be lost in a crash and is shown to nobody, `…_durable`
was synced and looked at. `ring` ends at `seq_durable` and has no hole. Must not be done here: I/O other than the row
lookup, deciding what is durable (the sequencer hears that from the log).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from heapq import merge, nsmallest
from itertools import groupby, islice
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from fleetlm_common.ids import SessionId, Slot, checked_id
from fleetlm_shard.log_types import CheckpointRow, lost_seqs

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from fleetlm_shard.log_types import Damage
    from fleetlm_shard.records import SessionImported
    from fleetlm_shard.subscriptions import Subscription

RING_MESSAGES_MAX: Final = 1000
"""Newest messages kept of one session: the largest page, so that `tail` of any size is answered from memory."""
RING_BYTES_MAX: Final = 1024 * 1024
"""The same in bytes: one session must not take the budget of many."""
MESSAGE_OVERHEAD_BYTES: Final = 48
"""What Python adds to a message's bytes in the ring."""
SESSION_BYTES: Final = 1600
"""What an empty session costs: object, names, table entry, deque (measured)."""
CURSOR_BYTES: Final = 200
"""What one participant's read cursor costs."""
EVICT_TRIES_MAX: Final = 64
"""Sessions looked at per call, so that eviction never holds up the loop; the next call goes on."""
EVICT_HELD_MAX: Final = 8
"""Sessions in a row that could give nothing: the call ends, for before a checkpoint there may be many thousands."""
NO_METADATA: Final = b"{}"
"""Metadata of a session that was made by its first append."""


class Session:
    """One session in memory. Owned by the loop; the sequencer alone advances it."""

    __slots__ = (
        "changed",
        "changed_pos",
        "cursors",
        "cursors_assigned",
        "earliest_seq",
        "earliest_trim_pos",
        "first_pos",
        "first_seq",
        "id",
        "id_json",
        "inserted_at_us",
        "last_pos",
        "last_seq_logged",
        "metadata",
        "pending",
        "ring",
        "ring_bytes",
        "seq_assigned",
        "seq_durable",
        "slot",
        "subscribers",
        "trimmed_seq",
    )

    def __init__(self, ident: str, slot: Slot, row: CheckpointRow | None, *, lost: int) -> None:
        self.id = ident
        self.id_json = msgspec.json.encode(ident)
        self.slot = slot
        self.last_seq_logged = 0 if row is None else row.last_seq
        """Seq of the last durable message that the log names."""
        self.seq_durable = self.last_seq_logged + lost
        """Last seq that readers may know; behind damage it counts the messages that may have been lost."""
        self.seq_assigned = self.seq_durable
        """Last seq given to a record, durable or not."""
        self.first_seq = 0 if row is None else row.first_seq
        self.first_pos = 0 if row is None else row.first_pos
        self.last_pos = 0 if row is None else row.last_pos
        """Position of the last durable message."""
        self.inserted_at_us = 0 if row is None else row.inserted_at_us
        """When the session was made durably; 0: there is no such session."""
        self.metadata = NO_METADATA if row is None else row.metadata
        self.cursors: dict[str, int] = {} if row is None else dict(row.cursors)
        self.cursors_assigned: dict[str, int] = {}
        """Read cursors whose records are not durable yet."""
        self.ring: deque[bytes] = deque()
        """Newest durable messages, contiguous, the last one is `seq_durable`."""
        self.ring_bytes = 0
        self.pending = 0
        """Logged writes of this session that are not durable yet."""
        self.changed = False
        """Differs from its row in the last checkpoint."""
        self.changed_pos = 0
        """Position of its last durable record of any kind."""
        self.subscribers: list[Subscription] = []
        self.earliest_seq = 0
        """First seq that the log still holds, valid for `earliest_trim_pos`; 0: not asked yet."""
        self.earliest_trim_pos = -1
        self.trimmed_seq = 0 if row is None else row.trimmed_seq
        """What is missing up to there was trimmed by the shard that the session came from."""

    @property
    def exists(self) -> bool:
        """Something of it is durable."""
        return self.inserted_at_us != 0

    @property
    def ring_first_seq(self) -> int:
        """Seq of the first message in the ring (one past `seq_durable` if it is empty)."""
        return self.seq_durable - len(self.ring) + 1

    def ring_slice(self, first_seq: int, count: int) -> list[bytes]:
        """Up to `count` messages from `first_seq` on, which must not lie before the ring."""
        start = first_seq - self.ring_first_seq
        assert start >= 0
        return list(islice(self.ring, start, start + count))

    @property
    def held(self) -> bool:
        """May not leave memory: changed since the checkpoint, being written, or listened to."""
        return self.changed or self.pending > 0 or bool(self.subscribers)

    def row(self) -> CheckpointRow:
        """The durable state, for a checkpoint."""
        # What damage may have hidden is not counted into the row: the damage itself is kept and counted at each load.
        return CheckpointRow(
            slot=self.slot,
            first_seq=self.first_seq,
            first_pos=self.first_pos,
            last_seq=self.last_seq_logged,
            last_pos=self.last_pos,
            inserted_at_us=self.inserted_at_us,
            metadata=self.metadata,
            cursors=dict(self.cursors),
            trimmed_seq=self.trimmed_seq,
        )


class RowSource(Protocol):
    """Where a session that is not in memory is found (`LogBoot`, then `Log`)."""

    @property
    def damage(self) -> Sequence[Damage]:
        """Ranges of the log that are unreadable."""
        ...

    def row(self, session: str, /) -> CheckpointRow | None:
        """The session's row in the newest checkpoint."""
        ...

    def released_pos(self, slot: int, /) -> int:
        """Nothing of the slot below this position counts."""
        ...


class Sessions:
    """All sessions in memory.

    Args:
        slot_of: the slot of a session id in this ring.
        rows: the newest checkpoint: the boot's at first, then the running log's (`rows` is set anew).
        bytes_max: the budget for rings and session state.
    """

    def __init__(
        self,
        *,
        slot_of: Callable[[SessionId], Slot],
        rows: RowSource,
        bytes_max: int,
    ) -> None:
        self._slot_of = slot_of
        self.rows = rows
        self._bytes_max = bytes_max
        self._hot: OrderedDict[str, Session] = OrderedDict()
        self._of_slot: dict[Slot, dict[str, Session]] = {}
        """The same by slot: a walk over all of a large shard would hold up the loop at every step of a move."""
        self._changed: dict[str, Session] = {}
        self.watched: dict[Slot, Callable[[Session], None]] = {}
        """Slots of moves whose source is this shard: who hears of each session that changed durably."""
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._hot)

    @property
    def changed_count(self) -> int:
        """Sessions that the next checkpoint must write."""
        return len(self._changed)

    def hot(self, ident: str) -> Session | None:
        """The session if it is in memory; counts as a use of it."""
        session = self._hot.get(ident)
        if session is not None:
            self.hits += 1
            self._hot.move_to_end(ident)
        return session

    def get(self, ident: str) -> Session:
        """The session, loaded if need be; one that was never written to is made empty (and leaves again unless it is).

        Raises:
            Invalid: no session can have this id.
        """
        session = self.hot(ident)
        if session is not None:
            return session
        self.misses += 1
        return self._load(SessionId(checked_id(ident, "session_id")))

    def seen(self, ident: str) -> Session:
        """The session as it is, not brought into memory if it is not there: to look at, not to keep."""
        return self._hot.get(ident) or self._made(SessionId(ident))

    def _made(self, ident: SessionId) -> Session:
        row, slot = self.rows.row(ident), self._slot_of(ident)
        # Nothing of a slot can have been lost before its copy here began.
        last_pos = max(0 if row is None else row.last_pos, self.rows.released_pos(slot))
        return Session(ident, slot, row, lost=lost_seqs(self.rows.damage, last_pos))

    def _load(self, ident: SessionId) -> Session:
        session = self._made(ident)
        # Make room first: were the new session evicted here, its caller would write to one that nobody finds.
        self.evict()
        self._hot[ident] = session
        self._of_slot.setdefault(session.slot, {})[ident] = session
        self.bytes += _fixed_bytes(session)
        return session

    def _unload(self, session: Session) -> None:
        del self._hot[session.id], self._of_slot[session.slot][session.id]
        self.bytes -= _fixed_bytes(session)

    def all_hot(self) -> list[Session]:
        """Every session in memory."""
        return self.hot_of(self._of_slot)

    def hot_of(self, slots: Iterable[int]) -> list[Session]:
        """Every session in memory that lies in these slots."""
        return [session for slot in slots for session in self._of_slot.get(Slot(slot), {}).values()]

    def message_durable(self, session: Session, seq: int, pos: int, at_us: int, json: bytes) -> None:
        """A message is on disk and the term was looked at: it becomes visible. By position: once for each message."""
        assert seq == session.seq_durable + 1
        session.seq_durable = session.last_seq_logged = seq
        session.last_pos = pos
        if not session.first_seq:
            session.first_seq, session.first_pos = seq, pos
            if not session.inserted_at_us:
                session.inserted_at_us = at_us
        ring = session.ring
        ring.append(json)
        grown = len(json) + MESSAGE_OVERHEAD_BYTES
        session.ring_bytes += grown
        self.bytes += grown
        while session.ring_bytes > RING_BYTES_MAX or len(ring) > RING_MESSAGES_MAX:
            gone = len(ring.popleft()) + MESSAGE_OVERHEAD_BYTES
            session.ring_bytes -= gone
            self.bytes -= gone
        # `changed` in line.
        session.changed_pos = pos
        if not session.changed:
            session.changed = True
            self._changed[session.id] = session
        if self.watched:
            self._tell_watcher(session)

    def created_durable(self, session: Session, *, pos: int, at_us: int, metadata: bytes) -> None:
        """The record of an explicit creation is on disk."""
        self.bytes += len(metadata) - len(session.metadata)
        session.inserted_at_us = at_us
        session.metadata = metadata
        self.changed(session, pos)

    def cursor_durable(self, session: Session, *, pos: int, participant: str, seq: int) -> None:
        """The record of a read cursor is on disk."""
        cursors = session.cursors
        before = cursors.get(participant)
        if before is None:
            self.bytes += CURSOR_BYTES
        cursors[participant] = max(seq, before or 0)
        self.changed(session, pos)

    def changed(self, session: Session, pos: int) -> None:
        """Something of the session became durable at `pos`."""
        session.changed_pos = pos
        if not session.changed:
            session.changed = True
            self._changed[session.id] = session
        if self.watched:
            self._tell_watcher(session)

    def _tell_watcher(self, session: Session) -> None:
        note = self.watched.get(session.slot)
        if note is not None:
            note(session)

    # What a move brings (docs/moves.md): the target takes it in without keeping messages in memory.

    def imported_durable(self, session: Session, *, seq: int, pos: int, at_us: int) -> None:
        """A message that another shard ordered is on disk; what is missing before it is missing there too."""
        assert seq > session.seq_durable
        self._forget_ring(session)
        session.seq_durable = session.last_seq_logged = seq
        session.last_pos = pos
        if not session.first_seq:
            session.first_seq, session.first_pos = seq, pos
        session.inserted_at_us = session.inserted_at_us or at_us
        self.changed(session, pos)

    def state_durable(self, session: Session, record: SessionImported, pos: int) -> None:
        """The rest of what another shard showed of the session is on disk."""
        self._forget_ring(session)
        self._take_state(session, record, pos)
        session.seq_durable = session.last_seq_logged
        session.seq_assigned = max(session.seq_assigned, session.seq_durable)
        self.changed(session, pos)

    def _take_state(self, session: Session, record: SessionImported, pos: int) -> None:
        self.bytes -= _fixed_bytes(session)
        if record.last_seq > session.last_seq_logged:
            session.last_seq_logged, session.last_pos = record.last_seq, pos
        session.inserted_at_us = record.inserted_at_us
        session.trimmed_seq = record.trimmed_seq
        session.metadata = record.metadata
        session.cursors = dict(record.cursors)
        self.bytes += _fixed_bytes(session)

    def _forget_ring(self, session: Session) -> None:
        self.bytes -= session.ring_bytes
        session.ring_bytes = 0
        session.ring.clear()

    def release(self, slots: Iterable[int]) -> None:
        """The record that these slots are released is on disk (or was read): nothing before it counts."""
        for session in self.hot_of(slots):
            assert not session.pending, "nobody writes to a slot that is being released"
            self._forget_ring(session)
            if session.changed:
                session.changed = False
                del self._changed[session.id]
            self._unload(session)

    def remember(self, session: Session, messages: Sequence[bytes]) -> None:
        """A reader brought the session's newest messages from the log: keep them for the next one.

        Only what ends at `seq_durable` may be given, and only an empty ring takes it.
        """
        if session.ring or self._hot.get(session.id) is not session:
            return
        for json in messages:
            session.ring.append(json)
            session.ring_bytes += len(json) + MESSAGE_OVERHEAD_BYTES
        self.bytes += session.ring_bytes
        self.evict()

    def changed_now(self) -> list[Session]:
        """Sessions that changed since the last checkpoint."""
        return list(self._changed.values())

    def changed_of(self, slots: Container[int]) -> list[str]:
        """Ids of those that changed since the last checkpoint and lie in these slots, ascending."""
        return sorted(ident for ident, session in self._changed.items() if session.slot in slots)

    def checkpointed(self, sessions: Sequence[Session], pos: int) -> None:
        """A checkpoint has the rows of these; those that have not changed at or after `pos` may leave memory now."""
        for session in sessions:
            if session.changed and session.changed_pos < pos:
                session.changed = False
                del self._changed[session.id]
        self.evict()

    def names(self, after: str, limit: int, stored: Iterable[str]) -> list[str]:
        """Ids of durable sessions after `after`, ascending: those of the newest checkpoint and those changed since.

        `stored` are the checkpoint's, ascending from there; the order of code points is that of UTF-8 bytes.
        """
        changed = nsmallest(limit, (ident for ident in self._changed if ident > after))
        names = (name for name, _ in groupby(merge(changed, stored)))
        return list(islice(names, limit))

    # A boot reads the log's end again; what a checkpoint has already must not count twice.

    def replay_message(self, ident: str, *, seq: int, pos: int, at_us: int) -> None:
        """Boot read a message, or found that there was one whose bytes are damaged (`at_us` 0)."""
        session = self.get(ident)
        if seq > session.last_seq_logged:
            session.last_seq_logged, session.last_pos = seq, pos
            if not session.first_seq:
                session.first_seq, session.first_pos = seq, pos
        session.inserted_at_us = session.inserted_at_us or at_us or 1
        self.changed(session, pos)

    def replay_created(self, ident: str, *, pos: int, at_us: int, metadata: bytes) -> None:
        """Boot read an explicit creation."""
        self.created_durable(self.get(ident), pos=pos, at_us=at_us, metadata=metadata)

    def replay_cursor(self, ident: str, *, pos: int, participant: str, seq: int) -> None:
        """Boot read a read cursor."""
        self.cursor_durable(self.get(ident), pos=pos, participant=participant, seq=seq)

    def replay_state(self, ident: str, record: SessionImported, *, pos: int) -> None:
        """Boot read what a move brought."""
        session = self.get(ident)
        self._take_state(session, record, pos)
        self.changed(session, pos)

    def replayed(self) -> None:
        """Boot knows all damage now: seqs go on behind whatever may have been lost."""
        damage = self.rows.damage
        for session in self._hot.values():
            last_pos = max(session.last_pos, self.rows.released_pos(session.slot))
            session.seq_durable = session.last_seq_logged + lost_seqs(damage, last_pos)
            session.seq_assigned = session.seq_durable

    def evict(self) -> None:
        """Come down to the budget: the least recently used lose their messages, and leave if nothing holds them."""
        hot = self._hot
        in_vain = 0
        for _ in range(EVICT_TRIES_MAX):
            if self.bytes <= self._bytes_max or len(hot) <= 1 or in_vain >= EVICT_HELD_MAX:
                return
            ident, session = next(iter(hot.items()))
            in_vain = in_vain + 1 if session.held and not session.ring else 0
            self._forget_ring(session)
            if session.held:
                hot.move_to_end(ident)
            else:
                self._unload(session)
                self.evicted += 1


def _fixed_bytes(session: Session) -> int:
    return SESSION_BYTES + len(session.metadata) - len(NO_METADATA) + CURSOR_BYTES * len(session.cursors)
