"""The operator under the rights that the chart gives it: they suffice, none is there without use, its metrics move."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any, Final

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import ApiError, ApiNotFound, KubeApi, Object
from fleetlm_common.kubemap import read_ring_map
from fleetlm_common.kubenames import LEASES, RING_LABEL, RING_MAPS, Resource
from fleetlm_common.logs import StreamLogger
from fleetlm_operator.kubeworld import NODES_AGAIN, KubeWorld
from fleetlm_operator.resources import NODES, PODS, ROLE_BINDINGS, ROLES, SERVICE_ACCOUNTS
from fleetlm_operator.shardwords import ShardWords
from tests.support.apiserver import NAMESPACES, Asked
from tests.support.helm import rendered
from tests.support.operatorworld import KINDS, World
from tests.support.playednodes import PlayedNodes

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]

CLUSTER_ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles")
CLUSTER_ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings")
GRANTS: Final = (SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS)
ACCOUNT: Final = "fleetlm-operator"
Right = tuple[str, str, str]


def rights_in(objects: list[Object]) -> set[Right]:
    """What the roles of rings' namespaces, or of the whole cluster, allow: group, resource, verb."""
    rules: list[dict[str, list[str]]] = [
        rule
        for each in objects
        if each["kind"] in {"Role", "ClusterRole"} and not each["metadata"]["name"].endswith("-election")
        for rule in each["rules"]
    ]
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def verbs(asked: Asked) -> set[str]:
    """Rights that a request needs: an apply that makes an object is asked for both."""
    return {asked.verb} | ({"create"} if asked.made else set())


class Installed:
    """The chart's account and rights; the operator itself is a process of the test.

    Args:
        world: where rings are.
        namespaced: whether rights are only in the rings' namespace.
        nodes: whether nodes are asked for all the same.
    """

    def __init__(self, world: World, *, namespaced: bool, nodes: bool = False) -> None:
        self.world = world
        self.namespace = f"{world.namespace[:50]}-system"
        watch = ("--set", f"watch.namespaces={{{world.namespace}}}") if namespaced else ()
        options = (*watch, "--set", f"watch.nodes={str(nodes).lower()}")
        self.objects = rendered("helm", *options, namespace=self.namespace)

    async def grant(self, *, rings: bool) -> None:
        """What may be done to rings, or what the operator needs for itself."""
        for each in self.objects:
            resource = next((kind for kind in GRANTS if kind.kind == each["kind"]), None)
            own = resource == SERVICE_ACCOUNTS or each["metadata"]["name"].endswith("-election")
            if resource is None or rings == own:
                continue
            namespace = each["metadata"].get("namespace")
            await self.world.api.apply(resource, namespace, each, manager="helm")

    async def account(self) -> Path:
        """A kubeconfig with a token of the account, in the chart's namespace."""
        await self.world.api.create(NAMESPACES, None, {"metadata": {"name": self.namespace}})
        await self.grant(rings=False)
        return await self.world.server.account(self.world.api, self.namespace, ACCOUNT)

    async def start(self) -> None:
        """An operator with that token."""
        kubeconfig = await self.account()
        container = next(each for each in self.objects if each["kind"] == "Deployment")["spec"]["template"]["spec"]
        told = {each["name"]: each["value"] for each in container["containers"][0]["env"] if "value" in each}
        mine = {"KUBECONFIG": str(kubeconfig), "FLEETLM_OPERATOR_POD_NAMESPACE": self.namespace}
        await self.world.operator("one", env={**told, **mine, "FLEETLM_OPERATOR_VERSION": "1.0.0"})

    def asked(self) -> list[Asked]:
        """Everything that it asked so far."""
        return self.world.server.asked_by(f"{self.namespace}:{ACCOUNT}")


async def hint(world: World) -> None:
    """Something happens to a pod of the ring, so that the operator looks at once."""
    labels = f"{RING_LABEL}=demo,app.kubernetes.io/component=shard"
    pods = (await world.api.list(PODS, world.namespace, labels=labels)).items
    for pod in pods[:1]:
        body: Object = {"metadata": {"annotations": {"look": pod["metadata"]["resourceVersion"]}}}
        with suppress(ApiNotFound):  # it is just being replaced, which is something, too
            await world.api.merge(PODS, world.namespace, pod["metadata"]["name"], body, manager="person")


