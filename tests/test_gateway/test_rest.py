"""REST: routes, refusals as problem JSON, ids in paths, the OpenAPI document; over real sockets."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote

import pytest
from yarl import URL

from fleetlm_common.errors import Conflict, FleetError, TryAgain
from fleetlm_common.limits import CLIENT_LIMITS
from fleetlm_gateway import openapi
from tests.support.eventually import eventually
from tests.support.frontrig import DEADLINE_S, EventList, FrontRig, front_rig, on_uvloop

ALICE: dict[str, Any] = {"X-Participant-Id": "alice"}
PROBLEM = "application/problem+json"


async def call(
    rig: FrontRig, method: str, path: str, *, json: object = None, data: bytes | None = None, **headers: Any
) -> tuple[int, Any, dict[str, str]]:
    """Status, decoded body and headers of one request; the path goes out as it is written."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        sent.setdefault("Content-Type", "application/json")
    url = URL(rig.url + path, encoded=True)
    async with rig.http.request(method, url, json=json, data=data, headers=sent) as answer:
        body: Any = await answer.json(content_type=None) if answer.status != 204 else {}
        if answer.status >= 400:
            assert answer.content_type == PROBLEM
            assert {"type", "title", "status", "detail", "code", "reason", "message"} <= set(body)
            assert body["status"] == answer.status
        return answer.status, body, dict(answer.headers)


@on_uvloop
async def test_a_session_from_creation_to_reading() -> None:
    """Create, append, batch, read pages, mark read, list: the answers have the shapes of the contract."""
    async with front_rig() as rig:
        status, made, headers = await call(rig, "POST", "/v1/sessions", json={"id": "a/b %", "metadata": {"t": 1}})
        assert (status, made["session_id"], made["metadata"], made["last_seq"]) == (201, "a/b %", {"t": 1}, 0)
        place = headers["Location"]
        assert place == "/v1/sessions/a%2Fb%20%25"
        assert (await call(rig, "POST", "/v1/sessions", json={"id": "a/b %", "metadata": {"t": 1}}))[0] == 200
        status, problem, _ = await call(rig, "POST", "/v1/sessions", json={"id": "a/b %", "metadata": {"t": 2}})
        assert (status, problem["code"]) == (409, "CONFLICT")
        messages = f"{place}/messages"
        status, ack, _ = await call(rig, "POST", messages, json={"content": "hi"}, **ALICE)
        assert (status, set(ack)) == (201, {"seq", "id", "inserted_at", "deduped"})
        status, acks, _ = await call(
            rig, "POST", messages, json={"messages": [{"content": 1}, {"content": 2}]}, **ALICE
        )
        assert (status, [one["seq"] for one in acks["messages"]]) == (201, [2, 3])
        for query, seqs, more in (
            ("", [1, 2, 3], False),
            ("?after=1&limit=1", [2], True),
            ("?before=3", [1, 2], False),
            ("?tail=1", [3], True),
            ("?tail=2&limit=10", [2, 3], True),
            ("?tail=3&limit=1", [3], True),
        ):
            status, page, _ = await call(rig, "GET", messages + query)
            assert (status, [one["seq"] for one in page["messages"]], page["has_more"]) == (200, seqs, more)
        assert (await call(rig, "PUT", f"{place}/read", json={"seq": 2}, **ALICE))[:2] == (200, {"last_read_seq": 2})
        status, found, _ = await call(rig, "GET", place)
        assert (status, found["last_seq"], found["earliest_seq"]) == (200, 3, 1)
        assert set(found) == {"session_id", "metadata", "last_seq", "earliest_seq", "inserted_at"}
        await call(rig, "POST", "/v1/sessions", json={"id": "zz"})
        assert (await call(rig, "GET", "/v1/sessions?limit=1"))[1]["has_more"] is True
        status, rest, _ = await call(rig, "GET", "/v1/sessions?after=" + quote("a/b %"))
        assert ([one["session_id"] for one in rest["sessions"]], rest["has_more"]) == (["zz"], False)
        status, whole, _ = await call(rig, "GET", "/v1/sessions?limit=2")
        assert ([one["session_id"] for one in whole["sessions"]], whole["has_more"]) == (["a/b %", "zz"], False)


@on_uvloop
async def test_session_without_an_id_gets_one() -> None:
    """The server chooses a UUID when the client does not choose; no body at all is enough."""
    async with front_rig() as rig:
        names = {(await call(rig, "POST", "/v1/sessions"))[1]["session_id"] for _ in range(3)}
        assert len(names) == 3
        assert all(
            re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", name) for name in names
        )


