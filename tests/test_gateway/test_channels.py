"""What clients lean on: joins, refs, order, pushes; over real sockets."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from fleetlm_common.errors import FleetError, Invalid, TryAgain
from tests.support.eventually import eventually
from tests.support.frontrig import Closed, FrontRig, PhxClient, front_rig, on_uvloop


async def fill(rig: FrontRig, session: str, count: int) -> None:
    """Append `count` messages by REST."""
    for at in range(0, count, 100):
        body = {"messages": [{"content": at + one} for one in range(min(100, count - at))]}
        url = f"{rig.url}/v1/sessions/{session}/messages"
        async with rig.http.post(url, json=body, headers={"X-Participant-Id": "filler"}) as answer:
            assert answer.status == 201, await answer.text()


async def until_caught_up(client: PhxClient) -> tuple[list[int], list[str]]:
    """Seqs of what is pushed, and the events, until `caught_up`."""
    seqs: list[int] = []
    events: list[str] = []
    while True:
        frame = await client.next()
        events.append(frame[3])
        if frame[3] == "messages":
            seqs += [message["seq"] for message in frame[4]["messages"]]
        if frame[3] == "caught_up":
            assert frame[4] == {"seq": seqs[-1] if seqs else frame[4]["seq"]}
            return seqs, events


@on_uvloop
async def test_join_replays_from_the_cursor_then_says_caught_up_once() -> None:
    """Reply, then the messages after the cursor, contiguous, then caught_up once, then live ones."""
    async with front_rig() as rig:
        await fill(rig, "s", 250)
        client = await rig.connect()
        client.push("1", "1", "session:s", "phx_join", {"cursor": 20})
        reply = await client.next()
        assert reply == [
            "1",
            "1",
            "session:s",
            "phx_reply",
            {"status": "ok", "response": {"session_id": "s", "epoch": 7, "last_seq": 250, "earliest_seq": 1}},
        ]
        seqs, events = await until_caught_up(client)
        assert seqs == list(range(21, 251))
        assert set(events[:-1]) == {"messages"}
        await fill(rig, "s", 1)
        live = await client.next()
        assert live[:4] == ["1", None, "session:s", "messages"]
        assert [message["seq"] for message in live[4]["messages"]] == [251]
        assert list(live[4]["messages"][0]) == [
            "id",
            "session_id",
            "seq",
            "sender_id",
            "sender_kind",
            "kind",
            "content",
            "metadata",
            "inserted_at",
        ]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [({"tail": 3}, [8, 9, 10]), ({"tail": 0}, []), ({}, []), ({"cursor": 10}, []), ({"tail": 1000}, [*range(1, 11)])],
)
@on_uvloop
async def test_join_forms(payload: object, expected: list[int]) -> None:
    """`tail` delivers the last n, an empty payload live only; caught_up comes also when there was nothing to replay."""
    async with front_rig() as rig:
        await fill(rig, "s", 10)
        client = await rig.connect()
        client.push("1", "1", "session:s", "phx_join", payload)
        assert (await client.next())[4]["status"] == "ok"
        assert (await until_caught_up(client))[0] == expected


@on_uvloop
async def test_empty_session_joins() -> None:
    """A session that has no messages yet answers last_seq 0 and earliest_seq 1."""
    async with front_rig() as rig:
        client = await rig.connect()
        found = await client.join("session:new", {"cursor": 0})
        assert (found["last_seq"], found["earliest_seq"]) == (0, 1)


@pytest.mark.parametrize(
    ("topic", "payload", "code", "reason", "field"),
    [
        ("session:s", {"cursor": -1}, "INVALID", "invalid", "cursor"),
        ("session:s", {"cursor": "1"}, "INVALID", "invalid", "cursor"),
        ("session:s", {"cursor": 2**53}, "INVALID", "invalid", "cursor"),
        ("session:s", {"cursor": 1, "tail": 1}, "INVALID", "invalid", "tail"),
        ("session:s", {"tail": 1001}, "INVALID", "invalid", "tail"),
        ("session:s", {"since": 1}, "INVALID", "unknown_field", "since"),
        ("session:s", [], "INVALID", "invalid", "payload"),
        ("session:s", None, "INVALID", "invalid", "payload"),
        ("session:s", {"cursor": 5}, "INVALID", "cursor_ahead", "cursor"),
        ("session:", {}, "INVALID", "invalid", "topic"),
        ("session:" + "é" * 65, {}, "INVALID", "invalid", "topic"),
        ("room:lobby", {}, "INVALID", "unmatched topic", "topic"),
        ("inbox:alice", {"limit": 0}, "INVALID", "invalid", "limit"),
        ("inbox:alice", {"limit": 101}, "INVALID", "invalid", "limit"),
        ("inbox:alice", {"cursor": 0}, "INVALID", "unknown_field", "cursor"),
        ("inbox:", {}, "FORBIDDEN", "forbidden", "topic"),
        ("inbox:bob", {}, "FORBIDDEN", "forbidden", "topic"),
        ("phoenix", {}, "INVALID", "unmatched topic", "topic"),
    ],
)
@on_uvloop
async def test_refused_joins(topic: str, payload: object, code: str, reason: str, field: str) -> None:
    """A join that cannot be is answered on its ref with the field; the socket and later joins are not disturbed."""
    async with front_rig() as rig:
        client = await rig.connect()
        reply = await client.request(topic, "phx_join", payload, join_ref="9")
        assert reply.status == "error"
        assert (reply.response["code"], reply.response["reason"], reply.response["field"]) == (code, reason, field)
        await client.join("session:s", {"cursor": 0})


@on_uvloop
async def test_cursor_ahead_carries_the_truth() -> None:
    """A cursor beyond last_seq is refused with last_seq: the client has seen what this ring does not hold."""
    async with front_rig() as rig:
        await fill(rig, "s", 3)
        client = await rig.connect()
        reply = await client.request("session:s", "phx_join", {"cursor": 4})
        assert (reply.response["reason"], reply.response["last_seq"]) == ("cursor_ahead", 3)


@on_uvloop
async def test_ids_are_the_raw_text_of_the_topic() -> None:
    """Any UTF-8 of up to 128 bytes names a session: percent signs, slashes, colons, quotes and NUL are themselves."""
    async with front_rig() as rig:
        client = await rig.connect()
        for at, name in enumerate(("50%25", "a/b:c", 'q"\\', "日本" * 21, "x" * 128, "a\0b", " ")):
            joined = await client.join(f"session:{name}", {"cursor": 0}, join_ref=f"j{at}")
            assert joined["session_id"] == name
            reply = await client.request(f"session:{name}", "append", {"content": at}, join_ref=f"j{at}")
            assert reply.response["seq"] == 1


@on_uvloop
async def test_append_forms_and_refusals() -> None:
    """A message, a batch, a repeated key, a stale expected_seq, another content: answered as the contract says."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        one = await client.request("session:s", "append", {"content": 1, "idempotency_key": "k"})
        assert (one.response["seq"], one.response["deduped"]) == (1, False)
        again = await client.request("session:s", "append", {"content": 1, "idempotency_key": "k", "expected_seq": 0})
        assert again.response == {**one.response, "deduped": True}
        other = await client.request("session:s", "append", {"content": 2, "idempotency_key": "k"})
        assert other.response["code"] == "IDEMPOTENCY_CONFLICT"
        stale = await client.request("session:s", "append", {"content": 2, "expected_seq": 0})
        assert (stale.response["code"], stale.response["last_seq"]) == ("CONFLICT", 1)
        batch = await client.request(
            "session:s", "append", {"messages": [{"content": 2}, {"content": 3}], "expected_seq": 1}
        )
        assert [ack["seq"] for ack in batch.response["messages"]] == [2, 3]
        bad = await client.request("session:s", "append", {"messages": [{"content": 4}, {"contents": 5}]})
        assert bad.response["field"] == "messages[1].contents"
        assert rig.boundary.session("s").last == 3