async def every_child_is_lost(world: World) -> None:
    """Each object that the operator makes is deleted, all but volumes, pods and the map; each comes back."""
    for resource in KINDS:
        if resource.kind in {"PersistentVolumeClaim", "Pod", "RingMap"}:
            continue
        found = (await world.api.list(resource, world.namespace, labels=f"{RING_LABEL}=demo")).items
        assert found, resource.kind
        for each in found:
            metadata = each["metadata"]
            await world.api.delete(resource, world.namespace, metadata["name"], uid=metadata["uid"])

        async def back(kind: Resource = resource, before: Any = found) -> bool:
            gone = {each["metadata"]["uid"] for each in before}
            await hint(world)
            now = (await world.api.list(kind, world.namespace, labels=f"{RING_LABEL}=demo")).items
            return len(now) == len(before) and not gone & {each["metadata"]["uid"] for each in now}

        await world.until(f"every {resource.kind} is back", back)
    await world.until_reason("Progressing", "False/Settled")


async def a_life(world: World) -> None:
    """Everything that may happen to a ring, so that every right is needed."""
    await world.make()
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await world.until_reason("Progressing", "False/Settled")
        await world.edit({"version": "2.0.0"})
        await world.until_reason("Progressing", "False/Settled")
        await world.edit({"version": "bad"})
        await world.until_reason("Stalled", "True/ImageUnavailable")
        await world.edit({"version": "3.0.0"})
        await world.until_reason("Progressing", "False/Settled")
        assert nodes.unready_at_once == 1
        await every_child_is_lost(world)
        await world.edit({"networkPolicy": {"enabled": False}, "gateway": {"replicas": 3}})
        await world.until_reason("Progressing", "False/Settled")
        await world.edit({"storage": {"size": "20Gi"}})
        await world.until_reason("Progressing", "False/StorageNotExpandable")
        await world.scale(4)

        async def told() -> bool:
            ring_map = await world.api.get(RING_MAPS, world.namespace, "demo")
            return ring_map is not None and ring_map["spec"]["shards"] == 4

        await world.until("the map's spec knows what is asked for", told)
        await world.scale(2)

        async def gone() -> bool:
            return len((await world.api.list(LEASES, world.namespace, labels=f"{RING_LABEL}=demo")).items) == 2

        await world.until("two shards have left", gone)


