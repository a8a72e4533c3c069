"""The append path: dedupe → expected_seq → assign seq, build the record once → queue; the answer after the disk.

One APPEND holds entries, in order; each entry is one client's append, all or nothing (one batch of the log):
- every key known with the same content: the first answers again, `deduped`; nothing is written, and `expected_seq` is
  not looked at;
- some keys known, some new: the known ones are answered `deduped`, the new ones are appended (a retry of a batch whose
  older keys have left the window must not fail); `expected_seq` is looked at, for something is appended;
- a key known with other content, or twice in the entry: the whole entry is refused;
- after a TRY_AGAIN in an entry all later ones get TRY_AGAIN too: what a client sent second never overtakes the first.

Promise: an answer never says more than the disk holds: acks, dedupe hits and conflicts that rest on records which are
not durable yet wait for them; answers from memory alone wait for a look at the term. Every call is answered once.
Must not be done here: ownership (the server admits), frames, what is visible when (`writes.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from fleetlm_common.errors import Conflict, FleetError, IdempotencyConflict, Invalid, TooLarge, TryAgain
from fleetlm_common.ids import uuid7_from, uuid7_prefix
from fleetlm_common.limits import BATCH_MESSAGES_MAX, CONTENT_BYTES_MAX, ID_BYTES_MAX, METADATA_BYTES_MAX
from fleetlm_common.rpc import Ack, EntryResult
from fleetlm_shard.keys import KnownKey
from fleetlm_shard.log_types import BATCH_BYTES_MAX, GroupTooLarge, LogBusy, LogDiskFull, LogError
from fleetlm_shard.records import InsertedAt, Message, content_hash, message_json
from fleetlm_shard.samejson import same_fragment
from fleetlm_shard.table import TableDamaged

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Coroutine

    from fleetlm_common.clock import Clock
    from fleetlm_common.ids import Slot
    from fleetlm_common.rpc import Append, Draft, Entry
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.sessions import Session, Sessions
    from fleetlm_shard.writes import Writes

ENTRIES_MAX: Final = 1000
"""Appends of one APPEND: more than a gateway gathers during one sync."""
FRAGMENT_BYTES_MAX: Final = CONTENT_BYTES_MAX + METADATA_BYTES_MAX + 2048
"""Content, metadata, and the sender's id and kind with their names (ids may be escaped to six times their bytes)."""
STAMP_S: Final = 0.0002
"""`inserted_at` and the ages of keys are so exact: a busy shard asks its clock and makes the text for ten messages."""
_FRAGMENT_START: Final = b'"sender_id":'


class Answer(Protocol):
    """Where one APPEND's results go; called once."""

    def __call__(self, ident: int, results: list[EntryResult], /) -> None:
        """Send them; `ident` is what was given with the request."""
        ...


class _Unclear(Exception):
    """A known key with other bytes: whether it says the same needs the stored message."""

    def __init__(self, draft: Draft, known: KnownKey, fresh_hash: bytes) -> None:
        super().__init__()
        self.draft = draft
        self.known = known
        self.fresh_hash = fresh_hash


class _Call(msgspec.Struct):
    """One APPEND on its way; `Waiting` for its records. A msgspec struct: made in a third of the time of an object."""

    request: Append
    ident: int
    answer: Answer
    since_s: float
    results: list[EntryResult] = []
    conflicts: list[tuple[int, Session]] = []
    """Entries refused because of `expected_seq`, filled in when the call is answered."""
    rests_on_log: bool = False
    """Something in the results is true only if the log is ours and holds what was queued."""
    verdicts: dict[tuple[str, bytes], bool] = {}
    """(key, hash) whose stored message was compared: says the same, or not."""

    def refuse_rest(self, error: TryAgain) -> None:
        """The next entry cannot be worked on now, so none after it may be either."""
        self.results.extend([EntryResult([], error.body())] * (len(self.request.entries) - len(self.results)))

    def conflict(self, session: Session) -> None:
        """The next entry expected another seq than the session has by now."""
        self.rests_on_log = True
        self.conflicts.append((len(self.results), session))
        # Held in memory until the answer, which names the last seq that is durable by then.
        session.pending += 1

    def settled(self) -> None:
        """Everything that the results rest on is visible."""
        for index, session in self.conflicts:
            session.pending -= 1
            last_seq = session.seq_durable
            words = f"expected_seq is not the session's last_seq, which is {last_seq}"
            self.results[index] = EntryResult([], Conflict(words, last_seq=last_seq).body())
        self.answer(self.ident, self.results)

    def stopped(self) -> None:
        """Nobody knows what is on disk."""
        self.answer(self.ident, [EntryResult([], log_stopped().body())] * len(self.request.entries))


