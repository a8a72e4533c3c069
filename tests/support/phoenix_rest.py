"""REST of the model of a gateway: as much of it as the SDK's guide uses.

Promise: answers as docs/protocol.md says. Must not be done here: sockets.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from tests.support.phoenix_model import Model


class ModelRest:
    """Routes over a model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.failures: list[tuple[int, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []

    def routes(self) -> list[web.RouteDef]:
        """For an application."""
        return [
            web.post("/v1/sessions/{id}/messages", self.append),
            web.get("/v1/sessions/{id}/messages", self.messages),
            web.get("/v1/sessions/{id}", self.session),
            web.get("/v1/sessions", self.sessions),
            web.get("/v1/participants/{id}/inbox", self.inbox),
        ]

    def _failure(self, request: web.Request) -> web.Response | None:
        self.headers.append(dict(request.headers))
        if not self.failures:
            return None
        status, body = self.failures.pop(0)
        return web.Response(status=status, text=json.dumps(body), content_type="application/problem+json")

    async def append(self, request: web.Request) -> web.Response:
        """POST a message."""
        payload = await request.json()
        failure = self._failure(request)
        if failure is not None:
            return failure
        acks = self.model.append(
            request.match_info["id"], [payload], sender="rest", expected_seq=payload.get("expected_seq")
        )
        if isinstance(acks, dict):
            return web.json_response(acks, status=409, content_type="application/problem+json")
        return web.json_response(acks[0], status=201)

    async def messages(self, request: web.Request) -> web.Response:
        """GET a page."""
        after, limit = int(request.query.get("after", 0)), int(request.query.get("limit", 100))
        return self._failure(request) or web.json_response(self.model.page(request.match_info["id"], after, limit))

    async def session(self, request: web.Request) -> web.Response:
        """GET one."""
        session_id = request.match_info["id"]
        if session_id not in self.model.logs:
            body = {"code": "NOT_FOUND", "reason": "not_found", "detail": "no such session", "field": "id"}
            return web.json_response(body, status=404, content_type="application/problem+json")
        return self._failure(request) or web.json_response(self._info(session_id))

    async def sessions(self, request: web.Request) -> web.Response:
        """GET all."""
        after, limit = request.query.get("after", ""), int(request.query["limit"])
        names = sorted(name for name in self.model.logs if name > after)
        body = {"sessions": [self._info(name) for name in names[:limit]], "has_more": len(names) > limit}
        return self._failure(request) or web.json_response(body)

    async def inbox(self, request: web.Request) -> web.Response:
        """GET every session, two a page at the most."""
        after, limit = request.query.get("after", ""), min(int(request.query.get("limit", 2)), 2)
        body = self.model.inbox(after=after, limit=limit)
        return self._failure(request) or web.json_response(body)

    def _info(self, session_id: str) -> dict[str, Any]:
        log = self.model.log(session_id)
        return {
            "session_id": session_id, "last_seq": log.last_seq, "earliest_seq": log.earliest_seq, "metadata": {},
            "inserted_at": "2026-01-01T00:00:00Z",
        }  # fmt: skip
