"""WebSocket bytes by hand, the client's side, without the product's code: so that nothing is too wrong to be sent.

Promise: what the server sends is checked against RFC 6455: unmasked, no reserved bit, known opcodes, whole.
Must not be done here: what frames mean.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Final

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
WAIT_S: Final = 20.0
"""For anything that must come: two cores are shared."""


class BadServer(AssertionError):
    """The server broke the protocol, or did not answer."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of the server."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of a close frame; 1005 without one."""
        return int(struct.unpack(">H", self.payload[:2])[0]) if len(self.payload) >= 2 else 1005


def encode(opcode: int, payload: bytes, *, first: int | None = None, mask: bytes | None = b"\x11\x22\x33\x44") -> bytes:
    """A frame; `first` replaces the first byte, `mask` None leaves it unmasked."""
    head = bytes((0x80 | opcode if first is None else first,))
    flag = 0 if mask is None else 0x80
    size = len(payload)
    if size < 126:
        head += bytes((flag | size,))
    elif size < 65_536:
        head += bytes((flag | 126,)) + struct.pack(">H", size)
    else:
        head += bytes((flag | 127,)) + struct.pack(">Q", size)
    if mask is None:
        return head + payload
    key = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def handshake(query: str, *, extra: str = "") -> bytes:
    """An upgrade request."""
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    return (
        f"GET /socket/websocket?{query} HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{extra}\r\n"
    ).encode()


class Socket:
    """One connection after its upgrade."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Bytes, whatever they are."""
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), WAIT_S)

    async def frame(self) -> Frame | None:
        """The next frame; None: the connection has ended.

        Raises:
            BadServer: it is none, or nothing comes.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                head = await self.reader.readexactly(2)
                first, size = head[0], head[1]
                if first & 0x70 or not first & 0x80 or size & 0x80 or first & 0xF not in {TEXT, CLOSE, PONG}:
                    raise BadServer(f"a server's frame begins with {head.hex()}")
                if size >= 126:
                    wide = 2 if size == 126 else 8
                    size = int.from_bytes(await self.reader.readexactly(wide), "big")
                return Frame(first & 0xF, await self.reader.readexactly(size))
        except TimeoutError as error:
            raise BadServer(f"nothing came for {WAIT_S:g} s") from error
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise BadServer("the connection ended within a frame") from error
            return None
        except OSError:
            return None

    def drop(self) -> None:
        """End it."""
        self.writer.transport.abort()


async def connect(host: str, port: int, *, participant: str = "fuzz") -> Socket:
    """A socket after a good handshake."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    try:
        writer.write(handshake(f"vsn=2.0.0&participant_id={participant}"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
    except BaseException:
        writer.transport.abort()
        raise
    if not head.startswith(b"HTTP/1.1 101 "):
        writer.transport.abort()
        raise BadServer(f"no upgrade: {head!r}")
    return Socket(reader, writer)
