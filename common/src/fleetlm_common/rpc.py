"""What gateway and shard say to each other, over the frames of `wire.py`; payloads are msgpack arrays.

The connection begins with HELLO and WELCOME (or ERROR and close). Then the gateway sends requests with ids of its own,
and each is answered once, on its id, by the reply named beside it, by MOVED or by ERROR. A SUBSCRIBE's id names the
subscription: after its SUBSCRIBED come PUSH and PUSH_READ frames on that id until ENDED, UNSUBSCRIBE or the end of the
connection.

    APPEND → APPENDED   READ → PAGE   INFO → INFO_OK   SUBSCRIBE → SUBSCRIBED   MARK_READ → MARKED
    CREATE → CREATED    LIST → LISTED   PING → PONG    UNSUBSCRIBE (no reply)   GOAWAY (from the shard: it is leaving)

Of the archive any shard may be asked, for the ring has one; what is said is as old as the archive lags:

    PARTICIPATED → PARTICIPATED_OK   INBOX → INBOX_PAGE   CHANGES → CHANGED   ENTRIES → ENTRIES_OK

The target of a move speaks to its source in the same way, as a peer of the name `shard:<its name>` (docs/moves.md):

    EXPORT, EXPORT_CHANGED → EXPORTED   EXPORT_MESSAGES → EXPORTED_MESSAGES   EXPORT_SEALED → EXPORTED_ALL

Promise: an answer about a session was true after sync and after a look at the volume's term (design §6, "Fence").
Must not be done here: anything that knows sockets or files.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from fleetlm_common.errors import ErrorBody

PROTOCOL: Final = 1
"""Both sides must say the same number; a change that an older peer misreads needs a new one."""


class Kind(IntEnum):
    """First byte of a frame after its length."""

    HELLO = 1
    WELCOME = 2
    ERROR = 3
    MOVED = 4
    PING = 5
    PONG = 6
    GOAWAY = 7
    APPEND = 10
    APPENDED = 11
    READ = 12
    PAGE = 13
    INFO = 14
    INFO_OK = 15
    SUBSCRIBE = 16
    SUBSCRIBED = 17
    UNSUBSCRIBE = 18
    PUSH = 19
    PUSH_READ = 20
    ENDED = 21
    MARK_READ = 22
    MARKED = 23
    CREATE = 24
    CREATED = 25
    LIST = 26
    LISTED = 27
    PARTICIPATED = 28
    PARTICIPATED_OK = 29
    INBOX = 30
    INBOX_PAGE = 31
    CHANGES = 32
    CHANGED = 33
    ENTRIES = 34
    ENTRIES_OK = 35
    EXPORT = 40
    EXPORT_CHANGED = 41
    EXPORTED = 42
    EXPORT_MESSAGES = 43
    EXPORTED_MESSAGES = 44
    EXPORT_SEALED = 45
    EXPORTED_ALL = 46


class _Payload(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of payloads: arrays on the wire, so that fields may be added at the end with a default."""


class Hello(_Payload, frozen=True):
    """First frame of a gateway. `volume_id` is the member's in the gateway's map: another one means another shard."""

    protocol: int
    ring_uid: str
    shard: str
    volume_id: str
    gateway: str
    credential: bytes
    epoch: int


class Welcome(_Payload, frozen=True):
    """The shard's answer: its boot's term and its map's epoch."""

    protocol: int
    shard: str
    term: int
    epoch: int


class MovedBody(_Payload, frozen=True):
    """Ask `owner`; the map that says so has `epoch`."""

    owner: str
    epoch: int


class Draft(_Payload, frozen=True):
    """A message to be: its key and its JSON fragment.

    `fragment` is `"sender_id":…,"sender_kind":…,"kind":…,"content":…,"metadata":…` without braces, checked by the
    gateway; the shard puts id, session, seq and time before it. What must be equal for a dedupe is exactly what this
    fragment says.
    """

    key: str
    fragment: bytes


class Entry(_Payload, frozen=True):
    """One client's append: all of its drafts or none. `expected_seq` is checked after the keys."""

    drafts: list[Draft]
    expected_seq: int | None = None


class Append(_Payload, frozen=True):
    """What arrived at a gateway for one session while its last append was under way, in order."""

    epoch: int
    session: str
    entries: list[Entry]


