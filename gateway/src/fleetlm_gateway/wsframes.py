"""WebSocket frames (RFC 6455) as bytes, both directions; pure.

Promise: a message comes out whole, unmasked, at most `frame_bytes_max` long, however it was cut into fragments and TCP
segments; a breach of the protocol raises before its payload is buffered. What a server sends is one unmasked frame.
No extensions: compression would cost more CPU than the network it saves here, and makes memory per socket unbounded.
Must not be done here: sockets, or the meaning of messages (`phoenix.py`).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
_CONTINUATION: Final = 0x0
_CONTROL_BYTES_MAX: Final = 125
"""RFC 6455 §5.5."""
_SIZE_16: Final = 126
_SIZE_64: Final = 127
_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80

_U16: Final = Struct(">H")
_U64: Final = Struct(">Q")
_HEAD_16: Final = Struct(">BBH")
_HEAD_64: Final = Struct(">BBQ")
_SHORT_HEADS: Final = tuple(bytes((_FIN | TEXT, size)) for size in range(_SIZE_16))


class Violation(Exception):
    """The peer broke the WebSocket protocol; nothing after it can be read."""


class Oversize(Exception):
    """A message longer than the limit was announced."""


def text_head(size_bytes: int) -> bytes:
    """What stands before a text message of that size."""
    if size_bytes < _SIZE_16:
        return _SHORT_HEADS[size_bytes]
    if size_bytes <= 0xFFFF:
        return _HEAD_16.pack(_FIN | TEXT, _SIZE_16, size_bytes)
    return _HEAD_64.pack(_FIN | TEXT, _SIZE_64, size_bytes)


def control(opcode: int, payload: bytes = b"") -> bytes:
    """A whole control frame."""
    assert len(payload) <= _CONTROL_BYTES_MAX
    return bytes((_FIN | opcode, len(payload))) + payload


def close(code: int, reason: str) -> bytes:
    """A whole close frame."""
    return control(CLOSE, _U16.pack(code) + reason.encode()[: _CONTROL_BYTES_MAX - 2])


def unmasked(payload: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    """`payload` XOR the mask repeated; as one big integer, the quickest way without leaving Python."""
    size = len(payload)
    key = (bytes(mask) * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


class Reader:
    """Cuts what a client sends into messages and control frames.

    Args:
        frame_bytes_max: of one message, fragments together.
    """

    __slots__ = ("_at", "_buffer", "_fragments", "_limit", "_opcode", "frames")

    def __init__(self, *, frame_bytes_max: int) -> None:
        self._limit = frame_bytes_max
        self._buffer: bytes | bytearray = b""
        self._at = 0
        self._opcode = 0
        self._fragments = bytearray()
        self.frames = 0
        """Frames seen, fragments and control frames included: what a rate limit counts."""

    def feed(self, data: bytes) -> None:
        """Add what arrived."""
        if self._at == len(self._buffer):
            self._buffer = data
        else:
            # Appending to a bytearray is amortised: who sends byte by byte must not cost a copy of all before.
            rest = self._buffer if isinstance(self._buffer, bytearray) else bytearray(self._buffer)
            del rest[: self._at]
            rest += data
            self._buffer = rest
        self._at = 0

    def next(self) -> tuple[int, bytes] | None:
        """The next (opcode, payload) that is whole: a text or binary message, a ping, pong or close; None: feed more.

        Raises:
            Violation: the protocol was broken.
            Oversize: a message is longer than the limit.
        """
        while True:
            frame = self._frame()
            if frame is None:
                return None
            first, payload = frame
            self.frames += 1
            opcode = first & 0xF
            if opcode >= CLOSE:
                return opcode, payload
            if first & _FIN and opcode != _CONTINUATION and not self._opcode:
                return opcode, payload
            whole = self._fragment(first, opcode, payload)
            if whole is not None:
                return whole

    def _frame(self) -> tuple[int, bytes] | None:
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        if have < 2:
            return None
        first, second = buffer[at], buffer[at + 1]
        size, body = second & 0x7F, at + 6
        if size >= _SIZE_16:
            wide = 2 if size == _SIZE_16 else 8
            if have < 2 + wide:
                return None
            size = (_U16 if wide == 2 else _U64).unpack_from(buffer, at + 2)[0]
            body += wide
        self._check(first, second, size)
        if len(buffer) < body + size:
            return None
        self._at = end = body + size
        return first, unmasked(buffer[body:end], buffer[body - 4 : body])

    def _check(self, first: int, second: int, size: int) -> None:
        """Refuse a frame by its header alone, before its payload is waited for."""
        opcode = first & 0xF
        if first & _RESERVED:
            raise Violation("a reserved bit is set, no extension was agreed")
        if not second & _MASKED:
            raise Violation("a client's frame must be masked")
        if opcode in (CLOSE, PING, PONG):
            if not first & _FIN or size > _CONTROL_BYTES_MAX:
                raise Violation("a control frame is fragmented or too long")
        elif opcode > BINARY:
            raise Violation(f"unknown opcode {opcode}")
        elif (opcode == _CONTINUATION) != bool(self._opcode):
            raise Violation("a fragment without a beginning, or a message inside a fragmented one")
        elif size + len(self._fragments) > self._limit:
            raise Oversize

    def _fragment(self, first: int, opcode: int, payload: bytes) -> tuple[int, bytes] | None:
        if opcode != _CONTINUATION:
            self._opcode = opcode
        self._fragments += payload
        if not first & _FIN:
            return None
        whole = self._opcode, bytes(self._fragments)
        self._opcode = 0
        self._fragments.clear()
        return whole
