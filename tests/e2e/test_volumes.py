"""Volumes that are not what the ring map says: nothing is served from them, nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from typing import Final

import pytest

import fleetlm_client
from tests.e2e.kubectl import get, until
from tests.e2e.rings import Ring, pod_ready, signal_container, volume

SESSIONS: Final = 12
"""With so many, each of two shards has some."""


@pytest.mark.long
async def test_an_empty_volume_under_a_shard_that_owned_data(namespace: str) -> None:
    """Degraded/VolumeLost, its slots are not served; when the old volume is back everything is there."""
    ring = Ring(namespace)
    await ring.apply({"replicas": 2, "gateway": {"replicas": 1}})
    await ring.ready()
    url = await ring.url()
    async with fleetlm_client.connect(url, participant_id="writer") as client:
        for at in range(SESSIONS):
            async with client.join(f"kept-{at}") as joined:
                assert (await joined.append({"at": at})).seq == 1
    before = (await get(namespace, "ringmap", ring.name))["spec"]
    folder = await volume(ring, 1)
    kept = folder.with_name(folder.name + "-kept")
    (folder / "volume").rename(kept)
    await signal_container(await get(namespace, "pod", f"{ring.name}-shard-1"))
    said = await ring.says("Degraded", "VolumeLost")
    assert "shard-1" in said["message"]
    assert (await ring.condition("Ready"))["reason"] == "VolumeLost"
    assert (await get(namespace, "ringmap", ring.name))["spec"] == before, "the map still names the old volume"
    assert not list((folder / "volume").glob("**/*.log")), "a lost volume is not begun afresh"

    shutil.rmtree(folder / "volume", ignore_errors=True)
    kept.rename(folder / "volume")
    await signal_container(await get(namespace, "pod", f"{ring.name}-shard-1"))

    async def back() -> bool:
        return pod_ready(await get(namespace, "pod", f"{ring.name}-shard-1"))

    await until("the shard is back on its volume", back)
    await ring.ready()
    async with fleetlm_client.connect(url, participant_id="reader") as client:
        for at in range(SESSIONS):
            async with client.join(f"kept-{at}") as joined:
                assert (await joined.append({"again": at})).seq == 2, json.dumps(said)


@pytest.mark.long
async def test_volumes_grow_where_their_class_allows_it(namespace: str) -> None:
    """The claim gets the size, no pod is restarted; where it may not, a condition says so and the ring serves on."""
    small = {"replicas": 1, "slots": 256, "gateway": {"replicas": 1}}
    grows, fixed = Ring(namespace, "grows"), Ring(namespace, "fixed")
    await grows.apply({**small, "storage": {"size": "1Gi"}})
    await fixed.apply({**small, "storage": {"size": "1Gi", "className": "fixed-size"}})
    for ring in (grows, fixed):
        await ring.ready()
    before = {
        ring.name: (await get(namespace, "pod", f"{ring.name}-shard-0"))["metadata"]["uid"] for ring in (grows, fixed)
    }
    for ring in (grows, fixed):
        await ring.patch({"storage": {"size": "2Gi"}})

    async def grown() -> bool:
        claim = await get(namespace, "pvc", "data-grows-shard-0")
        return bool(claim["status"]["capacity"]["storage"] == "2Gi")

    await until("the volume has grown", grown)
    await grows.ready()
    said = await fixed.says("Progressing", "StorageNotExpandable")
    assert "1Gi" in said["message"] or "2Gi" in said["message"]
    assert (await get(namespace, "pvc", "data-fixed-shard-0"))["status"]["capacity"]["storage"] == "1Gi"
    for ring in (grows, fixed):
        assert (await ring.condition("Ready"))["status"] == "True"
        assert (await get(namespace, "pod", f"{ring.name}-shard-0"))["metadata"]["uid"] == before[ring.name]
