"""Streams to gateways: contiguous, the same bytes for all, bounded."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Invalid
from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.rpc import Kind
from fleetlm_shard import subscriptions
from fleetlm_shard.sessions import RING_MESSAGES_MAX, Session
from fleetlm_shard.subscriptions import BUFFERED_BYTES_MAX, PUSH_BYTES_MAX, Subscription, Subscriptions
from tests.support.eventually import eventually
from tests.support.rpcclient import draft
from tests.support.shardrig import NAME, SLOTS, shard_rig


async def test_pushes_follow_the_replayed_part_without_a_hole() -> None:
    """A subscriber gets what lies between its cursor and now at once, then each new message once, in order."""
    async with shard_rig() as rig, await rig.client() as client, await rig.client() as writer:
        await writer.append("s", "one", "two", "three")
        stream = await client.subscribe("s", after=1)
        assert (stream.subscribed.start_seq, stream.subscribed.last_seq) == (1, 3)
        await writer.append("s", "four")
        await writer.append("s", "five", "six")
        seqs: list[object] = []
        while len(seqs) < 5:
            first_seq, messages = await stream.next()
            assert first_seq == 2 + len(seqs)
            seqs += [message["seq"] for message in messages]
        assert seqs == [2, 3, 4, 5, 6]


async def test_a_live_only_subscriber_starts_at_the_end() -> None:
    """Without a cursor pushes begin behind `last_seq` of the answer."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one")
        stream = await client.subscribe("s")
        assert (stream.subscribed.start_seq, stream.subscribed.last_seq) == (1, 1)
        await client.append("s", "two")
        assert (await stream.next())[0] == 2


async def test_what_is_not_in_memory_is_left_to_replay() -> None:
    """A cursor older than the ring starts at `last_seq`: the gateway replays the rest, nothing is pushed twice."""
    async with shard_rig() as rig, await rig.client() as client:
        for start in range(0, RING_MESSAGES_MAX + 50, 50):
            await client.append_entries("s", *(rpc.Entry([draft(f"{start + each}")]) for each in range(50)))
        last_seq = (await client.info("s")).last_seq
        stream = await client.subscribe("s", after=0)
        assert stream.subscribed.start_seq == last_seq
        await client.append("s", "next")
        assert (await stream.next())[0] == last_seq + 1


async def test_all_subscribers_get_the_same_bytes() -> None:
    """What is pushed is byte for byte what is read."""
    async with shard_rig() as rig, await rig.client() as one, await rig.client() as two:
        streams = [await one.subscribe("s"), await one.subscribe("s"), await two.subscribe("s")]
        await one.append("s", "hello", "again")
        payloads = {(await stream.frame())[1] for stream in streams}
        [payload] = payloads
        page = await one.read("s", after=0)
        assert msgspec.msgpack.decode(payload, type=rpc.Push).body == b",".join(page.messages)


async def test_unsubscribe_and_a_lost_connection_end_a_subscription() -> None:
    """Nothing is pushed afterwards, and the shard keeps nothing of it."""
    async with shard_rig() as rig, await rig.client() as client:
        other = await rig.client()
        await other.subscribe("s")
        stream = await client.subscribe("s")
        client.unsubscribe(stream)
        await other.close()
        await client.append("s", "one")
        assert stream.frames.empty()
        assert rig.shard.subscriptions.count == 0
        assert rig.shard.memory.sessions.get("s").subscribers == []


async def test_an_id_names_one_subscription() -> None:
    """A second SUBSCRIBE on a living id is refused and the first goes on."""
    async with shard_rig() as rig, await rig.client() as client:
        stream = await client.subscribe("s")
        client.wire.send(Kind.SUBSCRIBE, stream.ident, rpc.encode(rpc.Subscribe(1, "s")))
        assert (await stream.frame())[0] == Kind.ERROR
        await client.append("s", "one")
        assert (await stream.next())[0] == 1


