"""The gateway's process: ports, signals, and how it ends.

    start ─► serve ─┬─ SIGTERM, SIGINT   unready, no new connections, `draining`, sockets close over the window, exit 0
                    └─ a second signal   end at once, exit 0

Promise: the operations port answers from before the client port is open until after the last client is gone, and says
why the gateway is not ready. Must not be done here: anything about one client.
"""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge

from fleetlm_common.config import host_port
from fleetlm_common.ops import Health, OpsServer
from fleetlm_common.outofmemory import end_when_out_of_memory
from fleetlm_gateway.boundary import Boundary
from fleetlm_gateway.front import HTTP_CONNECTIONS_MAX, Front
from fleetlm_gateway.metrics import InnerMetrics, OuterMetrics

if TYPE_CHECKING:
    import random

    from fleetlm_common.clock import Clock
    from fleetlm_common.control import ControlPlane
    from fleetlm_common.logs import Logger
    from fleetlm_gateway.config import GatewayConfig

PREFIX: Final = "FLEETLM_GATEWAY_"
EXIT_FAILED: Final = 74
"""There was no memory (EX_IOERR, as the shard): clients connect again, to another gateway or to the next process."""
_OTHER_FILES: Final = 512
"""Descriptors besides clients': connections to shards (256 at the most), ports, files of the control plane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What the process gets from `__main__`."""

    control: ControlPlane
    clock: Clock
    entropy: random.Random
    log: Logger
    credential: bytes


class GatewayProcess:
    """One process of one gateway.

    Args:
        config: settings.
        outside: control plane, time, chance, the credential.
    """

    def __init__(self, config: GatewayConfig, outside: Outside) -> None:
        self._config = config
        self._log = outside.log
        self._leave = asyncio.Event()
        self._leave_now = asyncio.Event()
        self._listening = False
        registry = CollectorRegistry()
        self._boundary = Boundary(
            gateway=config.name,
            credential=outside.credential,
            control=outside.control,
            entropy=outside.entropy,
            log=outside.log,
            metrics=InnerMetrics(registry),
        )
        self._front = Front(
            config=config,
            boundary=self._boundary,
            metrics=OuterMetrics(registry),
            log=outside.log,
            clock=outside.clock,
            entropy=outside.entropy,
        )
        ready = Gauge("fleetlm_gateway_ready", "1 while requests can be served", registry=registry)
        ready.set_function(lambda: float(self.health().ok))
        self._ops = OpsServer(registry=registry, ready=self.health)

    def health(self) -> Health:
        """Whether clients should be sent here, with the reason when not."""
        if self._leave.is_set():
            return Health(ok=False, reason="Draining", message="this gateway is leaving")
        if not self._listening:
            return Health(ok=False, reason="Starting", message="the client port is not open yet")
        return self._boundary.ready()

    async def run(self) -> int:
        """Serve until a signal.

        Returns:
            The exit status, 0.

        Raises:
            OSError: a port cannot be had; `filename` names the variable.
        """
        loop = asyncio.get_running_loop()
        end_when_out_of_memory(loop, status=EXIT_FAILED)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._allow_files()
        try:
            await self._start()
            await self._leave.wait()
            await self._drain()
        finally:
            await self._front.close()
            await self._boundary.stop()
            await self._ops.stop()
        self._log.event("stopped")
        return 0

    async def _start(self) -> None:
        ops_port = await self._listen("OPS_LISTEN", self._config.ops_listen, self._ops.start)
        await self._boundary.start()
        port = await self._listen("LISTEN", self._config.listen, self._front.start)
        self._listening = True
        self._log.event("listening", port=port, ops_port=ops_port)

    async def _listen(self, variable: str, address: str, start: Callable[[str, int], Awaitable[int]]) -> int:
        host, port = host_port(address, variable=PREFIX + variable)
        try:
            return await start(host, port)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}", PREFIX + variable) from error

    async def _drain(self) -> None:
        """Send clients away, unless a second signal says not to wait for them."""
        self._front.stop_accepting()
        draining = asyncio.create_task(self._front.drain())
        hurry = asyncio.create_task(self._leave_now.wait())
        await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurry):
            task.cancel()
        await asyncio.gather(draining, hurry, return_exceptions=True)

    def _signalled(self) -> None:
        if self._leave.is_set():
            self._leave_now.set()
        self._leave.set()

    def _allow_files(self) -> None:
        """A socket is a file: allow as many as are promised, as far as the machine lets us, and say how far."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self._config.sockets + HTTP_CONNECTIONS_MAX + _OTHER_FILES
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            self._log.event("few_files", level="warning", wanted=wanted, allowed=allowed)
