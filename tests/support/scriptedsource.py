"""The source of a move, played by a test: the real protocol over real TCP, answers by the test's own words.

Promise: HELLO and rounds are answered as a source would; the pass names `states`, messages are what `pages` says of a
request. Must not be used for anything about durability.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from fleetlm_common import rpc
from fleetlm_common.control import ShardEndpoint
from fleetlm_common.errors import Invalid
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection
from tests.support.movesrig import MovesRig


@dataclass
class ScriptedSource:
    """What it says, and what it was asked."""

    states: list[rpc.SessionState]
    pages: Callable[[rpc.ExportMessages], rpc.ExportedMessages]
    asked: list[rpc.ExportMessages] = field(default_factory=list[rpc.ExportMessages])

    def answer(self, kind: int, payload: bytes) -> tuple[Kind, msgspec.Struct]:
        """Of one request."""
        if kind == Kind.HELLO:
            hello = msgspec.msgpack.decode(payload, type=rpc.Hello)
            return Kind.WELCOME, rpc.Welcome(rpc.PROTOCOL, hello.shard, 9, hello.epoch)
        if kind == Kind.EXPORT:
            return Kind.EXPORTED, rpc.Exported(self.states, more=False, after="")
        if kind == Kind.EXPORT_CHANGED:
            return Kind.EXPORTED, rpc.Exported([], more=False, after="")
        if kind == Kind.EXPORT_MESSAGES:
            request = msgspec.msgpack.decode(payload, type=rpc.ExportMessages)
            self.asked.append(request)
            return Kind.EXPORTED_MESSAGES, self.pages(request)
        return Kind.ERROR, Invalid("not in the script", field="kind").body()


@asynccontextmanager
async def scripted_source(ring: MovesRig, source: ScriptedSource) -> AsyncGenerator[ScriptedSource]:
    """In the place of the ring's first shard, whose process ends."""
    known = ring.control.view.shards[ring.names[0]]
    await ring.kill(0)
    wires: list[FrameConnection] = []

    def connection() -> FrameConnection:
        def on_frame(kind: int, ident: int, payload: bytes) -> None:
            reply, answer = source.answer(kind, payload)
            wire.send(reply, ident, rpc.encode(answer))

        wire = FrameConnection(on_frame=on_frame, on_lost=lambda _: None)
        wires.append(wire)
        return wire

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    endpoint = ShardEndpoint(known.name, known.volume_id, known.term, "127.0.0.1", port, known.ops_url, ready=True)
    await ring.control.announce(endpoint)
    try:
        yield source
    finally:
        server.close()
        for wire in wires:
            wire.abort()
        await server.wait_closed()
