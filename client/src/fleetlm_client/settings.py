"""The numbers of the SDK, each with unit and reason. One frozen value for a client.

Promise: whatever grows in a client is bounded by a field of `Settings`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds and times of one client; the defaults suit chats and agents."""

    append_deadline_s: float = 30.0
    """An append that is not acknowledged by then ends in `OutcomeUnknown` (or `NotSent`). Longer than the restart of a
    shard, so that restarts are not seen."""
    call_deadline_s: float = 15.0
    """The same for `replay`, `mark_read` and REST: above the gateway's own 10 s, so that its answer arrives."""
    connect_deadline_s: float = 10.0
    """How long `connect` and `join` try before they raise; afterwards the client reconnects without end."""
    reply_timeout_s: float = 15.0
    """The gateway answers within 10 s; a socket that stays silent on a request for this long is given up."""
    heartbeat_interval_s: float = 15.0
    """Phoenix servers close sockets that are silent for a minute."""
    heartbeat_timeout_s: float = 10.0
    """Nothing heard for this long after a heartbeat: the connection is half open and is given up."""
    backoff_base_s: float = 0.1
    """First bound of the random wait before a retry; it doubles with each failure."""
    backoff_cap_s: float = 5.0
    """Largest bound of that wait: a thousand clients then come back over five seconds."""
    outbox_messages_max: int = 10_000
    """Unacknowledged messages of a session; past it `append` waits and `submit` raises `TryAgain overloaded`."""
    outbox_bytes_max: int = 16 * 1024 * 1024
    """The same in bytes of JSON."""
    buffer_messages_max: int = 2_000
    """Events received and not yet taken (of an inbox: sessions that changed); past it live pushes are dropped and read
    again at the reader's pace."""
    buffer_bytes_max: int = 8 * 1024 * 1024
    """The same in bytes of JSON, of a session (what an inbox shows of one is some 10 KiB at the most)."""
    page_messages: int = 500
    """Messages of one page while the reader is behind; must be at most half of `buffer_messages_max`."""
    calls_max: int = 256
    """`replay` and `mark_read` requests of a session that wait for an answer."""
    sessions_max: int = 1_000
    """Sessions and inboxes joined over one client's socket (gateways have a bound of their own)."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: names the field.
        """
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.page_messages > self.buffer_messages_max // 2:
            raise ValueError("page_messages must be at most half of buffer_messages_max")
