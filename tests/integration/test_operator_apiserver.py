"""The operator as a process at a real API server with real controllers; kubelets are played (no containers run)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_common.kubemap import read_ring_map
from fleetlm_common.kubenames import LEASES, RING_LABEL, RING_MAPS, Resource
from fleetlm_common.logs import NullLogger
from fleetlm_common.ops import Health
from fleetlm_operator.kubeworld import KubeWorld
from fleetlm_operator.resources import (
    CLAIMS,
    DEPLOYMENTS,
    EVENTS,
    PODS,
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
)
from fleetlm_operator.ringplan import Apply, Create, plan
from fleetlm_operator.shardwords import ShardWords
from tests.support.operatorworld import World
from tests.support.playednodes import PlayedNodes
from tests.test_operator.modelcluster import DEFAULTS

STORAGE_CLASSES: Final = Resource("storage.k8s.io/v1", "StorageClass", "storageclasses")
VOLUMES: Final = Resource("v1", "PersistentVolume", "persistentvolumes")

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]


async def test_a_ring_comes_up_and_stays_as_asked(world: World) -> None:
    """From the smallest ShardRing to Ready; no finalizer, spec untouched; what is deleted or changed comes back."""
    await world.make()
    before = (await world.ring())["spec"]
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Ready", "True/Serving")
        ring = await world.ring()
        assert ring["spec"] == before
        assert ring["metadata"]["generation"] == 1
        assert "finalizers" not in ring["metadata"]
        assert not {"annotations"} & set(ring["metadata"])
        service = await world.api.get(SERVICES, world.namespace, "demo-gateway")
        assert service is not None
        label: Object = {"metadata": {"labels": {"team": "chat"}}}
        await world.api.merge(SERVICES, world.namespace, "demo-gateway", label, manager="person")
        await world.api.merge(STATEFUL_SETS, world.namespace, "demo-shard", {"spec": {"replicas": 1}}, manager="person")

        async def as_asked() -> bool:
            found = await world.api.get(STATEFUL_SETS, world.namespace, "demo-shard")
            return found is not None and found["spec"]["replicas"] == 3

        await world.until("the StatefulSet is as asked again", as_asked)
        secret = await world.api.get(SECRETS, world.namespace, "demo-credential")
        deployment = await world.api.get(DEPLOYMENTS, world.namespace, "demo-gateway")
        assert secret is not None
        assert deployment is not None
        uid = deployment["metadata"]["uid"]
        await world.api.delete(DEPLOYMENTS, world.namespace, "demo-gateway", uid=uid)

        async def back() -> bool:
            found = await world.api.get(DEPLOYMENTS, world.namespace, "demo-gateway")
            return found is not None and found["metadata"]["uid"] != uid

        await world.until("the Deployment is back", back)
        service = await world.api.get(SERVICES, world.namespace, "demo-gateway")
        assert service is not None
        assert service["metadata"]["labels"]["team"] == "chat"
        again = await world.api.get(SECRETS, world.namespace, "demo-credential")
        assert again is not None
        assert again["data"] == secret["data"], "the credential is made once"


async def test_at_rest_nothing_is_written(world: World) -> None:
    """Not the ring, not a child: versions stay while the operator looks again and again."""
    await world.make()
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")

    async def versions() -> list[str]:
        found = [await world.ring()]
        for resource in (STATEFUL_SETS, DEPLOYMENTS, SERVICES, RING_MAPS, LEASES):
            labels = f"{RING_LABEL}=demo"
            found += (await world.api.list(resource, world.namespace, labels=labels)).items
        return [each["metadata"]["resourceVersion"] for each in found]

    events = (await world.api.list(EVENTS, world.namespace)).items
    ours = [event for event in events if event.get("reportingComponent") == "fleetlm-operator"]
    assert {event["reason"] for event in ours} >= {"BringUp", "Settled"} or len(ours) >= 2
    before = await versions()
    for number in range(5):  # each is a hint
        body: Object = {"metadata": {"annotations": {"look": str(number)}}}
        await world.api.merge(PODS, world.namespace, "demo-shard-0", body, manager="person")
        await asyncio.sleep(0)
    assert "did" in world.said()
    assert await versions() == before


async def test_roll_bad_image_and_change_of_mind(world: World) -> None:
    """One pod at a time; a bad image stops at the first; another version heals without hands."""
    await world.make()
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await world.until_reason("Progressing", "False/Settled")
        await world.edit({"version": "2.0.0"})
        await world.until_reason("Progressing", "False/Settled")
        assert await world.images() == ["2.0.0"] * 3
        assert nodes.unready_at_once == 1
        await world.edit({"version": "bad"})
        await world.until_reason("Stalled", "True/ImageUnavailable")
        assert await world.images() == ["2.0.0", "2.0.0", "bad"]
        await world.edit({"version": "3.0.0"})
        await world.until_reason("Progressing", "False/Settled")
        assert await world.images() == ["3.0.0"] * 3
        assert nodes.unready_at_once == 1


@pytest.mark.parametrize("strategy", ["InPlace", "Handover"])
async def test_two_operators_at_once_do_no_harm(world: World, strategy: str) -> None:
    """Both lead (different Leases): one map, one credential, never two shards away, no move that nobody ends."""
    await world.make({"update": {"strategy": strategy}})
    await world.operator("one", lease="a")
    await world.operator("two", lease="b")
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await world.until_reason("Progressing", "False/Settled")
        for version in ("2.0.0", "3.0.0"):
            await world.edit({"version": version})
            await world.until_reason("Progressing", "False/Settled")
            assert await world.images() == [version] * 3
        assert nodes.unready_at_once == 1
        found = await world.api.get(RING_MAPS, world.namespace, "demo")
        assert found is not None
        assert not found["spec"]["map"].get("moves")
        if strategy == "InPlace":
            assert found["spec"]["map"]["epoch"] == 1, "nothing had to be moved"


async def leader(world: World) -> str:
    """Who leads."""
    found = await world.api.get(LEASES, world.namespace, "operator")
    return str(found["spec"].get("holderIdentity") or "") if found else ""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_standby_follows(world: World, how: signal.Signals) -> None:
    """A leader that ends gives its Lease back, one that dies is followed when it is over; the next looks after rings.

    The standby is up before: what is measured is neither its start nor the leader's end.
    """
    first = await world.operator("one")

    async def one_leads() -> bool:
        return await leader(world) == "one"

    await world.until("one leads", one_leads)
    await world.operator("two")
    assert (await world.metrics("two"))["fleetlm_operator_leader"] == 0
    first.send_signal(how)
    assert await first.wait() == (0 if how == signal.SIGTERM else -how)
    if how == signal.SIGTERM:
        assert await leader(world) in {"", "two"}, "given back before the process ended"

    async def two_leads() -> bool:
        return await leader(world) == "two"

    await world.until("two leads", two_leads, timeout_s=20)
    await world.make()
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Ready", "True/Serving")


async def test_the_lease_goes_with_the_deployment(world: World) -> None:
    """The operator's own; also one that was there before, as an earlier operator made it. Without one it stays."""
    labels = {"app": "operator"}
    body: Object = {
        "apiVersion": DEPLOYMENTS.api,
        "kind": DEPLOYMENTS.kind,
        "metadata": {"name": "own"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "one", "image": "none"}]}},
        },
    }
    for number, owners in enumerate([None, ["own"]]):
        env = {"FLEETLM_OPERATOR_DEPLOYMENT": "own"}
        operator = await world.operator(f"number-{number}", env=env)

        async def leads(name: str = f"number-{number}") -> bool:
            return await leader(world) == name

        await world.until("it leads", leads)
        found = await world.api.get(LEASES, world.namespace, "operator")
        assert found is not None
        said = found["metadata"].get("ownerReferences")
        assert (said and [owner["name"] for owner in said]) == owners
        operator.terminate()
        await operator.wait()
        await world.api.apply(DEPLOYMENTS, world.namespace, body, manager="helm")