@on_uvloop
async def test_idempotency_key_header() -> None:
    """The header is the key of a single message, with or without quotes; two different keys are refused."""
    async with front_rig() as rig:
        url = "/v1/sessions/s/messages"
        first = (await call(rig, "POST", url, json={"content": 1}, Idempotency_Key="k", **ALICE))[1]
        again = (await call(rig, "POST", url, json={"content": 1}, Idempotency_Key='"k"', **ALICE))[1]
        assert again == {**first, "deduped": True}
        status, problem, _ = await call(rig, "POST", url, json={"content": 2}, Idempotency_Key="k", **ALICE)
        assert (status, problem["code"]) == (409, "IDEMPOTENCY_CONFLICT")
        body = {"content": 1, "idempotency_key": "other"}
        assert (await call(rig, "POST", url, json=body, Idempotency_Key="k", **ALICE))[1]["field"] == "idempotency_key"


@pytest.mark.parametrize("name", ["a/b", "{a}", "50%25", "日本", "?x=1#y", "a b+c", "x" * 128, "\x00", "~"])
@on_uvloop
async def test_ids_are_percent_encoded(name: str) -> None:
    """Any id reaches its session through the path."""
    async with front_rig() as rig:
        path = f"/v1/sessions/{quote(name, safe='')}/messages"
        assert (await call(rig, "POST", path, json={"content": 1}, **ALICE))[0] == 201
        assert rig.boundary.session(name).last == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code", "field"),
    [
        ("GET", "/v1/sessions/%FF", None, {}, 400, "INVALID", "id"),
        ("GET", "/v1/sessions/%ED%A0%80", None, {}, 400, "INVALID", "id"),
        ("GET", "/v1/sessions/" + "x" * 129, None, {}, 400, "INVALID", "id"),
        ("GET", "/v1/sessions/none", None, {}, 404, "NOT_FOUND", "id"),
        ("GET", "/v1/sessions/s?x=1", None, {}, 400, "INVALID", "x"),
        ("GET", "/v1/sessions?participant_id=", None, {}, 400, "INVALID", "participant_id"),
        ("GET", "/v1/sessions?participant_id=a&limit=0", None, {}, 400, "INVALID", "limit"),
        ("GET", "/v1/sessions?limit=0", None, {}, 400, "INVALID", "limit"),
        ("GET", "/v1/sessions?limit=1001", None, {}, 400, "INVALID", "limit"),
        ("GET", "/v1/sessions?limit=1&limit=2", None, {}, 400, "INVALID", "limit"),
        ("GET", "/v1/sessions?after=%FF", None, {}, 400, "INVALID", "query"),
        ("GET", "/v1/sessions/s/messages?after=x", None, {}, 400, "INVALID", "after"),
        ("GET", "/v1/sessions/s/messages?after=-1", None, {}, 400, "INVALID", "after"),
        ("GET", "/v1/sessions/s/messages?after=%D9%A1", None, {}, 400, "INVALID", "after"),
        ("GET", "/v1/sessions/s/messages?after=1&tail=1", None, {}, 400, "INVALID", "tail"),
        ("GET", "/v1/sessions/s/messages?before=0", None, {}, 400, "INVALID", "before"),
        ("GET", "/v1/sessions/s/messages?after=7", None, {}, 400, "INVALID", "after"),
        ("GET", "/v1/participants/alice/inbox", None, {}, 401, "UNAUTHENTICATED", "participant_id"),
        ("GET", "/v1/participants/bob/inbox", None, ALICE, 403, "FORBIDDEN", "id"),
        ("GET", "/v1/participants/alice/inbox?limit=101", None, ALICE, 400, "INVALID", "limit"),
        ("GET", "/v1/participants/alice/inbox?after=x", None, ALICE, 400, "INVALID", "after"),
        ("GET", "/v1/participants/alice/inbox?after=1.", None, ALICE, 400, "INVALID", "after"),
        ("GET", "/v1/participants/alice/inbox?before=1", None, ALICE, 400, "INVALID", "before"),
        ("GET", "/v1/nope", None, {}, 404, "NOT_FOUND", None),
        ("GET", "/v1/sessions/a/b/c", None, {}, 404, "NOT_FOUND", None),
        ("GET", "/socket/longpoll", None, {}, 404, "NOT_FOUND", None),
        ("DELETE", "/v1/sessions", None, {}, 405, "INVALID", "method"),
        ("POST", "/", b"{}", {}, 405, "INVALID", "method"),
        ("POST", "/v1/sessions", b"{", {}, 400, "INVALID", "body"),
        ("POST", "/v1/sessions", b"[]", {}, 400, "INVALID", "payload"),
        ("POST", "/v1/sessions", b'{"id":""}', {}, 400, "INVALID", "id"),
        ("POST", "/v1/sessions", b'{"name":"x"}', {}, 400, "INVALID", "name"),
        ("POST", "/v1/sessions", b'{"metadata":[]}', {}, 400, "INVALID", "metadata"),
        ("POST", "/v1/sessions", b'{"metadata":{"a":"%b"}}' % (b"x" * 8192), {}, 413, "TOO_LARGE", "metadata"),
        ("POST", "/v1/sessions", b"{}", {"Content_Type": "text/plain"}, 415, "INVALID", "Content-Type"),
        ("POST", "/v1/sessions", b"{}", {"Content_Encoding": "gzip"}, 415, "INVALID", "Content-Encoding"),
        ("POST", "/v1/sessions/s/messages", b'{"content":1}', {}, 401, "UNAUTHENTICATED", "participant_id"),
        ("POST", "/v1/sessions/s/messages", b"{}", ALICE, 400, "INVALID", "content"),
        ("POST", "/v1/sessions/s/messages", b'{"content":"\xff", "content":1}', ALICE, 400, "INVALID", "body"),
        ("POST", "/v1/sessions/s/messages", b"", ALICE, 400, "INVALID", "payload"),
        ("POST", "/v1/sessions/s/messages", b" " * 262_145, ALICE, 413, "TOO_LARGE", "body"),
        ("POST", "/v1/sessions/s/messages", b'{"content":"%b"}' % (b"x" * 65_536), ALICE, 413, "TOO_LARGE", "content"),
        (
            "POST",
            "/v1/sessions/s/messages",
            b'{"content":1}',
            {"X_Participant_Id": "%FF"},
            400,
            "INVALID",
            "participant_id",
        ),
        (
            "POST",
            "/v1/sessions/s/messages",
            b'{"content":1}',
            {**ALICE, "X_Participant_Kind": "robot"},
            400,
            "INVALID",
            "participant_kind",
        ),
        ("PUT", "/v1/sessions/s/read", b'{"seq":-1}', ALICE, 400, "INVALID", "seq"),
        ("PUT", "/v1/sessions/s/read", b'{"seq":9}', ALICE, 400, "INVALID", "seq"),
        ("PUT", "/v1/sessions/s/read", b'{"seq":0}', {}, 401, "UNAUTHENTICATED", "participant_id"),
        ("GET", "/v1/sessions", None, {"Origin": "https://evil.example"}, 403, "FORBIDDEN", "origin"),
        ("OPTIONS", "/v1/sessions", None, {"Origin": "https://evil.example"}, 403, "FORBIDDEN", "origin"),
    ],
)
@on_uvloop
async def test_refusals_are_problems(  # noqa: PLR0917 - a table of what goes in and what comes out
    method: str, path: str, body: bytes | None, headers: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    """Every refusal, wrong paths and methods too, is problem JSON with code and field."""
    async with front_rig() as rig:
        found, problem, sent = await call(rig, method, path, data=body, **headers)
        assert (found, problem["code"], problem.get("field")) == (status, code, field)
        if status == 405:
            assert sent["Allow"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (TryAgain("full", reason="overloaded", retry_after_ms=1500), 429, "2"),
        (TryAgain("moving", reason="moving", retry_after_ms=10), 503, "1"),
        (TryAgain("full disk", reason="disk_full"), 503, "1"),
        (Conflict("others wrote", last_seq=4), 409, None),
    ],
)
@on_uvloop
async def test_refusals_of_the_inner_half(error: FleetError, status: int, retry_after: str | None) -> None:
    """TRY_AGAIN is 503, or 429 when overloaded, with Retry-After; the fields of the refusal are there."""
    async with front_rig() as rig:
        rig.boundary.refusal = error
        found, problem, headers = await call(rig, "POST", "/v1/sessions/s/messages", json={"content": 1}, **ALICE)
        assert (found, headers.get("Retry-After")) == (status, retry_after)
        assert (problem["code"], problem["reason"], problem["message"]) == (error.code, error.reason, error.message)
        assert problem.get("last_seq") == error.body().last_seq


