"""What a source answers a target, and what it refuses: a pass, the rounds after it, the end (docs/moves.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Invalid, TryAgain
from fleetlm_shard import exporter
from fleetlm_shard.keys import KEY_AGE_S_MIN
from tests.support.movesrig import moves_rig, session_in
from tests.support.movetarget import Target
from tests.test_shard.test_moves import fill
from tests.test_shard.test_moves_faults import bulk
from tests.test_shard.test_moves_rules import turns
from tests.test_shard.test_replay import trim

SLOT = 3
SESSIONS = sorted(session_in(SLOT, number=number) for number in range(5))


async def refused(answer: Coroutine[None, None, object], field: str, *, reason: str = "unknown_round") -> None:
    """As one that asks for what this source does not know any more: it begins anew."""
    with pytest.raises(Invalid) as error:
        await answer
    assert (error.value.field, error.value.reason) == (field, reason)


async def test_rounds_follow_a_pass() -> None:
    """Each tells what changed since the one before was answered; one that may not have arrived is answered again."""
    async with moves_rig() as ring, await ring[0].client() as client:
        for session in SESSIONS[:2]:
            await fill(client, session, 1)
        await ring.kill(1)
        target = Target(client, ring, await ring.begin([SLOT], 0, 1))
        await refused(target.round(1), "reader")
        first = await target.states(limit=1)
        assert first.more
        await refused(target.round(1), "round")
        second = await target.states(after=first.after)
        assert [state.session for state in (*first.sessions, *second.sessions)] == SESSIONS[:2]
        assert not second.more
        await refused(target.round(0), "round")
        await refused(target.round(2), "round")
        assert await target.round(1) == ([], False)
        await client.append(SESSIONS[0], "changed")
        assert await target.round(1) == (SESSIONS[:1], False)
        await client.append(SESSIONS[1], "changed")
        assert await target.round(1) == (SESSIONS[:2], False)
        assert await target.round(2) == ([], False)
        await refused(target.round(1), "round")


async def test_a_page_of_a_pass_is_never_empty_nor_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a target asks for."""
    monkeypatch.setattr(exporter, "STATES_MAX", 2)
    async with moves_rig() as ring, await ring[0].client() as client:
        for session in SESSIONS:
            await fill(client, session, 1)
        await ring.kill(1)
        target = Target(client, ring, await ring.begin([SLOT], 0, 1))
        for limit, count in ((-1, 1), (0, 1), (1, 1), (2, 2), (1000, 2)):
            page = await target.states(limit=limit)
            assert ([state.session for state in page.sessions], page.more) == (SESSIONS[:count], True)


async def test_a_move_that_the_map_does_not_show_is_refused() -> None:
    """It is over, or another shard's."""
    async with moves_rig() as ring, await ring[0].client() as client:
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, msgspec.structs.replace(move, id="1.7"))
        await refused(target.states(), "move", reason="unknown_move")
        await ring.abort(move)
        await refused(Target(client, ring, move).states(), "move", reason="unknown_move")


async def test_a_session_that_somebody_asked_for_and_that_is_not_there_does_not_count() -> None:
    """It is in the source's memory only."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSIONS[0], 1)
        assert await client.read_all(SESSIONS[1]) == []
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        await target.states()
        await ring.seal(move)
        assert await target.sealed() == rpc.ExportedAll(1, 1)


async def test_a_state_says_where_its_session_begins() -> None:
    """With its first message, with what retention left, or behind its last one when nothing is left."""
    whole, trimmed, gone, empty = SESSIONS[:4]
    async with moves_rig(retention_bytes=1, keys_window_s=KEY_AGE_S_MIN) as ring, await ring[0].client() as client:
        await fill(client, gone, 3)
        await bulk(client, trimmed, 200)
        await trim(ring[0])
        await fill(client, whole, 2)
        await client.create(empty, b"{}")
        earliest_seq = (await client.info(trimmed)).earliest_seq
        assert 1 < earliest_seq <= 200
        await ring.kill(1)
        target = Target(client, ring, await ring.begin([SLOT], 0, 1))
        page = await target.states()
        told = {state.session: (state.earliest_seq, state.last_seq) for state in page.sessions}
        assert told == {whole: (1, 2), trimmed: (earliest_seq, 200), gone: (4, 3), empty: (1, 0)}


async def test_a_full_round_is_answered_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer than one; what else changed comes with those after it."""
    monkeypatch.setattr(exporter, "STATES_MAX", 2)
    async with moves_rig() as ring, await ring[0].client() as client:
        await ring.kill(1)
        target = Target(client, ring, await ring.begin([SLOT], 0, 1))
        await target.states()
        for session in SESSIONS:
            await fill(client, session, 1)
        assert await target.round(1) == (SESSIONS[:2], True)
        assert await target.round(1) == (SESSIONS[:2], True)
        assert await target.round(2) == (SESSIONS[2:4], True)
        assert await target.round(3) == (SESSIONS[4:], False)


async def test_a_reader_takes_nothing_away_from_a_younger_one() -> None:
    """The elder of two containers of the target still asks: it is refused, and the younger misses no change."""
    async with moves_rig() as ring, await ring[0].client() as client:
        for session in SESSIONS[:2]:
            await fill(client, session, 1)
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        page = await target.states("elder", limit=1)
        await target.states("younger")
        await client.append(SESSIONS[0], "changed")
        await refused(target.states("elder", after=page.after), "reader")
        await refused(target.round(1, "elder"), "reader")
        assert await target.round(1, "younger") == (SESSIONS[:1], False)
        await ring.seal(move)
        await refused(target.sealed("elder"), "reader")
        assert await target.sealed("younger") == rpc.ExportedAll(2, 3)


async def test_how_much_there_is_is_said_after_the_whole_pass_only() -> None:
    """Before it nobody was told of every session."""
    async with moves_rig() as ring, await ring[0].client() as client:
        for session in SESSIONS:
            await fill(client, session, 1)
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        await target.states(limit=1)
        await ring.seal(move)
        await refused(target.sealed(), "reader")
        await target.states()
        assert await target.sealed() == rpc.ExportedAll(5, 5)


async def test_who_waits_for_the_seal_is_told_that_the_move_is_over() -> None:
    """Not that it is sealed."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await ring.kill(1)
        move = await ring.begin([SLOT], 0, 1)
        target = Target(client, ring, move)
        await target.states()
        waiting = asyncio.ensure_future(target.sealed())
        await turns(client)
        assert not waiting.done()
        await ring.abort(move)
        with pytest.raises(TryAgain) as over:
            await waiting
        assert over.value.reason == "moving"
        assert not ring[0].shard.memory.sessions.watched, "changes are noted for nobody"


async def test_a_seal_is_written_once() -> None:
    """However many maps show it."""
    async with moves_rig() as ring, await ring[0].client() as client:
        await fill(client, SESSIONS[0], 1)
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        for _ in range(2):
            await ring.swap(moves=ring.map.moves)
        await turns(client)
        assert ring[0].shard.moves.exporter.seals == 1
