"""The SDK over real sockets, against a model of a gateway on the loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator

import pytest

import fleetlm_client
from fleetlm_client import (
    CaughtUp,
    ClientClosed,
    ConnectionRefused,
    Event,
    Forbidden,
    Invalid,
    Message,
    NewMessage,
    NotReachable,
    NotSent,
    OutcomeUnknown,
    Reconnected,
    Session,
    Settings,
    TooLarge,
    TryAgain,
)
from fleetlm_client.address import parse
from tests.support.eventually import eventually
from tests.support.phoenix_server import PhoenixServer, phoenix_server

FAST = Settings(backoff_base_s=0.01, backoff_cap_s=0.05, connect_deadline_s=5)


@pytest.fixture
async def server() -> AsyncGenerator[PhoenixServer]:
    async with phoenix_server() as running:
        yield running


async def until(session: Session, seq: int) -> list[Event]:
    """Read events up to a message."""
    events: list[Event] = []
    async with asyncio.timeout(10):
        async for event in session:
            events.append(event)
            if isinstance(event, Message) and event.seq >= seq:
                break
    return events


async def test_a_first_conversation(server: PhoenixServer) -> None:
    """The example of the guide: connect, join, append, receive; who speaks stands in the URL."""
    async with (
        fleetlm_client.connect(server.url, participant_id="ali ce/ü", participant_kind="agent") as client,
        client.join("s1", cursor=0) as session,
    ):
        ack = await session.append({"text": "hi"}, kind="chat", metadata={"n": 1})
        events = await until(session, 1)
        assert ack.seq == 1
        assert session.cursor == 1
        assert session.joined.last_seq == 0
    assert isinstance(events[0], CaughtUp)
    message = events[1]
    assert isinstance(message, Message)
    assert (message.content, message.kind, message.metadata) == ({"text": "hi"}, "chat", {"n": 1})
    assert server.queries[0] == {"vsn": "2.0.0", "participant_id": "ali ce/ü", "participant_kind": "agent"}


async def test_appends_of_many_tasks_keep_call_order(server: PhoenixServer) -> None:
    """A thousand concurrent calls land in the order in which they were made, through a cut in the middle."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s") as session,
    ):
        tasks = [asyncio.create_task(session.append(number)) for number in range(1_000)]
        await tasks[10]
        await server.cut()
        acks = await asyncio.gather(*tasks)
        assert [ack.seq for ack in acks] == list(range(1, 1_001))
        assert [message["content"] for message in server.model.log("s").messages] == list(range(1_000))
        assert client.connections == 2


async def test_append_waits_for_room_in_order(server: PhoenixServer) -> None:
    """A full outbox makes callers wait in turn; `submit` refuses instead."""
    settings = Settings(outbox_messages_max=5, backoff_base_s=0.01)
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=settings) as client,
        client.join("s") as session,
    ):
        tasks = [asyncio.create_task(session.append(number)) for number in range(100)]
        await asyncio.sleep(0)
        with pytest.raises(TryAgain):
            session.submit("one more")
        await asyncio.gather(*tasks)
        assert [message["content"] for message in server.model.log("s").messages] == list(range(100))
        assert (await session.submit("later")).seq == 101


async def test_nobody_overtakes_those_who_wait_for_room(server: PhoenixServer) -> None:
    """A caller that comes when room has just become free goes behind those that were waiting for it."""
    settings = Settings(outbox_messages_max=1, backoff_base_s=0.01)
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=settings) as client,
        client.join("s", cursor=0) as session,
    ):
        assert isinstance(await anext(session), CaughtUp)

        async def first_then_new() -> None:
            await session.append("first")
            await session.append("new")

        await asyncio.gather(first_then_new(), *(session.append(number) for number in range(5)))
        assert [m["content"] for m in server.model.log("s").messages] == ["first", 0, 1, 2, 3, 4, "new"]


async def test_reading_resumes_by_itself(server: PhoenixServer) -> None:
    """A cut connection costs a `Reconnected` event, no message, and none comes twice."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s", cursor=0) as session,
    ):
        await server.add("s", ["a", "b"])
        events = await until(session, 2)
        await server.cut()
        server.model.add("s", ["c"])
        events += await until(session, 3)
        assert [event.seq for event in events if isinstance(event, Message)] == [1, 2, 3]
        assert any(isinstance(event, Reconnected) for event in events)
        assert session.cursor == 3


async def test_a_frozen_server_is_left(server: PhoenixServer) -> None:
    """A server that answers nothing (SIGSTOP) is given up by heartbeat and the append lands on the next connection."""
    settings = Settings(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.1, reply_timeout_s=0.3, backoff_base_s=0.01)
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=settings) as client,
        client.join("s") as session,
    ):
        server.frozen = True
        task = asyncio.create_task(session.append("x"))
        await eventually(lambda: client.connections >= 2, "the client leaves")
        server.frozen = False
        async with asyncio.timeout(10):
            assert (await task).seq == 1


async def test_deadlines_raise(server: PhoenixServer) -> None:
    """Sent and not answered: `OutcomeUnknown` with the key that was given. Waiting behind it: `NotSent`."""
    server.fault = lambda event: "silence" if event == "append" else "none"
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s") as session,
    ):
        first = asyncio.create_task(session.append("x", idempotency_key="mine", timeout_s=0.2))
        second = asyncio.create_task(session.append("y", timeout_s=0.1))
        with pytest.raises(NotSent):
            await second
        with pytest.raises(OutcomeUnknown) as caught:
            await first
        assert caught.value.keys == ("mine",)


async def test_closing_answers_what_waits(server: PhoenixServer) -> None:
    """Leaving the client ends waiting appends and iterations; nothing hangs."""
    server.fault = lambda event: "silence" if event == "append" else "none"
    async with fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client:
        session = await client.join("s", cursor=0).__aenter__()
        append = asyncio.create_task(session.append("x"))
        reading = asyncio.create_task(until(session, 1))
        await eventually(lambda: session.unacknowledged == 1, "the append is submitted")
    with pytest.raises((OutcomeUnknown, NotSent)):
        await append
    assert [type(event) for event in await reading] == [CaughtUp]
    with pytest.raises(ClientClosed):
        _ = client.rest


async def test_refusals_at_the_door(server: PhoenixServer) -> None:
    """403 raises `Forbidden` at once; 503 is retried until the deadline; nothing there is `NotReachable`."""
    server.refuse_status = 403
    with pytest.raises(Forbidden):
        async with fleetlm_client.connect(server.url, participant_id="a"):
            pass
    server.refuse_status = 503
    settings = Settings(connect_deadline_s=0.3, backoff_base_s=0.01)
    with pytest.raises(NotReachable, match="503"):
        async with fleetlm_client.connect(server.url, participant_id="a", settings=settings):
            pass
    assert len(server.queries) > 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(NotReachable, match="cannot be reached"):
        async with fleetlm_client.connect(url, participant_id="a", settings=settings):
            pass


async def test_a_final_close_code_raises_in_the_reader(server: PhoenixServer) -> None:
    """4500–4999: iterating raises `ConnectionRefused`, and so does every later append."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s", cursor=0) as session,
    ):
        await server.cut(code=4503, reason=b"banned")
        with pytest.raises(ConnectionRefused, match="banned"):
            await until(session, 1)
        with pytest.raises(ConnectionRefused):
            await session.append("x")
        assert server.opened == 1


