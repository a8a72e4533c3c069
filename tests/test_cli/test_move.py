"""Wishes about slots: what is asked for is what the ring's spec says afterwards."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fleetlm_cli.move import pinned
from fleetlm_common.control import Pin
from fleetlm_common.ids import ShardName

SHARDS = st.sampled_from([ShardName(f"shard-{ordinal}") for ordinal in range(3)])
WISHES = st.lists(st.tuples(st.sets(st.integers(0, 15), min_size=1), st.none() | SHARDS), max_size=6)


@given(WISHES)
def test_the_last_wish_for_a_slot_counts(wishes: list[tuple[set[int], ShardName | None]]) -> None:
    """Pins are ranges that do not overlap and say of each slot what was asked for last; taken back, nothing."""
    pins: tuple[Pin, ...] = ()
    wanted: dict[int, ShardName] = {}
    for slots, shard in wishes:
        pins = pinned(pins, slots, shard)
        for slot in slots:
            wanted.pop(slot, None)
            if shard is not None:
                wanted[slot] = shard
    said = [(slot, pin.shard) for pin in pins for slot in range(pin.first, pin.last + 1)]
    assert said == sorted(wanted.items())
    assert all(one.last + 1 < two.first or one.shard != two.shard for one, two in pairwise(pins))
