"""Frames between gateway and shard: a small binary header and an opaque payload, many requests over one TCP connection.

    u32 payload_bytes | u8 kind | u64 id | payload          (little-endian)

Promise: frames come out whole and in order; what is sent during one tick of the loop leaves in one write (six times
cheaper than a write each); a peer that does not read makes `buffered_bytes` grow, which the owner of the connection
bounds. Must not be done here: the meaning of kinds (`rpc.py`), reconnecting, deadlines.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final, cast

HEADER: Final = struct.Struct("<IBQ")
HEADER_BYTES: Final = HEADER.size
PAYLOAD_BYTES_MAX: Final = 8 * 1024 * 1024
"""A frame larger than this is a broken or hostile peer: appends of 100 messages of 64 KiB stay below it."""

_pack_head: Final = HEADER.pack
_unpack_head: Final = HEADER.unpack_from

OnFrame = Callable[[int, int, bytes], None]
OnLost = Callable[[Exception | None], None]


class ProtocolError(Exception):
    """The peer does not speak this protocol; the connection is closed."""


class FrameDecoder:
    """Cuts a byte stream into frames; pure.

    Feed what arrived, take what is whole; what is not whole stays for the next feed.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Frames (kind, id, payload) that are whole after `data`.

        Raises:
            ProtocolError: a frame announces more than `PAYLOAD_BYTES_MAX`.
        """
        if self._rest:
            data = self._rest + data
        frames: list[tuple[int, int, bytes]] = []
        at, end = 0, len(data)
        while end - at >= HEADER_BYTES:
            size, kind, ident = _unpack_head(data, at)
            if size > PAYLOAD_BYTES_MAX:
                raise ProtocolError(f"frame of {size} bytes, the limit is {PAYLOAD_BYTES_MAX}")
            begin = at + HEADER_BYTES
            stop = begin + size
            if stop > end:
                break
            frames.append((kind, ident, data[begin:stop]))
            at = stop
        self._rest = data[at:] if at < end else b""
        return frames


class Turn:
    """Connections that have something to read or to write in this turn of the loop: done one behind the other.

    First all sockets are read, then all frames are worked on, then everything is written: a system call between two
    requests costs the second one as much again as it takes itself (caches and branch predictors begin anew).
    """

    __slots__ = ("_loop", "_readers", "_writers")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._readers: list[FrameConnection] = []
        self._writers: list[FrameConnection] = []

    def read_later(self, connection: FrameConnection) -> None:
        """Have it work on what arrived."""
        if not self._readers:
            self._loop.call_soon(self._read)
        self._readers.append(connection)

    def write_later(self, connection: FrameConnection) -> None:
        """Have it write what is queued."""
        if not self._writers:
            self._loop.call_soon(self._write)
        self._writers.append(connection)

    def _read(self) -> None:
        readers, self._readers = self._readers, []
        for connection in readers:
            try:
                connection.work()
            except Exception as error:  # noqa: BLE001  as in `data_received`: it costs this connection, not the others
                connection.abort()
                self._loop.call_exception_handler({"message": "a frame could not be handled", "exception": error})

    def _write(self) -> None:
        writers, self._writers = self._writers, []
        for connection in writers:
            connection.flush()


class FrameConnection(asyncio.Protocol):
    """One side of a connection.

    Args:
        turn: shared by connections that should be worked on together; None: its own.
        on_frame: called for each frame, in order, in the loop; must not raise.
        on_lost: called once when the connection is gone.
        on_made: called once when it stands.
    """

    def __init__(
        self,
        *,
        on_frame: OnFrame,
        on_lost: OnLost,
        on_made: Callable[[FrameConnection], None] | None = None,
        turn: Turn | None = None,
    ) -> None:
        self._turn = Turn() if turn is None else turn
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_made = on_made
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._flushing = False
        self._arrived: list[bytes] = []
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's call: the connection stands."""
        # uvloop's transports are no subclasses of asyncio's: a cast, never an isinstance.
        self._transport = cast("asyncio.Transport", transport)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """Asyncio's call: bytes arrived."""
        if not self._arrived:
            self._turn.read_later(self)
        self._arrived.append(data)

    def work(self) -> None:
        """Handle what arrived; the turn's call."""
        arrived, self._arrived = self._arrived, []
        try:
            frames = self._decoder.feed(arrived[0] if len(arrived) == 1 else b"".join(arrived))
        except ProtocolError:
            self.abort()
            return
        on_frame = self._on_frame
        for kind, ident, payload in frames:
            if self.closed:
                return
            on_frame(kind, ident, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's call: the connection is gone."""
        self.closed = True
        self._pending.clear()
        self._on_lost(exc)

    @property
    def buffered_bytes(self) -> int:
        """Bytes sent and not yet taken by the kernel."""
        transport = self._transport
        return self._pending_bytes + (0 if transport is None else transport.get_write_buffer_size())

    def send(self, kind: int, ident: int, payload: bytes) -> None:
        """Queue a frame.

        It leaves at the end of this tick. A closed connection drops it: `on_lost` has been or will be called.
        """
        if self.closed:
            return
        size = len(payload)
        self._pending += (_pack_head(size, kind, ident), payload)
        self._pending_bytes += HEADER_BYTES + size
        if not self._flushing:
            self._flushing = True
            self._turn.write_later(self)

    def flush(self) -> None:
        """Write what is queued; the turn's call."""
        self._flushing = False
        if self._transport is None or self.closed or not self._pending:
            return
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self._transport.write(data)

    def close(self) -> None:
        """Send what is queued, then close."""
        if self._transport is not None and not self.closed:
            self.flush()
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what is queued is dropped."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
