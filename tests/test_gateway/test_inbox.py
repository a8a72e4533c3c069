"""A joined inbox over a real socket, before an archive in memory: pages, deltas, and nothing untold."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_gateway import inboxes
from tests.support.eventually import eventually
from tests.support.frontrig import FrontRig, PhxClient, front_rig, on_uvloop

INBOX = "inbox:alice"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other closely."""
    monkeypatch.setattr(inboxes, "POLL_S", 0.02)


async def post(rig: FrontRig, session: str, sender: str, content: object = 1) -> None:
    """Append by REST."""
    url = f"{rig.url}/v1/sessions/{session}/messages"
    async with rig.http.post(url, json={"content": content}, headers={"X-Participant-Id": sender}) as answer:
        assert answer.status == 201, await answer.text()


async def mark(rig: FrontRig, session: str, reader: str, seq: int) -> None:
    """Set a read cursor by REST."""
    url = f"{rig.url}/v1/sessions/{session}/read"
    async with rig.http.put(url, json={"seq": seq}, headers={"X-Participant-Id": reader}) as answer:
        assert answer.status == 200, await answer.text()


async def inbox(rig: FrontRig, query: str = "") -> dict[str, Any]:
    """Alice's by REST."""
    url = f"{rig.url}/v1/participants/alice/inbox{query}"
    async with rig.http.get(url, headers={"X-Participant-Id": "alice"}) as answer:
        assert answer.status == 200, await answer.text()
        body: dict[str, Any] = await answer.json()
        return body


async def joined(rig: FrontRig, payload: object | None = None) -> tuple[PhxClient, dict[str, Any]]:
    """A client that has joined Alice's inbox, and the page that came."""
    client = await rig.connect()
    client.push("1", "1", INBOX, "phx_join", payload or {})
    assert await client.next() == [
        "1", "1", INBOX, "phx_reply", {"status": "ok", "response": {"participant_id": "alice"}}
    ]  # fmt: skip
    frame = await client.next()
    assert frame[:4] == ["1", None, INBOX, "sessions"]
    return client, frame[4]


async def told(client: PhxClient) -> dict[str, Any]:
    """The next entry that is pushed."""
    frame = await client.next()
    assert frame[3] == "session", frame
    entry: dict[str, Any] = frame[4]
    return entry


@on_uvloop
async def test_an_inbox_begins_with_a_page_and_goes_on_with_what_changes() -> None:
    """Newest activity first; messages of others count, one's own and what is read do not."""
    async with front_rig() as rig:
        await post(rig, "one", "alice")
        await post(rig, "two", "alice")
        await post(rig, "one", "bob")
        await post(rig, "others", "bob")
        client, page = await joined(rig)
        assert page == await inbox(rig)
        assert [(entry["session_id"], entry["unread"]) for entry in page["sessions"]] == [("one", 1), ("two", 0)]
        assert page["sessions"][0] == {
            "session_id": "one",
            "last_seq": 2,
            "last_read_seq": 0,
            "unread": 1,
            "unread_more": False,
            "active_at": page["sessions"][0]["active_at"],
            "inserted_at": page["sessions"][0]["inserted_at"],
            "metadata": {},
        }
        assert page["next"] is None
        await post(rig, "two", "bob")
        entry = await told(client)
        assert (entry["session_id"], entry["last_seq"], entry["unread"]) == ("two", 2, 1)
        await mark(rig, "two", "alice", 2)
        entry = await told(client)
        assert (entry["session_id"], entry["last_read_seq"], entry["unread"]) == ("two", 2, 0)
        await post(rig, "others", "alice")
        entry = await told(client)
        assert (entry["session_id"], entry["unread"]) == ("others", 1)
        assert rig.value("topics") == 1


@on_uvloop
async def test_pages_follow_each_other() -> None:
    """`next` of a page asks for the page after it; a join takes the first."""
    async with front_rig() as rig:
        for number in range(5):
            await post(rig, f"s.{number}", "alice")
        first = await inbox(rig, "?limit=2")
        second = await inbox(rig, f"?limit=2&after={first['next']}")
        third = await inbox(rig, f"?limit=2&after={second['next']}")
        names = [[entry["session_id"] for entry in page["sessions"]] for page in (first, second, third)]
        assert names == [["s.4", "s.3"], ["s.2", "s.1"], ["s.0"]]
        assert third["next"] is None
        _, page = await joined(rig, {"limit": 2})
        assert page == first


@on_uvloop
async def test_sessions_by_participant() -> None:
    """In the order of their ids, as they are at their owners."""
    async with front_rig() as rig:
        for name in ("b", "a", "c"):
            await post(rig, name, "alice")
        await post(rig, "d", "bob")
        url = f"{rig.url}/v1/sessions?participant_id=alice"
        async with rig.http.get(f"{url}&limit=2") as answer:
            body = await answer.json()
        assert ([each["session_id"] for each in body["sessions"]], body["has_more"]) == (["a", "b"], True)
        async with rig.http.get(f"{url}&after=b") as answer:
            body = await answer.json()
        assert ([each["session_id"] for each in body["sessions"]], body["has_more"]) == (["c"], False)


