"""What goes out of one socket: frames of one tick in one write, a bound on what waits, and who was refused for it.

A socket is *full* while more than `write_buffer_bytes` wait for its network. Then channels refuse deliveries and are
called again when there is room (the inner half replays them from their cursors), and nothing is read from the client.

Promise: what waits here is at most `write_buffer_bytes` plus what was sent within one tick; `room` and `starve` wake
everybody who waits. Must not be done here: closing, reading, what frames say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fleetlm_gateway import phoenix, wsframes

if TYPE_CHECKING:
    from fleetlm_gateway.hub import Hub
    from fleetlm_gateway.websocket import AnyChannel

FLUSH_BYTES: Final = 64 * 1024
"""From this size on parts are handed over one by one instead of being copied together, and a reader of requests flushes
before it goes on, so that a full buffer stops it at once."""


class Outflow:
    """The way out of one socket.

    Args:
        hub: settings, clock, metrics, and the flush at the end of each tick.
        on_room: called, not from within a call of ours, when there is room after it was full or had refused somebody.
    """

    __slots__ = (
        "_dirty",
        "_drained_bytes",
        "_full_since_s",
        "_hub",
        "_on_room",
        "_pending",
        "_pending_bytes",
        "_progress_s",
        "_room",
        "_sent_bytes",
        "_starved",
        "_transport",
        "full",
    )

    def __init__(self, hub: Hub, *, on_room: Callable[[], None]) -> None:
        self._hub = hub
        self._on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._sent_bytes = 0
        self._dirty = False
        self._starved: dict[AnyChannel, None] = {}
        self._room: asyncio.Future[None] | None = None
        self._full_since_s = self._progress_s = 0.0
        self._drained_bytes = 0
        self.full = False

    def open(self, transport: asyncio.Transport) -> None:
        """Begin to send."""
        high = self._hub.config.write_buffer_bytes
        transport.set_write_buffer_limits(high=high, low=high // 4)
        self._transport = transport

    def lost(self) -> None:
        """The connection is gone: drop everything, wake everybody."""
        self._transport = None
        self._pending.clear()
        self._starved.clear()
        self.drained()

    # -- sending

    def send(self, frame: bytes) -> None:
        """Send a text frame at the end of this tick."""
        self._pending.append(wsframes.text_head(len(frame)))
        self.write(frame)

    def send_messages(self, head: bytes, body: bytes) -> None:
        """Send a push whose `body` is shared with other sockets."""
        size = len(head) + len(body) + len(phoenix.MESSAGES_TAIL)
        self._pending += (wsframes.text_head(size), head, body)
        self._pending_bytes += len(head) + len(body)
        self.write(phoenix.MESSAGES_TAIL)

    def write(self, data: bytes) -> None:
        """Send bytes of the connection itself (control frames)."""
        self._pending.append(data)
        self._pending_bytes += len(data)
        self._mark_dirty()

    def _mark_dirty(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._hub.flush_later(self)

    def flush_if_much(self) -> None:
        """Do not wait for the end of the tick when much is pending."""
        if self._pending_bytes > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what is pending to the transport."""
        self._dirty = False
        pending, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        if self._transport is None or self._transport.is_closing():
            return
        if pending:
            self._sent_bytes += size
            self._hub.metrics.bytes_sent.inc(size)
            if size > FLUSH_BYTES:
                self._transport.writelines(pending)
            else:
                self._transport.write(b"".join(pending))
        if self._starved and not self.full:
            # Refused within this tick for what was pending only; it has been taken.
            asyncio.get_running_loop().call_soon(self._on_room)

    # -- full and not

    def is_full(self) -> bool:
        """Whether deliveries are refused."""
        return self.full or self._pending_bytes > self._hub.config.write_buffer_bytes

    def waiting_bytes(self) -> int:
        """What this process holds for the client and its network has not taken."""
        return self._pending_bytes + (0 if self._transport is None else self._transport.get_write_buffer_size())

    def starve(self, channel: AnyChannel) -> None:
        """Remember whom to call when there is room again."""
        self._starved[channel] = None
        self._mark_dirty()

    def spare(self, channel: AnyChannel) -> None:
        """Do not call it any more."""
        self._starved.pop(channel, None)

    def feed_starved(self) -> None:
        """There is room: have everybody who was refused replayed, first come, first served."""
        starved, self._starved = self._starved, {}
        for channel in starved:
            channel.resume()

    async def room(self) -> None:
        """Wait while it is full. Cancel-safe."""
        while self.full:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    def filled(self) -> None:
        """The transport's word: more than `write_buffer_bytes` wait."""
        self.full = True
        self._hub.metrics.sockets_full.inc()
        self._full_since_s = self._progress_s = self._hub.clock.monotonic_s()
        self._drained_bytes = self._taken()

    def drained(self) -> None:
        """The transport's word: most of it has left."""
        if not self.full:
            return
        self.full = False
        self._hub.metrics.sockets_full.dec()
        if self._room is not None:
            room, self._room = self._room, None
            room.set_result(None)
        if self._transport is not None:
            # Not within this call: the transport may be in the middle of a write of ours.
            asyncio.get_running_loop().call_soon(self._on_room)

    def stalled(self, now_s: float) -> bool:
        """Whether a full socket has taken nothing for `stall_ms`, or has been full for `lag_ms`; look now and then."""
        taken = self._taken()
        if taken > self._drained_bytes:
            self._drained_bytes, self._progress_s = taken, now_s
        config = self._hub.config
        return now_s - self._progress_s >= config.stall_ms / 1000 or now_s - self._full_since_s >= config.lag_ms / 1000

    def _taken(self) -> int:
        """Bytes that the network has taken so far."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._sent_bytes - waiting
