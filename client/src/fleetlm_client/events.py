"""What sessions and inboxes hand to their readers, and what an append is answered with: plain values.

Promise: between two `Message`s there is never a hole in `seq` without a `Gap` that says so.
Must not be done here: anything that knows connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

SenderKind = Literal["human", "agent", "system"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a session's log; `content` is any JSON value, `inserted_at` RFC 3339 in UTC.

    `metadata` is None when the sender gave none.
    """

    id: str
    session_id: str
    seq: int
    sender_id: str
    sender_kind: str
    kind: str
    content: Any
    metadata: dict[str, Any] | None = None
    inserted_at: str


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Messages `from_seq` to `next_seq - 1` cannot be had; delivery continues at `next_seq`."""

    reason: str
    from_seq: int
    next_seq: int
    earliest_seq: int = 1
    last_seq: int = 0


class CaughtUp(msgspec.Struct, frozen=True):
    """Everything up to `seq` was delivered; what follows is live."""

    seq: int


class ReadCursor(msgspec.Struct, frozen=True):
    """A participant has read up to `last_read_seq`. Not part of the log: those sent while away are not told again."""

    participant_id: str
    last_read_seq: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The gateway is leaving; the SDK reconnects within `retry_after_ms` by itself."""

    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The session is joined again after the connection was lost; delivery continues after `cursor`."""

    cursor: int | None


Event = Message | Gap | CaughtUp | ReadCursor | Draining | Reconnected
"""What iterating a session yields."""


class Ack(msgspec.Struct, frozen=True):
    """The message is on disk at `seq`; `deduped`: it already was, from an earlier try with the same key."""

    seq: int
    id: str
    inserted_at: str
    deduped: bool = False


class Page(msgspec.Struct, frozen=True):
    """Answer to `replay`: messages in ascending order, and whether there are more in the direction asked for."""

    messages: list[Message]
    has_more: bool
    gap: Gap | None = None


class Joined(msgspec.Struct, frozen=True):
    """What the server said of the session when it was joined."""

    session_id: str
    epoch: int
    last_seq: int
    earliest_seq: int


class InboxEntry(msgspec.Struct, frozen=True):
    """A session as a participant's inbox shows it; times are RFC 3339.

    `unread`: messages after the read cursor that others sent; with `unread_more` there may be more of them.
    """

    session_id: str
    last_seq: int
    last_read_seq: int
    unread: int
    unread_more: bool
    active_at: str
    inserted_at: str = ""
    metadata: dict[str, Any] | None = None


class InboxPage(msgspec.Struct, frozen=True):
    """Some sessions of an inbox, newest activity first; `next` asks REST for the page that follows."""

    sessions: list[InboxEntry]
    next: str | None = None


InboxUpdate = InboxPage | InboxEntry
"""What iterating an inbox yields: its newest sessions, which replace whatever was known, or one as it is now."""