@on_uvloop
async def test_leaving_and_joining_again() -> None:
    """Who left hears nothing more; a second join replaces the first; nobody is asked when nobody is joined."""
    async with front_rig() as rig:
        await post(rig, "s", "alice")
        client, _ = await joined(rig)
        client.push("2", "2", INBOX, "phx_join", {})
        assert (await client.next())[:4] == ["1", "1", INBOX, "phx_close"]
        assert (await client.next())[4]["status"] == "ok"
        assert (await client.next())[3] == "sessions"
        assert (await client.request(INBOX, "append", {}, join_ref="2")).response["reason"] == "unknown_event"
        await post(rig, "s", "bob")
        assert (await told(client))["unread"] == 1
        assert (await client.request(INBOX, "phx_leave", {}, join_ref="2")).status == "ok"
        assert (await client.next())[3] == "phx_close"
        await post(rig, "s", "bob")
        await eventually(lambda: not _looking(rig), "nobody looks")
        await client.alive()
        assert rig.value("topics") == 0


def _looking(rig: FrontRig) -> bool:
    return any(task.get_name() == "inboxes" for task in asyncio.all_tasks())


@on_uvloop
async def test_what_cannot_be_told_is_shown_anew() -> None:
    """The archive has forgotten what changed: a fresh page; while it is away nothing is lost."""
    async with front_rig() as rig:
        await post(rig, "s", "alice")
        client, _ = await joined(rig)
        rig.boundary.refusal = TryAgain("away", reason="unavailable")
        asked = rig.boundary.asked
        await eventually(lambda: rig.boundary.asked > asked + 2, "some looks failed")
        rig.boundary.refusal = None
        await post(rig, "s", "bob")
        assert (await told(client))["unread"] == 1
        rig.boundary.lose()
        frame = await client.next()
        assert (frame[3], frame[4]["sessions"][0]["unread"]) == ("sessions", 1)


@pytest.mark.parametrize(("archived", "code"), [(False, "NOT_FOUND"), (True, "TRY_AGAIN")])
@on_uvloop
async def test_a_join_that_cannot_be(archived: bool, code: str) -> None:
    """No archive, or one that does not answer: said on the join's ref, and the next join is one's own."""
    async with front_rig() as rig:
        rig.boundary.archived = archived
        if archived:
            rig.boundary.refusal = TryAgain("away", reason="unavailable")
        client = await rig.connect()
        reply = await client.request(INBOX, "phx_join", {})
        assert reply.response["code"] == code
        rig.boundary.archived, rig.boundary.refusal = True, None
        await joined(rig)


@on_uvloop
async def test_a_page_is_as_new_as_the_looks_that_follow() -> None:
    """Who joins while a look is under way waits for it: what that look leaves behind must be in the page."""
    async with front_rig() as rig:
        await post(rig, "s", "alice")
        await post(rig, "s", "bob")
        client, _ = await joined(rig)
        begun, go = asyncio.Event(), asyncio.Event()
        look = rig.boundary.changes

        async def slow(participants: list[str], since: rpc.ChangesPlace) -> rpc.Changed:
            begun.set()
            await go.wait()
            return await look(participants, since)

        rig.boundary.changes = slow  # type: ignore[method-assign]
        await begun.wait()
        other = await rig.connect("vsn=2.0.0&participant_id=bob")
        other.push("1", "1", "inbox:bob", "phx_join", {})
        await other.alive()
        await post(rig, "s", "alice")
        go.set()
        seen = 0
        while seen < 3:
            frame = await other.next()
            seen = max([seen, *(each["last_seq"] for each in frame[4].get("sessions", ()))])
        assert (await told(client))["last_seq"] == 3


def _asked_since(rig: FrontRig, asked: int) -> bool:
    return rig.boundary.asked > asked


@on_uvloop
async def test_who_does_not_read_gets_a_fresh_page_afterwards() -> None:
    """A full socket is told no entries, which would fill it further."""
    async with front_rig(write_buffer_bytes=262_144, stall_ms=60_000) as rig:
        await post(rig, "s", "alice")
        client, _ = await joined(rig)
        await client.join("session:big", join_ref="2")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while rig.value("sockets_full") == 0:
            await post(rig, "big", "bob", "x" * 60_000)
        (socket,) = rig.front.hub.sockets()
        for _ in range(50):
            await post(rig, "s", "bob")
            asked = rig.boundary.asked
            await eventually(partial(_asked_since, rig, asked), "it was looked")
        held = socket.out.waiting_bytes()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        unread, entries = 0, 0
        while unread < 50:
            frame = await client.next()
            if frame[2] == INBOX:
                entries += 1
                unread = max(each["unread"] for each in frame[4].get("sessions", [frame[4]]))
        assert entries < 20, "a page, and perhaps what came while it filled"
        assert held < 4 * 262_144