@on_uvloop
async def test_sender_is_the_sockets_principal() -> None:
    """Who speaks was set when the socket opened; the default kind is human."""
    async with front_rig() as rig:
        for query, sender in (
            ("vsn=2.0.0&participant_id=b%20%C3%B6t&participant_kind=agent", ("b öt", "agent")),
            ("vsn=2.0.0&participant_id=carol", ("carol", "human")),
        ):
            client = await rig.connect(query)
            await client.join("session:s")
            await client.request("session:s", "append", {"content": None})
            message = msgspec.json.decode(rig.boundary.session("s").messages[-1])
            assert (message["sender_id"], message["sender_kind"]) == sender


@on_uvloop
async def test_replay_pages() -> None:
    """`after` and `before` answer ascending pages with has_more; a page behind the trim tells the gap."""
    async with front_rig() as rig:
        await fill(rig, "s", 250)
        client = await rig.connect()
        await client.join("session:s")

        async def page(payload: object) -> tuple[list[int], bool]:
            reply = await client.request("session:s", "replay", payload)
            assert reply.status == "ok", reply
            assert "gap" not in reply.response
            return [message["seq"] for message in reply.response["messages"]], reply.response["has_more"]

        assert await page({"after": 0}) == ([*range(1, 101)], True)
        assert await page({"after": 240, "limit": 10}) == ([*range(241, 251)], False)
        assert await page({"before": 6, "limit": 3}) == ([3, 4, 5], True)
        assert await page({"before": 1}) == ([], False)
        rig.boundary.trim("s", 200)
        reply = await client.request("session:s", "replay", {"after": 0, "limit": 2})
        assert reply.response["gap"] == {
            "reason": "trimmed",
            "from_seq": 1,
            "next_seq": 200,
            "earliest_seq": 200,
            "last_seq": 250,
        }
        assert [message["seq"] for message in reply.response["messages"]] == [200, 201]


