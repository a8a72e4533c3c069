"""What a boot rebuilds: sessions, keys, cursors, opened slots, from any mix of checkpoint and log."""

from __future__ import annotations

import asyncio

import pytest

from fleetlm_common import rpc
from fleetlm_common.control import RingSpec
from fleetlm_common.errors import Conflict, TryAgain
from fleetlm_common.ids import Epoch
from fleetlm_common.ring import Member, RingMap, ranges_from
from fleetlm_common.rpc import Kind
from fleetlm_shard.boot import LogLost
from fleetlm_shard.keys import KEY_AGE_S_MIN
from tests.support.eventually import eventually
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.rpcclient import draft
from tests.support.shardrig import NAME, SLOTS, Rig, RigClock, shard_rig
from tests.support.simdisk import SimVolume


@pytest.fixture
def volume() -> SimVolume:
    return SimVolume()


@pytest.fixture
def control() -> MemoryControlPlane:
    return MemoryControlPlane(RingSpec(uid="ring-1", slots=SLOTS, shards=1))


@pytest.mark.parametrize("checkpoint", ["never", "before", "between", "after"])
async def test_a_boot_knows_everything_that_was_answered(
    volume: SimVolume, control: MemoryControlPlane, checkpoint: str
) -> None:
    """Wherever the last checkpoint stands: seqs, messages, keys, metadata, cursors are those that were acknowledged."""
    clock = RigClock()
    async with shard_rig(volume, control=control, clock=clock, process="one") as rig, await rig.client() as client:
        if checkpoint == "before":
            assert await rig.shard.upkeep.checkpoint()
        await client.create("made", b'{"a":1}')
        first = await client.append("s", "one", "two")
        await client.mark_read("s", "bob", 1)
        if checkpoint == "between":
            assert await rig.shard.upkeep.checkpoint()
        await client.append("s", "three", expected_seq=2)
        await client.mark_read("s", "bob", 2)
        await client.append("t", "other")
        if checkpoint == "after":
            assert await rig.shard.upkeep.checkpoint()
        pages = [(await client.read(name, after=0)).messages for name in ("s", "t", "made")]
    clock.advance(60.0)
    async with shard_rig(volume, control=control, clock=clock, process="two") as rig, await rig.client() as client:
        assert rig.shard.memory.sessions.changed_count == (
            0 if checkpoint == "after" else {"never": 3, "before": 3, "between": 2}[checkpoint]
        )
        assert [(await client.read(name, after=0)).messages for name in ("s", "t", "made")] == pages
        assert (await client.info("made")).metadata == b'{"a":1}'
        assert await client.mark_read("s", "bob", 0) == 2
        again = await client.append("s", "one", "two", expected_seq=0)
        assert [(ack.seq, ack.id, ack.inserted_at) for ack in again] == [
            (ack.seq, ack.id, ack.inserted_at) for ack in first
        ]
        with pytest.raises(Conflict) as refused:
            await client.append("s", "four", expected_seq=2)
        assert refused.value.last_seq == 3
        assert [ack.seq for ack in await client.append("s", "four")] == [4]