@on_uvloop
async def test_participant_header_is_percent_decoded() -> None:
    """Ids that are not ASCII travel percent-encoded in the header."""
    async with front_rig() as rig:
        headers: dict[str, Any] = {"X_Participant_Id": quote("Zoë/1"), "X_Participant_Kind": "system"}
        await call(rig, "POST", "/v1/sessions/s/messages", json={"content": 1}, **headers)
        assert '"sender_id":"Zoë/1","sender_kind":"system"'.encode() in rig.boundary.session("s").messages[0]


@on_uvloop
async def test_pages_of_allowed_origins_may_read_the_answers() -> None:
    """An allowed origin gets CORS headers and its preflight; others and non-browsers get none."""
    async with front_rig(origins="https://app.example") as rig:
        origin: dict[str, Any] = {"Origin": "https://app.example"}
        status, _, headers = await call(rig, "OPTIONS", "/v1/sessions/s/messages", **origin)
        assert (status, headers["Access-Control-Allow-Origin"]) == (204, "https://app.example")
        assert "Idempotency-Key" in headers["Access-Control-Allow-Headers"]
        assert (await call(rig, "GET", "/v1/limits", **origin))[2][
            "Access-Control-Allow-Origin"
        ] == "https://app.example"
        assert "Access-Control-Allow-Origin" not in (await call(rig, "GET", "/v1/limits"))[2]


