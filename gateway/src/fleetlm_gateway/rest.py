"""REST `/v1`: the same operations as over the WebSocket, for what needs no socket.

Promise: ids in paths are percent-encoded UTF-8 and checked; queries and bodies with unknown fields are refused by name;
a body is bounded before and while it is read. Must not be done here: turning refusals into HTTP (`httpapp.py`).
"""

from __future__ import annotations

import asyncio
import random
from typing import Annotated, Final
from urllib.parse import quote, unquote_to_bytes

import msgspec
from aiohttp import web
from msgspec import Raw

from fleetlm_common import rpc
from fleetlm_common.clock import Clock
from fleetlm_common.errors import Forbidden, Invalid, NotFound
from fleetlm_common.ids import SessionId, checked_id, uuid7
from fleetlm_common.limits import CLIENT_LIMITS, INBOX_LIMIT_MAX, REPLAY_LIMIT_DEFAULT, REPLAY_LIMIT_MAX, SEQ_MAX
from fleetlm_gateway import drafts, payloads, principal
from fleetlm_gateway.boundary import Boundary
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.drafts import Keys
from fleetlm_gateway.jsontext import compact, decode_fields, encode

BODY_S_MAX: Final = 10.0
"""For a body to arrive: as long as a request may take."""
KEY_HEADER: Final = "Idempotency-Key"
_ID: Final = "{id:[^/]+}"
"""Any segment; aiohttp's own `{id}` takes no braces, which an id may hold."""
_MESSAGES: Final = f"/v1/sessions/{_ID}/messages"


class _Create(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str | None = None
    metadata: Raw = Raw()


class _Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seq: Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)]


class _Session(msgspec.Struct, frozen=True):
    session_id: str
    metadata: Raw
    last_seq: int
    earliest_seq: int
    inserted_at: str


class _Sessions(msgspec.Struct, frozen=True):
    sessions: list[_Session]
    has_more: bool


_CREATE: Final = msgspec.json.Decoder(_Create)
_READ: Final = msgspec.json.Decoder(_Read)


class Rest:
    """The routes of `/v1`.

    Args:
        boundary: the inner half.
        config: limits to show.
        keys: idempotency keys for clients that have none.
        clock: for ids of sessions whose creator chose none.
        entropy: for the same.
    """

    def __init__(
        self, *, boundary: Boundary, config: GatewayConfig, keys: Keys, clock: Clock, entropy: random.Random
    ) -> None:
        self._boundary = boundary
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._limits = {
            **CLIENT_LIMITS,
            "sockets_max": config.sockets,
            "topics_per_socket_max": config.topics_per_socket,
            "requests_per_socket_max": config.requests_per_socket,
            "request_bytes_per_socket_max": config.request_bytes_per_socket,
            "frames_per_second_max": config.frames_per_second,
            "frames_burst_max": config.frames_burst,
            "heartbeat_timeout_ms": config.heartbeat_timeout_ms,
        }

    def routes(self) -> list[web.RouteDef]:
        """What aiohttp is to route here."""
        return [
            web.get("/v1/limits", self._get_limits),
            web.get("/v1/sessions", self._get_sessions),
            web.post("/v1/sessions", self._post_session),
            web.get(f"/v1/sessions/{_ID}", self._get_session),
            web.get(_MESSAGES, self._get_messages),
            web.post(_MESSAGES, self._post_messages),
            web.put(f"/v1/sessions/{_ID}/read", self._put_read),
            web.get(f"/v1/participants/{_ID}/inbox", self._get_inbox),
        ]

    async def _get_limits(self, request: web.Request) -> web.Response:
        return json_response(self._limits)

    async def _get_sessions(self, request: web.Request) -> web.Response:
        query = _query(request, "after", "limit", "participant_id")
        after = checked_id(query["after"], "after") if query.get("after") else ""
        limit = _number(query, "limit", 1, REPLAY_LIMIT_MAX, REPLAY_LIMIT_DEFAULT)
        if "participant_id" in query:
            participant = checked_id(query["participant_id"], "participant_id")
            of_participant, more = await self._boundary.sessions_of(participant, after=after, limit=limit)
            return json_response(_Sessions([_session(*each) for each in of_participant], has_more=more))
        # One more than is shown: only that proves that there is more.
        found = await self._boundary.sessions(after=after, limit=limit + 1)
        shown = [_session(name, info) for name, info in found[:limit]]
        return json_response(_Sessions(shown, has_more=len(found) > limit))

    async def _post_session(self, request: web.Request) -> web.Response:
        asked = decode_fields(_CREATE, compact(await _body(request) or b"{}", "body"))
        chosen = uuid7(self._clock.now_ms(), self._entropy) if asked.id is None else checked_id(asked.id, "id")
        metadata = drafts.checked_metadata(bytes(asked.metadata) or b"null", "metadata")
        made = await self._boundary.create(SessionId(chosen), b"{}" if metadata == b"null" else metadata)
        place = {"Location": f"/v1/sessions/{quote(chosen, safe='')}"}
        return json_response(_session(chosen, made.info), status=201 if made.created else 200, headers=place)

    async def _get_session(self, request: web.Request) -> web.Response:
        _query(request)
        session = _session_id(request)
        info = await self._boundary.info(session)
        if not info.exists:
            raise NotFound("nobody ever wrote to this session", reason="no_such_session", field="id")
        return json_response(_session(session, info))

    async def _get_messages(self, request: web.Request) -> web.Response:
        query = _query(request, "after", "before", "tail", "limit")
        session = _session_id(request)
        given = [name for name in ("after", "before", "tail") if name in query]
        if len(given) > 1:
            raise Invalid(f"{given[0]} and {given[1]} exclude each other", field=given[1])
        limit = _number(query, "limit", 1, REPLAY_LIMIT_MAX, REPLAY_LIMIT_DEFAULT)
        if "before" in query:
            before = _number(query, "before", 1, SEQ_MAX, 1)
            page = await self._boundary.read(session, before=before, limit=limit)
        elif "tail" in query:
            tail = _number(query, "tail", 1, REPLAY_LIMIT_MAX, 1)
            tail = min(tail, limit) if "limit" in query else tail
            page = await self._boundary.read(session, tail=tail, limit=tail)
        else:
            after = _number(query, "after", 0, SEQ_MAX, 0)
            page = await self._boundary.read(session, after=after, limit=limit)
        return web.Response(body=payloads.page_body(page), content_type="application/json")

    async def _post_messages(self, request: web.Request) -> web.Response:
        _query(request)
        session = _session_id(request)
        sender = principal.of_request(request.headers)
        body = await _body(request)
        parsed = drafts.parse(body, sender=sender, keys=self._keys, key=_key_header(request))
        acks = await self._boundary.append(session, parsed.drafts, expected_seq=parsed.expected_seq)
        answer = payloads.acks_body(acks) if parsed.batch else payloads.ack_body(acks[0])
        return web.Response(body=answer, status=201, content_type="application/json")

    async def _put_read(self, request: web.Request) -> web.Response:
        _query(request)
        session = _session_id(request)
        reader = principal.of_request(request.headers)
        asked = decode_fields(_READ, compact(await _body(request), "body"))
        marked = await self._boundary.mark_read(session, reader.id, asked.seq)
        return json_response({"last_read_seq": marked})

    async def _get_inbox(self, request: web.Request) -> web.Response:
        query = _query(request, "after", "limit")
        participant = _path_id(request)
        if principal.of_request(request.headers).id != participant:
            raise Forbidden("an inbox is shown to its participant only", field="id")
        limit = _number(query, "limit", 1, INBOX_LIMIT_MAX, INBOX_LIMIT_MAX)
        after = payloads.inbox_place(query["after"]) if query.get("after") else None
        page = await self._boundary.inbox(participant, after=after, limit=limit)
        return json_response(payloads.inbox_body(page))


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=encode(value), status=status, headers=headers, content_type="application/json")


