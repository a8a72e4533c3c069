"""Phoenix Channels, V2 JSON serializer: text frames `[join_ref, ref, topic, event, payload]`.

Promise: pure; a payload is parsed once, by whoever knows its form. Must not be done here: state.
"""

from __future__ import annotations

import msgspec

from fleetlm_client.events import Ack, CaughtUp, Gap, InboxEntry, InboxPage, Joined, Message, Page, ReadCursor
from fleetlm_common.errors import ErrorBody

PHOENIX_TOPIC = "phoenix"
SESSION_PREFIX = "session:"
INBOX_PREFIX = "inbox:"
EMPTY = b"{}"


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One frame as it stands on the wire."""

    join_ref: str | None
    ref: str | None
    topic: str
    event: str
    payload: msgspec.Raw


class Reply(msgspec.Struct, frozen=True, gc=False):
    """Payload of `phx_reply`."""

    status: str
    response: msgspec.Raw


class Messages(msgspec.Struct, frozen=True):
    """Payload of the push `messages`."""

    messages: list[Message]


class Acks(msgspec.Struct, frozen=True):
    """Answer to an append of several messages."""

    messages: list[Ack]


class DrainingPush(msgspec.Struct, frozen=True):
    """Payload of the push `draining`."""

    retry_after_ms: int = 0


class LastRead(msgspec.Struct, frozen=True):
    """Answer to `mark_read`."""

    last_read_seq: int


decode_frame = msgspec.json.Decoder(Frame).decode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_messages = msgspec.json.Decoder(Messages).decode
decode_gap = msgspec.json.Decoder(Gap).decode
decode_caught_up = msgspec.json.Decoder(CaughtUp).decode
decode_read = msgspec.json.Decoder(ReadCursor).decode
decode_draining = msgspec.json.Decoder(DrainingPush).decode
decode_ack = msgspec.json.Decoder(Ack).decode
decode_acks = msgspec.json.Decoder(Acks).decode
decode_page = msgspec.json.Decoder(Page).decode
decode_joined = msgspec.json.Decoder(Joined).decode
decode_last_read = msgspec.json.Decoder(LastRead).decode
decode_inbox_page = msgspec.json.Decoder(InboxPage).decode
decode_inbox_entry = msgspec.json.Decoder(InboxEntry).decode
decode_error = msgspec.json.Decoder(ErrorBody).decode

_encode = msgspec.json.Encoder().encode


def encode_frame(join_ref: str | None, ref: str, topic: str, event: str, payload: bytes = EMPTY) -> str:
    """One frame as text; `payload` is JSON already."""
    return _encode((join_ref, ref, topic, event, msgspec.Raw(payload))).decode()


class JoinPayload(msgspec.Struct, frozen=True, omit_defaults=True):
    """Replay after `cursor`, or the last `tail`, or neither: live only."""

    cursor: int | None = None
    tail: int | None = None


class InboxJoinPayload(msgspec.Struct, frozen=True, omit_defaults=True):
    """How many sessions a page has; the server's most when not given."""

    limit: int | None = None


def encode_json(value: object) -> bytes:
    """Any JSON value as bytes.

    Raises:
        TypeError: `value` holds something that JSON has no form for.
    """
    return _encode(value)
