"""An inbox over the socket: the pure channel in virtual time, and the SDK's iterator over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import fleetlm_client
from fleetlm_client import (
    ClientClosed,
    Forbidden,
    Inbox,
    InboxEntry,
    InboxPage,
    InboxUpdate,
    Invalid,
    NotFound,
    NotReachable,
    ProtocolMismatch,
    Settings,
)
from fleetlm_client.inboxchannel import InboxChannel
from tests.support.eventually import eventually
from tests.support.phoenix_model import Fault, ModelSocket
from tests.support.phoenix_server import PhoenixServer, phoenix_server
from tests.test_client.harness import Harness

FAST = Settings(backoff_base_s=0.01, backoff_cap_s=0.05, connect_deadline_s=5)


@pytest.fixture
async def server() -> AsyncGenerator[PhoenixServer]:
    async with phoenix_server() as running:
        yield running


def brief(update: InboxUpdate | None) -> object:
    """A page as its sessions with what is unread, an entry as one of them."""
    if isinstance(update, InboxPage):
        return {entry.session_id: entry.unread for entry in update.sessions}
    return None if update is None else (update.session_id, update.unread)


def taken(harness: Harness, inbox: InboxChannel) -> list[object]:
    """Everything that there is to take, at the pace of one who takes all of it."""
    found: list[object] = []
    while (update := inbox.take()) is not None:
        found.append(brief(update))
        if inbox.behind:
            harness.link.pump(inbox, harness.now_s)
            harness.settle()
    return found


def socket_of(harness: Harness) -> ModelSocket:
    """The one that is open."""
    assert harness.socket is not None
    return harness.socket


def sent(harness: Harness) -> list[str]:
    """Events that the server of the newest connection got for inboxes."""
    return [frame[3] for frame in socket_of(harness).received if frame[2].startswith("inbox:")]


async def following(inbox: Inbox) -> object:
    """The next update."""
    async with asyncio.timeout(10):
        return brief(await anext(inbox))


# --- the channel


def test_a_page_then_what_changes() -> None:
    """A join asks for as many as it was told; what comes later is one session each."""
    harness = Harness()
    harness.model.add("a", [1, 2])
    harness.model.add("b", [1])
    inbox = harness.inbox(limit=1)
    harness.settle()
    assert socket_of(harness).received == [["1", "1", "inbox:alice", "phx_join", {"limit": 1}]]
    page = inbox.take()
    assert isinstance(page, InboxPage)
    assert (brief(page), page.next) == ({"a": 2}, "a")
    harness.model.add("b", [2])
    harness.model.mark_read("a", 2)
    harness.settle()
    assert taken(harness, inbox) == [("b", 2), ("a", 0)]


def test_nothing_stays_unknown_over_a_lost_connection() -> None:
    """What changed while nobody was connected is in the page that the next join brings."""
    harness = Harness()
    harness.model.add("a", [1])
    inbox = harness.inbox()
    harness.settle()
    assert taken(harness, inbox) == [{"a": 1}]
    harness.cut()
    harness.model.add("a", [2])
    harness.model.add("b", [1])
    harness.run(10)
    assert harness.link.connections == 2
    assert taken(harness, inbox) == [{"a": 2, "b": 1}]
    harness.model.add("b", [2])
    harness.settle()
    assert taken(harness, inbox) == [("b", 2)]


def test_a_page_takes_the_place_of_what_is_older() -> None:
    """Changes that nobody took before a page came are in it: told after it they would go back in time."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    harness.model.add("a", [1])
    harness.settle()
    harness.model.add("a", [2])
    socket_of(harness).push_inbox("sessions", harness.model.inbox(limit=100))
    harness.settle()
    assert taken(harness, inbox) == [{"a": 2}]


