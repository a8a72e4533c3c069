"""What people do to a ring that serves, and what must hold when it is done: for the tests and for the trial.

Each ends when the ring says that it is as asked; each wait is bounded by `within_s`.
Must not be done here: load, kills, judging what clients saw.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from tests.e2e.kubectl import Json, get, kubectl, listed, until
from tests.e2e.published import published
from tests.e2e.rings import READY_S, Ring, going, replaced


def image_of(pod: Json) -> str:
    """The image that a pod is made with."""
    return str(pod["spec"]["containers"][0]["image"])


async def images_of(ring: Ring, component: str) -> list[str]:
    """Images of all its pods."""
    return [image_of(pod) for pod in await ring.pods(component)]


async def slots_of(ring: Ring) -> Counter[str]:
    """Slots by shard, of all members of the ring map."""
    ring_map = await ring.map()
    owned = Counter[str]({member["name"]: 0 for member in ring_map["members"]})
    for found in ring_map["ranges"]:
        owned[found["owner"]] += found["last"] - found["first"] + 1
    return owned


async def shares(ring: Ring) -> set[str]:
    """The ring map's members, each with its share of the slots within one."""
    owned = await slots_of(ring)
    assert max(owned.values()) - min(owned.values()) <= 1, owned
    return set(owned)


async def scaled(ring: Ring, replicas: int, *, within_s: float = READY_S) -> None:
    """`kubectl scale`: every shard has its share, and those that left are gone."""
    await kubectl("scale", f"shardring/{ring.name}", "-n", ring.namespace, f"--replicas={replicas}")
    await ring.ready(timeout_s=within_s)
    assert await shares(ring) == {f"shard-{number}" for number in range(replicas)}
    assert len(await ring.pods("shard")) == replicas


async def upgraded(
    ring: Ring, version: str, *, strategy: Literal["Handover", "InPlace"] = "Handover", within_s: float = READY_S
) -> None:
    """Another version for 3 shards, one after the other, then for 2 gateways; those of before have sent all away."""
    update = {} if strategy == "Handover" else {"update": {"strategy": strategy}}  # what is the default goes unsaid
    await ring.apply({"version": version, "replicas": 3, **update})
    await ring.ready(timeout_s=within_s)
    assert await images_of(ring, "shard") == [published("shard", version)] * 3
    assert await images_of(ring, "gateway") == [published("gateway", version)] * 2

    async def alone() -> bool:
        return not any(map(going, await listed(ring.namespace, "pods", f"fleetlm.io/ring={ring.name}")))

    await until("gateways of before are gone", alone, timeout_s=within_s)
    if strategy == "Handover":
        assert await shares(ring) == {f"shard-{number}" for number in range(3)}


async def drained(ring: Ring, node: str, *, within_s: float = READY_S) -> None:
    """`kubectl drain`: the ring is as asked without the node, which then takes pods again."""
    line = ("--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={within_s:g}s")
    try:
        await kubectl("drain", node, *line, timeout_s=within_s + 30)
        await ring.ready(timeout_s=within_s)
        left = await listed(ring.namespace, "pods", f"fleetlm.io/ring={ring.name}")
        assert all(pod["spec"]["nodeName"] != node for pod in left)
    finally:
        await kubectl("uncordon", node)


async def restarted(ring: Ring, *, within_s: float = READY_S) -> None:
    """`kubectl delete pod` of each shard, then of each gateway, the next one when the ring is as asked again."""
    for pod in await ring.pods("shard"):
        await replaced(ring.namespace, pod["metadata"]["name"], within_s=within_s)
        await ring.ready(timeout_s=within_s)
    for pod in await ring.pods("gateway"):
        await gateway_deleted(ring, pod["metadata"]["name"], within_s=within_s)


async def gateway_deleted(ring: Ring, name: str, *, within_s: float = READY_S) -> None:
    """`kubectl delete pod` of a gateway, and wait until the ring is as asked with another one."""
    await kubectl("delete", "pod", name, "-n", ring.namespace, f"--timeout={within_s:g}s", timeout_s=within_s + 30)
    await ring.ready(timeout_s=within_s)


async def epoch(ring: Ring) -> int:
    """The ring map's: by how much it grew says how much was changed."""
    return int((await ring.map())["epoch"])


async def version_of(ring: Ring) -> str:
    """What the spec asks for."""
    return str((await get(ring.namespace, "shardring", ring.name))["spec"]["version"])
