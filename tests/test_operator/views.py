"""Views of small rings to plan for."""

from __future__ import annotations

from fleetlm_common.control import RingSpec, ShardEndpoint, View
from fleetlm_common.ids import ShardName, Term
from fleetlm_common.ring import RingMap
from fleetlm_operator.planning import plan


def announced(ordinal: int, *, volume_id: str | None = None, ready: bool = True) -> ShardEndpoint:
    """What shard-`ordinal` says."""
    return ShardEndpoint(
        name=ShardName(f"shard-{ordinal}"),
        volume_id=volume_id or f"volume-{ordinal}",
        term=Term(1),
        host="127.0.0.1",
        port=1,
        ops_url="http://127.0.0.1:2",
        ready=ready,
    )


def seen(*endpoints: ShardEndpoint, shards: int = 3, slots: int = 12, ring_map: RingMap | None = None) -> View:
    """A ring that asks for `shards`, with these announcements."""
    return View(RingSpec("ring-1", slots, shards), ring_map, {endpoint.name: endpoint for endpoint in endpoints})


def first_map(shards: int = 3, slots: int = 12) -> RingMap:
    """The map that a controller makes for them."""
    made = plan(seen(*map(announced, range(shards)), shards=shards, slots=slots)).new_map
    assert made is not None
    return made