def _session(name: str, info: rpc.InfoOk) -> _Session:
    return _Session(name, Raw(info.metadata or b"{}"), info.last_seq, info.earliest_seq, info.inserted_at)


def _session_id(request: web.Request) -> SessionId:
    return SessionId(_path_id(request))


def _path_id(request: web.Request) -> str:
    """The id in the path, from the path as it was sent (aiohttp's decoding would let bytes that are no UTF-8 pass)."""
    encoded = request.rel_url.raw_path.split("/")[3]
    try:
        return checked_id(unquote_to_bytes(encoded).decode(), "id")
    except UnicodeDecodeError as error:
        raise Invalid("the id in the path is not percent-encoded UTF-8", field="id") from error


def _key_header(request: web.Request) -> str | None:
    """The header's key; quotes around it (a structured header's string) do not count."""
    keys = request.headers.getall(KEY_HEADER, [])
    if len(keys) > 1:
        raise Invalid(f"{KEY_HEADER} is given twice", reason="repeated_field", field=KEY_HEADER)
    return keys[0].strip().removeprefix('"').removesuffix('"') if keys else None


def _query(request: web.Request, *known: str) -> dict[str, str]:
    fields = principal.query_fields(request.rel_url.raw_query_string)
    for name in fields:
        if name not in known:
            shown = name[:100]
            raise Invalid(f"unknown query field {shown}", reason="unknown_field", field=shown)
    return fields


def _number(query: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise Invalid(f"{name} must be {least} to {most}", field=name, limit=most)
    return int(text)


async def _body(request: web.Request) -> bytes:
    """The body, which must be JSON and arrive in time."""
    if "Content-Encoding" in request.headers:
        raise Invalid("compressed bodies are not taken", reason="content_encoding", field="Content-Encoding")
    if request.body_exists and request.content_type != "application/json":
        raise Invalid("the body must be application/json", reason="content_type", field="Content-Type")
    try:
        async with asyncio.timeout(BODY_S_MAX):
            body = await request.read()
    except TimeoutError as error:
        raise Invalid(
            f"the body did not arrive within {BODY_S_MAX:.0f} s", reason="body_timeout", field="body"
        ) from error
    try:
        # Here, once: what is kept raw further on is skipped, not read, and what looks at it later expects text.
        body.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"the body is not UTF-8: {error.reason}", reason="malformed_json", field="body") from error
    return body
