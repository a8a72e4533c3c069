"""The API server and etcd go and come: traffic goes on untouched, only changes wait."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import pytest

from tests.cluster import controlplane, processes
from tests.cluster.say import ClusterError
from tests.e2e.kubectl import until
from tests.e2e.rings import Ring, pod_ready, restarts, signal_container
from tests.e2e.traffic import Traffic, under_traffic

AWAY_S: Final = 60.0


async def stopped(name: str) -> None:
    """A process of the control plane ends."""
    await asyncio.to_thread(processes.stop, processes.record(name))


async def started(name: str) -> None:
    """It runs again, and the API server answers."""
    await asyncio.to_thread(processes.again, name)

    async def answers() -> bool:
        try:
            return await asyncio.to_thread(controlplane.api_ready)
        except ClusterError:
            return False  # it answers that it is not ready yet

    await until("the API server answers", answers)


@pytest.mark.long
@pytest.mark.timeout(300)  # kube-proxy and controllers look for the API server again after up to half a minute
async def test_the_api_server_is_away_for_a_minute(ring: Ring) -> None:
    """Appends are acknowledged all the while; a shard's container that dies comes back by the map that it stored."""
    pods = await ring.pods("shard")

    async def script(traffic: Traffic) -> None:
        await stopped("kube-apiserver")
        try:
            end_s = time.monotonic() + AWAY_S
            await traffic.progress()
            await signal_container(pods[0])
            while time.monotonic() < end_s:
                await traffic.progress()
        finally:
            await started("kube-apiserver")

    await under_traffic(ring, f"API server away for {AWAY_S:.0f} s, a shard's container killed meanwhile", script)

    async def known() -> bool:
        now = (await ring.pods("shard"))[0]
        return now["metadata"]["uid"] == pods[0]["metadata"]["uid"] and restarts(now) > restarts(pods[0])

    async def all_ready() -> bool:
        return all(pod_ready(pod) for pod in await ring.pods("shard"))

    await until("Kubernetes knows of the restart", known)
    await until("its shards are ready", all_ready)  # what the ring says may still be of before
    await ring.ready()


async def test_etcd_restarts(ring: Ring) -> None:
    """Nobody who writes or reads notices, and the operator goes on afterwards."""

    async def script(traffic: Traffic) -> None:
        await stopped("etcd")
        try:
            await traffic.progress()
        finally:
            await started("etcd")
        await ring.ready()

    report = await under_traffic(ring, "restart of etcd", script)
    assert report.reconnects == 0
