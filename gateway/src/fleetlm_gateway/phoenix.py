"""Phoenix Channels, V2 JSON serializer: `[join_ref, ref, topic, event, payload]`, in from and out to bytes; pure.

Promise: refs go back exactly as they came; payloads are not looked into; a frame that cannot be read still says, where
its head can be read, which request it was, so that the request can be answered.
Must not be done here: topics' meaning, sockets, WebSocket framing.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Raw

REF_BYTES_MAX: Final = 128
"""Of `join_ref` and `ref` as JSON: clients count, the longest known are UUIDs. They are echoed in each reply."""
NULL: Final = b"null"

_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'
_REF: Final = rb"(null|-?[0-9]{1,20}|" + _STRING + rb")"
_HEAD: Final = re.compile(
    rb"\s*+\[\s*+" + rb"\s*+,\s*+".join((_REF, _REF, rb"(" + _STRING + rb")", rb"(" + _STRING + rb")")) + rb"\s*+,",
    re.DOTALL,
)


class _Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    join_ref: Raw
    ref: Raw
    topic: str
    event: str
    payload: Raw


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A frame from a client; refs and payload are JSON as they came (`payload` None: it cannot be read)."""

    join_ref: bytes
    ref: bytes
    topic: str
    event: str
    payload: bytes | None


class Malformed(Exception):
    """Not a frame; nobody can be answered."""


_DECODE: Final = msgspec.json.Decoder(_Frame).decode
_TEXT: Final = msgspec.json.Decoder(str).decode
_ANY: Final = msgspec.json.Decoder().decode
_ENCODE: Final = msgspec.json.Encoder().encode


def decode(data: bytes) -> Frame:
    """Read a text frame.

    Raises:
        Malformed: not five elements of the right types, or refs longer than `REF_BYTES_MAX`.
    """
    try:
        data.decode()
        found = _DECODE(data)
    except UnicodeDecodeError as error:
        raise Malformed("not UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        return _head_only(data, error)
    join_ref, ref = bytes(found.join_ref), bytes(found.ref)
    _check_ref(join_ref, "join_ref")
    _check_ref(ref, "ref")
    return Frame(join_ref, ref, found.topic, found.event, bytes(found.payload))


def _check_ref(ref: bytes, name: str) -> None:
    if not (ref == NULL or (ref[:1] == ref[-1:] == b'"' and ref[1:-1].isalnum()) or _is_odd_ref(ref)):
        raise Malformed(f"{name} must be a string, an integer or null of at most {REF_BYTES_MAX} bytes")
    if len(ref) > REF_BYTES_MAX:
        raise Malformed(f"{name} is longer than {REF_BYTES_MAX} bytes")


def _is_odd_ref(ref: bytes) -> bool:
    r"""Whether it is JSON, and of a type that a ref may have.

    What is kept raw was skipped, not read: `"\x"` or `01` would go back to the client in a frame that no parser takes.
    """
    if len(ref) > REF_BYTES_MAX:
        return True
    try:
        return type(_ANY(ref)) in {str, int}
    except msgspec.DecodeError:
        return False


def _head_only(data: bytes, error: Exception) -> Frame:
    """The frame without its payload, when at least its first four elements can be read."""
    head = _HEAD.match(data)
    if head is None:
        raise Malformed(str(error)) from error
    join_ref, ref, topic, event = head.groups()
    _check_ref(join_ref, "join_ref")
    _check_ref(ref, "ref")
    try:
        return Frame(join_ref, ref, _TEXT(topic), _TEXT(event), None)
    except msgspec.DecodeError as wrong:
        raise Malformed(str(wrong)) from wrong


def topic_text(topic: str) -> bytes:
    """A topic as it stands in frames; made once per channel."""
    return _ENCODE(topic)


def reply_ok(join_ref: bytes, ref: bytes, topic: bytes, response: bytes) -> bytes:
    """The answer to a request that was done; `response` is a JSON object."""
    return b'[%b,%b,%b,"phx_reply",{"status":"ok","response":%b}]' % (join_ref, ref, topic, response)


def reply_error(join_ref: bytes, ref: bytes, topic: bytes, response: bytes) -> bytes:
    """The answer to a request that was refused; `response` is an error body."""
    return b'[%b,%b,%b,"phx_reply",{"status":"error","response":%b}]' % (join_ref, ref, topic, response)


def push(join_ref: bytes, topic: bytes, event: bytes, payload: bytes) -> bytes:
    """An event from the server."""
    return b'[%b,null,%b,"%b",%b]' % (join_ref, topic, event, payload)


def ended(join_ref: bytes, topic: bytes, event: bytes, payload: bytes = b"{}") -> bytes:
    """`phx_close` or `phx_error`: the channel is over; its ref is its join's."""
    return b'[%b,%b,%b,"%b",%b]' % (join_ref, join_ref, topic, event, payload)


def messages_head(join_ref: bytes, topic: bytes) -> bytes:
    """What stands before the messages of a push; made once per channel, so that one body serves all sockets."""
    return b'[%b,null,%b,"messages",{"messages":[' % (join_ref, topic)


MESSAGES_TAIL: Final = b"]}]"
"""What stands after them."""
