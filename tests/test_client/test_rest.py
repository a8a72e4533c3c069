"""REST helper: typed errors, retries with the same key, pages."""

from __future__ import annotations

import pytest

from fleetlm_client import (
    Conflict,
    NewMessage,
    NotFound,
    NotReachable,
    OutcomeUnknown,
    Rejected,
    Settings,
    TryAgain,
    connect_rest,
)
from tests.support.phoenix_server import phoenix_server

FAST = Settings(backoff_base_s=0.01, append_deadline_s=0.5, call_deadline_s=0.5)
BUSY = {"code": "TRY_AGAIN", "reason": "overloaded", "detail": "later", "retry_after_ms": 1}


async def test_try_again_is_retried_with_the_same_key() -> None:
    """Two refusals and one proxy's 502 later there is one message."""
    async with phoenix_server() as server, connect_rest(server.url, participant_id="ä b", settings=FAST) as rest:
        server.rest.failures = [(429, BUSY), (503, BUSY), (502, {})]
        ack = await rest.append("s/1", NewMessage(content="x"))
        assert ack.seq == 1
        assert server.model.log("s/1").last_seq == 1
        assert server.rest.headers[0]["X-Participant-Id"] == "%C3%A4%20b"


async def test_an_append_that_is_never_answered_is_unknown() -> None:
    """The deadline ends it with the key; a page ends with the last refusal."""
    async with phoenix_server() as server, connect_rest(server.url, participant_id="a", settings=FAST) as rest:
        server.rest.failures = [(503, BUSY)] * 1_000
        with pytest.raises(OutcomeUnknown) as caught:
            await rest.append("s", NewMessage(content="x", idempotency_key="mine"))
        assert caught.value.key == "mine"
        with pytest.raises(TryAgain):
            await rest.messages("s", after=0)


async def test_refusals_are_typed() -> None:
    """404 and 409 are what they are over the socket; a proxy's own 418 is a `Rejected`."""
    async with phoenix_server() as server, connect_rest(server.url, participant_id="a", settings=FAST) as rest:
        with pytest.raises(NotFound) as missing:
            await rest.session("nobody")
        assert missing.value.field == "id"
        await rest.append("s", NewMessage(content="x"))
        with pytest.raises(Conflict) as conflict:
            await rest.append("s", NewMessage(content="y"), expected_seq=0)
        assert conflict.value.last_seq == 1
        server.rest.failures = [(418, {})]
        with pytest.raises(Rejected, match="418"):
            await rest.session("s")


async def test_all_sessions_are_listed_page_by_page() -> None:
    """More than one page, in order, each once."""
    async with phoenix_server() as server, connect_rest(server.url, participant_id="a", settings=FAST) as rest:
        names = [f"s{at:04}" for at in range(1_201)]
        for name in names:
            server.model.add(name, ["x"])
        assert [session.session_id async for session in rest.all_sessions()] == names


async def test_nothing_there_is_not_reachable() -> None:
    """Said with the address."""
    async with connect_rest("http://127.0.0.1:1", participant_id="a", settings=FAST) as rest:
        with pytest.raises(NotReachable, match=r"127\.0\.0\.1:1"):
            await rest.session("s")


async def test_an_inbox_is_listed_page_by_page() -> None:
    """`next` of each page asks for the one after it; the participant's id is percent-encoded."""
    async with phoenix_server() as server, connect_rest(server.url, participant_id="ä b", settings=FAST) as rest:
        for name in ("a", "b", "c", "d", "e"):
            await rest.append(name, NewMessage(content="x"))
        assert [(entry.session_id, entry.unread) async for entry in rest.inbox()] == [(name, 1) for name in "abcde"]
        page = await rest.inbox_page(after="b", limit=1)
        assert ([entry.session_id for entry in page.sessions], page.next) == (["c"], "c")
