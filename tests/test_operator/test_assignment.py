"""Slots are spread evenly, and no slot moves that need not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.ids import ShardName
from fleetlm_operator.assignment import assign, moves_needed

Owners = list[ShardName | None]


def names(count: int, start: int = 0) -> list[ShardName]:
    return [ShardName(f"shard-{ordinal}") for ordinal in range(start, start + count)]


@st.composite
def rings(draw: st.DrawFn) -> tuple[Owners, list[ShardName]]:
    """Any owners, of any members past and present, and any members to come."""
    past = st.one_of(st.none(), st.sampled_from(names(7)))
    owners = draw(st.lists(past, min_size=1, max_size=64))
    members = draw(st.lists(st.sampled_from(names(9)), min_size=1, max_size=9, unique=True))
    return owners, members


def fewest_moves(owners: Owners, members: list[ShardName]) -> int:
    """The lower bound, found another way: whoever may hold the one more is tried as a choice by holdings."""
    held = Counter(owner for owner in owners if owner is not None)
    share, extra = divmod(len(owners), len(members))
    kept_at_share = sum(min(held[member], share) for member in members)
    kept_above = min(extra, sum(held[member] > share for member in members))
    return len(owners) - kept_at_share - kept_above


@given(rings())
def test_every_member_gets_its_share(ring: tuple[Owners, list[ShardName]]) -> None:
    """Counts differ by one at the most, and only members own anything."""
    owners, members = ring
    counts = Counter(assign(owners, members))
    assert set(counts) <= set(members)
    assert max(counts[member] for member in members) - min(counts[member] for member in members) <= 1
    assert sum(counts.values()) == len(owners)


@given(rings())
def test_nothing_moves_that_need_not(ring: tuple[Owners, list[ShardName]]) -> None:
    """As few slots change their owner as any even spread allows: for joining, leaving and cordoned shards alike."""
    owners, members = ring
    changed = sum(now != then for now, then in zip(owners, assign(owners, members), strict=True))
    assert changed == fewest_moves(owners, members)


@given(rings())
def test_an_assignment_is_its_own_assignment(ring: tuple[Owners, list[ShardName]]) -> None:
    """A controller that comes after has nothing to change."""
    owners, members = ring
    once = assign(owners, members)
    assert assign(once, members) == once
    assert moves_needed(once, members) == 0


@given(rings(), st.data())
def test_a_plan_that_is_half_done_ends_where_it_was_going(
    ring: tuple[Owners, list[ShardName]], data: st.DataObject
) -> None:
    """Any other controller continues with as many moves as are left, whatever part was done."""
    owners, members = ring
    goal = assign(owners, members)
    done = data.draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners)))
    halfway = [then if moved else now for now, then, moved in zip(owners, goal, done, strict=True)]
    left = sum(now != then for now, then in zip(halfway, goal, strict=True))
    changed = sum(now != then for now, then in zip(halfway, assign(halfway, members), strict=True))
    assert changed == left


def test_a_new_ring_has_one_range_a_shard() -> None:
    """The first map is small and reads well; the first shards get the one more."""
    owners = assign([None] * 8, names(3))
    assert [owner[-1] for owner in owners] == list("00011122")


def test_a_shard_that_joins_takes_a_slot_or_so_from_each() -> None:
    """256 slots on three shards become 64 each, and exactly 64 move."""
    owners = assign([None] * 256, names(3))
    assert moves_needed(owners, names(4)) == 64
    assert Counter(assign(owners, names(4))) == dict.fromkeys(names(4), 64)


def test_a_shard_that_leaves_gives_up_its_slots_only() -> None:
    """What the others own stays theirs."""
    owners = assign([None] * 256, names(4))
    assert moves_needed(owners, names(3)) == 64


@pytest.mark.parametrize(
    ("members", "avoided"),
    [([], []), ([*names(2), *names(1)], []), (names(2), names(3))],
    ids=["nobody", "twice", "all-avoided"],
)
def test_slots_need_members(members: list[ShardName], avoided: list[ShardName]) -> None:
    """Nobody to get slots, or one of them twice, is a mistake of the caller."""
    with pytest.raises(ValueError, match="members"):
        assign([None], members, avoided=avoided)


@given(rings(), st.data())
def test_pins_are_kept_and_the_rest_is_even(ring: tuple[Owners, list[ShardName]], data: st.DataObject) -> None:
    """A shard with more pins than its share has exactly those; all others differ by one at the most; done is done."""
    owners, members = ring
    pins = data.draw(st.dictionaries(st.integers(0, len(owners) - 1), st.sampled_from(names(9))))
    goal = assign(owners, members, pins)
    assert all(goal[slot] == shard for slot, shard in pins.items() if shard in members)
    assert set(goal) <= set(members)
    counts, pinned = Counter(goal), Counter(shard for shard in pins.values() if shard in members)
    lowest = min(counts[member] for member in members)
    assert all(counts[member] <= max(lowest + 1, pinned[member]) for member in members)
    assert assign(goal, members, pins) == goal


@st.composite
def rings_with_avoided(draw: st.DrawFn) -> tuple[Owners, list[ShardName], list[ShardName]]:
    """Any ring, and any of its members but one avoided."""
    owners, members = draw(rings())
    avoided = draw(st.lists(st.sampled_from(names(9)), max_size=9, unique=True))
    if set(members) <= set(avoided):
        avoided.remove(draw(st.sampled_from(members)))
    return owners, members, avoided


def most_kept(owners: Owners, members: list[ShardName], avoided: list[ShardName]) -> tuple[int, list[int]]:
    """How many slots can stay, and every member's number, sorted: found by giving out slots one at a time.

    Each goes to who has the fewest; an avoided one takes no more than it holds; among equals who holds more goes first.
    """
    held = Counter(owner for owner in owners if owner in members)
    counts = dict.fromkeys(members, 0)
    for _ in owners:
        takers = [each for each in members if each not in avoided or counts[each] < held[each]]
        counts[min(takers, key=lambda each: (counts[each], -held[each]))] += 1
    return sum(min(held[each], count) for each, count in counts.items()), sorted(counts.values())


@given(rings_with_avoided())
def test_avoided_members_keep_and_get_nothing(ring: tuple[Owners, list[ShardName], list[ShardName]]) -> None:
    """What they have they keep up to a share; the rest is as even as that allows; no slot moves that need not."""
    owners, members, avoided = ring
    goal = assign(owners, members, avoided=avoided)
    assert all(now == then for now, then in zip(owners, goal, strict=True) if then in avoided)
    kept, shares = most_kept(owners, members, avoided)
    counts = Counter(goal)
    assert set(counts) <= set(members)
    assert sorted(counts[each] for each in members) == shares
    assert sum(now == then for now, then in zip(owners, goal, strict=True)) == kept


@given(rings_with_avoided(), st.data())
def test_a_plan_with_avoided_members_ends_where_it_was_going(
    ring: tuple[Owners, list[ShardName], list[ShardName]], data: st.DataObject
) -> None:
    """From any part of the way there is as much left as there was; at its end nothing; without them all is even."""
    owners, members, avoided = ring
    goal = assign(owners, members, avoided=avoided)
    done = data.draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners)))
    halfway = [then if moved else now for now, then, moved in zip(owners, goal, done, strict=True)]
    again = assign(halfway, members, avoided=avoided)
    left = sum(now != then for now, then in zip(halfway, goal, strict=True))
    assert sum(now != then for now, then in zip(halfway, again, strict=True)) == left
    assert assign(goal, members, avoided=avoided) == goal
    counts = Counter(assign(goal, members))
    assert max(counts[member] for member in members) - min(counts[member] for member in members) <= 1


@given(rings_with_avoided(), st.data())
def test_a_pin_brings_nothing_to_an_avoided_member(
    ring: tuple[Owners, list[ShardName], list[ShardName]], data: st.DataObject
) -> None:
    """It holds what is there already, and waits otherwise; pins to others count as ever."""
    owners, members, avoided = ring
    pins = data.draw(st.dictionaries(st.integers(0, len(owners) - 1), st.sampled_from(names(9))))
    goal = assign(owners, members, pins, avoided)
    assert all(now == then for now, then in zip(owners, goal, strict=True) if then in avoided)
    for slot, shard in pins.items():
        assert goal[slot] == shard or shard not in members or (shard in avoided and owners[slot] != shard)
    assert set(goal) <= set(members)
    assert assign(goal, members, pins, avoided) == goal


def test_a_pool_that_is_left_at_once_piles_nothing_up() -> None:
    """Three of four nodes are cordoned: nothing moves. One of their shards goes: only the fourth gets its slots."""
    owners = assign([None] * 256, names(4))
    assert assign(owners, names(4), avoided=names(3)) == owners
    assert Counter(assign(owners, names(4, 1)[:3], avoided=names(2, 1))) == {
        "shard-1": 64,
        "shard-2": 64,
        "shard-3": 128,
    }
