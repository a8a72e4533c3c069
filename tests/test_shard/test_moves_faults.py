"""Moves that meet trouble: a full disk, a source that is away or that forgets, damage and retention (docs/moves.md)."""

from __future__ import annotations

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_shard.records import message_body
from tests.support.eventually import eventually
from tests.support.logkit import AT_US, message
from tests.support.movesrig import MovesRig, moves_rig, session_in
from tests.support.rpcclient import RpcClient, draft
from tests.support.scriptedsource import ScriptedSource, scripted_source
from tests.support.shardrig import CONFIG
from tests.support.simdisk import SimVolume
from tests.test_shard.test_moves import fill
from tests.test_shard.test_replay import forget, trim

SLOT = 3
SESSION = session_in(SLOT)
OWN = 5
MIB = 1024 * 1024


async def whole(ring: MovesRig, number: int, session: str, count: int) -> None:
    """The session is there, from its first message to its last."""
    async with await ring[number].client() as client:
        assert [each["seq"] for each in await client.read_all(session)] == list(range(1, count + 1))


async def bulk(client: RpcClient, session: str, count: int) -> None:
    """Messages of 50 kB each."""
    for number in range(count):
        await client.append(session, f"{number} " + "x" * 50_000)


async def test_a_full_target_gives_up_and_leaves_its_clients_their_space() -> None:
    """Failed `disk_full`, the source serves on; with more space the next move goes on from what is there."""
    async with moves_rig(own={1: {"disk_reserve_bytes": MIB}}) as ring, await ring[0].client() as client:
        await ring.move([OWN], 0, 1)
        volume = ring.volumes[ring.names[1]]
        volume.capacity_bytes = volume.used_bytes() + 4 * CONFIG.segment_bytes
        await bulk(client, SESSION, 400)
        move = await ring.begin([SLOT], 0, 1)
        told = await ring.says(move, "Failed")
        assert told.reason == "disk_full"
        assert "bytes are free" in told.message
        assert ring[1].shard.moves.failed == 1
        assert 0 < ring[1].shard.moves.imported_messages < 400
        async with await ring[1].client() as there:
            await bulk(there, session_in(OWN), 100)
            assert ring[1].shard.health().reason == "Ready"
        await ring.abort(move)
        assert (await client.append(SESSION, "here"))[0].seq == 401
        before = ring[1].shard.moves.imported_messages
        volume.capacity_bytes = SimVolume().capacity_bytes
        # Its last look at the free space was its last round.
        async with await ring[1].client() as there:
            await there.append(session_in(OWN), "another round")
        await ring.move([SLOT], 0, 1)
        assert ring[1].shard.moves.imported_messages == 401
        assert before < 400
        await whole(ring, 1, SESSION, 401)


async def test_a_target_that_is_full_when_it_becomes_the_owner_is_read() -> None:
    """Somebody else took the space behind the confirmation: reads go on there, appends hear `disk_full`."""
    async with moves_rig(own={1: {"disk_reserve_bytes": MIB}}) as ring:
        async with await ring[0].client() as client:
            await fill(client, SESSION, 5)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        volume = ring.volumes[ring.names[1]]
        volume.capacity_bytes = volume.used_bytes() + MIB // 2
        await ring[1].shard.log.look()
        assert ring[1].shard.health().reason == "DiskFull"
        await ring.commit(move)
        await whole(ring, 1, SESSION, 5)
        async with await ring[1].client() as there:
            with pytest.raises(TryAgain) as refused:
                await there.append(SESSION, "no room")
            assert refused.value.reason == "disk_full"


async def test_a_source_that_is_away_is_waited_for() -> None:
    """`Copying` with the reason `unreachable`; when it is back the move goes on by itself."""
    async with moves_rig() as ring:
        async with await ring[0].client() as client:
            await fill(client, SESSION, 5)
        await ring.kill(0)
        move = await ring.begin([SLOT], 0, 1)

        def away() -> bool:
            told = ring.progress(move)
            return told is not None and (told.state, told.reason) == ("Copying", "unreachable")

        await eventually(away, "the target says that it cannot reach the source")
        await ring.start(0)
        await ring.says(move, "Ready")
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        await ring.commit(move)
        await whole(ring, 1, SESSION, 5)


