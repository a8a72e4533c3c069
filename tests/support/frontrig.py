"""A gateway's outer half on a real loopback port, before a `MemoryBoundary`; and a client that speaks Phoenix frames.

Promise: what a test sends is what arrives, byte by byte when it wants; every wait has a deadline.
Must not be done here: judging what the gateway answers.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, ParamSpec

import aiohttp
import msgspec
import uvloop
from prometheus_client import CollectorRegistry

from fleetlm_common.clock import SystemClock
from fleetlm_common.logs import Level, Logger, NullLogger, Value
from fleetlm_gateway import wsframes
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.front import Front
from fleetlm_gateway.metrics import OuterMetrics
from tests.support.memoryboundary import MemoryBoundary

P = ParamSpec("P")

DEADLINE_S: Final = 10.0
HANDSHAKE: Final = (
    "GET /socket/websocket?{query} HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
WHO: Final = "vsn=2.0.0&participant_id=alice"


def on_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on the loop of the product; exceptions that nobody retrieved fail it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        lost: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
            await test(*args, **kwargs)

        uvloop.run(watched())
        assert not lost, lost

    return run


@dataclass
class FrontRig:
    """A running outer half."""

    front: Front
    boundary: MemoryBoundary
    registry: CollectorRegistry
    port: int
    http: aiohttp.ClientSession
    clients: list[PhxClient]

    @property
    def url(self) -> str:
        """Of REST."""
        return f"http://127.0.0.1:{self.port}"

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 when it was never touched."""
        return self.registry.get_sample_value(f"fleetlm_gateway_{name}", labels) or 0.0

    async def connect(self, query: str = WHO) -> PhxClient:
        """A connected client."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        writer.write(HANDSHAKE.format(query=query).encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
        assert head.startswith(b"HTTP/1.1 101 "), head
        client = PhxClient(reader, writer)
        self.clients.append(client)
        return client

    async def refused(self, query: str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and problem of an upgrade that is refused."""
        sent = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        sent = {name: value for name, value in sent.items() if value}
        async with self.http.get(f"{self.url}/socket/websocket?{query}", headers=sent) as answer:
            assert answer.content_type == "application/problem+json"
            return answer.status, await answer.json()


@asynccontextmanager
async def front_rig(*, log: Logger | None = None, **settings: Any) -> AsyncGenerator[FrontRig]:
    """Run an outer half with `settings` of `GatewayConfig`; its events go to `log`."""
    settings.setdefault("drain_window_ms", 100)
    config = GatewayConfig(control="file:/nowhere", credential_file="none", **settings)
    registry = CollectorRegistry()
    boundary = MemoryBoundary()
    await boundary.start()
    front = Front(
        config=config,
        boundary=boundary,
        metrics=OuterMetrics(registry),
        log=log or NullLogger(),
        clock=SystemClock(),
        entropy=random.Random(1),
    )
    port = await front.start("127.0.0.1", 0)
    clients: list[PhxClient] = []
    try:
        async with aiohttp.ClientSession() as http:
            yield FrontRig(front, boundary, registry, port, http, clients)
    finally:
        for client in clients:
            await client.close()
        await front.close()
        await boundary.stop()


class EventList:
    """A logger that keeps name and level of each event."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def event(self, name: str, /, *, level: Level = "info", **_: Value) -> None:
        """See `Logger`."""
        self.said.append((name, level))


class Closed(Exception):
    """The gateway closed; `code` None: without a close frame."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class PhxClient:
    """One socket, frames by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._refs = 0

    # -- out

    def raw(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    def frame(self, payload: bytes, *, first: int = 0x81, mask: bytes = b"\x01\x02\x03\x04") -> None:
        """Send a WebSocket frame."""
        self.writer.write(ws_frame(payload, first=first, mask=mask))

    def push(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: object) -> None:
        """Send a Phoenix frame."""
        self.frame(msgspec.json.encode([join_ref, ref, topic, event, payload]))

    def ref(self) -> str:
        """A new ref."""
        self._refs += 1
        return f"r{self._refs}"

    async def request(self, topic: str, event: str, payload: object, *, join_ref: str | None = "1") -> Reply:
        """Ask and wait for the answer, dropping pushes that come before it."""
        ref = self.ref()
        self.push(join_ref, ref, topic, event, payload)
        while True:
            frame = await self.next()
            if frame[1] == ref and frame[3] == "phx_reply":
                return Reply(frame[4]["status"], frame[4]["response"])

    async def join(self, topic: str, payload: object | None = None, *, join_ref: str = "1") -> dict[str, Any]:
        """Join and wait until replay has met live (pushes before that are dropped)."""
        self.push(join_ref, join_ref, topic, "phx_join", {} if payload is None else payload)
        while (reply := await self.next())[1] != join_ref:
            pass
        assert reply[4]["status"] == "ok", reply
        while (await self.next())[3] != "caught_up":
            pass
        response: dict[str, Any] = reply[4]["response"]
        return response

    # -- in

    async def next(self, deadline_s: float = DEADLINE_S) -> list[Any]:
        """The next Phoenix frame.

        Raises:
            Closed: there is none.
        """
        while True:
            opcode, payload = await self.ws(deadline_s)
            if opcode == wsframes.TEXT:
                frame: list[Any] = msgspec.json.decode(payload)
                return frame
            if opcode == wsframes.CLOSE:
                raise Closed(int.from_bytes(payload[:2], "big"), payload[2:].decode())

    async def ws(self, deadline_s: float = DEADLINE_S) -> tuple[int, bytes]:
        """The next WebSocket frame (opcode, payload)."""
        async with asyncio.timeout(deadline_s):
            try:
                first, size = await self.reader.readexactly(2)
                assert first & 0x80, "the gateway does not fragment"
                if size >= 126:
                    size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
                return first & 0xF, await self.reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionResetError) as error:
                raise Closed(None, repr(error)) from error

    async def close_code(self) -> int | None:
        """Read until the gateway closes; answers its close frame and hangs up, as clients do."""
        try:
            while True:
                await self.next()
        except Closed as closed:
            if closed.code is not None:
                self.frame(closed.code.to_bytes(2, "big"), first=0x88)
            self.writer.close()
            return closed.code

    async def alive(self) -> None:
        """Prove that the socket works."""
        reply = await self.request("phoenix", "heartbeat", {}, join_ref=None)
        assert reply.status == "ok"

    async def close(self) -> None:
        """Hang up."""
        self.writer.transport.abort()
        try:
            await self.writer.wait_closed()
        except OSError:
            return


@dataclass
class Reply:
    """An answer."""

    status: str
    response: dict[str, Any]


def ws_frame(payload: bytes, *, first: int = 0x81, mask: bytes = b"\x01\x02\x03\x04") -> bytes:
    """A client's WebSocket frame."""
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 1 << 16:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    return head + mask + wsframes.unmasked(payload, mask)