def test_a_slow_consumer_learns_the_newest_of_each_session() -> None:
    """A session that changed often while nobody took is told once, as it is, in the place of its newest change."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    for number in range(101):
        harness.model.add("ab"[number % 2], [number])
    harness.settle()
    assert taken(harness, inbox) == [{}, ("b", 50), ("a", 51)]


def test_more_changes_than_are_held_cost_a_page() -> None:
    """What was dropped is asked for again by one join, when the rest was taken and not before."""
    harness = Harness(settings=Settings(buffer_messages_max=4, page_messages=2))
    inbox = harness.inbox()
    harness.settle()
    for number in range(10):
        harness.model.add(f"s{number}", [1])
    harness.settle()
    assert sent(harness) == ["phx_join"]
    everything = {f"s{number}": 1 for number in range(10)}
    assert taken(harness, inbox) == [{}, *[(f"s{number}", 1) for number in range(4)], everything]
    assert sent(harness) == ["phx_join", "phx_join"]
    harness.model.add("s9", [2])
    harness.settle()
    assert taken(harness, inbox) == [("s9", 2)]


def test_what_ended_at_the_server_is_joined_again() -> None:
    """`phx_error` of this join is followed by a new one, that of an elder join by nothing."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    socket_of(harness).emit("0", None, "inbox:alice", "phx_close", {})
    harness.run(1)
    assert sent(harness) == ["phx_join"]
    socket_of(harness).push_inbox("phx_error", {})
    harness.run(1)
    assert sent(harness) == ["phx_join", "phx_join"]
    assert taken(harness, inbox) == [{}]


def test_draining_takes_an_inbox_to_another_gateway() -> None:
    """Within the time that the gateway gives, and the next join brings a page."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    assert taken(harness, inbox) == [{}]
    socket_of(harness).push_inbox("draining", {"retry_after_ms": 8_000})
    harness.run(8.1)
    assert harness.link.connections == 2
    assert taken(harness, inbox) == [{}]


def test_an_archive_that_is_away_is_waited_for() -> None:
    """TRY_AGAIN is tried again, not before the time told."""
    faults: list[Fault] = ["try_again"] * 3
    harness = Harness(fault=lambda event: faults.pop() if faults else "none")
    inbox = harness.inbox()
    harness.settle()
    harness.advance(0.049)
    harness.settle()
    assert sent(harness) == ["phx_join"]
    harness.run(10)
    assert taken(harness, inbox) == [{}]


def test_leaving_says_so() -> None:
    """Joined or about to be: the server is told, nothing is taken afterwards, and the inbox can be joined anew."""
    harness = Harness()
    for answered in (True, False):
        inbox = harness.inbox()
        harness.connect()
        harness.to_server()
        if answered:
            harness.to_client()
        harness.link.remove(inbox, harness.now_s)
        harness.settle()
        assert inbox.state == "left"
        assert socket_of(harness).inbox_ref is None
    assert sent(harness) == ["phx_join", "phx_leave"] * 2
    again = harness.inbox()
    harness.settle()
    assert taken(harness, again) == [{}]


@pytest.mark.parametrize(
    ("event", "payload"),
    [("sessions", {"sessions": 1}), ("session", {"session_id": "a"}), ("sessions", {"sessions": [{}]})],
)
def test_a_push_that_cannot_be_read_begins_anew(event: str, payload: dict[str, Any]) -> None:
    """On a new connection, whose page has what was in it; one that is brought again and again is said."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    socket_of(harness).push_inbox(event, payload)
    harness.model.add("a", [1])
    harness.run(1)
    assert harness.link.connections == 2
    assert taken(harness, inbox) == [{"a": 1}]
    for _ in range(2):
        socket_of(harness).push_inbox(event, payload)
        harness.run(1)
    assert isinstance(inbox.error, ProtocolMismatch)


def test_an_event_of_a_newer_server_is_let_pass() -> None:
    """It ends nothing, and what follows is told."""
    harness = Harness()
    inbox = harness.inbox()
    harness.settle()
    socket_of(harness).push_inbox("typing", {"who": 1})
    harness.model.add("a", [1])
    harness.run(1)
    assert taken(harness, inbox) == [{}, ("a", 1)]
    assert harness.link.connections == 1


# --- the iterator