def documented() -> set[str]:
    """Names of the operator's series, as the page has them."""
    page = (Path(__file__).parents[2] / "docs" / "operations" / "metrics.md").read_text()
    section = page.partition("\n## Operator on Kubernetes\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))


@pytest.mark.parametrize("namespaced", [True, False], ids=["namespaced", "clusterwide"])
async def test_the_charts_rights_suffice_and_are_needed(world: World, namespaced: bool) -> None:
    """A whole life of a ring: no request is forbidden, no right is unused, none reaches outside; every metric moves."""
    installed = Installed(world, namespaced=namespaced)
    await installed.start()

    async def waits() -> bool:
        return (await world.metrics()).get("fleetlm_operator_watch_restarts_total", 0) > 0

    await world.until("without rights it waits, and says so", waits)
    await installed.grant(rings=True)

    async def watching() -> bool:
        return len([each for each in installed.asked() if each.verb == "watch" and each.allowed]) >= 8

    await world.until("it watches all kinds", watching)
    begun = len(installed.asked())
    await a_life(world)
    asked = installed.asked()
    refused = [(each.resource, each.verb) for each in asked[begun:] if not each.allowed]
    assert refused == ([("nodes", "list")] if namespaced else []), "it looks whether it may, and lets it be for long"
    used = {(each.group, each.resource, verb) for each in asked if each.allowed for verb in verbs(each)}
    unused = sorted(rights_in(installed.objects) - used)
    assert not unused, "\n".join(map(str, unused))
    if namespaced:
        inside = {world.namespace, installed.namespace}
        assert {each.namespace for each in asked[begun:] if each.allowed} == inside
        assert not [each for each in installed.objects if each["kind"].startswith("Cluster")]
    own = [each for each in asked if each.namespace == installed.namespace]
    assert {(each.resource, each.name) for each in own} <= {
        ("leases", ACCOUNT),
        ("leases", ""),
        ("deployments", ACCOUNT),
    }
    after = await world.metrics()
    moved = {re.sub(r"_(bucket|sum|count)$", "", name.partition("{")[0]) for name, value in after.items() if value}
    assert documented() <= moved, "a documented series that is still as it was when the process began"
    assert after["fleetlm_operator_leader"] == 1


async def owned(world: World) -> list[int]:
    """Slots of each shard of the map, by ordinal."""
    found = await world.api.get(RING_MAPS, world.namespace, "demo")
    ring_map = None if found is None else read_ring_map(found)[1]
    assert ring_map is not None
    return [len(ring_map.slots_of(ShardName(f"shard-{number}"))) for number in range(len(ring_map.members))]


@asynccontextmanager
async def a_node(world: World) -> AsyncGenerator[str]:
    """One more node, gone afterwards."""
    name = f"{world.namespace}-1"
    made = await world.api.create(NODES, None, {"metadata": {"name": name}})
    yield name
    await world.api.delete(NODES, None, name, uid=made["metadata"]["uid"])


@pytest.mark.parametrize(
    ("namespaced", "nodes"),
    [(False, False), (True, True), (True, False)],
    ids=["clusterwide", "and-nodes", "namespaced"],
)
async def test_slots_avoid_a_cordoned_node(world: World, *, namespaced: bool, nodes: bool) -> None:
    """A shard leaves: its slots go to those on other nodes only, and back when the node takes pods.

    Without the right to see nodes they are spread over all, and the log says so once.
    """
    installed = Installed(world, namespaced=namespaced, nodes=nodes)
    await installed.start()
    await installed.grant(rings=True)
    blind = namespaced and not nodes
    async with PlayedNodes(world.api, world.namespace) as played, a_node(world) as node:
        played.places["demo-shard-1"] = node
        await world.make()
        await world.until_reason("Progressing", "False/Settled")
        before = await owned(world)
        cordon: Object = {"spec": {"unschedulable": True}}
        await world.api.merge(NODES, None, node, cordon, manager="kubectl")
        await world.scale(2)
        await world.until_reason("Progressing", "False/Settled")
        assert await owned(world) == ([256, 256] if blind else [512 - before[1], before[1]])
        assert ("on cordoned nodes" in (await world.ring())["status"]["message"]) is not blind
        await world.api.merge(NODES, None, node, {"spec": {"unschedulable": None}}, manager="kubectl")

        async def even() -> bool:
            await hint(world)
            return await owned(world) == [256, 256]

        await world.until("it has its share again", even)
    refused = {(each.resource, each.verb) for each in installed.asked() if not each.allowed}
    assert (("nodes", "list") in refused) is blind
    assert world.said().count('"event":"nodes_unseen"') == blind


async def test_the_right_to_see_nodes_is_asked_for_now_and_then(world: World) -> None:
    """Not at each look; what it lacks is said once; granted while the operator runs, it is used."""
    installed = Installed(world, namespaced=True)
    api = await KubeApi.connect({"KUBECONFIG": str(await installed.account())}, agent="test")
    await installed.grant(rings=True)
    await world.make()
    moments, said = [datetime.now(UTC)], StringIO()

    async def look(later: timedelta) -> frozenset[str]:
        moments.append(moments[-1] + later)
        seen = await kube.observe(world.namespace, "demo")
        assert seen is not None
        return seen.cordoned_nodes

    def tries() -> int:
        return len([each for each in installed.asked() if each.resource == "nodes"])

    async with ShardWords() as words, a_node(world) as node:
        await world.api.merge(NODES, None, node, {"spec": {"unschedulable": True}}, manager="kubectl")
        kube = KubeWorld(
            api,
            now=lambda: moments[-1],
            new_credential=lambda: "",
            words=words,
            log=StreamLogger("operator", stream=said),
        )

        async def allowed() -> bool:  # the server learns of a right a moment after it was granted
            with suppress(ApiError):
                await look(timedelta())
                return True
            return False

        await world.until("it may look at the ring", allowed)
        assert tries() == 1
        assert await look(NODES_AGAIN * 0.9) == frozenset()
        assert tries() == 1
        assert await look(NODES_AGAIN * 0.2) == frozenset()
        assert tries() == 2
        assert said.getvalue().count("nodes_unseen") == 1
        await Installed(world, namespaced=True, nodes=True).grant(rings=True)

        async def seen() -> bool:
            return await look(NODES_AGAIN) == frozenset({node})

        await world.until("it sees the cordoned node", seen)
    await api.close()
