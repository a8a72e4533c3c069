"""What all sockets of a gateway share: admission, the flush at the end of each tick, faults, and the drain.

Promise: at most `sockets` are open; after `drain` each joined topic was told once, each socket closed with a reconnect
code at its own random moment, and what was under way was answered first.
Must not be done here: anything about one socket alone (`websocket.py`).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from fleetlm_common.clock import Clock
from fleetlm_common.errors import TryAgain
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.logs import Logger
from fleetlm_gateway.boundary import Boundary
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.drafts import Keys
from fleetlm_gateway.inboxes import Inboxes
from fleetlm_gateway.metrics import OuterMetrics
from fleetlm_gateway.websocket import CLOSE_LINGER_S

if TYPE_CHECKING:
    from fleetlm_gateway.outflow import Outflow
    from fleetlm_gateway.websocket import Socket


class Hub:
    """Owner of the sockets.

    Args:
        config: limits.
        boundary: the inner half.
        metrics: what sockets count.
        log: for events.
        clock: ages and latencies.
        entropy: spreads closes over the drain's window.
        keys: idempotency keys for clients that have none.
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
        keys: Keys,
    ) -> None:
        self.config = config
        self.boundary = boundary
        self.metrics = metrics
        self.clock = clock
        self.keys = keys
        self.draining = False
        self.retry_after_ms = max(config.drain_window_ms, 1)
        self._log = log
        self._entropy = entropy
        self._loop = asyncio.get_running_loop()
        # In the order in which they came (a set's would depend on addresses): the simulator replays a drain.
        self._sockets: dict[Socket, None] = {}
        self._dirty: list[Outflow] = []
        self._empty = asyncio.Event()
        self.inboxes = Inboxes(boundary, entropy=entropy, fault=self.fault)

    def admit(self) -> None:
        """Refuse a socket that is one too many.

        Raises:
            TryAgain: as many as may be are open, or this gateway is leaving.
        """
        if self.draining:
            raise TryAgain("this gateway is leaving", reason="draining", retry_after_ms=self.retry_after_ms)
        if len(self._sockets) >= self.config.sockets:
            raise TryAgain("this gateway holds as many sockets as it may", reason="overloaded", retry_after_ms=1000)

    def add(self, socket: Socket) -> None:
        """A socket is open."""
        self._sockets[socket] = None
        self.metrics.sockets_opened.inc()
        self.metrics.sockets.set(len(self._sockets))

    def forget(self, socket: Socket, reason: str) -> None:
        """A socket is gone."""
        self._sockets.pop(socket, None)
        self.metrics.sockets.set(len(self._sockets))
        self.metrics.sockets_closed.labels(reason).inc()
        self._log.event("socket_closed", level="debug", reason=reason)
        if not self._sockets:
            self._empty.set()

    def sockets(self) -> list[Socket]:
        """Those that are open now."""
        return list(self._sockets)

    def flush_later(self, out: Outflow) -> None:
        """Flush it at the end of this tick: one call of the loop for all that were written to."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(out)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for out in dirty:
            out.flush()

    def fault(self, error: BaseException) -> None:
        """Say that something of ours broke."""
        self._log.event("socket_fault", level="error", error=type(error).__name__, message=str(error))
        self._loop.call_exception_handler({"message": "a socket's task failed", "exception": error})

    async def drain(self) -> None:
        """Send the clients away over the window; returns when all are gone. To be called once."""
        self.draining = True
        self.metrics.draining.set(1)
        window_s = self.config.drain_window_ms / 1000
        self._log.event("draining", sockets=len(self._sockets), window_ms=self.config.drain_window_ms)
        for socket in list(self._sockets):
            socket.announce_drain(self.retry_after_ms)
            self._loop.call_later(self._entropy.uniform(0, window_s), socket.finish)
        self._empty.clear()
        if not self._sockets:
            self.inboxes.stop()
            return
        try:
            async with asyncio.timeout(window_s + REQUEST_DEADLINE_S + CLOSE_LINGER_S):
                await self._empty.wait()
        except TimeoutError:
            self._log.event("drain_cut_short", level="warning", sockets=len(self._sockets))
            self.abort()

    def abort(self) -> None:
        """End every socket at once."""
        self.inboxes.stop()
        for socket in list(self._sockets):
            socket.abort()