async def test_an_inbox_is_followed_through_a_cut(server: PhoenixServer) -> None:
    """A page, changes, a page after the connection was made anew; sessions on the same socket go on."""
    async with (
        fleetlm_client.connect(server.url, participant_id="alice", settings=FAST) as client,
        client.inbox() as inbox,
        client.join("a", cursor=0) as session,
    ):
        assert await following(inbox) == {}
        await session.append(1)
        entry = await anext(inbox)
        assert isinstance(entry, InboxEntry)
        assert (entry.session_id, entry.last_seq, entry.last_read_seq, entry.unread) == ("a", 1, 0, 1)
        server.model.add("b", [1])  # and nobody is told of it
        await server.cut()
        assert await following(inbox) == {"a": 1, "b": 1}
        await session.append(2)
        assert await following(inbox) == ("a", 2)
        assert client.connections == 2


async def test_an_inbox_of_somebody_else_is_refused(server: PhoenixServer) -> None:
    """FORBIDDEN and INVALID name the field, a ring without an archive is NOT_FOUND; the client lives on."""
    async with fleetlm_client.connect(server.url, participant_id="alice", settings=FAST) as client:
        with pytest.raises(Forbidden) as other:
            async with client.inbox("bob"):
                pass
        assert other.value.field == "topic"
        with pytest.raises(Invalid) as large:
            async with client.inbox(limit=101):
                pass
        assert large.value.field == "limit"
        server.model.archived = False
        with pytest.raises(NotFound) as missing:
            async with client.inbox():
                pass
        assert missing.value.reason == "no_archive"
        server.model.archived = True
        async with client.inbox("alice") as inbox:
            assert await following(inbox) == {}


async def test_a_refusal_after_a_reconnect_ends_the_iteration(server: PhoenixServer) -> None:
    """What was joined and may not be joined again raises why, each time."""
    async with (
        fleetlm_client.connect(server.url, participant_id="alice", settings=FAST) as client,
        client.inbox() as inbox,
    ):
        assert await following(inbox) == {}
        server.model.archived = False
        await server.cut()
        for _ in range(2):
            with pytest.raises(NotFound):
                await following(inbox)


async def test_what_cannot_be_asked_is_refused_before_it_is(server: PhoenixServer) -> None:
    """The error names the argument."""
    async with fleetlm_client.connect(server.url, participant_id="alice", settings=FAST) as client:
        with pytest.raises(Invalid) as nobody:
            client.inbox("")
        assert nobody.value.field == "participant_id"
        with pytest.raises(Invalid) as none:
            client.inbox(limit=0)
        assert none.value.field == "limit"
        with pytest.raises(ClientClosed, match="the inbox is not open"):
            await anext(client.inbox())


async def test_an_inbox_that_is_not_granted_in_time_says_why(server: PhoenixServer) -> None:
    """The server's own words, not those about the connection, which stands."""
    server.fault = lambda event: "try_again" if event == "phx_join" else "none"
    settings = Settings(backoff_base_s=0.01, connect_deadline_s=0.3)
    async with fleetlm_client.connect(server.url, participant_id="alice", settings=settings) as client:
        with pytest.raises(NotReachable, match="not joined in time: not now"):
            async with client.inbox():
                pass


async def test_leaving_ends_the_iteration(server: PhoenixServer) -> None:
    """Who waits for an update is let go, the server is told, and the inbox can be entered again."""
    async with fleetlm_client.connect(server.url, participant_id="alice", settings=FAST) as client:
        async with client.inbox() as inbox:
            assert await following(inbox) == {}
            waiting = asyncio.ensure_future(anext(inbox, None))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="twice"):
                await anext(inbox)
            with pytest.raises(ValueError, match="joined on this client already"):
                await client.inbox().__aenter__()
        async with asyncio.timeout(10):
            assert await waiting is None
        (socket,) = server.sockets.values()
        await eventually(lambda: socket.inbox_ref is None, "the server is told")
        async with client.inbox() as again:
            assert await following(again) == {}
            last = asyncio.ensure_future(anext(again, None))
            await asyncio.sleep(0)
            await client.aclose()
            async with asyncio.timeout(10):
                assert await last is None
