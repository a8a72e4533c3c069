"""What a durable append is in each peer's protocol: ready-made bytes out, answers counted in.

    Redis       XADD to one of 200 streams                              answer: the entry's id
    PostgreSQL  Bind, Execute, Sync of a prepared INSERT: a commit each  answer: ReadyForQuery
    NATS        publish to one of 200 subjects of one JetStream          answer: the stream's acknowledgement
    shard       APPEND of one message to one of 200 sessions             answer: APPENDED

Promise: every protocol is spoken raw by the same kind of object, with as little work in Python as it can be, so that
the client weighs the same on all; the shard's answers are the dearest to read (each frame is looked at, each id checked
to be in order). A refusal raises `PeerError` here or is missed by the count of what the server holds (`peers.py`).
Must not be done here: sockets, timing.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from typing import Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import HEADER
from tests.support.rpcclient import fragment

MESSAGE_BYTES: Final = 256
STREAMS: Final = 200
"""Sessions, streams or subjects that a connection writes to in turn."""
_BODY: Final = fragment("x" * (MESSAGE_BYTES - len(fragment(""))))
"""The same 256 bytes for everybody."""
assert len(_BODY) == MESSAGE_BYTES


class PeerError(Exception):
    """A server said something else than "it is on disk"."""


class Wire(ABC):
    """One connection's protocol, after the handshake."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""
        self._sent = 0

    def hello(self) -> bytes:
        """What opens the connection; `greeted` tells when it is open."""
        return b""

    def greeted(self, data: bytes) -> bool:
        """Whether the connection is open after this answer to `hello`."""
        del data
        return True

    @abstractmethod
    def requests(self, count: int) -> bytes:
        """The next so many appends."""

    @abstractmethod
    def answers(self, data: bytes) -> int:
        """How many appends these bytes acknowledge, in the order in which they were sent."""


