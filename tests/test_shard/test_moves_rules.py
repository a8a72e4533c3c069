"""The rules of docs/moves.md in the real code: each with what it allows and with what it forbids."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Moved, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.logs import NullLogger
from fleetlm_common.rpc import Kind
from fleetlm_common.slots import slot_of
from fleetlm_shard import held
from fleetlm_shard.boot import Boot, BootInputs
from fleetlm_shard.moving import RELEASE_SESSIONS, Moves
from fleetlm_shard.volume import Volume
from fleetlm_shard.volume_types import map_names, term_path
from tests.support.eventually import eventually
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.movesrig import MovesRig, moves_rig, session_in
from tests.support.movetarget import Target
from tests.support.shardrig import SLOTS, RigClock
from tests.support.simdisk import NOTHING_KEPT, Loss
from tests.test_shard.test_moves import fill

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fleetlm_common.ring import Move, RingMap
    from tests.support.rpcclient import RpcClient

SLOT = 3
SESSION = session_in(SLOT)
ABORTED_OR_COMMITTED = pytest.mark.parametrize("committed", [False, True], ids=["aborted", "committed"])


def supersede(ring: MovesRig, number: int) -> None:
    """A younger container takes the shard's volume; the shard has not noticed yet."""
    term = ring[number].booted.volume.term
    ring.volumes[ring.names[number]].process(f"younger-{number}").create(term_path(term + 1)).close()


async def sealed(ring: MovesRig, *, confirmed: bool = True) -> Move:
    """A move of `SLOT` from the first shard to the second, up to `Sealing`."""
    move = await ring.begin([SLOT], 0, 1)
    await ring.says(move, "Ready")
    await ring.seal(move)
    if confirmed:
        await ring.says(move, "Confirmed")
    return move


async def turns(client: RpcClient) -> None:
    """Whatever was asked on this connection before has been worked on as far as it can be."""
    for _ in range(20):
        await client.request(Kind.PING, b"")


# 1: nothing is copied, sealed or confirmed before sync and look ------------------------------------------------------


ASKS: dict[str, Callable[[Target], Coroutine[None, None, object]]] = {
    "states": Target.states,
    "changes": lambda target: target.round(1),
    "messages": lambda target: target.messages(SESSION),
    "sealed": Target.sealed,
}


@pytest.mark.parametrize("what", ASKS)
async def test_an_elder_source_tells_nothing(what: str) -> None:
    """Rule 1: what a superseded container holds may not be the truth; it answers no request of a move any more."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        await target.states()
        if what == "sealed":
            await ring.seal(move)
        await ASKS[what](target)
        supersede(ring, 0)
        with pytest.raises((TryAgain, ConnectionError)):
            await ASKS[what](target)


async def test_what_is_not_durable_is_not_told() -> None:
    """Rule 1: a message on its way to the disk counts in no state, and `sealed` waits for it."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        ring[0].writer.hold()
        pending = asyncio.ensure_future(client.append(SESSION, "on its way"))
        await turns(client)
        target = Target(client, ring, move)
        states = asyncio.ensure_future(target.states())
        await turns(client)
        ring[0].writer.release()
        told = await states
        assert [state.last_seq for state in told.sessions] == [2]
        await pending
        ring[0].writer.hold()
        pending = asyncio.ensure_future(client.append(SESSION, "before the seal"))
        await turns(client)
        await ring.seal(move)
        everything = asyncio.ensure_future(target.sealed())
        await turns(client)
        assert not everything.done()
        ring[0].writer.release()
        assert await everything == rpc.ExportedAll(1, 4)
        await pending


