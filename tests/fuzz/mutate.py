"""Turns valid JSON, msgpack and bytes into what nobody should send; all chance comes from one seeded source.

Promise: the same source makes the same bytes. Must not be done here: sending, judging.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

import msgspec

DEEP: Final = 100_000
"""Levels of a depth bomb: it fits a frame and overflows any recursion."""

NASTY_JSON: Final[tuple[bytes, ...]] = (
    b"null", b"true", b"0", b"-0", b"-1", b"1.0", b"1e2", b"1e400", b"-1e400", b"NaN", b"Infinity", b"0x10", b"01",
    b"9" * 20, b"9" * 5_000, b"9" * 200_000, b"1" + b"0" * 400 + b".5", b"9007199254740993", b"18446744073709551616",
    b"[]", b"{}", b"[[]]", b'{"":{}}', b"[" * 65 + b"]" * 65, b"[" * DEEP, b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b'""', b'"x"', b'"' + b"x" * 129 + b'"', b'"' + b"x" * 70_000 + b'"',
    b'"' + "é".encode() * 64 + b'"', b'"' + "é".encode() * 65 + b'"', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\\ud83d\\ude00"', b'"\x00"', b'"\x1f"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\\x"', b'"\\u12"',
    '"\u202e\u2028\ufeff"'.encode(), b'"unfinished', b"'single'", b"/* no */1", b"[1,]", b'{"a":1,}', b'{"a":1,"a":2}',
    b"", b" ", b"\xef\xbb\xbf1", b"1 1", b"[1 2]", b"}", b"]", b'{"messages":[]}', b'{"content":1,"messages":[]}',
)  # fmt: skip
"""What stands where a value should."""

NASTY_MSGPACK: Final[tuple[bytes, ...]] = (
    b"\xc0", b"\xc1", b"\xc2", b"\x00", b"\xff", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7,
    b"\xcb\x7f\xf8" + b"\0" * 6,
    b"\xa0", b"\xa2\xff\xfe", b"\xa1\x00", b"\xd9\x81" + b"x" * 129, b"\xc4\x00", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x90", b"\x80", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 10_000 + b"\xc0", b"\x91" * 10_000,
    b"\xd4\x01\x00", b"\xc7\x00\x00", b"\x81\xa1a\x01", b"\xa3\xed\xa0\x80", b"",
)  # fmt: skip
"""The same on the wire between gateway and shard."""


class Mutator:
    """One source of trouble.

    Args:
        chance: decides everything.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def json(self, value: Any) -> bytes:
        """`value` as JSON with about one thing wrong in it (sometimes nothing)."""
        return self._json(value, 1.2 / _nodes(value))

    def _json(self, value: Any, share: float) -> bytes:
        if self.chance.random() < share:
            return self.chance.choice(NASTY_JSON)
        if isinstance(value, dict):
            return self._object({str(name): each for name, each in value.items()}, share)
        if isinstance(value, list):
            items = [self._json(each, share) for each in value]
            if items and self.chance.random() < share:
                self.chance.choice((items.clear, items.pop, lambda: items.append(items[0])))()
            return b"[" + b",".join(items) + b"]"
        return json.dumps(value, ensure_ascii=False).encode()

    def _object(self, value: dict[str, Any], share: float) -> bytes:
        pairs = [(json.dumps(name).encode(), self._json(each, share)) for name, each in value.items()]
        if pairs and self.chance.random() < share * 2:
            at = self.chance.randrange(len(pairs))
            name, text = pairs[at]
            edits: tuple[Callable[[], object], ...] = (
                lambda: pairs.append(pairs[at]),
                lambda: pairs.append((name, self.chance.choice(NASTY_JSON))),
                lambda: pairs.pop(at),
                lambda: pairs.append((b'"unknown"', text)),
                lambda: pairs.__setitem__(at, (self.chance.choice(NASTY_JSON), text)),
            )
            self.chance.choice(edits)()
        space = b" \n" if self.chance.random() < 0.1 else b""
        return b"{" + (b"," + space).join(name + space + b":" + text for name, text in pairs) + b"}"

    def msgpack(self, body: msgspec.Struct) -> bytes:
        """A payload as msgpack with about one thing wrong in it."""
        value = msgspec.to_builtins(body, builtin_types=(bytes,))
        return msgspec.msgpack.encode(self._msgpack(value, 1.2 / _nodes(value)))

    def _msgpack(self, value: Any, share: float) -> Any:
        if self.chance.random() < share:
            return msgspec.Raw(self.chance.choice(NASTY_MSGPACK))
        if isinstance(value, list):
            items = [self._msgpack(each, share) for each in value]
            if items and self.chance.random() < share:
                self.chance.choice((items.clear, items.pop, lambda: items.append(0)))()
            return items
        return value

    def damage(self, data: bytes) -> bytes:
        """`data` with one to three of: bits flipped, bytes cut out, doubled, inserted, the end missing."""
        for _ in range(self.chance.randrange(1, 4)):
            data = self._damage(data)
        return data

    def _damage(self, data: bytes) -> bytes:
        chance = self.chance
        if not data:
            return chance.randbytes(chance.randrange(1, 40))
        at = chance.randrange(len(data))
        end = min(len(data), at + chance.randrange(1, 20))
        kind = chance.randrange(6)
        if kind == 0:
            return data[:at] + bytes((data[at] ^ 1 << chance.randrange(8),)) + data[at + 1 :]
        if kind == 1:
            return data[:at] + data[end:]
        if kind == 2:
            return data[:end] + data[at:end] * chance.randrange(1, 50) + data[end:]
        if kind == 3:
            return data[:at] + chance.randbytes(end - at) + data[at:]
        if kind == 4:
            return data[:at]
        return data[:at] + chance.choice((b"\x00", b"\xff" * 9, b"\r\n", b"\r\n\r\n", b'"', b"{", b"]")) + data[at:]


def _nodes(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_nodes, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_nodes, value))
    return 1
