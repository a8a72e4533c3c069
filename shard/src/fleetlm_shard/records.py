"""The bodies of the log's records (docs/log.md, "Frames"), pure: values to bytes and back.

Promise: `decode` of what `encode` made gives the same value; a message's JSON is built here, once, and is from then on
only copied: to the log, to subscribers, to readers. Must not be done here: checksums and batches (`framing.py`).
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

import msgspec
from xxhash import xxh3_128_digest

HASH_BYTES: Final = 16
"""Of a content hash: two different contents under one key collide once in 2^64 tries."""
ID_CHARS: Final = 36
"""A message id is a UUID in its canonical form."""
_ID_START: Final = len(b'{"id":"')
_TAIL_HEAD: Final = struct.Struct("<BBHI")
_MESSAGE_HEAD: Final = struct.Struct("<BBHIQQ16sBB")
_pack_message_head: Final = _MESSAGE_HEAD.pack
_MESSAGE_BODY: Final = struct.Struct("<QQ16sBB")
MESSAGE_BODY_HEAD_BYTES: Final = _MESSAGE_BODY.size
_SEQ_AND_SESSION: Final = struct.Struct("<Q24xBB")


class RecordType(IntEnum):
    """The `type` byte of a frame; a number is never used again for something else."""

    BATCH = 1
    MESSAGE = 2
    SESSION = 3
    CURSOR = 4
    OPENED = 5
    RELEASED = 6
    IMPORTED = 7
    TRIMMED = 8
    DAMAGE = 9


class UnknownRecord(Exception):
    """A checksummed record of a type that this version does not know: a newer version wrote this log."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message: what is appended, replayed at boot, and kept in the key window.

    `key` and `content_hash` are for dedupe; `json` is what clients get, byte for byte.
    """

    slot: int
    session: str
    seq: int
    inserted_at_us: int
    key: str
    content_hash: bytes
    json: bytes


class SessionCreated(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A session was created explicitly; `metadata` is a JSON object as the client sent it."""

    slot: int
    session: str
    inserted_at_us: int
    metadata: bytes


class CursorMoved(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A participant's read cursor moved to `seq`."""

    slot: int
    session: str
    participant: str
    seq: int


class SlotsOpened(msgspec.Struct, frozen=True, array_like=True):
    """This shard serves these slots since the map of `epoch`."""

    epoch: int
    slots: list[int]


class Trimmed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Retention dropped everything below `below_pos`; the chain begins with segment `number` of `term`."""

    term: int
    number: int
    below_pos: int


class Damaged(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Recovery found `[from_pos, to_pos)` unreadable; up to `lost_max` messages that nobody can name were in it."""

    from_pos: int
    to_pos: int
    lost_max: int


class LostMessage(msgspec.Struct, frozen=True, gc=False):
    """Only handed out by recovery, never written: a sealed index names this message, but its bytes are damaged.

    The session's `last_seq` must count it.
    """

    session: str
    seq: int


Record = Message | SessionCreated | CursorMoved | SlotsOpened | Trimmed | Damaged
"""What can be appended."""
Replayed = Record | LostMessage
"""What recovery hands out."""

_MESSAGE: Final = int(RecordType.MESSAGE)
"""Asking an enum for a member takes 0.2 µs in Python 3.11, a fifth of `encode`."""
_pack = msgspec.msgpack.Encoder().encode
_SLOTTED: Final[dict[type, RecordType]] = {
    SessionCreated: RecordType.SESSION,
    CursorMoved: RecordType.CURSOR,
    SlotsOpened: RecordType.OPENED,
    Trimmed: RecordType.TRIMMED,
    Damaged: RecordType.DAMAGE,
}
_decoders: Final[dict[int, msgspec.msgpack.Decoder[Record]]] = {
    int(number): msgspec.msgpack.Decoder(kind) for kind, number in _SLOTTED.items()
}


def encode(record: Record) -> bytes:
    """A frame without its first 8 bytes (length and checksum): type, flags, slot, reserved, body."""
    if type(record) is Message:
        session = record.session.encode()
        key = record.key.encode()
        # One pack for frame head and body head, one concatenation: this line runs once per message.
        return (
            _pack_message_head(
                _MESSAGE, 0, record.slot, 0, record.seq, record.inserted_at_us, record.content_hash,
                len(session), len(key),
            )
            + session + key + record.json
        )  # fmt: skip
    slot = record.slot if isinstance(record, SessionCreated | CursorMoved) else 0
    return _TAIL_HEAD.pack(_SLOTTED[type(record)], 0, slot, 0) + _pack(record)


def decode(kind: int, slot: int, body: bytes | memoryview) -> Record:
    """The value of a frame whose checksum was right.

    Raises:
        UnknownRecord: a type that this version does not know.
    """
    if kind == _MESSAGE:
        seq, at_us, content_hash, session_bytes, key_bytes = _MESSAGE_BODY.unpack_from(body)
        key_at = MESSAGE_BODY_HEAD_BYTES + session_bytes
        json_at = key_at + key_bytes
        return Message(
            slot,
            str(body[MESSAGE_BODY_HEAD_BYTES:key_at], "utf-8"),
            seq,
            at_us,
            str(body[key_at:json_at], "utf-8"),
            content_hash,
            bytes(body[json_at:]),
        )
    decoder = _decoders.get(kind)
    if decoder is None:
        raise UnknownRecord(f"record type {kind} is not known to this version")
    return decoder.decode(body)


def message_place(body: bytes | memoryview) -> tuple[bytes, int, int]:
    """Session id (UTF-8), seq and offset of the JSON in a MESSAGE body; for indexes, which need no more."""
    seq, session_bytes, key_bytes = _SEQ_AND_SESSION.unpack_from(body)
    key_at = MESSAGE_BODY_HEAD_BYTES + session_bytes
    return bytes(body[MESSAGE_BODY_HEAD_BYTES:key_at]), seq, key_at + key_bytes


def message_inserted_at_us(body: bytes | memoryview) -> int:
    """When the message was inserted, from a MESSAGE body."""
    return int.from_bytes(body[8:16], "little")


def content_hash(fragment: bytes) -> bytes:
    """What must be equal for a dedupe: content, kind, metadata and sender, as the gateway encoded them.

    Versions of this system may hash differently: equal hashes mean equal contents, different ones are looked into
    (`Sequencer._compare`). Whoever searches for a collision dedupes two messages of their own.
    """
    return xxh3_128_digest(fragment)


def message_json(id_text: str, session_json: bytes, seq: int, inserted_at: bytes, fragment: bytes) -> bytes:
    """The message as clients will see it.

    Args:
        id_text: a UUID of 36 characters.
        session_json: the session id as a JSON string with its quotes.
        seq: its place in the session.
        inserted_at: 27 characters, see `InsertedAt`.
        fragment: the rest of the object's members, without braces.
    """
    return b'{"id":"%b","session_id":%b,"seq":%d,"inserted_at":"%b",%b}' % (
        id_text.encode(),
        session_json,
        seq,
        inserted_at,
        fragment,
    )


def message_id(json: bytes) -> str:
    """The id in a message's JSON; ids are never built twice."""
    return str(json[_ID_START : _ID_START + ID_CHARS], "ascii")


class InsertedAt:
    """Microseconds since 1970 to `2026-11-23T23:08:56.123456Z`; remembers the last second, for most calls share it."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = b""

    def text(self, at_us: int) -> bytes:
        """RFC 3339 in UTC, 27 bytes."""
        second, micros = divmod(at_us, 1_000_000)
        if second != self._second:
            self._prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
            self._second = second
        return b"%b.%06dZ" % (self._prefix, micros)