def log_stopped() -> TryAgain:
    """What everybody hears who waits for a log that failed; a new one each time, for what is raised keeps frames."""
    return TryAgain("the shard's log has stopped", reason="unavailable", retry_after_ms=1000)


class _Stamp:
    """A moment in all the forms that messages need; shared by what is appended within `STAMP_S` of it."""

    __slots__ = ("ack", "at_s", "at_us", "id_prefix", "text")

    def __init__(self, at_us: int, at_s: float, text: bytes) -> None:
        self.at_us = at_us
        self.at_s = at_s
        self.text = text
        self.ack = str(text, "ascii")
        self.id_prefix = uuid7_prefix(at_us // 1000)


class Sequencer:
    """Orders the messages of all sessions of this shard.

    Args:
        writes: the way into the log.
        sessions: hot state.
        keys: the idempotency window.
        clock: for `inserted_at` and ages.
        entropy: for message ids.
        look: resolves after a look at the term that began after the call; raises LogError.
        stored: the JSON of a durable message, None if the log does not hold it.
        admits: raises TryAgain if this shard may not write the slot now (asked again after each wait).
        spawn: runs a coroutine as a task of the shard.
    """

    def __init__(
        self,
        *,
        writes: Writes,
        sessions: Sessions,
        keys: KeyWindow,
        clock: Clock,
        entropy: random.Random,
        look: Callable[[], Awaitable[None]],
        stored: Callable[[str, int], Awaitable[bytes | None]],
        admits: Callable[[Slot], None],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._writes = writes
        self._sessions = sessions
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._look = look
        self._stored = stored
        self._admits = admits
        self._run = spawn
        self._inserted_at = InsertedAt()
        self._stamp = _Stamp(0, float("-inf"), self._inserted_at.text(0))
        self.appended = 0
        self.deduped = 0
        self.conflicts = 0
        self.idempotency_conflicts = 0

    def append(self, session: Session, request: Append, ident: int, answer: Answer) -> None:
        """Take one APPEND for `session`, which this shard may write; `answer` is called once, with `ident`.

        Raises:
            FleetError: the request as a whole is refused; `answer` is not called.
        """
        if not 1 <= len(request.entries) <= ENTRIES_MAX:
            raise Invalid(f"entries must be 1 to {ENTRIES_MAX}", field="entries", limit=ENTRIES_MAX)
        stamp = self._now()
        self._advance(_Call(request, ident, answer, stamp.at_s), session, stamp)

    def _advance(self, call: _Call, session: Session, stamp: _Stamp) -> None:
        """Work through the entries that have no result yet."""
        entries, results = call.request.entries, call.results
        for entry in entries[len(results) :] if results else entries:
            try:
                results.append(self._entry(call, session, entry, stamp))
            except _Unclear as question:
                self._run(self._compare(call, question))
                return
            except TryAgain as error:
                call.refuse_rest(error)
                break
            except FleetError as error:
                results.append(EntryResult([], error.body()))
        self._finish(call)

    def _finish(self, call: _Call) -> None:
        """Every entry has a result: answer as soon as it is known to be true."""
        if not call.rests_on_log:
            call.settled()
        elif self._writes.settled:
            self._spawn(call, self._look())
        else:
            self._writes.wait(call, call.since_s)

    def _entry(self, call: _Call, session: Session, entry: Entry, stamp: _Stamp) -> EntryResult:
        """Append one entry.

        Raises:
            _Unclear: a stored message must be compared first; nothing was done.
            FleetError: the entry is refused; nothing was done.
        """
        drafts = fresh = entry.drafts
        if len(drafts) == 1 and entry.expected_seq is None:
            (draft,) = drafts
            _check_draft(draft)
            if not self._keys.knows(session.id, draft.key):
                call.rests_on_log = True
                return EntryResult([self._append_one(session, draft, stamp)])
        hits = self._hits(call, session.id, drafts)
        if hits is not None:
            fresh = [draft for draft, hit in zip(drafts, hits, strict=True) if hit is None]
        if fresh and entry.expected_seq is not None and entry.expected_seq != session.seq_assigned:
            self.conflicts += 1
            call.conflict(session)
            return _UNFILLED
        acks = self._append(session, fresh, stamp) if fresh else []
        call.rests_on_log = True
        if hits is None:
            return EntryResult(acks)
        self.deduped += len(drafts) - len(fresh)
        following = iter(acks)
        return EntryResult([next(following) if hit is None else self._first_answer(hit) for hit in hits])

    def _hits(self, call: _Call, session_id: str, drafts: list[Draft]) -> list[KnownKey | None] | None:
        """What each draft's key stands for, all checked; None (the usual case) if all are new.

        Raises:
            _Unclear, IdempotencyConflict, Invalid, TooLarge: see `_entry`.
        """
        if len(drafts) != 1:
            _check_batch(drafts)
        hits: list[KnownKey | None] | None = None
        for index, draft in enumerate(drafts):
            _check_draft(draft)
            hit = self._keys.get(session_id, draft.key)
            if hit is not None:
                self._check_content(call, draft, hit)
                if hits is None:
                    hits = [None for _ in drafts]
                hits[index] = hit
        return hits

    def _check_content(self, call: _Call, draft: Draft, hit: KnownKey) -> None:
        fresh_hash = content_hash(draft.fragment)
        if fresh_hash == hit.content_hash:
            return
        verdict = call.verdicts.get((draft.key, fresh_hash))
        if verdict is None:
            raise _Unclear(draft, hit, fresh_hash)
        if not verdict:
            self.idempotency_conflicts += 1
            call.rests_on_log = True
            raise IdempotencyConflict(
                f"the key was used for other content (seq {hit.seq}); choose a new one", field="idempotency_key"
            )

    def _append_one(self, session: Session, draft: Draft, stamp: _Stamp) -> Ack:
        """What `_append` does for one draft, without its loops: most appends are of one message."""
        if not self._keys.room():
            raise _full_window()
        seq = session.seq_assigned + 1
        message, ack = self._formed(session, draft, seq, stamp)
        try:
            pos = self._writes.message(session, message)
        except LogError as error:
            raise refusal(error) from error
        session.seq_assigned = seq
        self._keys.add(message, ack.id, pos, stamp.at_s)
        self.appended += 1
        return ack

    def _append(self, session: Session, drafts: list[Draft], stamp: _Stamp) -> list[Ack]:
        """Assign seqs and queue the records, all or none."""
        if len(drafts) > self._keys.room():
            raise _full_window()
        first_seq = session.seq_assigned + 1
        formed = [self._formed(session, draft, seq, stamp) for seq, draft in enumerate(drafts, first_seq)]
        try:
            pos = self._writes.messages(session, [message for message, _ in formed])
        except LogError as error:
            raise refusal(error) from error
        session.seq_assigned += len(formed)
        for message, ack in formed:
            self._keys.add(message, ack.id, pos, stamp.at_s)
        self.appended += len(formed)
        return [ack for _, ack in formed]

    def _formed(self, session: Session, draft: Draft, seq: int, stamp: _Stamp) -> tuple[Message, Ack]:
        """The record and what is answered about it."""
        ident = uuid7_from(stamp.id_prefix, self._entropy)
        fragment = draft.fragment
        json = message_json(ident, session.id_json, seq, stamp.text, fragment)
        message = Message(session.slot, session.id, seq, stamp.at_us, draft.key, content_hash(fragment), json)
        return message, Ack(seq, ident, stamp.ack, False)

    def _now(self) -> _Stamp:
        at_s = self._clock.monotonic_s()
        stamp = self._stamp
        if at_s - stamp.at_s >= STAMP_S:
            at_us = self._clock.now_us()
            stamp = self._stamp = _Stamp(at_us, at_s, self._inserted_at.text(at_us))
        return stamp

    def _first_answer(self, hit: KnownKey) -> Ack:
        return Ack(hit.seq, hit.id, str(self._inserted_at.text(hit.inserted_at_us), "ascii"), True)

    def _spawn(self, call: _Call, work: Awaitable[None]) -> None:
        """Answer the call after `work`: from memory after a look, for a younger process may have gone on long ago."""

        async def finish() -> None:
            try:
                await work
            except LogError:
                call.stopped()
            else:
                call.settled()

        self._run(finish())

    async def _compare(self, call: _Call, question: _Unclear) -> None:
        """Find out whether the stored message says the same, then go on with the call."""
        session_id, draft, known = call.request.session, question.draft, question.known
        try:
            if known.seq > self._sessions.get(session_id).seq_durable:
                await self._writes.all_settled()
            stored = await self._stored(session_id, known.seq)
            session = self._sessions.get(session_id)
            self._admits(session.slot)
        except TryAgain as error:
            call.refuse_rest(error)
            self._finish(call)
        except (LogError, TableDamaged):
            call.refuse_rest(log_stopped())
            self._finish(call)
        else:
            # A message that is gone cannot be shown to say the same.
            same = stored is not None and same_fragment(stored, draft.fragment)
            call.verdicts[draft.key, question.fresh_hash] = same
            self._advance(call, session, self._now())


_UNFILLED: Final = EntryResult([])


def refusal(error: LogError) -> FleetError:
    """What a client hears when the log refuses."""
    if isinstance(error, LogBusy):
        return TryAgain("the shard has as much to write as it can hold", reason="overloaded")
    if isinstance(error, LogDiskFull):
        return TryAgain("the shard's disk is nearly full", reason="disk_full", retry_after_ms=5000)
    if isinstance(error, GroupTooLarge):
        return TooLarge("the messages of one append are too large together", field="messages", limit=BATCH_BYTES_MAX)
    return log_stopped()


def _full_window() -> TryAgain:
    return TryAgain(
        "the idempotency window is full of keys that may still be retried", reason="overloaded", retry_after_ms=1000
    )


def _check_batch(drafts: list[Draft]) -> None:
    if not 1 <= len(drafts) <= BATCH_MESSAGES_MAX:
        raise Invalid(
            f"an append has 1 to {BATCH_MESSAGES_MAX} messages, not {len(drafts)}",
            field="messages",
            limit=BATCH_MESSAGES_MAX,
        )
    if len({draft.key for draft in drafts}) != len(drafts):
        raise Invalid("two messages of one append have the same key", field="idempotency_key", reason="duplicate_key")


def _check_draft(draft: Draft) -> None:
    """What the record's form rests on; the JSON itself was checked by the gateway, which alone knows the credential."""
    key, fragment = draft.key, draft.fragment
    if not key or len(key) > ID_BYTES_MAX or not (key.isascii() or len(key.encode()) <= ID_BYTES_MAX):
        raise Invalid(f"idempotency_key must be 1 to {ID_BYTES_MAX} bytes of UTF-8", field="idempotency_key")
    if len(fragment) > FRAGMENT_BYTES_MAX:
        raise TooLarge("the message is too large", field="content", limit=FRAGMENT_BYTES_MAX)
    if not fragment.startswith(_FRAGMENT_START):
        raise Invalid("the message does not begin with its sender", field="fragment")