async def test_killed_again_and_again(world: World) -> None:
    """SIGKILL at growing moments during bring-up and upgrade: each time the next one goes on."""
    await world.make()
    async with PlayedNodes(world.api, world.namespace) as nodes:
        for number in range(4):
            process = await world.operator("one", lease=f"lease-{number}")

            async def acted(count: int = number) -> bool:
                return world.said().count('"event":"did"') > 6 * count

            await world.until("it acts", acted)
            process.kill()
            await process.wait()
        await world.operator("one", lease="last")
        await world.until_reason("Progressing", "False/Settled")
        await world.edit({"version": "2.0.0"})
        await world.until_reason("Progressing", "False/Settled")
        assert nodes.unready_at_once == 1


@pytest.mark.parametrize("keep", ["Retain", "Delete"])
async def test_deletion_ends_without_an_operator(world: World, keep: str) -> None:
    """By garbage collection: what is left is what Retain asked for, and a new ring goes on with it."""
    await world.make({"volumeRetention": {"whenDeleted": keep}})
    process = await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        process.kill()
        await process.wait()
        ring = await world.ring()
        await world.delete()

        async def gone() -> bool:
            return await world.left() == ({"RingMap", "PersistentVolumeClaim"} if keep == "Retain" else set())

        await world.until("only what was asked for is left", gone)
        await world.make({"volumeRetention": {"whenDeleted": keep}})
        await world.operator("two", lease="another")
        await world.until_reason("Ready", "True/Serving")
        found = await world.api.get(RING_MAPS, world.namespace, "demo")
        assert found is not None
        assert (found["spec"]["uid"] == ring["metadata"]["uid"]) == (keep == "Retain")