async def test_changes_are_told() -> None:
    """What changes while it is copied comes with the rounds: it need not be found out by count and sum."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await client.append(SESSION, "one more")
        await client.append(session_in(SLOT, number=1), "a new one")
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        assert ring[1].shard.moves.mismatches == 0


async def test_a_mismatch_is_healed_by_a_new_pass() -> None:
    """A change that was never told: nothing is confirmed before the target holds it; the metric says that it was so."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        source = ring[0].shard.moves.exporter.trackers[move.id]
        ring[0].shard.memory.sessions.watched.clear()
        await client.append(SESSION, "never told")
        await client.append(session_in(SLOT, number=1), "nor this")
        assert not source.dirty
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        assert ring[1].shard.moves.mismatches == 1
        await ring.commit(move)
        await whole(ring, 1, SESSION, 4)
        await whole(ring, 1, session_in(SLOT, number=1), 1)


async def test_a_mismatch_that_stays_ends_the_move() -> None:
    """Failed `mismatch`: nobody takes over what cannot be shown to be whole."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSION, 3)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        ring[0].shard.moves.exporter.trackers[move.id].told["nobody has it"] = 7
        await ring.seal(move)
        told = await ring.says(move, "Failed")
        assert told.reason == "mismatch"
        await ring.abort(move)
        assert (await client.append(SESSION, "here"))[0].seq == 4


async def test_a_source_from_a_backup_is_not_believed() -> None:
    """It holds less than it has told: Failed `diverged`, whatever is there stays where it is."""
    async with moves_rig() as ring:
        name = ring.names[0]
        async with await ring[0].client() as client:
            await fill(client, SESSION, 3)
            backup = ring.volumes[name].copy()
            await client.append(SESSION, "after the backup")
            move = await ring.begin([SLOT], 0, 1)
            await ring.says(move, "Ready")
            await ring.abort(move)
        await ring.kill(0)
        ring.volumes[name] = backup
        for process in backup.processes():
            backup.kill(process)
        await ring.start(0)
        move = await ring.begin([SLOT], 0, 1)
        assert (await ring.says(move, "Failed")).reason == "diverged"
        await whole(ring, 0, SESSION, 3)


async def test_what_retention_dropped_stays_dropped() -> None:
    """A trimmed beginning travels: the same gap, the same earliest seq, the same messages, also after a boot."""
    async with moves_rig(retention_bytes=1, keys_window_s=15.0) as ring:
        async with await ring[0].client() as client:
            await fill(client, session_in(SLOT, number=1), 3)
            await bulk(client, SESSION, 200)
            await trim(ring[0])
            gone = session_in(SLOT, number=1)
            for session in (SESSION, gone):
                forget(ring[0], session)
            before = [await page(client, session) for session in (SESSION, gone)]
            assert before[0].gap is not None
            assert before[1].gap == rpc.Gap("trimmed", 1, 4, 4, 3)
        await ring.move([SLOT], 0, 1)
        for _ in range(2):
            async with await ring[1].client() as there:
                assert [await page(there, session) for session in (SESSION, gone)] == before
            await ring.restart(1)
        async with await ring[1].client() as there:
            assert (await there.append(gone, "goes on"))[0].seq == 4


async def test_damage_stays_said() -> None:
    """A message that is unreadable at the source is missing at the target: a gap there, its neighbours whole."""
    async with moves_rig() as ring:
        source = ring.volumes[ring.names[0]]
        async with await ring[0].client() as client:
            await client.append_entries(SESSION, *(rpc.Entry([draft(f"text-{number}-")]) for number in range(1, 11)))
            [path] = [path for path in source.paths() if path.endswith(".seg") and b"text-5-" in source.read(path)]
            source.flip(path, source.read(path).index(b"text-5-"))
            forget(ring[0], SESSION)
            await ring.move([SLOT], 0, 1)
        for _ in range(2):
            async with await ring[1].client() as there:
                first = await there.read(SESSION, after=0)
                assert (first.first_seq, len(first.messages), first.has_more) == (1, 4, True)
                rest = await there.read(SESSION, after=4)
                assert rest.gap is not None
                assert (rest.gap.reason, rest.gap.from_seq, rest.gap.next_seq) == ("damaged", 5, 6)
                assert (rest.first_seq, len(rest.messages), rest.last_seq) == (6, 5, 10)
            await ring.restart(1)


async def page(client: RpcClient, session: str) -> rpc.Page:
    """The first page from the beginning."""
    return await client.read(session, after=0, limit=5)


# A source that a test plays -------------------------------------------------------------------------------------------


def state(session: str, last_seq: int) -> rpc.SessionState:
    """As a source shows it."""
    return rpc.SessionState(session, last_seq, 1, AT_US, b"{}", {})


def bodies(session: str, first: int, last: int) -> rpc.ExportedMessages:
    """Messages `first` to `last`."""
    found = [message_body(message(session, seq)) for seq in range(first, last + 1)]
    return rpc.ExportedMessages(found, [True] * len(found), more=False)


async def test_small_sessions_cost_a_fraction_of_a_request() -> None:
    """40 sessions of two messages come with five requests, whose parts are told apart by their order."""
    names = sorted(session_in(SLOT, number=number) for number in range(40))

    def pages(request: rpc.ExportMessages) -> rpc.ExportedMessages:
        others = [bodies(session, after + 1, 2) for session, after in request.others]
        return msgspec.structs.replace(bodies(request.session, request.after + 1, 2), others=others)

    script = ScriptedSource([state(name, 2) for name in names], pages)
    async with moves_rig() as ring, scripted_source(ring, script) as source:
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        assert ring[1].shard.moves.imported_messages == 80
        assert len(source.asked) == 5
        assert sorted(name for each in source.asked for name in (each.session, *dict(each.others))) == names


async def test_a_source_of_the_version_before_is_asked_for_each_session() -> None:
    """It answers the first of the sessions that it is asked for; nothing is missing, nothing comes twice."""
    names = sorted(session_in(SLOT, number=number) for number in range(10))
    async with moves_rig() as ring:
        elder = ScriptedSource([state(name, 3) for name in names], lambda request: bodies(request.session, 1, 3))
        async with scripted_source(ring, elder) as source:
            move = await ring.begin([SLOT], 0, 1)
            await ring.says(move, "Ready")
            assert ring[1].shard.moves.imported_messages == 30
            assert sorted(each.session for each in source.asked) == names


async def test_messages_that_are_beyond_the_state_end_a_session() -> None:
    """All up to the state is lost at the source, and more than a page came after it: that comes with a round."""
    async with moves_rig() as ring:
        grown = ScriptedSource([state(SESSION, 5)], lambda _: msgspec.structs.replace(bodies(SESSION, 6, 9), more=True))
        async with scripted_source(ring, grown) as source:
            move = await ring.begin([SLOT], 0, 1)
            await ring.says(move, "Ready")
            assert len(source.asked) == 1
            assert ring[1].shard.moves.imported_messages == 0


async def test_a_source_that_answers_more_than_it_was_asked_is_not_believed() -> None:
    """Whose messages would they be? The target says so, and asks again."""

    def pages(request: rpc.ExportMessages) -> rpc.ExportedMessages:
        return msgspec.structs.replace(bodies(request.session, 1, 1), others=[bodies(SESSION, 1, 1)])

    async with moves_rig() as ring, scripted_source(ring, ScriptedSource([state(SESSION, 1)], pages)):
        move = await ring.begin([SLOT], 0, 1)

        def refused() -> bool:
            told = ring.progress(move)
            return told is not None and "more sessions than it was asked for" in told.message

        await eventually(refused, "the target refuses the answer")
