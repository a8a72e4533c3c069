"""RingMap objects: both directions, and no half maps."""

from __future__ import annotations

import msgspec
import pytest

from fleetlm_common.control import RingSpec
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.kubemap import read_ring_map, ring_map_spec
from fleetlm_common.ring import Member, Move, RingMap, SlotRange

ONE, TWO = ShardName("shard-0"), ShardName("shard-1")
RING = RingMap(
    uid="ring",
    slots=8,
    epoch=Epoch(3),
    members=(Member(ONE, "volume-0"), Member(TWO, "volume-1")),
    ranges=(SlotRange(Slot(0), Slot(3), ONE, Epoch(1)), SlotRange(Slot(4), Slot(7), TWO, Epoch(3))),
    moves=(Move("3.1", (Slot(1), Slot(2)), ONE, TWO, "Copying", Epoch(3)),),
)
SPEC = RingSpec("ring", 8, 2)


@pytest.mark.parametrize("ring", [None, RING, msgspec.structs.replace(RING, moves=())])
def test_what_is_written_is_read(ring: RingMap | None) -> None:
    """Through JSON and back."""
    body = msgspec.json.decode(msgspec.json.encode({"spec": ring_map_spec(SPEC, ring)}))
    assert read_ring_map(body) == (SPEC, ring)


def test_who_is_replaced_in_place_is_read() -> None:
    """It is beside the map: it changes without a new epoch."""
    spec = msgspec.structs.replace(SPEC, in_place=(TWO,))
    assert read_ring_map({"spec": ring_map_spec(spec, RING)}) == (spec, RING)


def test_a_map_with_a_hole_is_refused() -> None:
    """Half a map is none: the last good one stays in use."""
    spec = ring_map_spec(SPEC, RING)
    body = {"spec": {**spec, "map": {**spec["map"], "ranges": spec["map"]["ranges"][:1]}}}
    with pytest.raises(ValueError, match="cover every slot"):
        read_ring_map(body)