async def test_old_keys_go_soon_after_a_boot(volume: SimVolume, control: MemoryControlPlane) -> None:
    """A key whose message is older than the window in the log's own time is new again when no retry can be left."""
    clock = RigClock()
    async with shard_rig(volume, control=control, clock=clock, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
        for number in range(2, 94):
            clock.advance(9.9)
            await client.append("s", str(number))
    async with shard_rig(volume, control=control, clock=clock, process="two") as rig, await rig.client() as client:
        assert [(ack.seq, ack.deduped) for ack in await client.append("s", "one")] == [(1, True)]
        clock.advance(KEY_AGE_S_MIN + 0.2)
        await client.append("s", "begins a mark")
        assert [(ack.seq, ack.deduped) for ack in await client.append("s", "9")] == [(9, True)]
        assert [(ack.seq, ack.deduped) for ack in await client.append("s", "one")] == [(95, False)]


async def test_a_clock_set_forward_makes_no_second_message(volume: SimVolume, control: MemoryControlPlane) -> None:
    """A retry on its way while the shard reboots on a machine whose clock was set by an hour is still a retry."""
    clock = RigClock()
    async with shard_rig(volume, control=control, clock=clock, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
    clock.at_us += 3600 * 1_000_000
    async with shard_rig(volume, control=control, clock=clock, process="two") as rig, await rig.client() as client:
        await client.append("s", "two")
        assert [(ack.seq, ack.deduped) for ack in await client.append("s", "one")] == [(1, True)]


async def test_the_window_survives_a_checkpoint(volume: SimVolume, control: MemoryControlPlane) -> None:
    """Keys below the checkpoint's position are read again: a retry across checkpoint and crash is still a retry."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
        assert await rig.shard.upkeep.checkpoint()
    async with shard_rig(volume, control=control, process="two") as rig, await rig.client() as client:
        assert [(ack.seq, ack.deduped) for ack in await client.append("s", "one")] == [(1, True)]
        assert (await client.info("s")).last_seq == 1


async def test_what_was_not_acknowledged_is_whole_or_not_there(volume: SimVolume, control: MemoryControlPlane) -> None:
    """An entry in flight at a crash is there with all of its messages or with none; a retry makes it whole once."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
        rig.writer.hold()
        request = rpc.Append(client.epoch, "s", [rpc.Entry([draft("two"), draft("three")])])
        client.send(Kind.APPEND, rpc.encode(request))
        assert (await client.request(Kind.PING, b""))[0] == Kind.PONG
        volume.kill("one")
    async with shard_rig(volume, control=control, process="two") as rig, await rig.client() as client:
        acks = await client.append("s", "two", "three")
        assert [ack.seq for ack in acks] == [2, 3]
        assert [message["content"] for message in await client.read_all("s")] == ["one", "two", "three"]


async def test_slots_are_opened_once(volume: SimVolume, control: MemoryControlPlane) -> None:
    """The record that a slot was opened is written before it is served, and not again by the next boot."""
    async with shard_rig(volume, control=control, process="one") as rig:
        assert rig.shard.holdings.opened == dict.fromkeys(range(SLOTS), 1)
        opened = rig.shard.log.stats.appended_records
        assert opened == 1
    async with shard_rig(volume, control=control, process="two") as rig:
        assert rig.shard.holdings.opened == dict.fromkeys(range(SLOTS), 1)
        assert rig.shard.log.stats.appended_records == 0
        assert len(rig.shard.ownership.serves) == SLOTS


async def test_no_slot_is_served_before_its_record_is_durable(volume: SimVolume, control: MemoryControlPlane) -> None:
    """While the record waits for the disk the slots' requests hear TRY_AGAIN."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        rig.writer.hold()
        ring = RingMap(
            "ring-1",
            SLOTS,
            Epoch(2),
            (Member(NAME, rig.booted.volume.volume_id),),
            ranges_from([(NAME, Epoch(2))] * SLOTS),
        )
        rig.shard.ownership.serves = frozenset()
        adopting = asyncio.create_task(rig.shard.ownership.adopt(ring))
        await eventually(lambda: rig.writer.waiting > 0, "the record waits")
        assert rig.shard.ownership.serves == frozenset()
        with pytest.raises(TryAgain) as refused:
            await client.append("s", "one")
        assert refused.value.reason == "moving"
        rig.writer.release()
        await adopting
        assert [ack.seq for ack in await client.append("s", "one")] == [1]


async def test_maps_are_stored_before_they_are_acted_on_and_never_go_back(
    volume: SimVolume, control: MemoryControlPlane
) -> None:
    """Each newer map is on the volume first; an older one changes nothing."""
    async with shard_rig(volume, control=control, process="one") as rig:
        first = control.view.map
        assert first is not None
        second = await rig.own([NAME] * SLOTS)
        await eventually(lambda: rig.shard.ownership.epoch == second.epoch, "the second map is taken")
        assert [ring.epoch for ring in rig.stored] == [1, 2]
        stored = rig.booted.volume.stored_map()
        assert stored is not None
        assert stored.epoch == 2
        await rig.shard.ownership.adopt(first)
        assert rig.shard.ownership.epoch == 2


async def test_a_map_that_names_another_volume_silences_the_shard(
    volume: SimVolume, control: MemoryControlPlane
) -> None:
    """VolumeLost: nothing is served any more, and readiness says why."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
        ring = RingMap("ring-1", SLOTS, Epoch(2), (Member(NAME, "another"),), ranges_from([(NAME, Epoch(2))] * SLOTS))
        await control.compare_and_swap(expected=Epoch(1), new=ring)
        await eventually(lambda: not rig.shard.ownership.serves, "the shard falls silent")
        assert (rig.shard.health().ok, rig.shard.health().reason) == (False, "VolumeLost")
        for ask in (client.append("s", "two"), client.read("s", after=0)):
            with pytest.raises(TryAgain):
                await ask


async def test_a_member_whose_log_is_gone_refuses_to_start(volume: SimVolume, control: MemoryControlPlane) -> None:
    """The identity is there, the map binds it, but the log is empty: never afresh in silence."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        await client.append("s", "one")
    disk = volume.process("vandal")
    for name in disk.listdir("log"):
        disk.unlink(f"log/{name}")
    with pytest.raises(LogLost):
        async with shard_rig(volume, control=control, process="two"):
            raise AssertionError("it served")


async def test_a_checkpoint_while_appends_go_on_loses_nothing(volume: SimVolume, control: MemoryControlPlane) -> None:
    """Rows gathered while sessions change are right together with the log behind them."""
    async with shard_rig(volume, control=control, process="one") as rig, await rig.client() as client:
        total = await _append_during_checkpoints(rig)
        assert rig.shard.log.stats.checkpoints >= 3
        assert (await client.info("s0")).last_seq > 0
    async with shard_rig(volume, control=control, process="two") as rig, await rig.client() as client:
        counted = 0
        for number in range(20):
            messages = await client.read_all(f"s{number}")
            assert [message["seq"] for message in messages] == list(range(1, len(messages) + 1))
            counted += len(messages)
        assert counted == total


async def _append_during_checkpoints(rig: Rig) -> int:
    client = await rig.client()
    total = 0
    wanted: list[int] = []
    done = asyncio.Event()

    async def append() -> None:
        nonlocal total
        while not done.is_set():
            await client.append(f"s{total % 20}", f"{total}")
            total += 1

    work = asyncio.create_task(append())
    for _ in range(3):
        wanted.append(total + 30)
        await eventually(lambda: total > wanted[-1], "appends go on")
        assert await rig.shard.upkeep.checkpoint()
    done.set()
    await work
    await client.close()
    return total