class RedisWire(Wire):
    """RESP."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._forms = [
            b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$1\r\n*\r\n$1\r\nm\r\n$%d\r\n%b\r\n"
            % (len(key), key, MESSAGE_BYTES, _BODY)
            for key in (b"%b-%d" % (name.encode(), number) for number in range(STREAMS))
        ]

    def requests(self, count: int) -> bytes:
        """XADD, one a stream in turn."""
        begin, self._sent = self._sent, self._sent + count
        forms = self._forms
        return b"".join([forms[number % STREAMS] for number in range(begin, begin + count)])

    def answers(self, data: bytes) -> int:
        """Bulk strings: two lines each."""
        if self._rest:
            data = self._rest + data
        if data[:1] == b"-" or b"\n-" in data:
            raise PeerError(f"Redis: {data[:200]!r}")
        end = data.rfind(b"\r\n") + 2 if b"\r\n" in data else 0
        lines = data.count(b"\r\n")
        if lines % 2:
            # The length of the next answer is here, its text is not: keep that line.
            end = data.rfind(b"\r\n", 0, end - 2) + 2 if lines > 1 else 0
            lines -= 1
        self._rest = data[end:]
        return lines // 2


class PostgresWire(Wire):
    """Protocol 3, extended, pipelined; every Sync ends a transaction of its own."""

    READY: Final = b"Z\x00\x00\x00\x05I"

    def __init__(self, name: str, *, user: str, database: str) -> None:
        super().__init__(name)
        self._startup = _message(b"", b"\0\x03\0\0user\0%b\0database\0%b\0\0" % (user.encode(), database.encode()))
        self._forms = [self._form(b"%b-%d" % (name.encode(), number)) for number in range(STREAMS)]
        self._steps = 0

    @staticmethod
    def _form(session: bytes) -> bytes:
        values = b"".join(len(value).to_bytes(4) + value for value in (session, _BODY))
        bind = _message(b"B", b"\0a\0\0\0\0\x02" + values + b"\0\0")
        return bind + _message(b"E", b"\0\0\0\0\0") + _message(b"S", b"")

    def hello(self) -> bytes:
        """Startup; the statement is prepared in the same flight."""
        insert = b"INSERT INTO messages (session, body) VALUES ($1, $2)"
        return self._startup + _message(b"P", b"a\0" + insert + b"\0\0\0") + _message(b"S", b"")

    def greeted(self, data: bytes) -> bool:
        """Two ReadyForQuery: of the startup and of the Parse."""
        self._refuse(data)
        self._steps += data.count(self.READY)
        return self._steps == 2

    def requests(self, count: int) -> bytes:
        """INSERT and commit."""
        begin, self._sent = self._sent, self._sent + count
        forms = self._forms
        return b"".join([forms[number % STREAMS] for number in range(begin, begin + count)])

    def answers(self, data: bytes) -> int:
        """ReadyForQuery after each commit."""
        data = self._rest + data
        self._refuse(data)
        end = data.rfind(self.READY)
        end = 0 if end < 0 else end + len(self.READY)
        self._rest = data[end:]
        return data.count(self.READY)

    @staticmethod
    def _refuse(data: bytes) -> None:
        if b"SERROR\0" in data or b"SFATAL\0" in data:
            raise PeerError(f"PostgreSQL: {data!r}")


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) + 4).to_bytes(4) + body


class NatsWire(Wire):
    """NATS client protocol; each publish names an inbox, where JetStream acknowledges."""

    _ACK: Final = re.compile(rb'"seq":\d+[^}]*}\r\n')

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._inbox = b"_INBOX.%b" % name.encode()
        self._forms = [
            b"PUB s.%b-%d %b %d\r\n%b\r\n" % (name.encode(), number, self._inbox, MESSAGE_BYTES, _BODY)
            for number in range(STREAMS)
        ]

    def hello(self) -> bytes:
        """CONNECT and one subscription for the answers."""
        return b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB %b 1\r\nPING\r\n' % self._inbox

    def greeted(self, data: bytes) -> bool:
        """The PONG."""
        if b"-ERR" in data:
            raise PeerError(f"NATS: {data!r}")
        return b"PONG\r\n" in data

    def requests(self, count: int) -> bytes:
        """PUB with a reply subject."""
        begin, self._sent = self._sent, self._sent + count
        forms = self._forms
        return b"".join([forms[number % STREAMS] for number in range(begin, begin + count)])

    def answers(self, data: bytes) -> int:
        """Acknowledgements with a sequence number."""
        data = self._rest + data
        if b"-ERR" in data or b'"error"' in data:
            raise PeerError(f"NATS: {data[:300]!r}")
        end = data.rfind(b"}\r\n")
        end = 0 if end < 0 else end + 3
        self._rest = data[end:]
        return data.count(b'"seq":', 0, end)


class ShardWire(Wire):
    """Our own RPC."""

    def __init__(self, name: str, *, hello: rpc.Hello) -> None:
        super().__init__(name)
        self._hello = hello
        self._acked = 0
        self._epoch = 0
        self._forms: list[tuple[bytes, bytes]] = []

    def hello(self) -> bytes:
        """HELLO."""
        return _frame(Kind.HELLO, 0, rpc.encode(self._hello))

    def greeted(self, data: bytes) -> bool:
        """WELCOME."""
        size, kind, _ = HEADER.unpack_from(data)
        if kind != Kind.WELCOME:
            raise PeerError(f"shard: {data!r}")
        welcome = msgspec.msgpack.decode(data[HEADER.size : HEADER.size + size], type=rpc.Welcome)
        self._epoch = welcome.epoch
        self._forms = [self._form(f"{self._name}-{number}") for number in range(STREAMS)]
        return True

    def _form(self, session: str) -> tuple[bytes, bytes]:
        """A request cut at its key: 16 digits that differ each time."""
        mark = "k" * 16
        drafts = [rpc.Draft(f"{hashlib.md5(session.encode()).hexdigest()[:8]}{mark}", _BODY)]
        request = rpc.encode(rpc.Append(self._epoch, session, [rpc.Entry(drafts)]))
        before, found, after = request.partition(mark.encode())
        assert found
        return before, after

    def requests(self, count: int) -> bytes:
        """APPEND with a key of its own."""
        begin, self._sent = self._sent, self._sent + count
        forms, pack, parts = self._forms, HEADER.pack, list[bytes]()
        for number in range(begin, begin + count):
            before, after = forms[number % STREAMS]
            parts += (pack(len(before) + 16 + len(after), Kind.APPEND, number), before, b"%016x" % number, after)
        return b"".join(parts)

    def answers(self, data: bytes) -> int:
        """APPENDED, of one session in order (a session that must first be looked up is answered after others)."""
        if self._rest:
            data = self._rest + data
        at, end, head, begin, acked = 0, len(data), HEADER.size, self._acked, self._acked
        while end - at >= head:
            size, kind, ident = HEADER.unpack_from(data, at)
            stop = at + head + size
            if stop > end:
                break
            if kind != Kind.APPENDED or ident >= self._sent:
                raise PeerError(f"shard: kind {kind}, id {ident} of {self._sent}: {data[at:stop]!r}")
            acked += 1
            at = stop
        self._rest = data[at:]
        self._acked = acked
        return acked - begin


def _frame(kind: int, ident: int, payload: bytes) -> bytes:
    return HEADER.pack(len(payload), kind, ident) + payload
