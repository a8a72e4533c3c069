"""Plays nodes and shards at an API server that has controllers and no kubelets.

    async with PlayedNodes(api, "ns") as nodes: ...   # pods become ready, shards announce themselves

A shard's operations port is a real one, on a loopback address of the pod's own, so that the operator asks what it asks
in a cluster. Must not be done here: anything about the operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from types import TracebackType
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_common.control import MoveProgress, ShardEndpoint
from fleetlm_common.ids import Epoch, ShardName, Term
from fleetlm_common.kubeapi import ApiError, KubeApi, Object
from fleetlm_common.kubemap import read_ring_map
from fleetlm_common.kubenames import (
    COMPONENT_LABEL,
    ENDPOINT_ANNOTATION,
    INSTANCE_LABEL,
    LEASES,
    RING_LABEL,
    RING_MAPS,
    SHARD_OPS_PORT,
    Resource,
)
from fleetlm_common.ops import Health, OpsServer
from fleetlm_operator.observed import is_ready, pod_from
from fleetlm_operator.resources import NODES, PODS

POLL_S: Final = 0.1
WELL: Final = Health(ok=True, reason="Ready")
_addresses = (f"127.{64 + os.getpid() % 128}.{number // 250}.{1 + number % 250}" for number in itertools.count())
"""Loopback addresses that no other process of the tests takes."""


class PlayedNodes:
    """What nodes and shards would do in one namespace, on polls.

    A pod whose image ends with `:bad` cannot be pulled; a shard announces itself, answers at its operations port and is
    ready when the map has it; a gateway is ready at once.

    Args:
        api: the connection.
        namespace: where.
    """

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._task: asyncio.Task[None] | None = None
        self.unready_at_once = 0
        """The most shards of one ring that were away at the same moment since it was all ready."""
        self.held: set[str] = set()
        """Pods that do not become ready."""
        self.words: dict[str, Health] = {}
        """What a shard says of itself, by its pod's name, when it does not say that it is well."""
        self.places: dict[str, str] = {}
        """Nodes, which must be there, by the pods that are bound to them; other pods are on none."""
        self.confirms = True
        """Whether targets confirm what is sealed."""
        self._was_ready: set[str] = set()
        self._ports: dict[str, tuple[str, OpsServer]] = {}
        self._stop = False

    async def __aenter__(self) -> PlayedNodes:
        self._task = asyncio.create_task(self._play())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._stop = True  # not cancelled: a connection that is being made would be left open
        await self._task
        for _, port in self._ports.values():
            await port.stop()

    async def _play(self) -> None:
        while not self._stop:
            with contextlib.suppress(ApiError):  # a pod that was deleted meanwhile; the next poll sees it
                await self._poll()
            await asyncio.sleep(POLL_S)

    async def _poll(self) -> None:
        pods = (await self._api.list(PODS, self._namespace, labels=RING_LABEL)).items
        shards: dict[str, list[bool]] = {}
        for pod in pods:
            labels = pod["metadata"]["labels"]
            ring, shard = labels[INSTANCE_LABEL], labels[COMPONENT_LABEL] == "shard"
            name = pod["metadata"]["name"]
            if name in self.places and "nodeName" not in pod["spec"]:
                await self._bind(name)
            bad = pod["spec"]["containers"][0]["image"].endswith(":bad") or name in self.held
            address = await self._address(name) if shard and not bad else ""
            ready = await self._serves(ring, pod, address) if shard and not bad else not shard
            await self._say(pod, ready=ready and not bad and self._word(name).ok, bad=bad, address=address)
            if shard:
                shards.setdefault(ring, []).append(is_ready(pod_from(pod)))
        for ring, states in shards.items():
            wanted = await self._members(ring)
            if wanted and sum(states) == wanted:
                self._was_ready.add(ring)
            if ring in self._was_ready:
                self.unready_at_once = max(self.unready_at_once, wanted - sum(states))

    async def _bind(self, pod: str) -> None:
        """What the scheduler does."""
        target = {"apiVersion": NODES.api, "kind": NODES.kind, "name": self.places[pod]}
        binding = Resource("v1", "Binding", f"pods/{pod}/binding")
        await self._api.create(binding, self._namespace, {"metadata": {"name": pod}, "target": target})

    def _word(self, pod: str) -> Health:
        return self.words.get(pod, WELL)

    async def _address(self, pod: str) -> str:
        """Where the operations port of that pod listens."""
        if pod not in self._ports:
            address = next(_addresses)
            port = OpsServer(registry=CollectorRegistry(), ready=lambda: self._word(pod))
            await port.start(address, SHARD_OPS_PORT)
            self._ports[pod] = address, port
        return self._ports[pod][0]

    async def _members(self, ring: str) -> int:
        found = await self._api.get(RING_MAPS, self._namespace, ring)
        ring_map = None if found is None else read_ring_map(found)[1]
        return 0 if ring_map is None else len(ring_map.members)

    async def _serves(self, ring: str, pod: Object, address: str) -> bool:
        """The shard announces itself, and how far its moves are; whether the map has it."""
        name = pod["metadata"]["name"]
        shard = ShardName(f"shard-{name.rpartition('-')[2]}")
        found = await self._api.get(RING_MAPS, self._namespace, ring)
        ring_map = None if found is None else read_ring_map(found)[1]
        said = {"Copying": "Ready", "Sealing": "Confirmed" if self.confirms else "Ready"}
        moves = () if ring_map is None else tuple(move for move in ring_map.moves if move.target == shard)
        endpoint = ShardEndpoint(
            name=shard,
            volume_id=f"volume-{name}",
            term=Term(1),
            host=address,
            port=4100,
            ops_url="http://x",
            moves=tuple(msgspec.convert({"id": m.id, "state": said[m.state]}, MoveProgress) for m in moves),
            epoch=Epoch(0) if ring_map is None else ring_map.epoch,
            serves=0 if ring_map is None else len(ring_map.slots_of(shard)),
        )
        text = msgspec.json.encode(endpoint).decode()
        body: Object = {"metadata": {"annotations": {ENDPOINT_ANNOTATION: text}}}
        await self._api.merge(LEASES, self._namespace, name, body, manager="shard")
        return ring_map is not None and ring_map.member(shard) is not None

    async def _say(self, pod: Object, *, ready: bool, bad: bool, address: str) -> None:
        status = "True" if ready else "False"
        before = next((each for each in pod["status"].get("conditions", []) if each["type"] == "Ready"), None)
        if before is not None and before["status"] == status:
            return
        waiting: dict[str, Any] = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        container = {
            "name": pod["spec"]["containers"][0]["name"],
            "image": pod["spec"]["containers"][0]["image"],
            "imageID": "",
            "ready": ready,
            "restartCount": 0,
            "state": waiting if bad else {"running": {"startedAt": now}},
        }
        body: Object = {
            "status": {
                "phase": "Pending" if bad else "Running",
                "conditions": [{"type": "Ready", "status": status, "lastTransitionTime": now}],
                "containerStatuses": [container],
                **({"podIP": address, "podIPs": [{"ip": address}]} if address else {}),
            }
        }
        name = pod["metadata"]["name"]
        await self._api.merge(PODS, self._namespace, name, body, manager="kubelet", subresource="status")
