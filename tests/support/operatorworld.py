"""Operators as processes in a namespace at a real API server, and what people do there.

Must not be done here: playing nodes (`playednodes.py`), judging.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from fleetlm_common.kubeapi import KubeApi, Object
from fleetlm_common.kubenames import LEASES, RING_LABEL, RING_MAPS, SHARD_RINGS
from fleetlm_operator.resources import (
    CLAIMS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
)
from tests.support.apiserver import NAMESPACES, ApiServer

WAIT_S: Final = 60.0
"""Two cores that other tests share."""
KINDS: Final = (
    CLAIMS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    RING_MAPS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
)
"""Everything that a ring has."""


class World:
    """A namespace, and operators in it."""

    def __init__(self, api: KubeApi, server: ApiServer, namespace: str, folder: Path) -> None:
        self.api = api
        self.server = server
        self.namespace = namespace
        self.folder = folder
        self.operators: list[asyncio.subprocess.Process] = []

    async def operator(
        self, name: str, *, lease: str = "operator", version: str = "1.0.0", env: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start an operator for this namespace only, as administrator unless `env` says otherwise."""
        env = {
            **os.environ,
            **self.server.env,
            "FLEETLM_OPERATOR_POD_NAME": name,
            "FLEETLM_OPERATOR_POD_NAMESPACE": self.namespace,
            "FLEETLM_OPERATOR_NAMESPACES": self.namespace,
            "FLEETLM_OPERATOR_OPS_LISTEN": "127.0.0.1:0",
            "FLEETLM_OPERATOR_LEASE_NAME": lease,
            "FLEETLM_OPERATOR_VERSION": version,
            **(env or {}),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fleetlm_operator", "kubernetes", env=env, stdout=log, stderr=log
            )
        self.operators.append(process)
        return process

    async def metrics(self, name: str = "one") -> dict[str, float]:
        """The series of an operator that started, with their labels: `fleetlm_operator_rings{phase="Ready"}`."""

        async def started() -> bool:
            return '"event":"started"' in self.said(name)

        await self.until(f"{name} listens", started)
        lines = (json.loads(line) for line in self.said(name).splitlines() if '"event":"started"' in line)
        port = [line["ops_port"] for line in lines][-1]
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
        rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith("fleetlm_operator_"))
        return {series: float(value) for series, _, value in rows}

    def said(self, name: str = "one") -> str:
        """What an operator logged."""
        return (self.folder / f"{name}.log").read_text()

    async def make(self, spec: Object | None = None) -> None:
        """What `kubectl apply` of a ShardRing does."""
        body = {"apiVersion": SHARD_RINGS.api, "kind": SHARD_RINGS.kind, "metadata": {"name": "demo"}}
        await self.api.apply(SHARD_RINGS, self.namespace, {**body, "spec": spec or {}}, manager="kubectl")

    async def scale(self, replicas: int) -> None:
        """What `kubectl scale sr` does: by the scale subresource."""
        body: Object = {"spec": {"replicas": replicas}}
        await self.api.merge(SHARD_RINGS, self.namespace, "demo", body, manager="kubectl", subresource="scale")

    async def delete(self) -> None:
        """What `kubectl delete sr` does."""
        uid = (await self.ring())["metadata"]["uid"]
        await self.api.delete(SHARD_RINGS, self.namespace, "demo", uid=uid)

    async def left(self) -> set[str]:
        """Kinds of what the ring has, or has left behind."""
        found: set[str] = set()
        for resource in KINDS:
            listed = await self.api.list(resource, self.namespace, labels="app.kubernetes.io/instance=demo")
            found |= {resource.kind for _ in listed.items}
        return found

    async def pods(self) -> set[str]:
        """Uids of the ring's pods."""
        found = await self.api.list(PODS, self.namespace, labels=f"{RING_LABEL}=demo")
        return {pod["metadata"]["uid"] for pod in found.items}

    async def message(self, kind: str) -> str:
        """What a condition says to people."""
        found: list[Object] = (await self.ring())["status"]["conditions"]
        return str(next(each["message"] for each in found if each["type"] == kind))

    async def edit(self, spec: Object) -> None:
        """What `kubectl patch sr` does."""
        await self.api.merge(SHARD_RINGS, self.namespace, "demo", {"spec": spec}, manager="kubectl")

    async def ring(self) -> Object:
        """The ShardRing."""
        found = await self.api.get(SHARD_RINGS, self.namespace, "demo")
        assert found is not None
        return found

    async def reason(self, kind: str) -> str:
        """Status and reason of a condition: `True/Serving`."""
        ring = await self.ring()
        if ring.get("status", {}).get("observedGeneration") != ring["metadata"]["generation"]:
            return "stale"
        found = [each for each in ring["status"]["conditions"] if each["type"] == kind]
        return f"{found[0]['status']}/{found[0]['reason']}" if found else ""

    async def until(self, what: str, holds: Callable[[], Awaitable[bool]], *, timeout_s: float = WAIT_S) -> float:
        """Wait for it; returns how long that took, in seconds."""
        begun_s = time.monotonic()
        while not await holds():
            waited = time.monotonic() - begun_s
            if waited > timeout_s:
                ring = await self.api.get(SHARD_RINGS, self.namespace, "demo")
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{ring}\n{self._logs()[-3000:]}")
            await asyncio.sleep(0.1)
        return time.monotonic() - begun_s

    async def until_reason(self, kind: str, reason: str) -> float:
        """Wait for a condition."""

        async def holds() -> bool:
            return await self.reason(kind) == reason

        return await self.until(f"{kind} is {reason}", holds)

    async def images(self) -> list[str]:
        """Tags of the shards' images, by ordinal."""
        labels = f"{RING_LABEL}=demo,app.kubernetes.io/component=shard"
        pods = (await self.api.list(PODS, self.namespace, labels=labels)).items
        pods.sort(key=lambda pod: str(pod["metadata"]["name"]))
        return [pod["spec"]["containers"][0]["image"].partition(":")[2] for pod in pods]

    def _logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@asynccontextmanager
async def world_in(server: ApiServer, folder: Path, namespace: str) -> AsyncGenerator[World]:
    """A namespace of a test's own, which takes `restricted` pods only."""
    api = await KubeApi.connect(server.env, agent="test")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": namespace, "labels": labels}
    await api.apply(NAMESPACES, None, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}, manager="t")
    world = World(api, server, namespace, folder)
    try:
        yield world
    finally:
        for process in world.operators:
            if process.returncode is None:
                process.kill()
            await process.wait()
        await api.close()