@pytest.mark.parametrize(
    ("event", "payload", "field"),
    [
        ("replay", {}, "after"),
        ("replay", {"after": 1, "before": 2}, "after"),
        ("replay", {"after": -1}, "after"),
        ("replay", {"before": 0}, "before"),
        ("replay", {"after": 0, "limit": 0}, "limit"),
        ("replay", {"after": 0, "limit": 1001}, "limit"),
        ("replay", {"after": 0, "x": 1}, "x"),
        ("replay", 5, "payload"),
        ("mark_read", {}, "seq"),
        ("mark_read", {"seq": -1}, "seq"),
        ("mark_read", {"seq": 1}, "seq"),
        ("shout", {}, "event"),
        ("phx_reply", {}, "event"),
    ],
)
@on_uvloop
async def test_refused_requests(event: str, payload: object, field: str) -> None:
    """A request that is wrong is answered on its ref and names the field."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        reply = await client.request("session:s", event, payload)
        assert reply.status == "error"
        assert (reply.response["code"], reply.response["field"]) == ("INVALID", field)


@on_uvloop
async def test_mark_read_is_pushed_to_everybody() -> None:
    """A read cursor is answered, never goes back, and is pushed to those who joined."""
    async with front_rig() as rig:
        await fill(rig, "s", 3)
        watcher, client = await rig.connect("vsn=2.0.0&participant_id=bob"), await rig.connect()
        await watcher.join("session:s")
        await client.join("session:s")
        assert (await client.request("session:s", "mark_read", {"seq": 2})).response == {"last_read_seq": 2}
        assert (await client.request("session:s", "mark_read", {"seq": 1})).response == {"last_read_seq": 2}
        pushed = await watcher.next()
        assert pushed == ["1", None, "session:s", "read", {"participant_id": "alice", "last_read_seq": 2}]


@on_uvloop
async def test_unjoined_topics_answer_unmatched() -> None:
    """Without a join, after a leave, or with the join_ref of an earlier join the answer is phoenix's own."""
    async with front_rig() as rig:
        client = await rig.connect()
        for topic in ("session:s", "nonsense"):
            reply = await client.request(topic, "append", {"content": 1})
            assert (reply.status, reply.response["code"], reply.response["reason"]) == (
                "error",
                "NOT_FOUND",
                "unmatched topic",
            )
        await client.join("session:s", join_ref="5")
        assert (await client.request("session:s", "append", {"content": 1}, join_ref="4")).status == "error"
        assert (await client.request("session:s", "phx_leave", {}, join_ref="4")).status == "ok"
        assert (await client.request("session:s", "append", {"content": 1}, join_ref="5")).status == "ok"
        assert (await client.request("phoenix", "append", {"content": 1})).response["field"] == "event"