async def test_an_orphaned_ring_is_taken_over_without_a_restart(world: World) -> None:
    """Orphan leaves everything running; the next ShardRing of the name owns it."""
    await world.make({"deletionPolicy": "Orphan"})
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        pods = await world.pods()
        await world.delete()
        await world.make()
        await world.until_reason("Progressing", "False/Settled")
        assert await world.pods() == pods
        owned = await world.api.get(STATEFUL_SETS, world.namespace, "demo-shard")
        assert owned is not None
        assert owned["metadata"]["ownerReferences"][0]["uid"] == (await world.ring())["metadata"]["uid"]


async def test_volumes_that_cannot_grow_are_said(world: World) -> None:
    """The API server's own refusal stands in the condition; new volumes get the size; no pod is restarted."""
    await world.make()
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        pods = await world.pods()
        await world.edit({"storage": {"size": "20Gi"}})
        await world.until_reason("Progressing", "False/StorageNotExpandable")

        async def template() -> bool:
            found = await world.api.get(STATEFUL_SETS, world.namespace, "demo-shard")
            if found is None:
                return False
            claim = found["spec"]["volumeClaimTemplates"][0]["spec"]
            return bool(claim["resources"]["requests"]["storage"] == "20Gi")

        await world.until("the claim template has the new size", template)
        await world.until_reason("Ready", "True/Serving")
        assert await world.pods() == pods


GROWING: Final = "growing"


async def grows(world: World) -> None:
    """A StorageClass that enlarges volumes, three volumes of it, and what its driver does when a claim wants more."""
    metadata: Object = {"name": GROWING}
    no_provisioner = "kubernetes.io/no-provisioner"
    made: Object = {"metadata": metadata, "provisioner": no_provisioner, "allowVolumeExpansion": True}
    await world.api.create(STORAGE_CLASSES, None, made)
    for number in range(3):
        spec: Object = {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": GROWING,
            "hostPath": {"path": f"/nowhere/{number}"},
        }
        await world.api.create(VOLUMES, None, {"metadata": {"name": f"growing-{number}"}, "spec": spec})


async def enlarge(world: World) -> None:
    """The driver's part: volume and claim get what the claim asks for."""
    for claim in (await world.api.list(CLAIMS, world.namespace)).items:
        capacity: Object = {"storage": claim["spec"]["resources"]["requests"]["storage"]}
        volume, name = claim["spec"]["volumeName"], claim["metadata"]["name"]
        await world.api.merge(VOLUMES, None, volume, {"spec": {"capacity": capacity}}, manager="driver")
        body: Object = {"status": {"capacity": capacity}}
        await world.api.merge(CLAIMS, world.namespace, name, body, manager="driver", subresource="status")


