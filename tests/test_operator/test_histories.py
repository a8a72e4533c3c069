"""In any order: whoever dies, fails, looks late, changes his mind or forgets somebody, it ends as people asked for.

What each operation does by itself: `test_moving.py`, `test_forgetting.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetlm_common.control import Forgotten, Pin, shard_names
from fleetlm_common.ids import ShardName, Slot
from fleetlm_operator.memory import BACKOFF_MAX_S
from tests.test_operator.playedring import PlayedController, PlayedRing
from tests.test_operator.test_moving import name, step, the_map

Event = Callable[[PlayedRing, list[PlayedController]], None]

ORDINALS = st.integers(0, 6)


def _shard_acts(ordinal: int) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        if name(ordinal) in ring.shards:
            ring.shards[name(ordinal)].act()

    return happen


def _shard_dies(ordinal: int) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        if name(ordinal) in ring.shards:
            ring.shards[name(ordinal)].stop()

    return happen


def _shard_comes_back(ordinal: int) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        if name(ordinal) in ring.shards:
            ring.shards[name(ordinal)].start()

    return happen


def _target_fails(which: int) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        moves = () if ring.map is None else ring.map.moves
        for move in moves[which : which + 1]:
            if move.id not in ring.shards[move.target].confirmed:
                ring.shards[move.target].failed.add(move.id)

    return happen


def _controller(which: int, doing: str) -> Event:
    def happen(_: PlayedRing, controllers: list[PlayedController]) -> None:
        controller = controllers[which]
        if doing in {"look", "both"}:
            controller.look()
        if doing in {"act", "both"}:
            controller.act()
        if doing == "crash":
            controller.crash()

    return happen


def _asks(shards: int, cordoned: list[int], pins: list[tuple[int, int, int]]) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        ring.ask(
            shards=shards,
            cordoned=tuple(map(name, cordoned)),
            pins=tuple(Pin(Slot(min(one, two)), Slot(max(one, two)), name(shard)) for one, two, shard in pins),
        )

    return happen


def _nodes_are_cordoned(avoided: list[int]) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        ring.avoided = tuple(map(name, avoided))

    return happen


def _people_forget(ordinal: int) -> Event:
    """Rightly or not: they may be wrong about who is dead."""

    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        member = None if ring.map is None else ring.map.member(name(ordinal))
        if member is not None:
            ring.ask(forgotten=(*ring.spec.forgotten, Forgotten(member.name, member.volume_id)))

    return happen


def _a_volume_is_gone(ordinal: int) -> Event:
    """Of a shard that is no member: a member's would be given up, or forgotten."""

    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        known = name(ordinal) in ring.shards and ring.map is not None
        if known and ring.map is not None and ring.map.member(name(ordinal)) is None:
            ring.shards[name(ordinal)].renew()

    return happen


def _everybody_gets_on(times: int) -> Event:
    def happen(ring: PlayedRing, controllers: list[PlayedController]) -> None:
        for _ in range(times):
            step(ring, controllers[0])

    return happen


def _time_passes(seconds: float) -> Event:
    def happen(ring: PlayedRing, _: list[PlayedController]) -> None:
        ring.now_s += seconds

    return happen


SLOTS = 20
EVENTS = st.one_of(
    st.builds(_shard_acts, ORDINALS),
    st.builds(_shard_acts, ORDINALS),
    st.builds(_shard_dies, ORDINALS),
    st.builds(_shard_comes_back, ORDINALS),
    st.builds(_target_fails, st.integers(0, 3)),
    st.builds(_controller, st.integers(0, 1), st.sampled_from(["look", "act", "both", "both", "crash"])),
    st.builds(
        _asks,
        st.integers(1, 7),
        st.lists(ORDINALS, max_size=2, unique=True),
        st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1), ORDINALS), max_size=2),
    ),
    st.builds(_nodes_are_cordoned, st.lists(ORDINALS, max_size=7, unique=True)),
    st.builds(_people_forget, ORDINALS),
    st.builds(_a_volume_is_gone, ORDINALS),
    st.builds(_everybody_gets_on, st.integers(1, 4)),
    st.builds(_time_passes, st.sampled_from([0.5, 3.0, 20.0])),
)


@settings(max_examples=120, deadline=None)
@example(2, [_asks(1, [], []), _controller(0, "both"), _asks(1, [0], [])])
@given(st.integers(1, 5), st.lists(EVENTS, max_size=60))
def test_any_history_ends_as_people_asked_for(shards: int, events: list[Event]) -> None:
    """Whoever dies, fails, looks late or changes his mind: no rule is broken, and with peace the ring is even."""
    ring = PlayedRing(shards=shards, slots=SLOTS)
    controllers = [PlayedController(ring), PlayedController(ring)]
    ring.settle(controllers)
    for happen in events:
        ring.run_processes()
        happen(ring, controllers)
    for shard in ring.shards.values():
        shard.start()
    ring.now_s += BACKOFF_MAX_S
    wanted = shard_names(ring.spec)
    eligible = [each for each in wanted if each not in ring.spec.cordoned]
    ring.settle(controllers)
    assert not the_map(ring).moves
    assert [each for each in wanted if the_map(ring).member(each) is None] == []
    if not eligible:
        return
    assert {member.name for member in the_map(ring).members} == set(wanted)
    assert_as_asked(ring, eligible, ring.without_new())
    ring.avoided = ()
    ring.settle(controllers)
    assert_as_asked(ring, eligible, set())


def assert_as_asked(ring: PlayedRing, eligible: list[ShardName], avoided: set[ShardName]) -> None:
    """Pins are kept, and all who may get slots have as many, within one; who may not has no more than they."""
    pinned = {slot: pin.shard for pin in ring.spec.pins for slot in range(pin.first, pin.last + 1)}
    owners = [found.owner for found in the_map(ring).owners()]
    assert all(owners[slot] == shard for slot, shard in pinned.items() if shard in set(eligible) - avoided)
    owned = Counter(owners)
    at_least = Counter(shard for shard in pinned.values() if shard in eligible)
    lowest = min(owned[each] for each in eligible if each not in avoided)
    assert all(owned[each] <= max(lowest + 1, at_least[each]) for each in eligible)
    assert set(owners) <= set(eligible)
