"""Pods die and go, nodes are drained, under writers and readers: nothing acknowledged is lost, stalls are printed."""

from __future__ import annotations

import json
import sys

import pytest

from tests.e2e.install import OPERATOR_NAMESPACE
from tests.e2e.kubectl import get, listed, run, until
from tests.e2e.operations import drained, gateway_deleted
from tests.e2e.rings import Ring, killed_in_place, pod_ready, replaced
from tests.e2e.traffic import Traffic, under_traffic


@pytest.mark.parametrize("component", ["shard", "gateway"])
async def test_a_container_is_killed(ring: Ring, component: str) -> None:
    """SIGKILL of a container: it restarts in its pod, on its volume, and the same seqs go on."""

    async def script(traffic: Traffic) -> None:
        pods = await ring.pods(component)
        await killed_in_place(ring.namespace, pods[0]["metadata"]["name"])

    await under_traffic(ring, f"SIGKILL of a {component}'s container", script)


async def test_the_operator_is_killed(ring: Ring) -> None:
    """SIGKILL of the operator's container: nobody who writes or reads notices."""

    async def script(traffic: Traffic) -> None:
        pods = await listed(OPERATOR_NAMESPACE, "pods", "app.kubernetes.io/component=operator")
        await killed_in_place(OPERATOR_NAMESPACE, pods[0]["metadata"]["name"])

    report = await under_traffic(ring, "SIGKILL of the operator's container", script)
    assert report.reconnects == 0


@pytest.mark.parametrize(
    "how", [(), pytest.param(("--grace-period=0", "--force"), marks=pytest.mark.long)], ids=["delete", "force"]
)
async def test_a_shard_pod_is_deleted(ring: Ring, how: tuple[str, ...]) -> None:
    """Another pod takes the volume over, also when the deletion does not wait for the first one's end."""

    async def script(traffic: Traffic) -> None:
        await replaced(ring.namespace, f"{ring.name}-shard-1", *how)

    await under_traffic(ring, " ".join(("kubectl delete pod, a shard", *how)), script)


async def test_a_gateway_pod_is_deleted(ring: Ring) -> None:
    """Its clients are told, reconnect to another one, and go on where they were."""

    async def script(traffic: Traffic) -> None:
        pods = await ring.pods("gateway")
        await gateway_deleted(ring, pods[0]["metadata"]["name"])

    await under_traffic(ring, "kubectl delete pod, a gateway", script)


@pytest.mark.long
@pytest.mark.timeout(500)
async def test_a_drill_drains_a_node(ring: Ring) -> None:
    """`fleetlm drill drain-node`: promises held, and the node takes pods again."""
    where = ("--kubernetes", f"{ring.namespace}/{ring.name}", "--url", await ring.url())
    drill = ("drill", "drain-node", "node1", *where, "--timeout", "180", "--yes", "--json")
    verdict = json.loads(await run(sys.executable, "-m", "fleetlm_cli.main", *drill, timeout_s=400))
    assert verdict["held"], verdict
    assert not (await get("", "node", "node1"))["spec"].get("unschedulable", False)


@pytest.mark.long
async def test_every_node_is_drained_in_turn(ring: Ring) -> None:
    """`kubectl drain` of each node ends, budgets hold back the second shard, volumes follow their pods."""

    async def script(traffic: Traffic) -> None:
        for node in ("node1", "node2", "node3"):
            await drained(ring, node)
            await traffic.progress()

    await under_traffic(ring, "drain of three nodes in turn", script)
    await until("pods are ready", lambda: _all_ready(ring))


async def _all_ready(ring: Ring) -> bool:
    return all(pod_ready(pod) for pod in await ring.pods("shard"))