class Ack(_Payload, frozen=True):
    """One message is on disk."""

    seq: int
    id: str
    inserted_at: str
    deduped: bool


class EntryResult(_Payload, frozen=True):
    """The answer to one entry.

    Acks, one a draft, or an error. After a TRY_AGAIN in an entry all later entries have one too.
    """

    acks: list[Ack]
    error: ErrorBody | None = None


class Appended(_Payload, frozen=True):
    """Results in the order of the entries."""

    results: list[EntryResult]


class Read(_Payload, frozen=True):
    """Messages after `after`, or before `before`, or the last `tail`; exactly one is given. Ascending in every case."""

    epoch: int
    session: str
    limit: int
    after: int | None = None
    before: int | None = None
    tail: int | None = None


class Gap(_Payload, frozen=True):
    """Messages that this ring does not hold any more.

    `from_seq` is the first missing, `next_seq` the first that follows.
    """

    reason: str
    from_seq: int
    next_seq: int
    earliest_seq: int
    last_seq: int


class Page(_Payload, frozen=True):
    """Messages (JSON, ready for clients) with contiguous seqs from `first_seq`; a gap stands before them.

    `has_more`: for `after` there are later ones up to `last_seq`; for `before` and `tail` earlier ones.
    A page that meets a gap after some messages ends before it: the next page begins with the gap.
    """

    first_seq: int
    messages: list[bytes]
    has_more: bool
    last_seq: int
    earliest_seq: int
    gap: Gap | None = None


class Info(_Payload, frozen=True):
    """Ask about a session; a `cursor` beyond its `last_seq` is answered by ERROR INVALID `cursor_ahead`."""

    epoch: int
    session: str
    cursor: int | None = None


class InfoOk(_Payload, frozen=True):
    """A session as it is; one that was never written to has `exists=False`, `last_seq` 0 and `earliest_seq` 1."""

    exists: bool
    last_seq: int
    earliest_seq: int
    inserted_at: str
    metadata: bytes
    epoch: int


class Subscribe(_Payload, frozen=True):
    """Push what comes after `after` (None: after the session's `last_seq` now)."""

    epoch: int
    session: str
    after: int | None = None


class Subscribed(_Payload, frozen=True):
    """The subscription stands.

    Pushes begin at `start_seq` + 1 and are contiguous; `start_seq` > `after` means: replay the rest first.
    """

    start_seq: int
    last_seq: int


class Push(_Payload, frozen=True):
    """`count` messages from `first_seq`, as JSON joined by commas."""

    first_seq: int
    count: int
    body: bytes


class PushRead(_Payload, frozen=True):
    """A participant's read cursor moved."""

    participant: str
    last_read_seq: int


class Ended(_Payload, frozen=True):
    """The subscription is over.

    `moved` (with owner and epoch), `draining`, or `overflow` (this gateway does not read fast enough).
    """

    reason: str
    owner: str
    epoch: int


class MarkRead(_Payload, frozen=True):
    """Set a participant's read cursor; it never goes back."""

    epoch: int
    session: str
    participant: str
    seq: int


class Marked(_Payload, frozen=True):
    """The read cursor as it is now, on disk."""

    last_read_seq: int


class Create(_Payload, frozen=True):
    """Make a session that has no messages yet; `metadata` is a JSON object. The same metadata again is no error."""

    epoch: int
    session: str
    metadata: bytes


class Created(_Payload, frozen=True):
    """`created` is False when the session existed with the same metadata."""

    created: bool
    info: InfoOk


class List(_Payload, frozen=True):
    """Sessions of this shard in the order of their ids (UTF-8 bytes), after `after` ("" from the first)."""

    after: str
    limit: int


class Listed(_Payload, frozen=True):
    """Session ids with what INFO says of each."""

    sessions: list[tuple[str, InfoOk]]


class Participated(_Payload, frozen=True):
    """Sessions that a participant wrote to or marked read, in the order of their ids (UTF-8 bytes), after `after`."""

    participant: str
    after: str
    limit: int


class ParticipatedOk(_Payload, frozen=True):
    """Their ids; fewer than asked for: there are no more."""

    sessions: list[str]


class InboxPlace(_Payload, frozen=True):
    """A place in an inbox, whose newest activity comes first: that of this entry."""

    active_at_us: int
    session: str


