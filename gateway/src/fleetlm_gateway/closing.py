"""Why the gateway closes a socket: the whole table of close codes.

Promise: 4000–4499 mean "connect again" (after `retry_after_ms` if told), 4500–4999 mean "do not: the client is wrong";
each is in docs/protocol.md and has a test. Must not be done here: closing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class CloseReason:
    """A close code, its stable name (the frame's reason begins with it, and metrics carry it) and a sentence."""

    code: int
    name: str
    message: str

    @property
    def reconnect(self) -> bool:
        """Whether a client should connect again."""
        return self.code < 4500


NORMAL: Final = CloseReason(1000, "normal", "the client closed")
DRAINING: Final = CloseReason(4000, "draining", "this gateway is leaving, another one takes you")
HEARTBEAT_TIMEOUT: Final = CloseReason(4001, "heartbeat_timeout", "nothing was heard from the client")
SLOW_READER: Final = CloseReason(4002, "slow_reader", "the client does not read what it is sent; resume by cursor")
RATE_LIMITED: Final = CloseReason(4003, "rate_limited", "too many frames although they were refused")
INTERNAL: Final = CloseReason(4004, "internal", "a fault of the gateway; it was logged")
MALFORMED: Final = CloseReason(4500, "malformed", "not a frame of the Phoenix V2 JSON serializer")
WEBSOCKET: Final = CloseReason(4501, "websocket", "the WebSocket protocol was broken")
BINARY: Final = CloseReason(4502, "binary", "binary frames are not spoken here")
FRAME_TOO_LARGE: Final = CloseReason(4503, "frame_too_large", "a frame is larger than frame_bytes_max")

ALL: Final = (
    DRAINING,
    HEARTBEAT_TIMEOUT,
    SLOW_READER,
    RATE_LIMITED,
    INTERNAL,
    MALFORMED,
    WEBSOCKET,
    BINARY,
    FRAME_TOO_LARGE,
)
"""What this gateway may say; `normal` only answers a client's own close."""