async def test_volumes_grow_where_the_class_allows_it(world: World) -> None:
    """Claims ask for the size, the growth is under way until they have it, no pod is restarted."""
    await grows(world)
    await world.make({"storage": {"className": GROWING}})
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        pods = await world.pods()
        await world.edit({"storage": {"size": "20Gi"}})
        await world.until_reason("Progressing", "True/VolumeGrowth")
        assert await world.reason("Ready") == "True/Serving"

        async def asked() -> bool:
            claims = (await world.api.list(CLAIMS, world.namespace)).items
            return {claim["spec"]["resources"]["requests"]["storage"] for claim in claims} == {"20Gi"}

        await world.until("every claim asks for the size", asked)
        await enlarge(world)
        await world.until_reason("Progressing", "False/Settled")
        assert await world.pods() == pods


async def test_more_shards_and_fewer(world: World) -> None:
    """`kubectl scale` 3 → 5 → 2: slots move by the map, pods that go are the last to; the ring is Ready throughout."""
    await world.make()
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        kept = await world.pods()
        for replicas in (5, 2):
            await world.scale(replicas)
            await world.until_reason("Progressing", "True/Scaling")
            assert await world.reason("Ready") == "True/Serving"
            await world.until_reason("Progressing", "False/Settled")
            found = await world.api.get(RING_MAPS, world.namespace, "demo")
            assert found is not None
            ring_map = read_ring_map(found)[1]
            assert ring_map is not None
            names = [f"shard-{number}" for number in range(replicas)]
            counts = [len(ring_map.slots_of(ShardName(name))) for name in names]
            assert sorted(member.name for member in ring_map.members) == names  # they joined as they were ready
            assert sum(counts) == ring_map.slots
            assert max(counts) - min(counts) <= 1
            leases = await world.api.list(LEASES, world.namespace, labels=f"{RING_LABEL}=demo")
            assert len(leases.items) == replicas
        shards = await world.api.list(PODS, world.namespace, labels="app.kubernetes.io/component=shard")
        assert {pod["metadata"]["uid"] for pod in shards.items} < kept


async def test_an_orphaned_ring_has_no_writer_waiting(world: World) -> None:
    """`deletionPolicy: Orphan` in the middle of a move: what is sealed is ended all the same, and nothing begins."""
    await world.make({"deletionPolicy": "Orphan"})
    await world.operator("one")

    async def states() -> list[str]:
        found = await world.api.get(RING_MAPS, world.namespace, "demo")
        ring_map = None if found is None else read_ring_map(found)[1]
        return [] if ring_map is None else [move.state for move in ring_map.moves]

    async def sealed() -> bool:
        return "Sealing" in await states()

    async def ended() -> bool:
        return "Sealing" not in await states()

    async with PlayedNodes(world.api, world.namespace) as nodes:
        await world.until_reason("Progressing", "False/Settled")
        nodes.confirms = False
        await world.scale(5)
        await world.until("a move is sealed", sealed)
        await world.delete()
        await world.until("no move is sealed", ended, timeout_s=15)
        assert len(await world.pods()) == 7


async def test_an_upgrade_of_the_operator_rolls_nothing(world: World) -> None:
    """A newer operator takes over rings at rest: not one write to them, not one pod replaced."""
    await world.make()
    first = await world.operator("one")
    async with PlayedNodes(world.api, world.namespace):
        await world.until_reason("Progressing", "False/Settled")
        workloads = (STATEFUL_SETS, "demo-shard"), (DEPLOYMENTS, "demo-gateway")
        pods = await world.pods()
        before = [await world.api.get(resource, world.namespace, name) for resource, name in workloads]
        first.send_signal(signal.SIGTERM)
        assert await first.wait() == 0
        await world.operator("two", version="9.9.9")

        async def looked() -> bool:
            return (await world.metrics("two")).get('fleetlm_operator_steps_total{outcome="ok"}', 0) > 0

        await world.until("the newer one has looked", looked)
        assert await world.pods() == pods
        assert before == [await world.api.get(resource, world.namespace, name) for resource, name in workloads]
        assert (await world.ring())["status"]["version"] == "1.0.0"