class Inbox(_Payload, frozen=True):
    """Up to `limit` sessions that a participant wrote to or marked read, after `after` (None: from the newest)."""

    participant: str
    after: InboxPlace | None
    limit: int


class InboxEntry(_Payload, frozen=True):
    """A session as the archive shows it to a participant.

    `active_at_us`: when its newest message was inserted, or it was made. `unread`: messages after the read cursor that
    others sent, among the first `UNREAD_MAX`; `unread_more`: there are further messages.
    """

    session: str
    last_seq: int
    inserted_at_us: int
    active_at_us: int
    metadata: bytes
    last_read_seq: int
    unread: int
    unread_more: bool


class InboxPage(_Payload, frozen=True):
    """`more`: there are sessions after the last of these (a page also ends by its bytes)."""

    entries: list[InboxEntry]
    more: bool


class ChangesPlace(_Payload, frozen=True):
    """A place in the archive's stream of changes, the same for every shard: a transaction, and the database's time.

    (0, 0): where it is now.
    """

    xid: int
    at_us: int


class Changes(_Payload, frozen=True):
    """Which sessions of these participants changed since a place."""

    participants: list[str]
    since: ChangesPlace


class Changed(_Payload, frozen=True):
    """Of each pair: participant, session, last seq, last read seq; some may have been told before.

    `now`: ask from there next. `lost`: what changed since then is not known (too long ago, or too much): read anew.
    """

    pairs: list[tuple[str, str, int, int]]
    now: ChangesPlace
    lost: bool


class Entries(_Payload, frozen=True):
    """Ask for these pairs of participant and session."""

    pairs: list[tuple[str, str]]


class EntriesOk(_Payload, frozen=True):
    """Each pair's participant and entry; pairs that the archive does not know are left out."""

    entries: list[tuple[str, InboxEntry]]


class Export(_Payload, frozen=True):
    """The sessions of a move's slots after `after`, in the order of their ids; "" begins a pass.

    A pass belongs to `reader`, a name that a target makes anew for each: the source keeps what changes for one reader
    at a time, and answers another one INVALID `unknown_round`, as it does after a restart. Then a pass begins anew.
    """

    move: str
    epoch: int
    reader: str
    after: str
    limit: int


class ExportChanged(_Payload, frozen=True):
    """The sessions that changed since round `round` - 1 was answered (round 0 is the pass).

    Asking for a round says that the answer to the one before has arrived; asking for the same again is a retry.
    """

    move: str
    epoch: int
    reader: str
    round: int


class SessionState(_Payload, frozen=True):
    """A session as the source shows it: all but its messages. `earliest_seq` is the first message that is held."""

    session: str
    last_seq: int
    earliest_seq: int
    inserted_at_us: int
    metadata: bytes
    cursors: dict[str, int]


class Exported(_Payload, frozen=True):
    """States of sessions; `more`: the pass goes on after `after`."""

    sessions: list[SessionState]
    more: bool
    after: str


class ExportMessages(_Payload, frozen=True):
    """Messages of a session after seq `after`, as the source's log holds them; up to `limit`, and to `bytes_max`.

    `others`: of further sessions, each with its own `after`, if the limits allow; they are for all together.
    """

    move: str
    epoch: int
    session: str
    after: int
    limit: int
    bytes_max: int
    others: list[tuple[str, int]] = []


class ExportedMessages(_Payload, frozen=True):
    """Bodies of MESSAGE records (docs/log.md) with ascending seqs: key and content hash come along.

    A hole between them, or before the first, is a hole at the source: what was trimmed or damaged there is missing
    from now on. `windowed` says of each whether its key is in the source's window. `more`: there are later ones.
    `others`: the same of the first of the request's `others`; of those that are missing nothing was looked at.
    """

    bodies: list[bytes]
    windowed: list[bool]
    more: bool
    others: list[ExportedMessages] = []


class ExportSealed(_Payload, frozen=True):
    """Answered when the source is sealed, durably; `reader` must have been given a whole pass."""

    move: str
    epoch: int
    reader: str


class ExportedAll(_Payload, frozen=True):
    """How many sessions the slots have, and the sum of their last seqs: nothing will be added by this source."""

    sessions: int
    total: int


class Goaway(_Payload, frozen=True):
    """The shard is leaving: send what is new elsewhere or later."""

    reason: str


encode = msgspec.msgpack.Encoder().encode
"""Payload to bytes."""