async def test_sealed_waits_for_what_waits_for_a_segment() -> None:
    """Rule 1: looks go by while the next segment is missing, and say nothing of what is queued for it."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        await target.states()
        preparer, count = ring[0].preparer, 1
        preparer.hold()
        pending = asyncio.ensure_future(client.append(SESSION, "the first"))
        await turns(client)
        while pending.done():
            pending = asyncio.ensure_future(client.append(SESSION, f"{count} {'x' * 60_000}"))
            count += 1
            await turns(client)
        assert preparer.waiting == 1
        await ring.seal(move)
        everything = asyncio.ensure_future(target.sealed())
        await turns(client)
        too_early = everything.done()
        preparer.release()
        assert await everything == rpc.ExportedAll(1, count)
        assert not too_early
        await pending


@pytest.mark.parametrize("elder", [False, True], ids=["alone", "superseded"])
async def test_confirmed_is_said_when_it_is_durable(elder: bool) -> None:
    """Rules 1 and 4: not while CONFIRMED is on its way, and never by a target that a younger one has followed."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        target = ring[1]
        target.writer.hold()
        await ring.seal(move)
        await eventually(lambda: target.writer.waiting > 0, "CONFIRMED is on its way")
        assert target.shard.moves.confirmed == 0
        await ring.says(move, "Ready")
        if elder:
            supersede(ring, 1)
        target.writer.release()
        if elder:
            await eventually(lambda: bool(target.stopped), "the elder ends")
            await ring.says(move, "Ready")
        else:
            await ring.says(move, "Confirmed")


# 2: a seal ends by a map only ----------------------------------------------------------------------------------------


@ABORTED_OR_COMMITTED
async def test_only_a_map_ends_a_seal(committed: bool) -> None:
    """Rule 2: time, a dead target, an older map, a newer one that still shows the move: the source stays sealed."""
    async with moves_rig(3) as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        before = ring.map
        move = await sealed(ring)
        waits = asyncio.ensure_future(client.append(SESSION, "waits"))
        ring.clock.advance(86_400.0)
        if not committed:
            await ring.kill(1)
        await ring[0].shard.ownership.adopt(before)
        await ring.begin([5], 0, 2)
        await turns(client)
        assert not waits.done()
        assert ring[0].shard.ownership.sealed == {SLOT: move.id}
        assert len(await client.read_all(SESSION)) == 2
        if committed:
            await ring.commit(move)
            with pytest.raises(Moved):
                await waits
        else:
            await ring.abort(move)
            assert [ack.seq for ack in await waits] == [3]


# 3: boots of a slot that is sealed, or confirmed ---------------------------------------------------------------------


@ABORTED_OR_COMMITTED
@pytest.mark.parametrize("loss", [None, NOTHING_KEPT], ids=["kill", "power"])
async def test_a_source_boots_sealed(loss: Loss | None, committed: bool) -> None:
    """Rule 3: what its map shows sealing is read, and not written, until a map ends it."""
    async with moves_rig() as ring:
        async with await ring[0].client() as client:
            await fill(client, SESSION, 2)
        move = await sealed(ring)
        await ring.restart(0, loss=loss)
        async with await ring[0].client() as client:
            waits = asyncio.ensure_future(client.append(SESSION, "waits"))
            assert len(await client.read_all(SESSION)) == 2
            await turns(client)
            assert not waits.done()
            await ring.says(move, "Confirmed")
            if committed:
                await ring.commit(move)
                with pytest.raises(Moved):
                    await waits
            else:
                await ring.abort(move)
                assert [ack.seq for ack in await waits] == [3]


@pytest.mark.parametrize("number", [0, 1], ids=["SEALED", "CONFIRMED"])
async def test_a_boot_goes_by_no_older_map_than_its_log(number: int) -> None:
    """Rule 3: with no stored map to warn it (an elder wrote the record after we had looked), the log's epoch binds."""
    async with moves_rig() as ring:
        async with await ring[0].client() as client:
            await fill(client, SESSION, 2)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        older = ring.map
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        name = ring.names[number]
        await ring.kill(number)
        hand = ring.volumes[name].process("hand")
        for _, _, path in map_names(hand.listdir("")):
            hand.unlink(path)
        booted = await _boot_with_lagging_plane(ring, number, older, ring.map)
        assert booted == ring.map.epoch