async def test_what_shards_say_of_themselves_stands_in_the_conditions(world: World) -> None:
    """Asked at their operations ports: an empty volume announces nothing, a damaged log serves."""
    await world.make()
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await world.until_reason("Progressing", "False/Settled")
        nodes.words["demo-shard-1"] = Health(ok=False, reason="VolumeLost", message="the log is gone")
        await world.until_reason("Degraded", "True/VolumeLost")
        assert "shard-1: VolumeLost: the log is gone" in await world.message("Degraded")
        assert await world.reason("Ready") == "False/VolumeLost"
        nodes.words["demo-shard-1"] = Health(ok=True, reason="LogDamaged", message="1 range is unreadable")
        await world.until_reason("Degraded", "True/LogDamaged")
        assert await world.reason("Ready") == "True/Serving"


async def test_what_is_made_once_has_its_owner_at_once(world: World) -> None:
    """A ring that goes before its next step leaves nothing; and one that is to keep its RingMap may take it back."""

    async def step(kind: type[Create] | type[Apply]) -> list[list[Object]]:
        async with ShardWords() as words:
            kube = KubeWorld(
                world.api,
                now=lambda: datetime.now(UTC),
                new_credential=lambda: "made up",
                words=words,
                log=NullLogger(),
            )
            seen = await kube.observe(world.namespace, "demo")
            assert seen is not None
            for action in plan(seen, DEFAULTS).actions:
                if isinstance(action, kind):
                    await kube.act(seen.ring, action)
        made = [
            await world.api.get(SECRETS, world.namespace, "demo-credential"),
            await world.api.get(RING_MAPS, world.namespace, "demo"),
        ]
        return [(one or {})["metadata"].get("ownerReferences", []) for one in made]

    await world.make({"volumeRetention": {"whenDeleted": "Delete"}})
    uid = (await world.ring())["metadata"]["uid"]
    assert [[owner["uid"] for owner in owners] for owners in await step(Create)] == [[uid], [uid]]
    await world.edit({"volumeRetention": {"whenDeleted": "Retain"}})
    assert [[owner["uid"] for owner in owners] for owners in await step(Apply)] == [[uid], []]


async def bring_up(world: World, nodes: PlayedNodes) -> None:
    """No map yet: a shard is missing."""
    nodes.held.add("demo-shard-1")
    await world.make({"volumeRetention": {"whenDeleted": "Delete"}})
    await world.until_reason("Progressing", "True/BringUp")


async def rolling(world: World, nodes: PlayedNodes) -> None:
    """One pod changed, and not ready yet."""
    await world.make({"volumeRetention": {"whenDeleted": "Delete"}})
    await world.until_reason("Progressing", "False/Settled")
    nodes.held.add("demo-shard-2")
    await world.edit({"version": "2.0.0"})

    async def changed() -> bool:
        return await world.images() == ["1.0.0", "1.0.0", "2.0.0"]

    await world.until("the first pod is changed", changed)


async def stalled(world: World, nodes: PlayedNodes) -> None:
    """A bad image."""
    await world.make({"volumeRetention": {"whenDeleted": "Delete"}})
    await world.until_reason("Progressing", "False/Settled")
    assert nodes.unready_at_once == 0
    await world.edit({"version": "bad"})
    await world.until_reason("Stalled", "True/ImageUnavailable")


@pytest.mark.parametrize("state", [bring_up, rolling, stalled], ids=lambda state: state.__name__)
async def test_paused_and_deleted_in_every_state(
    world: World, state: Callable[[World, PlayedNodes], Awaitable[None]]
) -> None:
    """Paused: nothing is changed, whatever is asked; deleted while paused: gone, and nothing waits for anything."""
    await world.operator("one")
    async with PlayedNodes(world.api, world.namespace) as nodes:
        await state(world, nodes)
        await world.edit({"paused": True})
        await world.until_reason("Paused", "True/PausedBySpec")
        pods, images = await world.pods(), await world.images()
        nodes.held.clear()
        await world.edit({"version": "7.0.0"})
        await world.until_reason("Paused", "True/PausedBySpec")
        assert await world.pods() == pods
        assert await world.images() == images
        await world.delete()

        async def gone() -> bool:
            return not await world.left()

        # The garbage collector looks for new kinds every half a minute, and again when it found them gone.
        await world.until("nothing is left", gone, timeout_s=120)
