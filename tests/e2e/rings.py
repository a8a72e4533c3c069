"""A ring on the cluster, as a person with kubectl sees it, and what can be done to its pods.

Must not be done here: reading the product's memory, or judging (that is the history's).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.cluster import nodes
from tests.cluster.storage import VOLUMES
from tests.e2e.kubectl import Json, get, kubectl, listed, run, until

READY_S: Final = 90.0
KILLED: Final[Counter[str]] = Counter()
"""By uid of the pod: how often a test ended its container. Nobody else may."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The ShardRing `name` in `namespace`."""

    namespace: str
    name: str = "chat"

    async def apply(self, spec: Mapping[str, Any] | None = None) -> None:
        """`kubectl apply` of the whole object."""
        await kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps(self.manifest(spec)))

    def manifest(self, spec: Mapping[str, Any] | None = None) -> Json:
        """The object that a person would write."""
        return {
            "apiVersion": "fleetlm.io/v1alpha1",
            "kind": "ShardRing",
            "metadata": {"name": self.name},
            **({"spec": dict(spec)} if spec else {}),
        }

    async def patch(self, spec: Mapping[str, Any]) -> None:
        """`kubectl patch`."""
        body = json.dumps({"spec": dict(spec)})
        await kubectl("patch", "shardring", self.name, "-n", self.namespace, "--type=merge", "-p", body)

    async def delete(self) -> None:
        """`kubectl delete` and wait until the object is gone."""
        await kubectl("delete", "shardring", self.name, "-n", self.namespace, "--timeout=60s")

    async def read(self) -> Json:
        """The object."""
        return await get(self.namespace, "shardring", self.name)

    async def condition(self, kind: str) -> Json:
        """One condition that is about the present generation.

        Raises:
            KeyError: there is none yet.
        """
        found = await self.read()
        for one in found.get("status", {}).get("conditions", []):
            if one["type"] == kind and one["observedGeneration"] == found["metadata"]["generation"]:
                return dict(one)
        raise KeyError(f"{kind} about generation {found['metadata']['generation']}: {found.get('status')}")

    async def says(self, kind: str, reason: str, *, timeout_s: float = READY_S) -> Json:
        """Wait until a condition has a reason; the condition."""
        seen: Json = {}

        async def holds() -> bool:
            seen.update(await self.condition(kind))
            return bool(seen["reason"] == reason)

        try:
            await until(f"{kind} has reason {reason}", holds, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\nlast {seen}\n{await self.evidence()}") from error
        return seen

    async def ready(self, *, timeout_s: float = READY_S) -> float:
        """Wait until everything is as asked: Ready, settled, nothing degraded; the seconds that it took."""

        async def holds() -> bool:
            wanted = {"Ready": "Serving", "Progressing": "Settled", "Degraded": "AllWell", "Stalled": "NotStalled"}
            found = await self.read()
            said = {
                one["type"]: one["reason"]
                for one in found["status"]["conditions"]
                if one["observedGeneration"] == found["metadata"]["generation"]
            }
            return wanted.items() <= said.items()

        try:
            return await until(f"{self.namespace}/{self.name} is as asked", holds, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self.evidence()}") from error

    async def map(self) -> Json:
        """Who owns what, and which moves are in flight."""
        return dict((await get(self.namespace, "ringmap", self.name))["spec"]["map"])

    async def url(self) -> str:
        """Its gateway Service, as clients in the cluster reach it; the address, for the client has no cluster DNS."""
        service = await get(self.namespace, "service", f"{self.name}-gateway")
        return f"http://{service['spec']['clusterIP']}:4000"

    async def pods(self, component: str) -> list[Json]:
        """Pods of `shard` or `gateway` that are not about to go, by name."""
        selector = f"fleetlm.io/ring={self.name},app.kubernetes.io/component={component}"
        found = [pod for pod in await listed(self.namespace, "pods", selector) if not going(pod)]
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    async def evidence(self) -> str:
        """What a person would look at: the ring, its pods, events, the ends of logs."""
        at = ("-n", self.namespace)
        commands = (
            ("get", "shardring", self.name, *at, "-o", "yaml"),
            ("get", "pods", *at, "-o", "wide"),
            ("get", "events", *at, "--sort-by=.lastTimestamp"),
            ("logs", *at, "-l", f"fleetlm.io/ring={self.name}", "--tail=20", "--prefix"),
            ("logs", "-n", "fleetlm", "-l", "app.kubernetes.io/name=fleetlm", "--tail=30", "--prefix"),
        )
        parts: list[str] = []
        for command in commands:
            try:
                parts.append(f"$ kubectl {' '.join(command)}\n{await kubectl(*command)}")
            except Exception as error:  # noqa: BLE001 - one that cannot be had must not hide the others
                parts.append(f"$ kubectl {' '.join(command)}: {error}")
        return "\n".join(parts)


async def nothing_ended_by_itself(ring: Ring, *, others: Sequence[Json] = ()) -> None:
    """No container of the ring's pods and of `others` ended that no test killed.

    Raises:
        AssertionError: one did; with its last words.
    """
    for pod in [*await ring.pods("shard"), *await ring.pods("gateway"), *others]:
        name, found, killed = pod["metadata"]["name"], restarts(pod), KILLED[pod["metadata"]["uid"]]
        if found != killed:
            words = await kubectl("logs", name, "-n", pod["metadata"]["namespace"], "--previous", "--tail=20")
            raise AssertionError(f"{name} was restarted {found} times, and killed {killed} times:\n{words}")


async def volume(ring: Ring, ordinal: int) -> Path:
    """The folder that is a shard's volume."""
    claim = await get(ring.namespace, "pvc", f"data-{ring.name}-shard-{ordinal}")
    return VOLUMES / str(claim["spec"]["volumeName"])


def going(pod: Json) -> bool:
    """Whether a pod is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def pod_ready(pod: Json) -> bool:
    """Whether Kubernetes calls it ready."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def restarts(pod: Json) -> int:
    """How often its container was started again."""
    return sum(int(one["restartCount"]) for one in pod["status"].get("containerStatuses", []))


def container_of(pod: Json) -> str:
    """The id of its one container, as containerd knows it."""
    return str(pod["status"]["containerStatuses"][0]["containerID"]).removeprefix("containerd://")


async def signal_container(pod: Json, name: str = "SIGKILL") -> None:
    """Send a signal to the pod's container, behind Kubernetes' back.

    Raises:
        CommandError: it has ended already.
    """
    node = str(pod["spec"]["nodeName"])
    line = ("tasks", "kill", "--signal", name, container_of(pod))
    await run(*nodes.ctr_line(node, *line))
    if name == "SIGKILL":
        KILLED[pod["metadata"]["uid"]] += 1


async def killed_in_place(namespace: str, name: str) -> None:
    """SIGKILL a pod's container, and wait until the same pod has another one that is ready."""
    pod = await get(namespace, "pod", name)
    before = restarts(pod)
    await signal_container(pod)

    async def back() -> bool:
        now = await get(namespace, "pod", name)
        assert now["metadata"]["uid"] == pod["metadata"]["uid"], f"{name} was replaced, not restarted"
        return restarts(now) > before and pod_ready(now)

    await until(f"{name} is back in its pod", back)


async def replaced(namespace: str, name: str, *how: str, within_s: float = READY_S) -> None:
    """`kubectl delete pod`, and wait until another pod of that name is ready."""
    uid = (await get(namespace, "pod", name))["metadata"]["uid"]
    await kubectl("delete", "pod", name, "-n", namespace, "--wait=false", *how)

    async def back() -> bool:
        now = await get(namespace, "pod", name)
        return bool(now["metadata"]["uid"] != uid and pod_ready(now))

    await until(f"another {name} is ready", back, timeout_s=within_s)