async def _boot_with_lagging_plane(ring: MovesRig, number: int, older: RingMap, newer: RingMap) -> int:
    """Boot while the control plane still answers `older`; it learns `newer` when the boot has asked for it."""
    plane = MemoryControlPlane(ring.control.view.spec, older)
    tasks: list[asyncio.Task[None]] = []
    waited: list[str] = []

    def keep(work: Coroutine[None, None, None]) -> None:
        tasks.append(asyncio.get_running_loop().create_task(work))

    async def sleep(_: float) -> None:
        if boot.stage.reason != "StaleMap":
            await asyncio.Event().wait()  # the keeper of the term
        waited.append(boot.stage.message)
        await plane.compare_and_swap(expected=older.epoch, new=newer)

    async def unheard(_: Volume) -> None:
        """Its volume is the right one."""

    name = ring.names[number]
    boot = Boot(
        BootInputs(
            config=msgspec.structs.replace(ring.config, name=name),
            disk=ring.volumes[name].process("lagging"),
            control=plane,
            clock=RigClock(),
            entropy=random.Random(1),
            sleep=sleep,
            events=NullLogger(),
            new_volume_id="none",
            boot_id="lagging",
            keep=keep,
            announce=unheard,
        )
    )
    try:
        booted = await boot.run()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ring.volumes[name].kill("lagging")
    assert len(waited) == 1
    assert booted.ring is not None
    return booted.ring.epoch


# 4 and 6: whose confirmation, and who serves -------------------------------------------------------------------------


async def test_a_confirmation_counts_for_its_own_move_only() -> None:
    """Rules 4 and 6: an aborted move's CONFIRMED neither confirms the next one nor opens what that brought."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        first = await sealed(ring)
        await ring.abort(first)
        await client.append(SESSION, "after the abort")
        second = await ring.begin([SLOT], 0, 1)
        told = await ring.says(second, "Ready")
        assert told.state != "Confirmed"
        # No controller does this: it is what would follow if one took the first word for the second's.
        await ring.commit(second)
        assert ring[1].shard.health().reason == "MoveNotHere"
        async with await ring[1].client() as there:
            for work in (there.append(SESSION, "lost"), there.read(SESSION, after=0)):
                with pytest.raises(TryAgain, match=second.id) as refused:
                    await work
                assert refused.value.reason == "unavailable"


async def test_a_target_serves_nothing_before_the_commit() -> None:
    """Rule 6: it holds everything and has confirmed; whoever asks it is sent to the owner, also after it booted."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 2)
        move = await sealed(ring)
        for _ in range(2):
            async with await ring[1].client() as there:
                for work in (there.append(SESSION, "too early"), there.read(SESSION, after=0)):
                    with pytest.raises(Moved) as moved:
                        await work
                    assert moved.value.owner == "shard-0"
            await ring.restart(1)
        await ring.says(move, "Confirmed")
        await ring.commit(move)
        async with await ring[1].client() as there:
            assert [ack.seq for ack in await there.append(SESSION, "now")] == [3]


# 7: keys -------------------------------------------------------------------------------------------------------------


async def test_the_window_travels_as_it_is() -> None:
    """Rule 7: a key in the source's window is in the target's, one that had left it is not; boots change nothing."""
    async with moves_rig(keys_window_s=60.0) as ring:
        async with await ring[0].client() as client:
            await client.append(SESSION, "old")
            ring.clock.advance(120.0)
            ring[0].shard.memory.keys.evict(ring.clock.monotonic_s())
            await client.append(SESSION, "young")
        await ring.move([SLOT], 0, 1)
        await ring.restart(1)
        async with await ring[1].client() as there:
            [again] = await there.append(SESSION, "young")
            assert (again.seq, again.deduped) == (2, True)
            [anew] = await there.append(SESSION, "old")
            assert (anew.seq, anew.deduped) == (3, False)


# 8: clean-up ---------------------------------------------------------------------------------------------------------


async def test_a_clean_up_is_void_when_the_slots_come_back() -> None:
    """Rule 8: a map that names the shard target again keeps its copy; after an abort the grace time begins anew."""
    async with moves_rig(clean_after_s=60.0) as ring, await ring[0].client() as client:
        written = await fill(client, SESSION, 5)
        await ring.move([SLOT], 0, 1)
        moves = ring[0].shard.moves
        ring.clock.advance(61.0)
        back = await ring.begin([SLOT], 1, 0)
        moves.clean()
        await ring.says(back, "Ready")
        assert (moves.imported_messages, moves.released_slots) == (0, 0)
        await ring.abort(back)
        moves.clean()
        ring.clock.advance(59.0)
        moves.clean()
        await turns(client)
        assert moves.released_slots == 0
        await ring.move([SLOT], 1, 0)
        ring.clock.advance(600.0)
        moves.clean()
        assert [each["content"] for each in await client.read_all(SESSION)] == written
        assert moves.released_slots == 0


