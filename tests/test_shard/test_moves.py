"""Moves between two whole shards, step by step (docs/moves.md)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Invalid, Moved, TryAgain
from fleetlm_common.rpc import Kind
from fleetlm_shard.shard import Shard
from tests.support.eventually import eventually
from tests.support.movesrig import MovesRig, moves_rig, session_in
from tests.support.rpcclient import RpcClient

SLOT = 3
SESSION = session_in(SLOT)
OTHER = session_in(5)


def texts(messages: list[dict[str, object]]) -> list[object]:
    """What was written."""
    return [each["content"] for each in messages]


async def fill(client: RpcClient, session: str, count: int) -> list[str]:
    """Append messages, return what was written."""
    written = [f"{session} {number}" for number in range(count)]
    for text in written:
        await client.append(session, text)
    return written


async def test_a_move_takes_everything_along() -> None:
    """Messages byte for byte, keys, read cursors, metadata; the source says where it went; seq goes on."""
    async with moves_rig() as ring:
        async with await ring[0].client() as client:
            await client.create(SESSION, b'{"topic":"gold"}')
            written = await fill(client, SESSION, 20)
            assert await client.mark_read(SESSION, "bob", 7) == 7
            before = await client.read(SESSION, after=0)
            info = await client.info(SESSION)
            await ring.move([SLOT], 0, 1)
            with pytest.raises(Moved) as moved:
                await client.append(SESSION, "too late")
            assert (moved.value.owner, moved.value.epoch) == ("shard-1", ring.map.epoch)
            assert (await client.append(OTHER, "here as before"))[0].seq == 1
        async with await ring[1].client() as client:
            after = await client.read(SESSION, after=0)
            assert after.messages == before.messages
            there = await client.info(SESSION)
            assert (there.inserted_at, there.metadata, there.last_seq) == (info.inserted_at, info.metadata, 20)
            assert await client.mark_read(SESSION, "bob", 3) == 7
            [again] = await client.append(SESSION, written[4])
            assert (again.deduped, again.seq) == (True, 5)
            assert (await client.append(SESSION, "new"))[0].seq == 21
        await ring.restart(1)
        async with await ring[1].client() as client:
            assert texts(await client.read_all(SESSION)) == [*written, "new"]
            [again] = await client.append(SESSION, written[4])
            assert (again.deduped, again.seq) == (True, 5)


async def test_small_sessions_come_together_and_large_ones_in_pages() -> None:
    """What one request can hold is brought with one; every session is whole, whatever stands beside it."""
    counts = {session_in(SLOT, number=number): 1 + number % 3 for number in range(60)}
    large = [session_in(SLOT, number=number) for number in (7, 8, 30)]
    async with moves_rig() as ring, await ring[0].client() as client:
        for session, count in counts.items():
            await fill(client, session, count)
        for session in large:
            for number in range(8):
                await client.append(session, f"{number} " + "x" * 60_000)
            counts[session] += 8
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        assert ring[1].shard.moves.imported_messages == sum(counts.values())
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        await ring.commit(move)
        async with await ring[1].client() as there:
            for session, count in counts.items():
                assert [each["seq"] for each in await there.read_all(session)] == list(range(1, count + 1))


async def test_a_session_that_is_not_in_the_move_is_refused_whoever_stands_beside_it() -> None:
    """The field is named; nothing of the others is told."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        await fill(client, OTHER, 1)
        move = await ring.begin([SLOT], 0, 1)
        request = rpc.ExportMessages(move.id, ring.map.epoch, SESSION, 0, 10, 1000, [(SESSION, 1), (OTHER, 0)])
        with pytest.raises(Invalid) as refused:
            await client.ask(Kind.EXPORT_MESSAGES, request, rpc.ExportedMessages)
        assert refused.value.field == "session"


def test_shards_of_the_version_before_are_understood() -> None:
    """In an upgrade a source may know nothing of `others`: it answers the first session, and asks for one."""
    asked = msgspec.msgpack.encode(["m", 1, SESSION, 0, 10, 1000])
    assert msgspec.msgpack.decode(asked, type=rpc.ExportMessages).others == []
    told = msgspec.msgpack.encode([[b"body"], [True], False])
    assert msgspec.msgpack.decode(told, type=rpc.ExportedMessages).others == []


