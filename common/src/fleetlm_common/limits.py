"""Every limit that a client can meet, with name and reason; `GET /v1/limits` and docs/protocol.md show these values.

Promise: a limit stands here once. Must not be done here: checks (they stand where the input comes in).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

ID_BYTES_MAX: Final = 128
"""Session, participant ids and idempotency keys: one length byte in the record, and indexes stay small."""
KIND_BYTES_MAX: Final = 64
"""A message's `kind` is a label."""
CONTENT_BYTES_MAX: Final = 64 * 1024
"""Encoded JSON of `content`: a batch of 100 must fit a log batch; larger things belong in object storage."""
METADATA_BYTES_MAX: Final = 8 * 1024
"""Encoded JSON of `metadata`, of a message or a session."""
FRAME_BYTES_MAX: Final = 256 * 1024
"""One WebSocket frame or REST body."""
BATCH_MESSAGES_MAX: Final = 100
"""Messages of one append: all or nothing, so they share one log batch."""
REPLAY_LIMIT_DEFAULT: Final = 100
"""Messages of one replay page when the reader does not say."""
REPLAY_LIMIT_MAX: Final = 1000
"""Messages of one replay page at the most."""
INBOX_LIMIT_MAX: Final = 100
"""Sessions of one page of an inbox: each costs the counting of up to `UNREAD_MAX` messages."""
UNREAD_MAX: Final = 1000
"""Messages after a read cursor that are looked at to count the unread ones: an agent that never marks anything read
must not cost a walk through a million rows."""
PAGE_BYTES_MAX: Final = 1024 * 1024
"""Bytes of messages of one page on the wire between shard and gateway; `has_more` says that there is more."""
JSON_DEPTH_MAX: Final = 64
"""Nesting of `content` and `metadata`: parsers in every language can follow it."""
SEQ_MAX: Final = 2**53 - 1
"""Largest integer that JavaScript holds exactly."""
REQUEST_DEADLINE_S: Final = 10.0
"""One deadline per request at the gateway, passed down, never restarted."""
KEY_WINDOW_MARGIN_S: Final = 5.0
"""A key younger than `REQUEST_DEADLINE_S` plus this is never evicted: a retry of it may still be on its way."""

CLIENT_LIMITS: Final = MappingProxyType(
    {
        "id_bytes_max": ID_BYTES_MAX,
        "kind_bytes_max": KIND_BYTES_MAX,
        "content_bytes_max": CONTENT_BYTES_MAX,
        "metadata_bytes_max": METADATA_BYTES_MAX,
        "frame_bytes_max": FRAME_BYTES_MAX,
        "batch_messages_max": BATCH_MESSAGES_MAX,
        "replay_limit_default": REPLAY_LIMIT_DEFAULT,
        "replay_limit_max": REPLAY_LIMIT_MAX,
        "json_depth_max": JSON_DEPTH_MAX,
        "inbox_limit_max": INBOX_LIMIT_MAX,
        "unread_max": UNREAD_MAX,
        "seq_max": SEQ_MAX,
        "request_deadline_ms": int(REQUEST_DEADLINE_S * 1000),
    }
)
"""What `GET /v1/limits` answers (a gateway adds its own: sockets, topics, frames a second)."""