async def test_a_clean_up_of_many_sessions_is_done_in_pieces() -> None:
    """Dropping them from memory must not hold up appends to other slots: the next call takes what this one left."""
    slots = [SLOT, SLOT + 1, SLOT + 2]
    async with moves_rig(clean_after_s=60.0) as ring, await ring[0].client() as client:
        await ring.move(slots, 0, 1)
        sessions = ring[0].shard.memory.sessions
        for number in range(SLOTS * RELEASE_SESSIONS * 9 // 20):
            if slot_of(SessionId(name := f"cold-{number}"), SLOTS) in slots:
                sessions.get(name)
        moves = ring[0].shard.moves
        ring.clock.advance(61.0)
        for released in (2, 3, 3):
            moves.clean()
            await turns(client)
            await eventually(partial(_has_released, moves, released), f"{released} slots are released")
        assert not sessions.hot_of(slots)
        assert (await client.append(session_in(SLOT + 3), "others go on"))[0].seq == 1


def _has_released(moves: Moves, slots: int) -> bool:
    return moves.released_slots == slots


async def test_a_clean_up_on_its_way_spares_what_comes_after_it() -> None:
    """Rule 8: the record's position decides; an import that begins before it is durable stands behind it."""
    async with moves_rig(clean_after_s=0.0) as ring:
        async with await ring[0].client() as client:
            written = await fill(client, SESSION, 5)
        await ring.move([SLOT], 0, 1)
        ring[0].writer.hold()
        ring[0].shard.moves.clean()
        back = await ring.begin([SLOT], 1, 0)
        async with await ring[1].client() as client:
            await turns(client)  # as far as an import can come that does not wait
        assert ring[0].shard.moves.released_slots == 0
        ring[0].writer.release()
        await ring.says(back, "Ready")
        assert ring[0].shard.moves.released_slots == 1
        await ring.seal(back)
        await ring.says(back, "Confirmed")
        await ring.commit(back)
        for _ in range(2):
            async with await ring[0].client() as client:
                assert [each["content"] for each in await client.read_all(SESSION)] == written
            await ring.restart(0)


# 9: the queue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "value"), [("HELD_REQUESTS_MAX", 2), ("HELD_BYTES_MAX", 300)])
async def test_a_full_queue_refuses_and_lets_nobody_overtake(
    bound: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 9: TRY_AGAIN moving for what does not fit and for all behind it in its slot; what waits keeps its order."""
    monkeypatch.setattr(held, bound, value)
    async with moves_rig() as ring, await ring[0].client() as client:
        move = await sealed(ring)
        waits = [asyncio.ensure_future(client.append(SESSION, f"waits {number}")) for number in range(2)]
        await turns(client)
        count = ring[0].shard.ownership.held.count
        assert count >= 1
        for _ in range(2):
            with pytest.raises(TryAgain) as refused:
                await client.append(SESSION, "x" * 200)
            assert refused.value.reason == "moving"
        with pytest.raises(TryAgain):
            await client.append(session_in(SLOT, number=1), "x" * 200)
        assert ring[0].shard.ownership.held.refused == 3
        await ring.abort(move)
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert [each[0].seq for each in done if isinstance(each, list)] == list(range(1, count + 1))
        assert all(isinstance(each, list | TryAgain) for each in done)
        assert (await client.append(SESSION, "x" * 200))[0].seq == count + 1


@ABORTED_OR_COMMITTED
async def test_a_retry_joins_what_waits(committed: bool) -> None:
    """Rule 9: by another connection, at the same place in the queue; both are answered, one message is written."""
    async with moves_rig() as ring, await ring[0].client() as client, await ring[0].client() as other:
        move = await sealed(ring)
        first = asyncio.ensure_future(client.append(SESSION, "one"))
        await turns(client)
        second = asyncio.ensure_future(client.append(SESSION, "two"))
        await turns(client)
        retry = asyncio.ensure_future(other.append(SESSION, "one"))
        await turns(other)
        assert ring[0].shard.ownership.held.count == 2
        if committed:
            await ring.commit(move)
            told = await asyncio.gather(first, second, retry, return_exceptions=True)
            assert [type(each) for each in told] == [Moved] * 3
        else:
            await ring.abort(move)
            assert [(await each)[0].seq for each in (first, second, retry)] == [1, 2, 1]
