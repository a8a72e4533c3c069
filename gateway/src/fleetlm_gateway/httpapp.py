"""The client port's HTTP application: REST, OpenAPI, the upgrade, and one border around all of them.

Promise: each request is checked for its origin, answered as JSON or problem JSON, and counted; while the gateway is
leaving the answer is 503. Must not be done here: what a route does (`rest.py`), sockets after the upgrade.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from fleetlm_common.errors import FleetError, Invalid, NotFound, Rejected, TooLarge, TryAgain
from fleetlm_common.limits import FRAME_BYTES_MAX
from fleetlm_common.logs import Logger
from fleetlm_gateway import openapi, origins, upgrade
from fleetlm_gateway.hub import Hub
from fleetlm_gateway.problems import problem
from fleetlm_gateway.rest import Rest, json_response

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATUS_OF_REASON: Final = {"upgrade_required": 426, "content_type": 415, "content_encoding": 415, "body_timeout": 408}
"""Refusals for which HTTP has a status of its own."""


class HttpApp:
    """Makes the aiohttp application.

    Args:
        hub: sockets, boundary, metrics.
        rest: the routes of `/v1`.
        name: this gateway, for the landing page.
        version: of this build.
        log: for faults.
    """

    def __init__(self, *, hub: Hub, rest: Rest, name: str, version: str, log: Logger) -> None:
        self._hub = hub
        self._log = log
        self._landing = {
            "name": "fleetlm",
            "gateway": name,
            "version": version,
            "websocket": upgrade.PATH,
            "rest": "/v1",
            "openapi": "/openapi.json",
            "limits": "/v1/limits",
        }
        self._document = openapi.document(version=version)
        # Bodies are bounded while they are read; what is compressed is refused, so that nothing can unfold.
        self.app = web.Application(client_max_size=FRAME_BYTES_MAX, middlewares=[self._border])
        self.app.add_routes(
            [
                web.get("/", self._get_landing, allow_head=True),
                web.get("/openapi.json", self._get_openapi, allow_head=True),
                web.get(upgrade.PATH, self._get_socket, allow_head=False),
                *rest.routes(),
            ]
        )

    async def _get_landing(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._landing)

    async def _get_openapi(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._document)

    async def _get_socket(self, request: web.Request) -> web.StreamResponse:
        try:
            return upgrade.accept(request, self._hub)
        except FleetError as error:
            self._hub.metrics.sockets_refused.labels(error.code).inc()
            raise

    @web.middleware
    async def _border(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = "other" if resource is None else resource.canonical
        response = await self._answer(request, handler)
        if isinstance(response, upgrade.HandedOver):
            return response
        self._hub.metrics.http_requests.labels(route, str(response.status)).inc()
        if self._hub.draining:
            response.force_close()
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            origin = origins.check(request.headers, allowed=self._hub.config.allowed_origins)
        except FleetError as error:
            return problem(error)
        if origin is not None and request.method == "OPTIONS":
            return web.Response(status=204, headers=origins.preflight(origin))
        response = await self._handled(request, handler)
        if origin is not None and not isinstance(response, upgrade.HandedOver):
            response.headers.update(origins.cors(origin))
        return response

    async def _handled(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._hub.draining:
                retry_after_ms = self._hub.retry_after_ms
                raise TryAgain("this gateway is leaving", reason="draining", retry_after_ms=retry_after_ms)  # noqa: TRY301
            return await handler(request)
        except FleetError as error:
            status = _STATUS_OF_REASON.get(error.reason) if isinstance(error, Rejected) else None
            upgrades = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"} if status == 426 else {}
            return problem(error, status=status, headers=upgrades)
        except web.HTTPRequestEntityTooLarge:
            what = f"the body is larger than {FRAME_BYTES_MAX} bytes"
            return problem(TooLarge(what, field="body", limit=FRAME_BYTES_MAX))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            refused = Invalid(f"this path takes {allowed}", reason="method_not_allowed", field="method")
            return problem(refused, status=405, headers={"Allow": allowed})
        except web.HTTPNotFound:
            return problem(NotFound("no such path; /openapi.json lists them", reason="no_such_path"))
        except (ConnectionError, web.RequestPayloadError) as error:
            # The client hung up, or broke the body's framing: no fault of ours, and mostly nobody left to be told.
            return problem(Invalid(f"the body did not arrive whole: {error}", reason="body_incomplete", field="body"))
        except Exception as error:  # noqa: BLE001 - the border: a fault of ours is logged and still answered
            self._log.event("http_fault", level="error", error=type(error).__name__, message=str(error))
            return problem(TryAgain("a fault of the gateway; it was logged", reason="unavailable"), status=500)
