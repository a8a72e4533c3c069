"""Hot state: a budget that is kept, and nothing lost by leaving memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fleetlm_common.errors import Invalid
from fleetlm_common.ids import SessionId, Slot
from fleetlm_shard.log_types import CheckpointRow, Damage
from fleetlm_shard.sessions import EVICT_HELD_MAX, RING_BYTES_MAX, RING_MESSAGES_MAX, SESSION_BYTES, Sessions
from tests.support.shardrig import shard_rig

MIB = 1024 * 1024


class Rows:
    """A checkpoint in a dict."""

    def __init__(self) -> None:
        self.stored: dict[str, CheckpointRow] = {}
        self.damaged: list[Damage] = []

    @property
    def damage(self) -> Sequence[Damage]:
        return self.damaged

    def row(self, session: str, /) -> CheckpointRow | None:
        return self.stored.get(session)

    def released_pos(self, _: int, /) -> int:
        return 0


def make(bytes_max: int = MIB) -> tuple[Sessions, Rows]:
    rows = Rows()
    return Sessions(slot_of=lambda _: Slot(0), rows=rows, bytes_max=bytes_max), rows


def add(sessions: Sessions, ident: str, count: int = 1, *, size: int = 100, pos: int = 1) -> None:
    session = sessions.get(ident)
    for _ in range(count):
        session.seq_assigned += 1
        sessions.message_durable(session, seq=session.seq_assigned, pos=pos, at_us=5, json=b"x" * size)


def test_rings_are_bounded_in_messages_and_bytes() -> None:
    """The newest stay, contiguous, whatever their size."""
    sessions, _ = make(100 * MIB)
    add(sessions, "many", RING_MESSAGES_MAX + 10, size=10)
    add(sessions, "large", 40, size=50_000)
    many, large = sessions.get("many"), sessions.get("large")
    assert (len(many.ring), many.ring_first_seq, many.seq_durable) == (RING_MESSAGES_MAX, 11, RING_MESSAGES_MAX + 10)
    assert large.ring_bytes <= RING_BYTES_MAX
    assert large.ring_first_seq + len(large.ring) == 41


def test_the_budget_is_kept_and_changed_sessions_are_not_forgotten() -> None:
    """Past the budget messages leave memory; a session that changed since the checkpoint stays, with its seq."""
    sessions, rows = make(50 * SESSION_BYTES)
    for number in range(200):
        add(sessions, f"s{number}", 3)
        sessions.evict()
    assert len(sessions) == 200, "nothing may leave before a checkpoint has it"
    assert all(session.last_seq_logged == 3 for session in sessions.all_hot())
    changed = sessions.changed_now()
    rows.stored = {session.id: session.row() for session in changed}
    sessions.checkpointed(changed, pos=2)
    for _ in range(10):
        sessions.evict()
    assert sessions.bytes <= 50 * SESSION_BYTES
    assert len(sessions) < 60
    assert sessions.evicted > 100
    assert all(sessions.get(f"s{number}").seq_durable == 3 for number in range(200))


def test_held_sessions_cost_little_and_hide_nobody() -> None:
    """Before a checkpoint thousands may be held: a call passes a few of them, and gets beyond them in the end."""
    sessions, rows = make(10 * SESSION_BYTES)
    for number in range(200):
        add(sessions, f"held{number}")
    add(sessions, "free")
    for _ in range(60):
        sessions.evict()  # their messages go first
    rows.stored = {"free": sessions.get("free").row()}
    sessions.checkpointed([sessions.get("free")], pos=2)
    calls = 0
    while not sessions.evicted:
        sessions.evict()
        calls += 1
    assert len(sessions) == 200
    assert 190 // EVICT_HELD_MAX <= calls <= 200 // EVICT_HELD_MAX + 1


def test_a_session_that_changed_during_the_checkpoint_stays_changed() -> None:
    """Its row in that checkpoint may be too old: the next one must have it."""
    sessions, _ = make()
    add(sessions, "early", pos=1)
    add(sessions, "late", pos=10)
    sessions.checkpointed(sessions.changed_now(), pos=10)
    assert [session.id for session in sessions.changed_now()] == ["late"]


@pytest.mark.parametrize("hold", ["pending", "subscribers"])
def test_who_is_held_stays(hold: str) -> None:
    """A session that is being written or listened to never leaves: its object is the one that advances."""
    sessions, _ = make(SESSION_BYTES)
    session = sessions.get("s")
    if hold == "pending":
        session.pending = 1
    else:
        session.subscribers.append(None)  # type: ignore[arg-type]
    for number in range(100):
        sessions.get(f"other{number}")
        sessions.evict()
    assert sessions.get("s") is session


def test_seqs_go_on_behind_what_damage_may_have_hidden() -> None:
    """Unnamed lost messages are counted for sessions whose last record lies before them, and for no others."""
    sessions, rows = make()
    rows.damaged = [Damage(100, 200, 7)]
    rows.stored = {
        "before": CheckpointRow(0, 1, 10, 5, 50, 1, b"{}", {}),
        "after": CheckpointRow(0, 1, 10, 5, 300, 1, b"{}", {}),
    }
    assert sessions.get("before").seq_durable == 12
    assert sessions.get("before").row().last_seq == 5, "a checkpoint keeps what is known; the damage is counted at load"
    assert sessions.get("after").seq_durable == 5
    assert sessions.get("before").ring_first_seq == 13


def test_hits_and_misses_are_counted() -> None:
    """The gauges that a budget is judged by."""
    sessions, _ = make()
    sessions.get("s")
    sessions.get("s")
    assert sessions.hot(SessionId("t")) is None
    assert (sessions.hits, sessions.misses) == (1, 1)
    with pytest.raises(Invalid):
        sessions.get("")
    assert len(sessions) == 1


def test_names_merge_the_checkpoint_with_what_changed_since() -> None:
    """Ascending, each once, from behind `after`, as many as asked for."""
    sessions, _ = make()
    for ident in ("b", "d", "e"):
        add(sessions, ident)
    assert sessions.names("a", 10, ["a1", "b", "c"]) == ["a1", "b", "c", "d", "e"]
    assert sessions.names("b", 2, ["c"]) == ["c", "d"]


async def test_evicted_sessions_come_back_whole() -> None:
    """With a tiny budget every session is reloaded again and again, with seqs, cursors, metadata and messages."""
    async with shard_rig(hot_bytes_max=MIB) as rig, await rig.client() as client:
        for number in range(30):
            await client.create(f"s{number}", b'{"number":%d}' % number)
            for text in ("one", "two"):
                await client.append(f"s{number}", text + "x" * 20_000, key=text)
            await client.mark_read(f"s{number}", "bob", 1)
        assert await rig.shard.upkeep.checkpoint()
        for number in range(300):
            await client.info(f"other{number}")
            rig.shard.memory.sessions.evict()
        for _ in range(20):
            rig.shard.memory.sessions.evict()
        assert rig.shard.memory.sessions.bytes <= MIB
        for number in range(30):
            info = await client.info(f"s{number}")
            assert (info.last_seq, info.metadata) == (2, b'{"number":%d}' % number)
            assert await client.mark_read(f"s{number}", "bob", 0) == 1
            assert [message["seq"] for message in await client.read_all(f"s{number}")] == [1, 2]
            [again] = await client.append(f"s{number}", "two" + "x" * 20_000, key="two")
            assert (again.seq, again.deduped) == (2, True)
            assert [ack.seq for ack in await client.append(f"s{number}", "three")] == [3]
