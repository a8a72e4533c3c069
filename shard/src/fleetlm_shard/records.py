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
    IMPORTED_KEYLESS = 10
    STATE = 11
    SEALED = 12
    CONFIRMED = 13
    VOID = 14


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


class Imported(Message, frozen=True, gc=False):
    """A message that another shard ordered, brought here by a move: the same bytes.

    Its time is that shard's, so it says nothing about the age of what stands beside it. `windowed`: its key was in the
    idempotency window there, so it is in the window here.
    """

    windowed: bool = True


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


class SlotsReleased(msgspec.Struct, frozen=True, array_like=True):
    """What this log holds of these slots before this record is gone."""

    slots: list[int]


class SlotsSealed(msgspec.Struct, frozen=True, array_like=True):
    """This shard, the source of `move`, writes nothing more of these slots; by the map of `epoch`."""

    move: str
    epoch: int
    slots: list[int]


class MoveConfirmed(msgspec.Struct, frozen=True, array_like=True):
    """All of these slots is here, says the target of `move`, which its map of `epoch` shows sealing."""

    move: str
    epoch: int
    slots: list[int]


class SessionImported(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A session as its source showed it: all but its messages, which stand before this record.

    Messages up to `last_seq` that do not stand there are missing at the source too; those up to `trimmed_seq` because
    of its retention.
    """

    slot: int
    session: str
    last_seq: int
    trimmed_seq: int
    inserted_at_us: int
    metadata: bytes
    cursors: dict[str, int]


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


class Void(msgspec.Struct, frozen=True, gc=False):
    """Here stood records of slots that were released (`compaction.py`); only read."""


class LostMessage(msgspec.Struct, frozen=True, gc=False):
    """Only handed out by recovery, never written: a sealed index names this message, but its bytes are damaged.

    The session's `last_seq` must count it.
    """

    session: str
    seq: int


Slotted = SessionCreated | CursorMoved | SessionImported
"""Records of one session that are no messages."""
Record = Message | Slotted | SlotsOpened | SlotsReleased | SlotsSealed | MoveConfirmed | Trimmed | Damaged
"""What can be appended."""
Replayed = Record | LostMessage | Void
"""What recovery hands out."""

_MESSAGE: Final = int(RecordType.MESSAGE)
"""Asking an enum for a member takes 0.2 µs in Python 3.11, a fifth of `encode`."""
IMPORTS: Final = frozenset({int(RecordType.IMPORTED), int(RecordType.IMPORTED_KEYLESS)})
MESSAGES: Final = frozenset({_MESSAGE, *IMPORTS})
"""Types whose body is a message's."""
OF_A_SLOT: Final = MESSAGES | {int(each) for each in (RecordType.SESSION, RecordType.CURSOR, RecordType.STATE)}
"""Types that do not count any more once their slot is released."""
VOID_TAIL: Final = _TAIL_HEAD.pack(RecordType.VOID, 0, 0, 0)
"""A VOID's frame without its first 8 bytes; zeros follow."""
_VOID: Final = Void()
_pack = msgspec.msgpack.Encoder().encode
_SLOTTED: Final[dict[type, RecordType]] = {
    SessionCreated: RecordType.SESSION,
    CursorMoved: RecordType.CURSOR,
    SlotsOpened: RecordType.OPENED,
    SlotsReleased: RecordType.RELEASED,
    SessionImported: RecordType.STATE,
    SlotsSealed: RecordType.SEALED,
    MoveConfirmed: RecordType.CONFIRMED,
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
    if isinstance(record, Imported):
        kind = RecordType.IMPORTED if record.windowed else RecordType.IMPORTED_KEYLESS
        return _TAIL_HEAD.pack(kind, 0, record.slot, 0) + message_body(record)
    assert not isinstance(record, Message)
    slot = record.slot if isinstance(record, Slotted) else 0
    return _TAIL_HEAD.pack(_SLOTTED[type(record)], 0, slot, 0) + _pack(record)


def decode(kind: int, slot: int, body: bytes | memoryview) -> Record | Void:
    """The value of a frame whose checksum was right.

    Raises:
        UnknownRecord: a type that this version does not know.
    """
    if kind == _MESSAGE:
        return Message(slot, *_message_fields(body))
    decoder = _decoders.get(kind)
    if decoder is not None:
        return decoder.decode(body)
    if kind in IMPORTS:
        return Imported(slot, *_message_fields(body), kind == RecordType.IMPORTED)
    if kind == RecordType.VOID:
        return _VOID
    raise UnknownRecord(f"record type {kind} is not known to this version")


def _message_fields(body: bytes | memoryview) -> tuple[str, int, int, str, bytes, bytes]:
    """Session, seq, time, key, content hash and JSON of a MESSAGE body."""
    seq, at_us, content_hash, session_bytes, key_bytes = _MESSAGE_BODY.unpack_from(body)
    key_at = MESSAGE_BODY_HEAD_BYTES + session_bytes
    json_at = key_at + key_bytes
    session = str(body[MESSAGE_BODY_HEAD_BYTES:key_at], "utf-8")
    return session, seq, at_us, str(body[key_at:json_at], "utf-8"), content_hash, bytes(body[json_at:])


def message_body(message: Message) -> bytes:
    """The body of its record, which is the same in every log that holds it."""
    session, key = message.session.encode(), message.key.encode()
    head = _MESSAGE_BODY.pack(message.seq, message.inserted_at_us, message.content_hash, len(session), len(key))
    return head + session + key + message.json


def imported(slot: int, body: bytes, *, windowed: bool) -> Imported:
    """The record of a message that came from another shard as `body`.

    Raises:
        ValueError: these bytes are no message (struct.error becomes one).
    """
    try:
        return Imported(slot, *_message_fields(body), windowed)
    except struct.error as error:
        raise ValueError("a message's body ends too early") from error


def message_place(body: bytes | memoryview) -> tuple[bytes, int, int]:
    """Session id (UTF-8), seq and offset of the JSON in a MESSAGE body; for indexes, which need no more."""
    seq, session_bytes, key_bytes = _SEQ_AND_SESSION.unpack_from(body)
    key_at = MESSAGE_BODY_HEAD_BYTES + session_bytes
    return bytes(body[MESSAGE_BODY_HEAD_BYTES:key_at]), seq, key_at + key_bytes


def message_key(body: bytes) -> str:
    """The key in a MESSAGE body."""
    _, session_bytes, key_bytes = _SEQ_AND_SESSION.unpack_from(body)
    key_at = MESSAGE_BODY_HEAD_BYTES + session_bytes
    return str(body[key_at : key_at + key_bytes], "utf-8")


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