async def test_a_join_that_is_refused_raises(server: PhoenixServer) -> None:
    """`cursor_ahead` reaches the caller of `join` with the true `last_seq`."""
    server.model.add("s", ["a"])
    async with fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client:
        with pytest.raises(Invalid) as caught:
            async with client.join("s", cursor=5):
                pass
        assert (caught.value.reason, caught.value.last_seq) == ("cursor_ahead", 1)


async def test_a_slow_reader_gets_everything(server: PhoenixServer) -> None:
    """More than the buffer holds is pushed while nobody reads; it all comes, in order, and appends still work."""
    settings = Settings(buffer_messages_max=50, page_messages=20, backoff_base_s=0.01)
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=settings) as client,
        client.join("s", cursor=0) as session,
    ):
        for block in range(20):
            await server.add("s", [f"{block}.{at}" for at in range(50)])
        assert (await session.append("mine")).seq == 1_001
        events = await until(session, 1_001)
        assert [event.seq for event in events if isinstance(event, Message)] == list(range(1, 1_002))


async def test_pages_batches_and_read_cursors(server: PhoenixServer) -> None:
    """The rest of a session's requests."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s", cursor=0) as session,
    ):
        acks = await session.append_batch([NewMessage(content="a"), NewMessage(content="b", idempotency_key="k")])
        assert [ack.seq for ack in acks] == [1, 2]
        page = await session.replay(after=0, limit=1)
        assert ([message.content for message in page.messages], page.has_more) == (["a"], True)
        assert await session.mark_read(2) == 2


async def test_what_cannot_be_sent_is_refused_before_it_is(server: PhoenixServer) -> None:
    """Limits and JSON are checked here, with the field named: an append can never end the socket."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s") as session,
    ):
        with pytest.raises(TooLarge) as large:
            await session.append("x" * 70_000)
        assert large.value.field == "content"
        with pytest.raises(Invalid) as bad:
            await session.append(object())
        assert bad.value.field == "content"
        with pytest.raises(Invalid) as key:
            await session.append("x", idempotency_key="k" * 129)
        assert key.value.field == "idempotency_key"
        with pytest.raises(TooLarge) as batch:
            await session.append_batch([NewMessage(content=1)] * 101)
        assert batch.value.field == "messages"
        with pytest.raises(Invalid):
            client.join("")
        with pytest.raises(Invalid):
            client.join("s2", cursor=-1)
        assert server.model.log("s").frames == 0


async def test_two_iterations_at_once_are_a_mistake(server: PhoenixServer) -> None:
    """Events would be split between them: said at once."""
    async with (
        fleetlm_client.connect(server.url, participant_id="a", settings=FAST) as client,
        client.join("s", cursor=0) as session,
    ):
        await anext(session)
        first = asyncio.ensure_future(anext(session))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="twice"):
            await anext(session)
        await server.add("s", ["x"])
        assert isinstance(await first, Message)


@pytest.mark.parametrize(
    "url",
    [
        "http://h:4000",
        "ws://h:4000/",
        "h:4000",
        "ws://h:4000/socket/websocket?vsn=2.0.0",
        "http://h:4000/socket",
        "http://h:4000/v1/",
    ],
)
def test_addresses_in_any_form(url: str) -> None:
    """What people paste means the same place."""
    assert parse(url).base == "http://h:4000"
    assert parse(url).websocket == "ws://h:4000/socket/websocket"


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h:99999", "http://h:x"])
def test_bad_addresses_are_named(url: str) -> None:
    """The error says which field, and shows a good one."""
    with pytest.raises(Invalid) as caught:
        parse(url)
    assert caught.value.field == "url"


def test_tls_addresses() -> None:
    """Https stays https, and becomes wss for the socket; a path in front is kept."""
    address = parse("https://chat.example.com/fleet/")
    assert address.websocket == "wss://chat.example.com/fleet/socket/websocket"
