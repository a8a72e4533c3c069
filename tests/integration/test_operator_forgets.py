"""A shard that is dead for good, at a real API server: its pod goes by people's word; kubelets are played.

What decides it is held against a model in `tests/test_operator/test_forgotten_pods.py`.
"""

from __future__ import annotations

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_common.kubemap import read_ring_map
from fleetlm_common.kubenames import LEASES, RING_MAPS
from fleetlm_common.ring import RingMap
from fleetlm_operator.resources import CLAIMS, PODS, STATEFUL_SETS
from tests.support.operatorworld import World
from tests.support.playednodes import PlayedNodes

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]

NAME = ShardName("shard-2")
POD = "demo-shard-2"
VOLUME = f"volume-{POD}"


async def the_map(world: World) -> RingMap:
    """As it stands in the RingMap."""
    found = await world.api.get(RING_MAPS, world.namespace, "demo")
    assert found is not None
    ring_map = read_ring_map(found)[1]
    assert ring_map is not None
    return ring_map


async def replicas(world: World) -> int:
    """Pods that the StatefulSet is told to have."""
    found = await world.api.get(STATEFUL_SETS, world.namespace, "demo-shard")
    assert found is not None
    return int(found["spec"]["replicas"])


async def kept(world: World) -> list[str]:
    """What `blockedBy` says of members that people want forgotten."""
    blocks: list[Object] = (await world.ring())["status"].get("blockedBy", [])
    return [block["message"] for block in blocks if block["predicate"] == "MayBeForgotten"]


async def dies_emptied(world: World, nodes: PlayedNodes) -> None:
    """It gave everything away and says nothing of the newest owners; two shards are asked for."""
    await world.until_reason("Progressing", "False/Settled")
    nodes.held.add(POD)
    await world.until_reason("Degraded", "True/ShardsNotReady")
    await world.edit({"pins": [{"first": 0, "last": 0, "shard": "shard-1"}]})

    async def moved() -> bool:
        ring_map = await the_map(world)
        return ring_map.owners()[0].owner == "shard-1" and not ring_map.moves

    await world.until("a move that it has not seen", moved)
    await world.scale(2)
    await world.edit({"cordoned": []})


async def test_a_dead_shard_is_forgotten_and_comes_again(world: World) -> None:
    """The wrong volume is refused in words; the right one lets pod and Lease go, and joins only when it may again."""
    await world.make({"cordoned": [NAME]})
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await dies_emptied(world, nodes)
        await world.edit({"forgottenVolumes": [{"shard": NAME, "volume": "another"}]})

        async def refused() -> bool:
            why = f"shard-2 is not forgotten: the ring map binds it to volume {VOLUME}, not to another"
            return await kept(world) == [why]

        await world.until("it is said", refused)
        assert (await replicas(world), NAME in {each.name for each in (await the_map(world)).members}) == (3, True)
        await world.edit({"forgottenVolumes": [{"shard": NAME, "volume": VOLUME}]})
        await world.until_reason("Progressing", "False/Settled")
        assert "forgot shard-2 and its volume" in world.said()
        assert (await replicas(world), len((await the_map(world)).members)) == (2, 2)
        assert await world.api.get(PODS, world.namespace, POD) is None
        assert await world.api.get(LEASES, world.namespace, POD) is None
        assert await world.api.get(CLAIMS, world.namespace, f"data-{POD}") is not None
        nodes.held.clear()
        await world.scale(3)
        await world.until_reason("Degraded", "True/MapHeld")
        assert f"shard-2 announces volume {VOLUME}, which people had the ring forget" in await world.message("Degraded")
        await world.edit({"forgottenVolumes": [], "pins": []})
        await world.until_reason("Progressing", "False/Settled")
        member = (await the_map(world)).member(NAME)
        assert member is not None
        assert member.volume_id == VOLUME
        assert await world.reason("Degraded") == "False/AllWell"
