"""The OpenAPI document (3.1) of the REST interface, as data.

Promise: every route is in it with its fields, limits and refusals (a test compares it with what is routed).
Must not be done here: serving it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fleetlm_common.limits import (
    BATCH_MESSAGES_MAX,
    ID_BYTES_MAX,
    INBOX_LIMIT_MAX,
    KIND_BYTES_MAX,
    REPLAY_LIMIT_DEFAULT,
    REPLAY_LIMIT_MAX,
    SEQ_MAX,
    UNREAD_MAX,
)

Json = dict[str, Any]

_CODES: Final = [
    "TRY_AGAIN",
    "INVALID",
    "TOO_LARGE",
    "UNAUTHENTICATED",
    "FORBIDDEN",
    "NOT_FOUND",
    "CONFLICT",
    "IDEMPOTENCY_CONFLICT",
]
_ID: Final[Json] = {
    "type": "string",
    "minLength": 1,
    "maxLength": ID_BYTES_MAX,
    "description": "1 to 128 bytes of UTF-8",
}
_SEQ: Final[Json] = {"type": "integer", "minimum": 0, "maximum": SEQ_MAX}
_TIME: Final[Json] = {"type": "string", "format": "date-time"}


def _object(required: tuple[str, ...], **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _list_of(item: Json) -> Json:
    return {"type": "array", "items": item}


_DRAFT: Final[Json] = {
    "content": {"description": "any JSON, at most 64 KiB encoded and 64 levels deep"},
    "kind": {"type": ["string", "null"], "maxLength": KIND_BYTES_MAX, "default": "message"},
    "metadata": {"type": ["object", "null"], "description": "at most 8 KiB encoded"},
    "idempotency_key": {**_ID, "type": ["string", "null"]},
}
_MESSAGE_FIELDS: Final = (
    "id",
    "session_id",
    "seq",
    "sender_id",
    "sender_kind",
    "kind",
    "content",
    "metadata",
    "inserted_at",
)
_SCHEMAS: Final[Json] = {
    "Message": _object(
        _MESSAGE_FIELDS,
        id={"type": "string", "format": "uuid"},
        session_id=_ID,
        seq=_SEQ,
        sender_id=_ID,
        sender_kind={"enum": ["human", "agent", "system"]},
        kind={"type": "string"},
        content={},
        metadata={"type": ["object", "null"]},
        inserted_at=_TIME,
    ),
    "Ack": _object(
        ("seq", "id", "inserted_at", "deduped"),
        seq=_SEQ,
        id={"type": "string", "format": "uuid"},
        inserted_at=_TIME,
        deduped={"type": "boolean"},
    ),
    "Acks": _object(("messages",), messages=_list_of(_ref("Ack"))),
    "Draft": {**_object(("content",), **_DRAFT), "additionalProperties": False},
    "Append": {**_object(("content",), **_DRAFT, expected_seq=_SEQ), "additionalProperties": False},
    "AppendBatch": {
        **_object(
            ("messages",),
            messages={**_list_of(_ref("Draft")), "minItems": 1, "maxItems": BATCH_MESSAGES_MAX},
            expected_seq=_SEQ,
        ),
        "additionalProperties": False,
    },
    "Gap": _object(
        ("reason", "from_seq", "next_seq", "earliest_seq", "last_seq"),
        reason={"type": "string"},
        from_seq=_SEQ,
        next_seq=_SEQ,
        earliest_seq=_SEQ,
        last_seq=_SEQ,
    ),
    "Page": _object(
        ("messages", "has_more"), messages=_list_of(_ref("Message")), has_more={"type": "boolean"}, gap=_ref("Gap")
    ),
    "Session": _object(
        ("session_id", "metadata", "last_seq", "earliest_seq", "inserted_at"),
        session_id=_ID,
        metadata={"type": "object"},
        last_seq=_SEQ,
        earliest_seq=_SEQ,
        inserted_at={"type": "string"},
    ),
    "Sessions": _object(("sessions", "has_more"), sessions=_list_of(_ref("Session")), has_more={"type": "boolean"}),
    "InboxEntry": _object(
        (
            "session_id",
            "last_seq",
            "last_read_seq",
            "unread",
            "unread_more",
            "active_at",
            "inserted_at",
            "metadata",
        ),
        session_id=_ID,
        last_seq=_SEQ,
        last_read_seq=_SEQ,
        unread={"type": "integer", "minimum": 0, "maximum": UNREAD_MAX},
        unread_more={"type": "boolean"},
        active_at=_TIME,
        inserted_at=_TIME,
        metadata={"type": "object"},
    ),
    "Inbox": _object(("sessions", "next"), sessions=_list_of(_ref("InboxEntry")), next={"type": ["string", "null"]}),
    "CreateSession": {
        **_object((), id={**_ID, "type": ["string", "null"]}, metadata={"type": ["object", "null"]}),
        "additionalProperties": False,
    },
    "MarkRead": {**_object(("seq",), seq=_SEQ), "additionalProperties": False},
    "ReadCursor": _object(("last_read_seq",), last_read_seq=_SEQ),
    "Limits": {"type": "object", "additionalProperties": {"type": "integer"}},
    "Problem": _object(
        ("type", "title", "status", "detail", "code", "reason", "message"),
        type={"type": "string", "format": "uri"},
        title={"type": "string"},
        status={"type": "integer"},
        detail={"type": "string"},
        code={"enum": _CODES},
        reason={"type": "string"},
        message={"type": "string"},
        retry_after_ms={"type": "integer"},
        field={"type": "string"},
        limit={"type": "integer"},
        last_seq=_SEQ,
    ),
}


def _parameter(name: str, where: str, schema: Json, text: str, *, required: bool = False) -> Json:
    return {"name": name, "in": where, "required": required, "schema": schema, "description": text}


_IN_PATH: Final = _parameter("id", "path", _ID, "percent-encoded", required=True)
_LIMIT: Final = _parameter(
    "limit",
    "query",
    {"type": "integer", "minimum": 1, "maximum": REPLAY_LIMIT_MAX, "default": REPLAY_LIMIT_DEFAULT},
    "how many at the most",
)
_SPEAKER: Final = (
    _parameter("X-Participant-Id", "header", _ID, "who speaks; percent-encoded where not ASCII", required=True),
    _parameter("X-Participant-Kind", "header", {"enum": ["human", "agent", "system"], "default": "human"}, "its kind"),
)


def _operation(
    name: str,
    summary: str,
    answers: Mapping[int, str],
    *,
    parameters: tuple[Json, ...] = (),
    body: Json | None = None,
    refusals: tuple[int, ...] = (400, 403, 429, 503),
) -> Json:
    responses: Json = {
        str(status): {"description": "done", "content": {"application/json": {"schema": _ref(schema)}}}
        for status, schema in answers.items()
    }
    for status in refusals:
        responses[str(status)] = {"$ref": f"#/components/responses/Problem{status}"}
    found: Json = {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


_REFUSALS: Final = {
    400: "INVALID: mend the request, `field` names what",
    401: "UNAUTHENTICATED: say who you are",
    403: "FORBIDDEN: a page of this origin may not",
    404: "NOT_FOUND",
    408: "INVALID body_timeout: the body did not arrive in time",
    409: "CONFLICT (with last_seq) or IDEMPOTENCY_CONFLICT",
    413: "TOO_LARGE: `field` and `limit` say what and how far",
    415: "INVALID: not application/json, or compressed",
    429: "TRY_AGAIN overloaded, with Retry-After",
    503: "TRY_AGAIN, with Retry-After; an append may have been done, retry with the same key",
}
_RETRY_AFTER: Final[Json] = {
    "Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "seconds"}
}
_HEADERS: Final[dict[int, Json]] = {429: _RETRY_AFTER, 503: _RETRY_AFTER}
_WRITE_REFUSALS: Final = (400, 401, 403, 408, 409, 413, 415, 429, 503)


_LIST: Final = _operation(
    "listSessions",
    "Sessions by the bytes of their ids",
    {200: "Sessions"},
    parameters=(
        _parameter("after", "query", _ID, "the last id of the page before"),
        _LIMIT,
        _parameter("participant_id", "query", _ID, "those that it wrote to or marked read (archive)"),
    ),
    refusals=(400, 403, 404, 429, 503),
)
_INBOX: Final = _operation(
    "inbox",
    "The participant's sessions with unread counts, newest activity first",
    {200: "Inbox"},
    parameters=(
        _IN_PATH,
        *_SPEAKER,
        _parameter("after", "query", {"type": "string"}, "`next` of the page before"),
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": INBOX_LIMIT_MAX}, ""),
    ),
    refusals=(400, 401, 403, 404, 429, 503),
)


def _paths() -> Json:
    messages = {
        "get": _operation(
            "readMessages",
            "A page of messages, ascending; at most one of after, before and tail (default: after=0)",
            {200: "Page"},
            parameters=(
                _IN_PATH,
                _parameter("after", "query", _SEQ, "messages after this seq"),
                _parameter("before", "query", {**_SEQ, "minimum": 1}, "the last messages before this seq"),
                _parameter(
                    "tail", "query", {"type": "integer", "minimum": 1, "maximum": REPLAY_LIMIT_MAX}, "the last n"
                ),
                _LIMIT,
            ),
        ),
        "post": _operation(
            "append",
            "Append a message, or a batch: all or nothing",
            {201: ""},
            parameters=(_IN_PATH, *_SPEAKER, _parameter("Idempotency-Key", "header", _ID, "key of a single message")),
            body={"oneOf": [_ref("Append"), _ref("AppendBatch")]},
            refusals=_WRITE_REFUSALS,
        ),
    }
    answer: Json = {"oneOf": [_ref("Ack"), _ref("Acks")]}
    messages["post"]["responses"]["201"]["content"]["application/json"]["schema"] = answer
    return {
        "/v1/limits": {"get": _operation("limits", "Every limit with its name", {200: "Limits"}, refusals=(403, 503))},
        "/v1/sessions": {
            "get": _LIST,
            "post": _operation(
                "createSession",
                "Make a session (200: it existed with the same metadata)",
                {201: "Session", 200: "Session"},
                body=_ref("CreateSession"),
                refusals=tuple(status for status in _WRITE_REFUSALS if status != 401),
            ),
        },
        "/v1/sessions/{id}": {
            "get": _operation(
                "session",
                "A session as it is",
                {200: "Session"},
                parameters=(_IN_PATH,),
                refusals=(400, 403, 404, 429, 503),
            )
        },
        "/v1/sessions/{id}/messages": messages,
        "/v1/sessions/{id}/read": {
            "put": _operation(
                "markRead",
                "Set the participant's read cursor; it never goes back",
                {200: "ReadCursor"},
                parameters=(_IN_PATH, *_SPEAKER),
                body=_ref("MarkRead"),
                refusals=_WRITE_REFUSALS,
            )
        },
        "/v1/participants/{id}/inbox": {"get": _INBOX},
    }


def document(*, version: str) -> Json:
    """The document.

    Args:
        version: of this build.
    """
    problem: Json = {"application/problem+json": {"schema": _ref("Problem")}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FleetLM",
            "version": version,
            "description": "Durable, ordered, resumable sessions. Live delivery: the WebSocket, docs/protocol.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _SCHEMAS,
            "responses": {
                f"Problem{status}": {"description": text, "content": problem, "headers": _HEADERS.get(status, {})}
                for status, text in _REFUSALS.items()
            },
        },
    }
