"""The wire between gateway and shard, fuzzed from both ends.

`ShardWire` plays a gateway that knows the credential, or does not; `rogue` makes a proxy damage what a shard says to a
real gateway, whose clients must still be answered.

Promise: as in `surfaces.py`. Must not be done here: starting processes.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.rpc import Kind
from tests.fuzz.mutate import Mutator
from tests.fuzz.surfaces import Wrong
from tests.fuzz.wsclient import WAIT_S
from tests.support.rpcclient import draft
from tests.support.tcpproxy import Through

HEADER: Final = struct.Struct("<IBQ")
UNANSWERED: Final = {Kind.UNSUBSCRIBE}
"""Requests that have no reply."""
PUSHED: Final = {Kind.PUSH, Kind.PUSH_READ, Kind.ENDED, Kind.GOAWAY}
"""Frames that are no reply."""
PROBE: Final = (1 << 63) + 1
"""Ids of probes begin here."""


class ShardWire:
    """A gateway gone mad: each request is answered once on its id, or the connection ends."""

    def __init__(self, host: str, port: int, hello: rpc.Hello, sessions: Sequence[str]) -> None:
        self._where = host, port
        self._hello = hello
        self._sessions = sessions
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._ident = 0

    async def case(self, chance: random.Random) -> str:
        """See `Surface`."""
        if chance.random() < 0.1:
            return await self._stranger(chance)
        reader, writer = await self._greeted()
        mutator = Mutator(chance)
        kind, payload = self._request(mutator, chance)
        self._ident += 1
        data = HEADER.pack(len(payload), kind, self._ident) + payload
        damaged = chance.random() < 0.1
        if damaged:
            data = mutator.damage(data)
        probe = PROBE + self._ident
        writer.write(data + HEADER.pack(0, Kind.PING, probe))
        wanted = not damaged and kind not in UNANSWERED
        try:
            if damaged:
                writer.write_eof()  # whatever the damage made of the stream: it may wait for the rest of a frame
            return await self._answered(reader, probe, wanted=wanted, damaged=damaged, data=data)
        except (asyncio.IncompleteReadError, OSError) as error:
            await self.close()
            if damaged:
                return "ended"
            raise Wrong(f"the shard hung up on {kind} {payload[:200].hex()}") from error

    async def _answered(
        self, reader: asyncio.StreamReader, probe: int, *, wanted: bool, damaged: bool, data: bytes
    ) -> str:
        said: list[int] = []
        probed = False
        while damaged or not probed or (wanted and not said):
            kind, ident, _ = await _frame(reader)
            if ident == probe and kind == Kind.PONG:
                probed = True
            elif ident == self._ident and kind not in PUSHED:
                said.append(kind)
        if len(said) != wanted:
            raise Wrong(f"{len(said)} answers to {data[:200].hex()}")
        return Kind(said[0]).name if said else "none"

    def _request(self, mutator: Mutator, chance: random.Random) -> tuple[int, bytes]:
        session = chance.choice(self._sessions)
        bodies: list[tuple[int, msgspec.Struct]] = [
            (Kind.APPEND, rpc.Append(1, session, [rpc.Entry([draft("a"), draft("b")]), rpc.Entry([draft("c")], 0)])),
            (Kind.READ, rpc.Read(1, session, 10, 0)),
            (Kind.READ, rpc.Read(1, session, 10, None, 5)),
            (Kind.READ, rpc.Read(1, session, 10, None, None, 5)),
            (Kind.INFO, rpc.Info(1, session, 0)),
            (Kind.SUBSCRIBE, rpc.Subscribe(1, session, 0)),
            (Kind.MARK_READ, rpc.MarkRead(1, session, "p", 0)),
            (Kind.CREATE, rpc.Create(1, session, b'{"a":1}')),
            (Kind.LIST, rpc.List("", 10)),
        ]
        kind, body = chance.choice(bodies)
        roll = chance.random()
        if roll < 0.05:
            return chance.randrange(256), rpc.encode(body)
        if roll < 0.2:
            return kind, mutator.damage(rpc.encode(body))
        return kind, mutator.msgpack(body)

    async def _greeted(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._where)
            payload = rpc.encode(self._hello)
            self._streams[1].write(HEADER.pack(len(payload), Kind.HELLO, 0) + payload)
            kind, _, answer = await _frame(self._streams[0])
            if kind != Kind.WELCOME:
                raise Wrong(f"a good HELLO was answered {kind} {answer!r}")
            self._ident = 0
        return self._streams

    async def _stranger(self, chance: random.Random) -> str:
        """Somebody who does not know the credential, or how to say it."""
        mutator = Mutator(chance)
        guess = msgspec.structs.replace(self._hello, credential=chance.randbytes(chance.randrange(64)))
        payload = chance.choice((rpc.encode(guess), mutator.msgpack(guess), chance.randbytes(30)))
        data = HEADER.pack(len(payload), chance.choice((Kind.HELLO, Kind.APPEND, 0, 255)), 1) + payload
        if chance.random() < 0.5:
            data = mutator.damage(data)
        reader, writer = await asyncio.open_connection(*self._where)
        try:
            writer.write(data)
            writer.write_eof()
            while True:
                kind, _, _ = await _frame(reader)
                if kind != Kind.ERROR:
                    raise Wrong(f"a stranger was answered {kind} for {data[:200].hex()}")
        except (asyncio.IncompleteReadError, OSError):
            return "ended"
        finally:
            writer.transport.abort()

    async def close(self) -> None:
        """See `Surface`."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    try:
        async with asyncio.timeout(WAIT_S):
            size, kind, ident = HEADER.unpack(await reader.readexactly(HEADER.size))
            return kind, ident, await reader.readexactly(size)
    except TimeoutError as error:
        raise Wrong(f"the shard said nothing for {WAIT_S:g} s") from error


def rogue(chance: random.Random, share: Callable[[], float]) -> Through:
    """What a shard says, with a share of its frames damaged (cut into frames first: headers can be hit, too)."""
    mutator = Mutator(chance)
    rest = b""

    def through(data: bytes) -> bytes:
        nonlocal rest
        rest += data
        out: list[bytes] = []
        while len(rest) >= HEADER.size:
            size, kind, ident = HEADER.unpack_from(rest)
            end = HEADER.size + size
            if len(rest) < end:
                break
            payload, rest = rest[HEADER.size : end], rest[end:]
            if kind not in {Kind.WELCOME, Kind.PONG} and chance.random() < share():
                payload = mutator.damage(payload)
                if chance.random() < 0.2:
                    kind = chance.randrange(256)
            out.append(HEADER.pack(len(payload), kind, ident) + payload)
        return b"".join(out)

    return through
