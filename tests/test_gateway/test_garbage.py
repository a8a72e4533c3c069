"""What a socket's frames leave to the collector: nothing."""

from __future__ import annotations

from tests.support.frontrig import front_rig, on_uvloop
from tests.support.garbage import left_to_the_collector


@on_uvloop
async def test_requests_and_pushes_leave_nothing_to_the_collector() -> None:
    """Appends, refusals, replays, read cursors, heartbeats, deliveries to another socket; joins and leaves."""
    async with front_rig() as rig:
        writer, reader = await rig.connect(), await rig.connect()
        for client in (writer, reader):
            await client.request("session:s", "phx_join", {"cursor": 0}, join_ref="1")
        with left_to_the_collector() as found:
            for number in range(20):
                for event, payload, status in (
                    ("append", {"content": number}, "ok"),
                    ("append", {"content": number, "expected_seq": 0}, "error"),
                    ("append", {"kind": 7}, "error"),
                    ("replay", {"after": 0, "limit": 5}, "ok"),
                    ("mark_read", {"seq": number + 1}, "ok"),
                ):
                    reply = await writer.request("session:s", event, payload, join_ref="1")
                    assert reply.status == status, reply
                await writer.request("phoenix", "heartbeat", {}, join_ref=None)
                await writer.request("session:t", "phx_join", {"cursor": 0}, join_ref=f"t{number}")
                await writer.request("session:t", "phx_leave", {}, join_ref=f"t{number}")
                while (await reader.next())[3] != "messages":
                    pass
        assert not found