@on_uvloop
async def test_leave_answers_then_closes_the_channel() -> None:
    """phx_leave is answered, phx_close follows on the join's ref, no push comes after it, and joining again works."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s", join_ref="1")
        client.push("1", "2", "session:s", "phx_leave", {})
        assert await client.next() == ["1", "2", "session:s", "phx_reply", {"status": "ok", "response": {}}]
        assert await client.next() == ["1", "1", "session:s", "phx_close", {}]
        await fill(rig, "s", 2)
        found = await client.join("session:s", {"cursor": 0}, join_ref="3")
        assert found["last_seq"] == 2
        assert (await client.request("session:s", "phx_leave", {}, join_ref="3")).status == "ok"
        assert (await client.request("session:s", "phx_leave", {}, join_ref="3")).status == "ok"


@on_uvloop
async def test_second_join_of_a_topic_closes_the_first() -> None:
    """The older channel gets phx_close on its own join_ref, then the newer join is answered and alone gets pushes."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s", join_ref="1")
        client.push("2", "2", "session:s", "phx_join", {"cursor": 0})
        assert await client.next() == ["1", "1", "session:s", "phx_close", {}]
        assert (await client.next())[:4] == ["2", "2", "session:s", "phx_reply"]
        assert (await client.next())[3] == "caught_up"
        await fill(rig, "s", 1)
        assert (await client.next())[:4] == ["2", None, "session:s", "messages"]
        await client.alive()
        assert len(rig.boundary.session("s").places) == 1


@on_uvloop
async def test_join_replaced_while_under_way_is_answered() -> None:
    """A join that is overtaken by another one, or by a leave, is answered too: every request is, once."""
    async with front_rig() as rig:
        client = await rig.connect()
        rig.boundary.gate.clear()
        client.push("1", "1", "session:s", "phx_join", {})
        client.push("1", "1a", "session:s", "append", {"content": 1})
        client.push("2", "2", "session:s", "phx_join", {})
        frames = [await client.next() for _ in range(3)]
        assert [(frame[0], frame[1], frame[3]) for frame in frames] == [
            ("1", "1", "phx_reply"),
            ("1", "1a", "phx_reply"),
            ("1", "1", "phx_close"),
        ]
        assert frames[0][4]["response"]["reason"] == "superseded"
        assert frames[1][4]["response"]["reason"] == "unmatched topic"
        client.push("2", "3", "session:s", "phx_leave", {})
        frames = [await client.next() for _ in range(3)]
        assert [(frame[1], frame[3]) for frame in frames] == [
            ("2", "phx_reply"),
            ("3", "phx_reply"),
            ("2", "phx_close"),
        ]
        rig.boundary.gate.set()
        await client.alive()
        assert not rig.boundary.session("s").places


@on_uvloop
async def test_requests_of_a_channel_take_effect_in_order() -> None:
    """Sent without waiting: join, appends, a replay that sees them, a mark_read, an append; each is answered once."""
    async with front_rig() as rig:
        client = await rig.connect()
        rig.boundary.gate.clear()
        client.push("1", "1", "session:s", "phx_join", {})
        for at in range(5):
            client.push("1", f"a{at}", "session:s", "append", {"content": at})
        client.push("1", "r", "session:s", "replay", {"after": 0})
        client.push("1", "m", "session:s", "mark_read", {"seq": 5})
        client.push("1", "z", "session:s", "append", {"content": "last"})
        client.push("1", "q", "session:s", "replay", {"after": 5})
        await client.alive()
        rig.boundary.gate.set()
        replies: dict[str, object] = {}
        while len(replies) < 10:
            frame = await client.next()
            if frame[3] == "phx_reply":
                assert frame[1] not in replies
                assert frame[4]["status"] == "ok", frame
                replies[frame[1]] = frame[4]["response"]
        assert list(replies) == ["1", "a0", "a1", "a2", "a3", "a4", "r", "m", "z", "q"]
        content = [[one["content"] for one in replies[ref]["messages"]] for ref in ("r", "q")]  # type: ignore[index]
        assert content == [[0, 1, 2, 3, 4], ["last"]]


@on_uvloop
async def test_replay_waits_for_the_appends_before_it() -> None:
    """A page asked for behind an append is not fetched before the append is answered."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        rig.boundary.gate.clear()
        client.push("1", "a", "session:s", "append", {"content": 1})
        client.push("1", "r", "session:s", "replay", {"after": 0})
        await client.alive()
        assert rig.boundary.reads_under_way == 0
        rig.boundary.gate.set()
        while (frame := await client.next())[1] != "r":
            pass
        assert len(frame[4]["response"]["messages"]) == 1


@on_uvloop
async def test_many_refused_at_the_door_do_not_pile_up() -> None:
    """Hundreds of waiting appends that are refused at once are each answered; the stack does not grow with them."""
    async with front_rig() as rig:
        client = await rig.connect()
        rig.boundary.gate.clear()
        client.push("1", "1", "session:s", "phx_join", {})
        for at in range(900):
            client.push("1", f"a{at}", "session:s", "append", {"content": at})
        await client.alive()
        rig.boundary.refusal_at_the_door = TryAgain("full", reason="overloaded")
        rig.boundary.gate.set()
        answered: set[str] = set()
        while len(answered) < 901:
            frame = await client.next()
            if frame[3] == "phx_reply":
                assert frame[1] not in answered
                answered.add(frame[1])
        await client.alive()


@pytest.mark.parametrize("event", ["append", "replay", "mark_read", "phx_join"])
@pytest.mark.parametrize("error", [TryAgain("moving", reason="moving", retry_after_ms=70), Invalid("no", field="x")])
@on_uvloop
async def test_refusals_of_the_inner_half_reach_the_ref(event: str, error: FleetError) -> None:
    """What the ring refuses is answered on the request's ref with all its fields."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        rig.boundary.refusal = error
        payload = {"append": {"content": 1}, "replay": {"after": 0}, "mark_read": {"seq": 0}, "phx_join": {}}[event]
        reply = await client.request("session:s", event, payload)
        assert reply.status == "error"
        assert reply.response == msgspec.json.decode(msgspec.json.encode(error.body()))