async def test_appends_during_copying_are_brought_over() -> None:
    """What changes after it was copied is copied again before the target confirms."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await client.append(SESSION, "later")
        await client.append(session_in(SLOT, number=1), "a new session")
        await client.mark_read(SESSION, "bob", 4)
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        await ring.commit(move)
        async with await ring[1].client() as there:
            assert len(await there.read_all(SESSION)) == 4
            assert len(await there.read_all(session_in(SLOT, number=1))) == 1
            assert await there.mark_read(SESSION, "bob", 1) == 4


async def test_writes_wait_while_sealed_and_reads_do_not() -> None:
    """Appends, `mark_read` and creation wait; at the commit each is told MOVED, in the order of arrival."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        answered: list[int] = []

        async def write(number: int) -> None:
            work = [
                client.append(SESSION, "waits"),
                client.mark_read(SESSION, "bob", 1),
                client.create(session_in(SLOT, number=2)),
                client.append(session_in(SLOT, number=1), "waits, too"),
            ]
            for unused in work[:number] + work[number + 1 :]:
                unused.close()
            with pytest.raises(Moved):
                await work[number]
            answered.append(number)

        tasks = []
        for number in range(4):
            tasks.append(asyncio.ensure_future(write(number)))
            await client.info(SESSION)
        assert len(await client.read_all(SESSION)) == 2
        assert ring[0].shard.ownership.held.count == 4
        await ring.says(move, "Confirmed")
        assert not answered
        await ring.commit(move)
        await asyncio.gather(*tasks)
        assert answered == [0, 1, 2, 3]


async def test_an_abort_works_the_queue_off() -> None:
    """The source unseals because a newer map shows it, and what waited is written there, in order."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        waiting = [asyncio.ensure_future(client.append(SESSION, f"waits {number}")) for number in range(3)]
        await ring.says(move, "Confirmed")
        await ring.abort(move)
        assert [acks[0].seq for acks in await asyncio.gather(*waiting)] == [3, 4, 5]
        # The next move goes on from what the target has.
        again = await ring.move([SLOT], 0, 1)
        assert again.id != move.id
        async with await ring[1].client() as there:
            assert len(await there.read_all(SESSION)) == 5


async def test_streams_end_with_moved_after_their_last_push() -> None:
    """A subscriber hears everything that was acknowledged here, then where it goes on."""
    async with moves_rig() as ring, await ring[0].client() as client:
        stream = await client.subscribe(SESSION, after=0)
        await fill(client, SESSION, 3)
        await ring.move([SLOT], 0, 1)
        assert [(await stream.next())[0] for _ in range(3)] == [1, 2, 3]
        kind, _ = await stream.frame()
        assert kind == Kind.ENDED


async def test_there_and_back_again() -> None:
    """What was released is gone, what came back is whole; a session's rows and keys are those of the truth."""
    async with moves_rig(clean_after_s=0.0) as ring:
        async with await ring[0].client() as client:
            written = await fill(client, SESSION, 5)
        await ring.move([SLOT], 0, 1)
        ring[0].shard.moves.clean()
        async with await ring[1].client() as client:
            written.extend([f"more {number}" for number in range(5)])
            for text in written[5:]:
                await client.append(SESSION, text)
        await ring.move([SLOT], 1, 0)
        for _ in range(2):
            async with await ring[0].client() as client:
                assert texts(await client.read_all(SESSION)) == written
                assert (await client.append(SESSION, written[2]))[0].deduped
            await ring.restart(0)


async def test_a_queue_that_waits_too_long_is_refused() -> None:
    """TRY_AGAIN moving, for all of the slot, until the seal ends."""
    async with moves_rig() as ring, await ring[0].client() as client:
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        with pytest.raises(TryAgain, match="handed over") as refused:
            await client.append(SESSION, "waits")
        assert refused.value.reason == "moving"
        with pytest.raises(TryAgain):
            await asyncio.wait_for(client.append(SESSION, "behind it"), 1)
        await ring.abort(move)
        assert (await client.append(SESSION, "waits"))[0].seq == 1


async def given_and_not_opened(ring: MovesRig) -> Shard:
    """The target, of whom a map says that it owns `SLOT`; its disk takes nothing until `release`."""
    move = await ring.begin([SLOT], 0, 1)
    await ring.says(move, "Ready")
    await ring.seal(move)
    await ring.says(move, "Confirmed")
    shard = ring[1].shard
    ring[1].writer.hold()
    await ring.commit(move, acted=False)
    await eventually(lambda: shard.ownership.epoch == ring.map.epoch, "the map is being acted on")
    return shard


async def test_a_shard_that_serves_stays_ready_while_it_opens_more() -> None:
    """What it serves it goes on serving: nobody counts it out for a batch that waits for the disk; it says how many."""
    async with moves_rig() as ring:
        await ring.move([5], 0, 1)
        shard = await given_and_not_opened(ring)
        assert (shard.health().ok, shard.health().reason) == (True, "Ready")
        assert shard.health().message == "1 slots, 1 being opened"
        ring[1].writer.release()
        await ring.acted()
        assert shard.health().message == "2 slots"


async def test_a_shard_that_serves_nothing_yet_is_not_ready_before_its_first_slots_are_open() -> None:
    """Those that a map gives to one that has none."""
    async with moves_rig() as ring:
        shard = await given_and_not_opened(ring)
        assert (shard.health().ok, shard.health().reason) == (False, "OpeningSlots")
        ring[1].writer.release()
        await ring.acted()
        assert (shard.health().ok, shard.health().message) == (True, "1 slots")
