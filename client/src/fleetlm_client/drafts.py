"""From what a caller wants to append to JSON fragments, checked against the limits before anything is sent.

Promise: a fragment that came out of here fits a frame, so that no append can make the server close the socket; its
idempotency key is made once and never changes, whatever is retried. Must not be done here: sending.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fleetlm_client.frames import encode_json
from fleetlm_common import limits
from fleetlm_common.errors import Invalid, TooLarge
from fleetlm_common.ids import checked_id, uuid7

FRAME_OVERHEAD_BYTES = 2_048
"""Join ref, ref, topic (128 bytes, escaped), event and braces around the messages of an append."""
PAYLOAD_BYTES_MAX = limits.FRAME_BYTES_MAX - FRAME_OVERHEAD_BYTES
"""Fragments of one append frame together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessage:
    """A message to be appended.

    `content` is any JSON value; `kind` a label; `idempotency_key` is made when it is not given. Give one when the same
    message may be appended again by another process (after a crash, from a job queue).
    """

    content: Any
    kind: str | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None


class _Fragment(msgspec.Struct, frozen=True, omit_defaults=True):
    content: msgspec.Raw
    idempotency_key: str
    kind: str | None = None
    metadata: msgspec.Raw | None = None


@dataclass(frozen=True, slots=True)
class Fragment:
    """A message ready to be sent: its key and its JSON object."""

    key: str
    body: bytes


def fragment(message: NewMessage, *, now_ms: int, entropy: random.Random) -> Fragment:
    """Check and encode one message.

    Raises:
        Invalid: not JSON, a bad key or kind; names the field.
        TooLarge: content, metadata or kind beyond its limit; names the field.
    """
    key = uuid7(now_ms, entropy) if message.idempotency_key is None else message.idempotency_key
    checked_id(key, "idempotency_key")
    content = _json(message.content, field="content", limit=limits.CONTENT_BYTES_MAX)
    metadata = None
    if message.metadata is not None:
        metadata = msgspec.Raw(_json(dict(message.metadata), field="metadata", limit=limits.METADATA_BYTES_MAX))
    if message.kind is not None:
        _check_size(message.kind.encode(errors="surrogatepass"), field="kind", limit=limits.KIND_BYTES_MAX)
    return Fragment(key, encode_json(_Fragment(msgspec.Raw(content), key, message.kind, metadata)))


def fragments(messages: Sequence[NewMessage], *, now_ms: int, entropy: random.Random) -> tuple[Fragment, ...]:
    """Check and encode the messages of one all-or-nothing batch.

    Raises:
        Invalid: none at all, or one of them is bad; names the field.
        TooLarge: more than 100, or too many bytes for one frame.
    """
    if not messages:
        raise Invalid("messages must hold at least one", field="messages")
    if len(messages) > limits.BATCH_MESSAGES_MAX:
        raise TooLarge(
            f"messages holds {len(messages)}, a batch has at most {limits.BATCH_MESSAGES_MAX}",
            field="messages",
            limit=limits.BATCH_MESSAGES_MAX,
        )
    made = tuple(fragment(message, now_ms=now_ms, entropy=entropy) for message in messages)
    if sum(len(one.body) + 1 for one in made) > PAYLOAD_BYTES_MAX:
        raise TooLarge(
            f"messages together exceed {PAYLOAD_BYTES_MAX} bytes of one frame",
            field="messages",
            limit=PAYLOAD_BYTES_MAX,
        )
    return made


def _json(value: object, *, field: str, limit: int) -> bytes:
    try:
        encoded = encode_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"{field} is not JSON: {error}", field=field) from error
    _check_size(encoded, field=field, limit=limit)
    return encoded


def _check_size(encoded: bytes, *, field: str, limit: int) -> None:
    if len(encoded) > limit:
        raise TooLarge(f"{field} has {len(encoded)} bytes, the limit is {limit}", field=field, limit=limit)