@on_uvloop
async def test_subscription_that_ends_by_itself_is_an_error_of_the_channel() -> None:
    """phx_error on the join's ref tells the client to join again; the topic is not joined any more."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        next(iter(rig.boundary.session("s").places)).end("cursor_ahead")
        frame = await client.next()
        assert frame[:4] == ["1", "1", "session:s", "phx_error"]
        assert (frame[4]["code"], frame[4]["reason"]) == ("INVALID", "cursor_ahead")
        assert (await client.request("session:s", "append", {"content": 1})).response["reason"] == "unmatched topic"
        await client.join("session:s", join_ref="2")


@on_uvloop
async def test_gap_is_pushed_where_it_is() -> None:
    """A reader behind the earliest message gets the gap, then what follows it."""
    async with front_rig() as rig:
        await fill(rig, "s", 20)
        rig.boundary.trim("s", 11)
        client = await rig.connect()
        client.push("1", "1", "session:s", "phx_join", {"cursor": 4})
        assert (await client.next())[4]["response"]["earliest_seq"] == 11
        gap = await client.next()
        assert gap[3:] == [
            "gap",
            {"reason": "trimmed", "from_seq": 5, "next_seq": 11, "earliest_seq": 11, "last_seq": 20},
        ]
        assert (await until_caught_up(client))[0] == [*range(11, 21)]


@on_uvloop
async def test_hanging_up_leaves_nothing_behind() -> None:
    """A client that goes away in the middle of everything takes its places, requests and tasks with it."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        await client.join("session:t", join_ref="t")
        rig.boundary.gate.clear()
        client.push("t", "page", "session:t", "replay", {"after": 0})
        for at in range(10):
            client.push(f"j{at}", f"j{at}", f"session:{at}", "phx_join", {})
        for event, payload in (("append", {"content": 1}), ("replay", {"after": 0}), ("mark_read", {"seq": 0})):
            client.push("1", event, "session:s", event, payload)
        await client.alive()
        assert rig.boundary.reads_under_way == 1
        await client.close()
        await eventually(lambda: rig.value("sockets") == 0, "the socket is forgotten")
        await eventually(lambda: rig.boundary.reads_under_way == 0, "nobody waits for a page any more")
        rig.boundary.gate.set()
        await eventually(lambda: rig.boundary.session("s").last == 1, "what was appended is appended")
        await eventually(lambda: rig.value("topics") == 0, "no place is left")
        assert not rig.boundary.session("s").places
        assert len(asyncio.all_tasks()) <= 4


@on_uvloop
async def test_heartbeat_and_ping_are_answered() -> None:
    """Phoenix's heartbeat gets its reply, a WebSocket ping its pong."""
    async with front_rig() as rig:
        client = await rig.connect()
        client.push(None, "7", "phoenix", "heartbeat", {})
        assert await client.next() == [None, "7", "phoenix", "phx_reply", {"status": "ok", "response": {}}]
        client.frame(b"ping", first=0x89)
        assert await client.ws() == (0xA, b"ping")


@on_uvloop
async def test_clients_close_is_answered() -> None:
    """A close frame comes back with its code, then the connection ends."""
    async with front_rig() as rig:
        client = await rig.connect()
        client.frame((1000).to_bytes(2, "big") + b"bye", first=0x88)
        with pytest.raises(Closed) as closed:
            await client.next()
        assert closed.value.code == 1000
        await eventually(lambda: rig.value("sockets_closed_total", reason="normal") == 1, "counted as normal")
