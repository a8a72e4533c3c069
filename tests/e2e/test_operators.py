"""Operators die at every step, and two lead at once: rings come up and roll all the same, and are never harmed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.cluster import images
from tests.e2e.install import OPERATOR_NAMESPACE
from tests.e2e.kubectl import CommandError, get, kubectl, listed, until
from tests.e2e.published import UPGRADE, published
from tests.e2e.rings import Ring, pod_ready, signal_container
from tests.e2e.traffic import Traffic, under_traffic

OPERATORS = "app.kubernetes.io/component=operator"
KILLS = 5
"""In each: bring-up and roll take some ten seconds of an operator's life each."""


async def kill_operator_once_more(chance: random.Random) -> None:
    """SIGKILL, a random moment after it is ready; its pod goes too, so that the next start is not held back."""

    async def found() -> bool:
        return any(pod_ready(pod) for pod in await listed(OPERATOR_NAMESPACE, "pods", OPERATORS))

    await until("an operator is ready", found)
    await asyncio.sleep(chance.random() * 3)
    for pod in await listed(OPERATOR_NAMESPACE, "pods", OPERATORS):
        with suppress(CommandError, KeyError):
            await signal_container(pod)
        name = pod["metadata"]["name"]
        await kubectl("delete", "pod", name, "-n", OPERATOR_NAMESPACE, "--grace-period=0", "--force")


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_the_operator_dies_again_and_again(namespace: str) -> None:
    """During bring-up and during a roll under load: both end as asked."""
    chance = random.Random(5)
    ring = Ring(namespace)
    await ring.apply({"version": images.version()})
    for _ in range(KILLS):
        await kill_operator_once_more(chance)
    await ring.ready()
    assert (await get(namespace, "ringmap", ring.name))["spec"]["map"]["epoch"] == 1

    async def script(traffic: Traffic) -> None:
        await ring.apply({"version": UPGRADE})
        for _ in range(KILLS):
            await kill_operator_once_more(chance)
        await ring.ready()

    await under_traffic(ring, f"an upgrade whose operator is killed {KILLS} times", script)
    pods = await ring.pods("shard")
    assert [pod["spec"]["containers"][0]["image"] for pod in pods] == [published("shard", UPGRADE)] * 3


@asynccontextmanager
async def a_second_leader() -> AsyncGenerator[None]:
    """Another operator that holds another Lease: both believe that they lead."""
    made = await get(OPERATOR_NAMESPACE, "deployment", "fleetlm-operator")
    name = "fleetlm-operator-other"
    template = made["spec"]["template"]
    template["metadata"]["labels"]["fleetlm.io/other"] = "yes"
    template["spec"]["containers"][0]["env"] = [
        *[one for one in template["spec"]["containers"][0]["env"] if one["name"] != "FLEETLM_OPERATOR_LEASE_NAME"],
        {"name": "FLEETLM_OPERATOR_LEASE_NAME", "value": "other"},
    ]
    selector = {"matchLabels": {**made["spec"]["selector"]["matchLabels"], "fleetlm.io/other": "yes"}}
    other = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": 1, "selector": selector, "template": template},
    }
    await kubectl("apply", "-n", OPERATOR_NAMESPACE, "-f", "-", stdin=json.dumps(other))
    try:
        await kubectl("rollout", "status", f"deployment/{name}", "-n", OPERATOR_NAMESPACE, "--timeout=60s")
        holder = (await get(OPERATOR_NAMESPACE, "lease", "other"))["spec"].get("holderIdentity")
        assert holder, "it leads"
        yield
    finally:
        await kubectl("delete", "deployment", name, "-n", OPERATOR_NAMESPACE, "--timeout=60s")
        await kubectl("delete", "lease", "other", "-n", OPERATOR_NAMESPACE, "--ignore-not-found")


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_two_operators_at_once(namespace: str) -> None:
    """A bring-up and a roll with two leaders: one pod at a time is away all the same."""
    ring = Ring(namespace)
    async with a_second_leader():
        await ring.apply({"version": images.version()})
        await ring.ready()

        async def script(traffic: Traffic) -> None:
            await ring.apply({"version": UPGRADE})
            rolling = asyncio.create_task(ring.ready())
            away = 0
            while not rolling.done():
                ready = sum(pod_ready(pod) for pod in await ring.pods("shard"))
                away = max(away, 3 - ready)
                await asyncio.sleep(0.2)
            await rolling
            assert away <= 1

        await under_traffic(ring, "an upgrade by two operators at once", script)
