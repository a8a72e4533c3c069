"""Payloads of `phx_join`, `replay` and `mark_read`, and the bodies of answers.

Promise: a value that comes out is in range; a refusal names the field. Must not be done here: `append` (`drafts.py`).
"""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Raw

from fleetlm_common import rpc
from fleetlm_common.clock import iso_utc
from fleetlm_common.errors import FleetError, Invalid
from fleetlm_common.ids import checked_id
from fleetlm_common.limits import INBOX_LIMIT_MAX, REPLAY_LIMIT_DEFAULT, REPLAY_LIMIT_MAX, SEQ_MAX
from fleetlm_gateway.boundary import FromCursor, FromTail, LiveOnly, Start
from fleetlm_gateway.jsontext import decode_fields, encode, repeated_name

SeqField = Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)]
PositiveSeq = Annotated[int, msgspec.Meta(ge=1, le=SEQ_MAX)]
LimitField = Annotated[int, msgspec.Meta(ge=1, le=REPLAY_LIMIT_MAX)]
TailField = Annotated[int, msgspec.Meta(ge=0, le=REPLAY_LIMIT_MAX)]


class _Join(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    cursor: SeqField | None = None
    tail: TailField | None = None


class _JoinInbox(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=INBOX_LIMIT_MAX)] = INBOX_LIMIT_MAX


class Replay(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A page asked for; exactly one of `after` and `before` is given."""

    after: SeqField | None = None
    before: PositiveSeq | None = None
    limit: LimitField = REPLAY_LIMIT_DEFAULT


class MarkRead(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A read cursor to be set."""

    seq: SeqField


class AckBody(msgspec.Struct, frozen=True, gc=False):
    """One message is on disk."""

    seq: int
    id: str
    inserted_at: str
    deduped: bool


class JoinReply(msgspec.Struct, frozen=True, gc=False):
    """A session as a joiner finds it."""

    session_id: str
    epoch: int
    last_seq: int
    earliest_seq: int


class InboxEntryBody(msgspec.Struct, frozen=True, gc=False):
    """A session in an inbox."""

    session_id: str
    last_seq: int
    last_read_seq: int
    unread: int
    unread_more: bool
    active_at: str
    inserted_at: str
    metadata: Raw


class InboxBody(msgspec.Struct, frozen=True, gc=False):
    """A page of an inbox, newest activity first; `next` asks for the page that follows, null at the end."""

    sessions: list[InboxEntryBody]
    next: str | None


class GapBody(msgspec.Struct, frozen=True, gc=False):
    """What this ring does not hold any more."""

    reason: str
    from_seq: int
    next_seq: int
    earliest_seq: int
    last_seq: int


T = TypeVar("T")

_PLACE: Final = re.compile(r"([0-9]{1,16})\.(.+)", re.DOTALL)

_JOIN: Final = msgspec.json.Decoder(_Join)
_JOIN_INBOX: Final = msgspec.json.Decoder(_JoinInbox)
_REPLAY: Final = msgspec.json.Decoder(Replay)
_MARK_READ: Final = msgspec.json.Decoder(MarkRead)


def _decoded(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    asked = decode_fields(decoder, payload)
    twice = repeated_name(payload)
    if twice is not None:
        raise Invalid(f"{twice} is given twice", reason="repeated_field", field=twice)
    return asked


def start_of_join(payload: bytes) -> Start:
    """Where a join begins.

    Raises:
        Invalid: names the field.
    """
    asked = _decoded(_JOIN, payload)
    if asked.cursor is not None and asked.tail is not None:
        raise Invalid("cursor and tail exclude each other", field="tail")
    if asked.cursor is not None:
        return FromCursor(asked.cursor)
    return LiveOnly() if not asked.tail else FromTail(asked.tail)


def limit_of_inbox_join(payload: bytes) -> int:
    """How many sessions a join of an inbox begins with.

    Raises:
        Invalid: names the field.
    """
    return _decoded(_JOIN_INBOX, payload).limit


def inbox_place(text: str) -> rpc.InboxPlace:
    """The place that `next` of a page names.

    Raises:
        Invalid: it names none.
    """
    found = _PLACE.fullmatch(text)
    if found is None or int(found[1]) > SEQ_MAX:
        raise Invalid("after must be the next of a page before", field="after")
    return rpc.InboxPlace(int(found[1]), checked_id(found[2], "after"))


def inbox_entry(entry: rpc.InboxEntry) -> InboxEntryBody:
    """A session as an inbox shows it."""
    return InboxEntryBody(
        entry.session,
        entry.last_seq,
        entry.last_read_seq,
        entry.unread,
        entry.unread_more,
        iso_utc(entry.active_at_us),
        iso_utc(entry.inserted_at_us),
        Raw(entry.metadata),
    )


def inbox_body(page: rpc.InboxPage) -> InboxBody:
    """A page of an inbox as clients see it."""
    following = f"{page.entries[-1].active_at_us}.{page.entries[-1].session}" if page.more else None
    return InboxBody([inbox_entry(entry) for entry in page.entries], following)


def replay(payload: bytes) -> Replay:
    """Which page is asked for.

    Raises:
        Invalid: names the field.
    """
    asked = _decoded(_REPLAY, payload)
    if (asked.after is None) == (asked.before is None):
        raise Invalid("give exactly one of after and before", field="after")
    return asked


def mark_read(payload: bytes) -> int:
    """The seq to be marked.

    Raises:
        Invalid: names the field.
    """
    return _decoded(_MARK_READ, payload).seq


def error_body(error: FleetError) -> bytes:
    """A refusal as clients see it."""
    return encode(error.body())


def ack_body(ack: rpc.Ack) -> bytes:
    """One message's answer."""
    return encode(AckBody(ack.seq, ack.id, ack.inserted_at, ack.deduped))


def acks_body(acks: list[rpc.Ack]) -> bytes:
    """A batch's answer."""
    return b'{"messages":[%b]}' % b",".join(map(ack_body, acks))


def gap_body(gap: rpc.Gap) -> bytes:
    """A gap as clients see it."""
    return encode(GapBody(gap.reason, gap.from_seq, gap.next_seq, gap.earliest_seq, gap.last_seq))


def page_body(page: rpc.Page) -> bytes:
    """A page as clients see it; `gap` stands there only when there is one."""
    more = b"true" if page.has_more else b"false"
    gap = b"" if page.gap is None else b',"gap":%b' % gap_body(page.gap)
    return b'{"messages":[%b],"has_more":%b%b}' % (b",".join(page.messages), more, gap)


def read_body(participant: str, last_read_seq: int) -> bytes:
    """A participant's read cursor as clients see it."""
    return b'{"participant_id":%b,"last_read_seq":%d}' % (encode(participant), last_read_seq)
