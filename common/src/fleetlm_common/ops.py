"""The operations port: liveness, readiness with its reason, metrics, and a component's admin routes.

Promise: `/health/ready` says what the component itself says, with the reason; the port answers while the component is
still starting; `/metrics` says of every process alike what it holds (memory, CPU, descriptors, tasks).
Must not be done here: deciding readiness (the component passes a function), anything that clients of FleetLM use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest


@dataclass(frozen=True, slots=True)
class Health:
    """A component's own word: whether, and a stable reason (CamelCase) with a sentence."""

    ok: bool
    reason: str
    message: str = ""


class OpsServer:
    """HTTP on a port of its own.

    Args:
        registry: what `/metrics` shows; the process's own series are added to it.
        ready: asked at each `/health/ready`; 200 or 503 with reason and message.
        live: asked at each `/health/live`.
        routes: the component's admin API.
    """

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], Health],
        live: Callable[[], Health] = lambda: Health(ok=True, reason="Alive"),
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
        self._registry = registry
        ProcessCollector(registry=registry)
        tasks = Gauge("fleetlm_process_tasks", "asyncio tasks that have not ended", registry=registry)
        tasks.set_function(_tasks)
        self._ready = ready
        self._live = live
        self._app = web.Application()
        self._app.add_routes(
            [
                web.get("/health/live", self._get_live),
                web.get("/health/ready", self._get_ready),
                web.get("/metrics", self._get_metrics),
                *routes,
            ]
        )
        self._runner = web.AppRunner(self._app, access_log=None)

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 takes a free one.

        Returns:
            The port.

        Raises:
            OSError: it is taken.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        address: tuple[str, int] = self._runner.addresses[0]
        return address[1]

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _get_live(self, request: web.Request) -> web.Response:
        return _answer(self._live())

    async def _get_ready(self, request: web.Request) -> web.Response:
        return _answer(self._ready())

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _tasks() -> float:
    """How many tasks the loop has; 0 where there is no loop (a registry that is looked at from outside)."""
    try:
        return float(len(asyncio.all_tasks()))
    except RuntimeError:
        return 0.0


def _answer(health: Health) -> web.Response:
    body = {"ok": health.ok, "reason": health.reason, "message": health.message}
    return web.json_response(body, status=200 if health.ok else 503)
