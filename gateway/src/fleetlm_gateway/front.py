"""The client port as a whole: listener, HTTP application, sockets; everything of the outer half around one `Boundary`.

Promise: once `stop_accepting` returned no new connection is taken; `drain` sends the clients away; `close` ends what is
left. Must not be done here: the environment, signals (`process.py`), the inner half.
"""

from __future__ import annotations

import asyncio
import random
from importlib.metadata import version
from typing import Final, cast

from aiohttp import web

from fleetlm_common.clock import Clock
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.logs import Logger
from fleetlm_gateway.boundary import Boundary
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.drafts import Keys
from fleetlm_gateway.httpapp import HttpApp
from fleetlm_gateway.httplog import http_logger
from fleetlm_gateway.hub import Hub
from fleetlm_gateway.metrics import OuterMetrics
from fleetlm_gateway.rest import Rest

BACKLOG: Final = 1024
"""Connections that wait to be accepted: a whole gateway's clients come back at once when another one dies."""
HTTP_CONNECTIONS_MAX: Final = 4096
"""Connections that are no WebSocket (yet); one more is closed at once. Each may hold a body of `FRAME_BYTES_MAX`."""
KEEP_ALIVE_S: Final = 75.0
"""An HTTP connection without a request is closed after it; longer than the 60 s of usual proxies."""


class Front:
    """What clients talk to.

    Args:
        config: limits, origins, the drain's window.
        boundary: the inner half.
        metrics: of the outer half.
        log: for events.
        clock: ages and latencies.
        entropy: keys, ids and the drain's spread; must differ in each process.
    """

    def __init__(
        self,
        *,
        config: GatewayConfig,
        boundary: Boundary,
        metrics: OuterMetrics,
        log: Logger,
        clock: Clock,
        entropy: random.Random,
    ) -> None:
        keys = Keys(f"{entropy.getrandbits(80):020x}")
        self.hub = Hub(
            config=config, boundary=boundary, metrics=metrics, log=log, clock=clock, entropy=entropy, keys=keys
        )
        rest = Rest(boundary=boundary, config=config, keys=keys, clock=clock, entropy=entropy)
        self.app = HttpApp(hub=self.hub, rest=rest, name=config.name, version=version("fleetlm-gateway"), log=log).app
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            logger=http_logger(log),
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=REQUEST_DEADLINE_S,
        )
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes a free one.

        Returns:
            The port.

        Raises:
            OSError: it is taken.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._connection, host, port, backlog=BACKLOG)
        address: tuple[str, int] = self._listener.sockets[0].getsockname()
        return address[1]

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        return server() if len(server.connections) < HTTP_CONNECTIONS_MAX else _Refused()

    def stop_accepting(self) -> None:
        """Take no new connection."""
        if self._listener is not None:
            self._listener.close()

    async def drain(self) -> None:
        """Send the clients away; returns when every socket is gone and every HTTP request answered."""
        await self.hub.drain()
        await self._runner.cleanup()

    async def close(self) -> None:
        """End everything now (harmless after `drain`)."""
        self.stop_accepting()
        self.hub.abort()
        await self._runner.cleanup()


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it; there is no memory to read its request with."""
        transport = cast("asyncio.Transport", transport)
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        transport.close()
