"""The model of a gateway on a real socket of the loopback: for clients whose I/O is what is tested.

Promise: as `phoenix_model.py`, over aiohttp's WebSocket server; tests can cut, freeze and refuse connections.
Must not be done here: anything about sessions.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import WSMsgType, web

from tests.support.phoenix_model import Fault, Model, ModelSocket
from tests.support.phoenix_rest import ModelRest


@dataclass(slots=True)
class PhoenixServer:
    """A running server."""

    url: str = ""
    model: Model = field(default_factory=Model)
    fault: Callable[[str], Fault] | None = None
    refuse_status: int | None = None
    frozen: bool = False
    opened: int = 0
    queries: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    sockets: dict[web.WebSocketResponse, ModelSocket] = field(default_factory=dict[web.WebSocketResponse, ModelSocket])
    rest: ModelRest = field(init=False)

    def __post_init__(self) -> None:
        """REST over the same sessions."""
        self.rest = ModelRest(self.model)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One WebSocket."""
        self.queries.append(dict(request.query))
        if self.refuse_status is not None:
            return web.Response(status=self.refuse_status, headers={"Retry-After": "0"})
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.opened += 1
        one = self.sockets[socket] = ModelSocket(
            self.model, participant=request.query.get("participant_id", ""), fault=self.fault
        )
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT and not self.frozen:
                    one.receive(message.data)
                    await self.flush()
        finally:
            one.close()
            self.sockets.pop(socket, None)
        return socket

    async def flush(self) -> None:
        """Send what the model has queued on each socket."""
        if self.frozen:
            return
        for socket, one in list(self.sockets.items()):
            while one.out:
                await socket.send_str(one.out.popleft())

    async def add(self, session_id: str, contents: list[object]) -> None:
        """Somebody else appends."""
        self.model.add(session_id, contents)
        await self.flush()

    async def cut(self, code: int = 1001, reason: bytes = b"") -> None:
        """Close every connection."""
        for socket in list(self.sockets):
            await socket.close(code=code, message=reason)


@asynccontextmanager
async def phoenix_server() -> AsyncGenerator[PhoenixServer]:
    """Listen on a free port of the loopback."""
    server = PhoenixServer()
    app = web.Application()
    app.add_routes([web.get("/socket/websocket", server.serve), *server.rest.routes()])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        await server.cut()
        await runner.cleanup()