@on_uvloop
async def test_limits_show_every_limit() -> None:
    """`GET /v1/limits` has the limits of every gateway and this one's own."""
    async with front_rig(topics_per_socket=17) as rig:
        _, limits, _ = await call(rig, "GET", "/v1/limits")
        assert {name: limits[name] for name in CLIENT_LIMITS} == dict(CLIENT_LIMITS)
        assert limits["topics_per_socket_max"] == 17
        assert {"sockets_max", "frames_per_second_max", "frames_burst_max", "heartbeat_timeout_ms"} <= set(limits)


@on_uvloop
async def test_landing_links_to_the_rest() -> None:
    """A person who opens the port finds name, version and where to go on."""
    async with front_rig() as rig:
        _, landing, _ = await call(rig, "GET", "/")
        assert (landing["name"], landing["openapi"]) == ("fleetlm", "/openapi.json")
        for link in (landing["openapi"], landing["limits"]):
            assert (await call(rig, "GET", link))[0] == 200


@on_uvloop
async def test_openapi_has_every_route_and_nothing_else() -> None:
    """The document and the routes name the same operations, and every reference leads somewhere."""
    async with front_rig() as rig:
        _, document, _ = await call(rig, "GET", "/openapi.json")
        assert document == openapi.document(version=document["info"]["version"])
        assert document["openapi"] == "3.1.0"
        app = rig.front.app
        routed = {
            (route.method.lower(), route.resource.canonical)
            for route in app.router.routes()
            if route.resource is not None and route.resource.canonical.startswith("/v1") and route.method != "HEAD"
        }
        described = {(method, path) for path, methods in document["paths"].items() for method in methods}
        assert described == routed
        names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
        assert len(set(names)) == len(names)
        for where in _references(document):
            found: Any = document
            for part in where.removeprefix("#/").split("/"):
                found = found[part]
        for path, methods in document["paths"].items():
            for one in methods.values():
                declared = {parameter["name"] for parameter in one["parameters"] if parameter["in"] == "path"}
                assert declared == set(re.findall(r"{(\w+)}", path))
                assert one["responses"]


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if "$ref" in node else []
        return here + [found for value in node.values() for found in _references(value)]
    return [found for value in node for found in _references(value)] if isinstance(node, list) else []


@on_uvloop
async def test_a_fault_is_still_a_problem() -> None:
    """A bug behind a route answers 500 as a problem: outcome unknown, try again."""
    async with front_rig() as rig:
        rig.boundary.refusal = _Broken("boom")  # type: ignore[assignment]
        status, problem, _ = await call(rig, "GET", "/v1/sessions/s")
        assert (status, problem["code"]) == (500, "TRY_AGAIN")


class _Broken(Exception):
    reason = "bug"


@on_uvloop
async def test_http_connections_are_closed_in_order() -> None:
    """Draining answers what is under way, closes kept-alive connections and takes no new ones."""
    async with front_rig(drain_window_ms=1) as rig:
        rig.boundary.gate.clear()
        under_way = asyncio.create_task(call(rig, "GET", "/v1/sessions/s/messages"))
        await eventually(lambda: rig.boundary.reads_under_way == 1, "the request has arrived")
        rig.front.stop_accepting()
        draining = asyncio.create_task(rig.front.drain())
        await eventually(lambda: rig.value("draining") == 1, "the drain has begun")
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", rig.port)
        rig.boundary.gate.set()
        assert (await under_way)[0] == 200
        await draining


@on_uvloop
async def test_what_clients_send_does_not_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are no HTTP, broken chunks, a client that leaves amid its body: answered or ended, no fault."""
    head = (
        b"POST /v1/sessions/s/messages HTTP/1.1\r\nHost: g\r\nX-Participant-Id: a\r\nContent-Type: application/json\r\n"
    )
    events = EventList()
    async with front_rig(log=events) as rig:
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01",
            b"GET / HTTP/1.1\r\nX-\x00: 1\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"Content-Length: 10\r\n\r\n{",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(garbage)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), DEADLINE_S)
            writer.close()
        async with rig.http.get(f"{rig.url}/v1/limits") as answer:
            assert answer.status == 200
    assert [name for name, level in events.said if level != "debug" and name != "socket_closed"] == []
    assert ("http_malformed", "debug") in events.said
    assert capsys.readouterr().err == ""
