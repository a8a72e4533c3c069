"""The load generator's WebSocket: as little work a frame as it can be, for it shares the cores with what it measures.

Promise: frames are standard (RFC 6455); text frames of the client are masked with the key 0, which leaves their bytes
as they are (masking protects proxies, not the measurement). Must not be done here: counting, timing (`benchload.py`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import Callable
from typing import Final, cast

_MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_NONCE: Final = base64.b64encode(b"fleetlm-bench-16")
_ACCEPT: Final = base64.b64encode(hashlib.sha1(_NONCE + _MAGIC, usedforsecurity=False).digest())
_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA
_HEAD_BYTES_MAX: Final = 16 * 1024
"""An answer to the upgrade longer than this is none."""


def text_frame(payload: bytes) -> bytes:
    """A client's text frame."""
    return _frame(_TEXT, payload)


def _frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + b"\0\0\0\0" + payload


class WireError(Exception):
    """The server does not speak WebSocket as expected, or closed."""


class WireSocket(asyncio.Protocol):
    """One connection.

    Args:
        host: for the request's head.
        path: with query.
        on_texts: called with the text frames of one read, in order.
    """

    def __init__(self, host: str, path: str, *, on_texts: Callable[[list[bytes]], None]) -> None:
        self._host = host
        self._path = path
        self._on_texts = on_texts
        self._rest = b""
        self._upgraded = False
        self._fragments: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's call."""
        # uvloop's transports are no asyncio.Transport, but they are one in all but name.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(
            b"GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n"
            % (self._path.encode(), self._host.encode(), _NONCE)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's call."""
        self._lose(f"connection lost: {exc or 'closed by the server'}")

    def send(self, frames: list[bytes]) -> None:
        """Write frames at once."""
        if self._transport is not None:
            self._transport.write(b"".join(frames))

    def close(self) -> None:
        """Close politely."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.write(_frame(_CLOSE, b"\x03\xe8"))
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Asyncio's call."""
        data = self._rest + data if self._rest else data
        if not self._upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                if len(head) > _HEAD_BYTES_MAX:
                    self._lose("no answer to the upgrade")
                return
            if not head.startswith(b"HTTP/1.1 101") or _ACCEPT not in head:
                self._lose(f"upgrade refused: {head.splitlines()[0].decode(errors='replace')}")
                return
            self._upgraded = True
            self.opened.set_result(None)
        texts: list[bytes] = []
        self._rest = self._cut(data, texts)
        if texts:
            self._on_texts(texts)

    def _cut(self, data: bytes, texts: list[bytes]) -> bytes:
        """Frames of `data` into `texts`; returns what is not whole yet."""
        at, end = 0, len(data)
        while end - at >= 2:
            first, size, body = data[at], data[at + 1], at + 2
            if size == 126:
                body += 2
                if end < body:
                    break
                size = int.from_bytes(data[at + 2 : body])
            elif size == 127:
                body += 8
                if end < body:
                    break
                size = int.from_bytes(data[at + 2 : body])
            if end < body + size:
                break
            payload = data[body : body + size]
            if first == 0x81:
                texts.append(payload)
            else:
                self._on_other(first, payload, texts)
            at = body + size
        return data[at:]

    def _on_other(self, first: int, payload: bytes, texts: list[bytes]) -> None:
        opcode = first & 0xF
        if opcode == _PING:
            self.send([_frame(_PONG, payload)])
        elif opcode == _CLOSE:
            self._lose(f"closed by the server: {payload[2:].decode(errors='replace')}")
        elif opcode <= _TEXT:
            self._fragments.append(payload)
            if first & 0x80:
                texts.append(b"".join(self._fragments))
                self._fragments.clear()

    def _lose(self, why: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(WireError(why))
        if not self.lost.done():
            self.lost.set_result(why)
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
