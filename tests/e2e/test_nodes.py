"""A node that hangs: its containers write on while Kubernetes starts others elsewhere; the fence is on the volume."""

from __future__ import annotations

import signal

import pytest

from tests.cluster import processes
from tests.e2e.kubectl import get, kubectl, until
from tests.e2e.rings import Ring, pod_ready, signal_container
from tests.e2e.traffic import Traffic, under_traffic

TAINT = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"


async def _ready(node: str, status: str) -> None:
    async def holds() -> bool:
        conditions = (await get("", "node", node))["status"]["conditions"]
        return any(one["type"] == "Ready" and one["status"] == status for one in conditions)

    await until(f"{node} is Ready={status}", holds, timeout_s=90)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("asleep", [False, True], ids=["container-runs", "container-sleeps"])
async def test_a_frozen_node(ring: Ring, asleep: bool) -> None:
    """Kubelet stopped, node out of service: the elder container yields when asked; one that slept is fenced by term."""
    elder = (await ring.pods("shard"))[0]
    name, node = elder["metadata"]["name"], elder["spec"]["nodeName"]
    kubelet = processes.record(f"kubelet-{node}")

    async def moved() -> bool:
        now = await get(ring.namespace, "pod", name)
        return bool(now["metadata"]["uid"] != elder["metadata"]["uid"] and pod_ready(now))

    async def script(traffic: Traffic) -> None:
        processes.send(kubelet, signal.SIGSTOP)
        try:
            if asleep:
                await signal_container(elder, "SIGSTOP")
            await _ready(node, "Unknown")
            await kubectl("taint", "node", node, TAINT)
            await until(f"{name} is ready on another node", moved)
            if asleep:
                await signal_container(elder, "SIGCONT")
            await traffic.progress()
        finally:
            processes.send(kubelet, signal.SIGCONT)
            await kubectl("taint", "node", node, f"{TAINT}-")
        await _ready(node, "True")
        await ring.ready()

    plural = "while its shard's container sleeps" if asleep else "while its shard's container runs"
    await under_traffic(ring, f"a frozen node, out of service {plural}", script)