async def test_read_cursors_are_broadcast_and_never_go_back() -> None:
    """`mark_read` moves forward, tells every subscriber, answers the current value below it, refuses beyond the end."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", "two", "three")
        stream = await client.subscribe("s")
        assert await client.mark_read("s", "bob", 2) == 2
        kind, payload = await stream.frame()
        assert kind == Kind.PUSH_READ
        assert msgspec.msgpack.decode(payload, type=rpc.PushRead) == rpc.PushRead("bob", 2)
        assert await client.mark_read("s", "bob", 1) == 2
        assert await client.mark_read("s", "bob", 2) == 2
        with pytest.raises(Invalid) as refused:
            await client.mark_read("s", "bob", 4)
        assert (refused.value.reason, refused.value.last_seq) == ("cursor_ahead", 3)
        assert stream.frames.empty()


async def test_two_marks_in_flight_answer_the_higher_one() -> None:
    """Marks that overtake each other on the way to the disk end at the highest, in memory as in the answers."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", "two", "three")
        rig.writer.hold()
        marks = [asyncio.create_task(client.mark_read("s", "bob", seq)) for seq in (1, 3, 2)]
        await eventually(lambda: rig.writer.waiting > 0, "a round waits")
        rig.writer.release()
        answers = await asyncio.gather(*marks)
        assert max(answers) == 3
        assert rig.shard.memory.sessions.get("s").cursors == {"bob": 3}
        assert await client.mark_read("s", "bob", 1) == 3


async def test_a_released_slot_ends_its_subscriptions() -> None:
    """ENDED names the new owner and the epoch; appends and reads answer MOVED from then on."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one")
        stream = await client.subscribe("s", after=0)
        await stream.next()
        ring = await rig.own([ShardName("shard-1")] * SLOTS)
        kind, payload = await stream.frame()
        assert kind == Kind.ENDED
        assert msgspec.msgpack.decode(payload, type=rpc.Ended) == rpc.Ended("moved", "shard-1", ring.epoch)
        assert rig.shard.subscriptions.count == 0
        await rig.own([NAME] * SLOTS)


class SlowPeer:
    """A gateway that takes nothing."""

    def __init__(self) -> None:
        self.subscriptions: dict[int, Subscription] = {}
        self.sent: list[tuple[int, int]] = []
        self.buffered_bytes = 0

    def send(self, kind: int, ident: int, payload: bytes) -> None:
        self.sent.append((kind, ident))
        self.buffered_bytes += len(payload)


def test_a_gateway_that_does_not_read_loses_its_streams_and_nobody_else_does() -> None:
    """Past the bound each of its subscriptions is ENDED; memory does not grow any more; the others go on."""
    session = Session("s", Slot(0), None, lost=0)
    streams, slow, good = Subscriptions(), SlowPeer(), SlowPeer()
    streams.subscribe(slow, 1, session=session, after=None)
    streams.subscribe(slow, 2, session=session, after=None)
    streams.subscribe(good, 1, session=session, after=None)
    text = b"x" * (PUSH_BYTES_MAX - 100)
    while slow.subscriptions:
        session.seq_durable += 1
        streams.publish(session, [text])
        good.buffered_bytes = 0
        assert slow.buffered_bytes <= BUFFERED_BYTES_MAX + 2 * PUSH_BYTES_MAX
    assert [kind for kind, _ in slow.sent[-2:]] == [Kind.ENDED, Kind.ENDED]
    assert (streams.count, streams.overflowed, len(session.subscribers)) == (1, 2, 1)


def test_large_batches_are_pushed_in_pieces() -> None:
    """No PUSH is larger than a frame may be; the pieces are contiguous."""
    messages = [b"x" * 300_000] * 10
    pushes = [msgspec.msgpack.decode(each, type=rpc.Push) for each in subscriptions._pushes(5, messages)]
    assert [(push.first_seq, push.count) for push in pushes] == [(5, 3), (8, 3), (11, 3), (14, 1)]
    assert all(len(push.body) <= PUSH_BYTES_MAX for push in pushes)
