"""An `append` payload becomes checked drafts: what a client wrote, with its sender, ready for the shard.

    {content, kind?, metadata?, idempotency_key?, expected_seq?}      or      {messages: [{content, …}], expected_seq?}

Promise: a draft's fragment is valid JSON that every client can read (`jsontext.py`), within the limits, and the same
bytes for the same content, whatever white space it came with. What cannot be accepted is refused with the field named,
the whole batch with it. Must not be done here: sending, or anything that needs to know the session.

`kind` is `message` when not given, `metadata` is `null`. A key that the client did not give is made here.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from fleetlm_common.errors import Invalid, TooLarge
from fleetlm_common.ids import checked_id
from fleetlm_common.limits import (
    BATCH_MESSAGES_MAX,
    CONTENT_BYTES_MAX,
    KIND_BYTES_MAX,
    METADATA_BYTES_MAX,
    SEQ_MAX,
)
from fleetlm_common.rpc import Draft
from fleetlm_gateway.jsontext import check_value, compact, decode_fields, encode, repeated_name
from fleetlm_gateway.principal import Principal

KIND_DEFAULT: Final = "message"
"""A message whose `kind` is not given."""

_ABSENT: Final = Raw()


class _Message(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One of a batch."""

    content: Raw = _ABSENT
    kind: str | None = None
    metadata: Raw = _ABSENT
    idempotency_key: str | None = None


