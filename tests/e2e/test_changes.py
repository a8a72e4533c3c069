"""Changes of a ring under writers and readers: upgrades, a bad image, changes of mind, scaling."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.cluster import images
from tests.e2e.kubectl import kubectl, listed, until
from tests.e2e.operations import images_of, scaled, shares, slots_of, upgraded
from tests.e2e.published import BAD, UPGRADE, published
from tests.e2e.rings import Ring, replaced
from tests.e2e.traffic import Traffic, under_traffic


@pytest.fixture
async def changed(ring: Ring) -> AsyncGenerator[Ring]:
    """The shared ring, whose spec is put back afterwards."""
    yield ring
    await ring.apply({"version": images.version(), "replicas": 3})
    await ring.ready()


async def test_an_upgrade_in_place(changed: Ring) -> None:
    """Shard by shard, then the gateways; each on its own volume; nothing is lost."""
    claims = [pod["spec"]["volumes"] for pod in await changed.pods("shard")]

    async def script(traffic: Traffic) -> None:
        await upgraded(changed, UPGRADE, strategy="InPlace")

    await under_traffic(changed, "upgrade of 3 shards and 2 gateways", script)
    data = [[one for one in each if one["name"] == "data"] for each in claims]
    now = [[one for one in pod["spec"]["volumes"] if one["name"] == "data"] for pod in await changed.pods("shard")]
    assert now == data


@pytest.mark.long
async def test_an_upgrade_with_hand_over(changed: Ring) -> None:
    """The default: each shard gives its slots away before its pod goes; at the end all is even."""

    async def script(traffic: Traffic) -> None:
        await upgraded(changed, UPGRADE, within_s=150)

    await under_traffic(changed, "upgrade of 3 shards and 2 gateways with hand-over", script)


@pytest.mark.long
async def test_a_bad_image_and_a_change_of_mind(changed: Ring) -> None:
    """An image that nobody has stops at the first pod and is said; changing it back heals without hands."""

    async def script(traffic: Traffic) -> None:
        await changed.apply({"version": BAD, "replicas": 3})
        await changed.says("Stalled", "ImageUnavailable")
        assert sorted(await images_of(changed, "shard")) == sorted(
            [published("shard"), published("shard"), published("shard", BAD)]
        )
        assert await images_of(changed, "gateway") == [published("gateway")] * 2
        await changed.apply({"version": images.version(), "replicas": 3})
        await changed.ready()

    await under_traffic(changed, "an image that nobody has, and back", script)
    assert await images_of(changed, "shard") == [published("shard")] * 3


@pytest.mark.long
async def test_a_change_of_mind_in_the_middle(changed: Ring) -> None:
    """Back to the old version when the first shard has the new one: pods that are as asked stay."""

    async def begun() -> bool:
        status = (await changed.read())["status"]
        return status.get("updatedReplicas") == 1 and published("shard", UPGRADE) in await images_of(changed, "shard")

    async def script(traffic: Traffic) -> None:
        uids = [pod["metadata"]["uid"] for pod in await changed.pods("shard")]
        await changed.apply({"version": UPGRADE, "replicas": 3})
        await until("the first shard has the new image", begun)
        await changed.apply({"version": images.version(), "replicas": 3})
        await changed.ready()
        now = [pod["metadata"]["uid"] for pod in await changed.pods("shard")]
        assert now[0] == uids[0], "the last in turn was never touched"
        assert now[2] != uids[2], "the first in turn was replaced"

    await under_traffic(changed, "a change of mind in the middle of an upgrade", script)
    assert await images_of(changed, "shard") == [published("shard")] * 3
    assert await images_of(changed, "gateway") == [published("gateway")] * 2


async def test_more_shards_and_fewer(changed: Ring) -> None:
    """`kubectl scale sr` 3 → 5 → 2 → 3: slots move, shards that leave go last, and nobody who writes or reads loses."""

    async def script(traffic: Traffic) -> None:
        for replicas in (5, 2, 3):
            await scaled(changed, replicas)
            await traffic.progress()

    await under_traffic(changed, "kubectl scale 3 → 5 → 2 → 3", script)
    claims = await listed(changed.namespace, "pvc", f"fleetlm.io/ring={changed.name}")
    assert len(claims) == 5, "volumes of shards that left are kept"


@pytest.mark.long
async def test_slots_avoid_a_cordoned_node(changed: Ring) -> None:
    """A shard leaves: its slots go to the one on another node only; uncordoned, the other one gets its share."""

    async def node_of(number: int) -> str:
        return str((await changed.pods("shard"))[number]["spec"]["nodeName"])

    async def even() -> bool:
        owned = await slots_of(changed)
        return max(owned.values()) - min(owned.values()) <= 1

    async def script(traffic: Traffic) -> None:
        node = await node_of(1)
        try:
            await kubectl("cordon", node)
            if await node_of(0) == node:  # an earlier drain brought them together
                await replaced(changed.namespace, f"{changed.name}-shard-0")
                await changed.ready()
            before = (await slots_of(changed))["shard-1"]
            await kubectl("scale", f"shardring/{changed.name}", "-n", changed.namespace, "--replicas=2")
            await changed.ready()
            assert (await slots_of(changed))["shard-1"] == before
            assert "without new slots: shard-1" in (await changed.read())["status"]["message"]
            await traffic.progress()
        finally:
            await kubectl("uncordon", node)
        await until("it has its share", even)
        await changed.ready()

    await under_traffic(changed, "a shard leaves while a node is cordoned", script)


@pytest.mark.long
async def test_cordons_and_pins(changed: Ring) -> None:
    """`cordoned` empties a shard under traffic, `pins` fill one; taken back, all is even."""
    last = 99

    async def script(traffic: Traffic) -> None:
        pins = [{"first": 0, "last": last, "shard": "shard-2"}]
        await changed.apply({"version": images.version(), "replicas": 3, "cordoned": ["shard-1"], "pins": pins})
        await changed.ready()
        assert (await slots_of(changed))["shard-1"] == 0
        ranges = (await changed.map())["ranges"]
        assert {found["owner"] for found in ranges if found["first"] <= last} == {"shard-2"}
        await traffic.progress()
        await changed.apply({"version": images.version(), "replicas": 3})
        await changed.ready()
        assert await shares(changed) == {f"shard-{number}" for number in range(3)}

    await under_traffic(changed, "a shard is cordoned, slots are pinned, and both taken back", script)
