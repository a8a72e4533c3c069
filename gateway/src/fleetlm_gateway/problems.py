"""Refusals over HTTP: RFC 9457 problem JSON with the codes of the WebSocket.

Promise: whatever a request was refused for, wrong method and unknown path included, the answer is
`application/problem+json` with `code`, `reason` and `message`; 429 and 503 say when to come again.
Must not be done here: deciding to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec
from aiohttp import web

from fleetlm_common.errors import HTTP_STATUS, FleetError
from fleetlm_gateway.jsontext import encode

CONTENT_TYPE: Final = "application/problem+json"
_TITLES: Final = {
    "TRY_AGAIN": "Not now: try again with the same key",
    "INVALID": "The request is wrong",
    "TOO_LARGE": "The request is larger than a limit",
    "UNAUTHENTICATED": "Nobody knows who asks",
    "FORBIDDEN": "Who asks may not",
    "NOT_FOUND": "There is no such thing",
    "CONFLICT": "Others wrote meanwhile",
    "IDEMPOTENCY_CONFLICT": "The key was used for other content",
}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body; `detail` (RFC 9457) and `message` (as over the WebSocket) say the same."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    reason: str
    message: str
    retry_after_ms: int | None = None
    field: str | None = None
    limit: int | None = None
    last_seq: int | None = None


def problem(error: FleetError, *, status: int | None = None, headers: Mapping[str, str] | None = None) -> web.Response:
    """The response that refuses with `error`.

    Args:
        error: why.
        status: when it is not the one that the code stands for (405, 408, 415, 426).
        headers: further ones, for example `Allow`.
    """
    body = error.body()
    if status is None:
        status = 429 if body.reason == "overloaded" else HTTP_STATUS.get(body.code, 500)
    sent = dict(headers or {})
    if body.retry_after_ms is not None:
        sent["Retry-After"] = str(max(1, math.ceil(body.retry_after_ms / 1000)))
    found = Problem(
        f"urn:fleetlm:problem:{body.code.lower().replace('_', '-')}",
        _TITLES.get(body.code, "Refused"),
        status,
        body.message,
        body.code,
        body.reason,
        body.message,
        retry_after_ms=body.retry_after_ms,
        field=body.field,
        limit=body.limit,
        last_seq=body.last_seq,
    )
    return web.Response(body=encode(found), status=status, headers=sent, content_type=CONTENT_TYPE)