class _Payload(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Both forms of the payload."""

    content: Raw = _ABSENT
    kind: str | None = None
    metadata: Raw = _ABSENT
    idempotency_key: str | None = None
    expected_seq: int | None = None
    messages: list[Raw] | None = None


_PAYLOAD: Final = msgspec.json.Decoder(_Payload)
_MESSAGE: Final = msgspec.json.Decoder(_Message)
_BRACES_BYTES: Final = 2
_FRAME_OF: Final = {name: len(f'"{name}":,') for name in _Payload.__struct_fields__}
_CONTENT_FRAME_BYTES: Final = _FRAME_OF["content"]
_KEY_FRAME_BYTES: Final = _FRAME_OF["idempotency_key"] + 2


class Keys:
    """Makes idempotency keys for clients that have none.

    Args:
        boot: something that no other gateway process has (its boot's entropy).
    """

    __slots__ = ("_boot", "_count")

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self._count = 0

    def make(self) -> str:
        """A key that was never made before."""
        self._count += 1
        return f"gw-{self._boot}-{self._count:x}"


class Parsed(msgspec.Struct, frozen=True, gc=False):
    """What an `append` asks for; `batch` says which form its answer has."""

    drafts: list[Draft]
    expected_seq: int | None
    batch: bool


def parse(payload: bytes, *, sender: Principal, keys: Keys, key: str | None = None) -> Parsed:
    """Check an `append` payload.

    Args:
        payload: JSON as the client sent it.
        sender: whose messages these are.
        keys: makes the keys that the client did not give.
        key: an idempotency key from elsewhere (the REST header); for a single message only.

    Raises:
        Invalid: names the field.
        TooLarge: names the field and the limit.
    """
    asked = decode_fields(_PAYLOAD, payload)
    content, metadata = bytes(asked.content), bytes(asked.metadata)
    if not _is_plain(payload, asked, content, metadata):
        text = compact(payload, "payload")
        asked = decode_fields(_PAYLOAD, text)
        if asked.messages is not None:
            return _batch(asked, text, sender=sender, keys=keys, key=key)
        content, metadata = bytes(asked.content), bytes(asked.metadata)
        _refuse_repeated(text, asked, content, metadata, where="")
    given = _one_key(asked.idempotency_key, key)
    draft = _draft(content, metadata, asked.kind, given, where="", sender=sender, keys=keys)
    return Parsed([draft], _checked_seq(asked.expected_seq), batch=False)


def _is_plain(payload: bytes, asked: _Payload, content: bytes, metadata: bytes) -> bool:
    """Whether this is a single message without white space between its tokens and without a repeated field.

    True for what most clients send, and then the text need not be read again to be brought to its compact form: the
    fields' lengths add up to the whole, so there is nothing else in it, and a string holds no tokens.
    """
    return content[:1] == b'"' and not metadata and asked.messages is None and _size_of(asked, content) == len(payload)


def _batch(asked: _Payload, text: bytes, *, sender: Principal, keys: Keys, key: str | None) -> Parsed:
    for name, absent in (
        ("content", not bytes(asked.content)),
        ("kind", asked.kind is None),
        ("metadata", not bytes(asked.metadata)),
        ("idempotency_key", asked.idempotency_key is None and key is None),
    ):
        if not absent:
            raise Invalid(f"{name} stands in each of messages, not beside them", field=name)
    assert asked.messages is not None
    count = len(asked.messages)
    if count == 0:
        raise Invalid("messages is empty", field="messages")
    if count > BATCH_MESSAGES_MAX:
        raise TooLarge(
            f"{count} messages, a batch has at most {BATCH_MESSAGES_MAX}", field="messages", limit=BATCH_MESSAGES_MAX
        )
    items = [bytes(item) for item in asked.messages]
    if _size_of_batch(items, asked.expected_seq) != len(text):
        _refuse_repeated_name(text, where="")
    drafts = [_item(item, where=f"messages[{at}].", sender=sender, keys=keys) for at, item in enumerate(items)]
    _refuse_shared_keys(drafts)
    return Parsed(drafts, _checked_seq(asked.expected_seq), batch=True)


def _item(text: bytes, *, where: str, sender: Principal, keys: Keys) -> Draft:
    asked = decode_fields(_MESSAGE, text, where=where)
    content, metadata = bytes(asked.content), bytes(asked.metadata)
    _refuse_repeated(text, asked, content, metadata, where=where)
    return _draft(content, metadata, asked.kind, asked.idempotency_key, where=where, sender=sender, keys=keys)


def _draft(
    content: bytes, metadata: bytes, kind: str | None, key: str | None, *, where: str, sender: Principal, keys: Keys
) -> Draft:
    if not content:
        raise Invalid(f"{where}content is missing", reason="missing_field", field=f"{where}content")
    if len(content) > CONTENT_BYTES_MAX:
        raise _too_large(f"{where}content", len(content), CONTENT_BYTES_MAX)
    check_value(content, f"{where}content")
    fragment = b'%b"kind":%b,"content":%b,"metadata":%b' % (
        sender.fragment,
        b'"message"' if kind is None else _encoded_kind(kind, f"{where}kind"),
        content,
        checked_metadata(metadata, f"{where}metadata") if metadata else b"null",
    )
    return Draft(keys.make() if key is None else checked_id(key, f"{where}idempotency_key"), fragment)


def checked_metadata(metadata: bytes, field: str) -> bytes:
    """Compact JSON of a `metadata`: an object, or null.

    Raises:
        Invalid: something else; names `field`.
        TooLarge: longer than `METADATA_BYTES_MAX`.
    """
    if metadata == b"null":
        return metadata
    if metadata[:1] != b"{":
        raise Invalid(f"{field} must be an object or null", field=field)
    if len(metadata) > METADATA_BYTES_MAX:
        raise _too_large(field, len(metadata), METADATA_BYTES_MAX)
    check_value(metadata, field)
    return metadata


def _encoded_kind(kind: str, field: str) -> bytes:
    size_bytes = len(kind.encode())
    if not 1 <= size_bytes <= KIND_BYTES_MAX:
        raise Invalid(f"{field} must be 1 to {KIND_BYTES_MAX} bytes of UTF-8", field=field, limit=KIND_BYTES_MAX)
    return encode(kind)


def _checked_seq(expected_seq: int | None) -> int | None:
    if expected_seq is not None and not 0 <= expected_seq <= SEQ_MAX:
        raise Invalid(f"expected_seq must be 0 to {SEQ_MAX}", field="expected_seq")
    return expected_seq


def _one_key(in_payload: str | None, beside: str | None) -> str | None:
    if in_payload is not None and beside is not None and in_payload != beside:
        raise Invalid("the header Idempotency-Key and idempotency_key differ", field="idempotency_key")
    return beside if in_payload is None else in_payload


def _refuse_repeated(text: bytes, asked: _Payload | _Message, content: bytes, metadata: bytes, *, where: str) -> None:
    """Refuse a field given twice: which of the two was meant nobody knows.

    The lengths of the fields add up to the length of the (compact) text when each stands there once; only when they do
    not (escapes in a string, an explicit null) the names themselves are looked at.
    """
    size = _size_of(asked, content)
    if metadata:
        size += _FRAME_OF["metadata"] + len(metadata)
    if size != len(text):
        _refuse_repeated_name(text, where=where)


def _size_of(asked: _Payload | _Message, content: bytes) -> int:
    """How long the compact text of these fields is, without metadata, if each stands there once and plainly.

    It is never longer than the text: an escape is longer than what it stands for.
    """
    size = _BRACES_BYTES - 1
    if content:
        size += _CONTENT_FRAME_BYTES + len(content)
    if asked.kind is not None:
        size += _FRAME_OF["kind"] + 2 + len(asked.kind.encode())
    key = asked.idempotency_key
    if key is not None:
        size += _KEY_FRAME_BYTES + (len(key) if key.isascii() else len(key.encode()))
    if type(asked) is _Payload and asked.expected_seq is not None:
        size += _size_of_seq(asked.expected_seq)
    return size


def _size_of_batch(items: list[bytes], expected_seq: int | None) -> int:
    return (
        _BRACES_BYTES - 1 + _FRAME_OF["messages"] + sum(map(len, items)) + len(items) + 1 + _size_of_seq(expected_seq)
    )


def _size_of_seq(expected_seq: int | None) -> int:
    return 0 if expected_seq is None else _FRAME_OF["expected_seq"] + len(str(expected_seq))


def _refuse_repeated_name(text: bytes, *, where: str) -> None:
    twice = repeated_name(text)
    if twice is not None:
        field = where + twice
        raise Invalid(f"{field} is given twice", reason="repeated_field", field=field)


def _refuse_shared_keys(drafts: list[Draft]) -> None:
    seen: set[str] = set()
    for at, draft in enumerate(drafts):
        if draft.key in seen:
            field = f"messages[{at}].idempotency_key"
            raise Invalid(f"{field} was given to an earlier message of the batch", reason="key_reused", field=field)
        seen.add(draft.key)


def _too_large(field: str, size_bytes: int, limit: int) -> TooLarge:
    return TooLarge(f"{field} has {size_bytes} bytes of JSON, the limit is {limit}", field=field, limit=limit)
