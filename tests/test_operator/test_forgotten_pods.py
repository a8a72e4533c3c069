"""A shard of Kubernetes that is dead for good: people's word lets its pod go; what keeps it stands in the status.

The model asserts that no member's pod is given up, and that only confirmed moves change owners (`modelcluster.py`).
"""

from __future__ import annotations

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_operator.forgetting import ANSWER_S
from fleetlm_operator.membership import view_of
from tests.test_operator.modelcluster import ModelCluster
from tests.test_operator.test_ringmoves import at_rest, balanced, settled

NAME = ShardName("shard-2")
WORD: Object = {"shard": "shard-2", "volume": "volume-2"}
STEPS = int(ANSWER_S) + 10
"""A step of the model takes a second."""


def dead() -> ModelCluster:
    """Two shards are asked for; the third owns nothing, was dead before the last move, and says nothing of it."""
    cluster = settled({"cordoned": ["shard-2"]})
    cluster.break_pod(2)
    cluster.edit(pins=[{"first": 0, "last": 0, "shard": "shard-1"}])
    steps(cluster, 20)
    cluster.edit(replicas=2, cordoned=[])
    steps(cluster, 20)
    assert balanced(cluster, 2)
    return cluster


def steps(cluster: ModelCluster, count: int) -> None:
    for _ in range(count):
        cluster.step()


def is_member(cluster: ModelCluster) -> bool:
    """Of shard-2."""
    return cluster.map is not None and cluster.map.member(NAME) is not None


def replicas(cluster: ModelCluster) -> int:
    """Pods that the StatefulSet is told to have."""
    return int(cluster.children["StatefulSet demo-shard"]["spec"]["replicas"])


def kept(cluster: ModelCluster) -> list[str]:
    """What `blockedBy` says of members that people want forgotten."""
    blocks: list[Object] = cluster.ring_object["status"].get("blockedBy", [])
    return [block["message"] for block in blocks if block["predicate"] == "MayBeForgotten"]


def test_a_dead_shard_holds_its_pod_until_it_is_forgotten() -> None:
    """Without the word for ever; with it pod and Lease go, the volume stays, and the ring is as asked."""
    cluster = dead()
    steps(cluster, 200)
    assert is_member(cluster)
    assert (replicas(cluster), len(cluster.pods)) == (3, 3)
    assert cluster.said("Stalled") == ("True", "ContainerFails")
    cluster.edit(forgottenVolumes=[WORD])
    cluster.step()
    assert kept(cluster) == ["shard-2 is not forgotten: it has 20 s to answer"]
    at_rest(cluster)
    assert not is_member(cluster)
    assert (replicas(cluster), sorted(cluster.pods), sorted(cluster.claims)) == (2, [0, 1], [0, 1, 2])
    assert "Lease demo-shard-2" not in cluster.children
    assert cluster.said("Degraded") == ("False", "AllWell")
    assert cluster.said("Stalled") == ("False", "NotStalled")


def test_what_keeps_it_stands_in_the_status() -> None:
    """Another volume, a shard that is asked for: each is said, and it stays."""
    cluster = dead()
    cluster.edit(forgottenVolumes=[{"shard": "shard-2", "volume": "another"}])
    steps(cluster, STEPS)
    assert kept(cluster) == ["shard-2 is not forgotten: the ring map binds it to volume volume-2, not to another"]
    cluster.edit(replicas=3, forgottenVolumes=[WORD])
    steps(cluster, STEPS)
    assert is_member(cluster)
    assert cluster.verdict is not None
    cluster.crashed.clear()
    steps(cluster, 20)
    asked = "shard-2 is not forgotten: the ring asks for 3 shards, and it is one of them: ask for fewer first"
    assert cluster.said("Progressing") == ("False", "NotForgotten")
    assert cluster.verdict.conditions["Progressing"].message == asked
    assert cluster.verdict.sentence == asked
    cluster.edit(forgottenVolumes=[])
    at_rest(cluster)


def test_a_pod_that_is_ready_is_an_answer() -> None:
    """Its shard only cannot announce anything; one that is not Ready is no answer, nor is one that is not there."""
    cluster = settled()
    assert view_of(cluster.observe()).alive == ("shard-0", "shard-1", "shard-2")
    cluster.break_pod(2)
    del cluster.pods[1]
    assert view_of(cluster.observe()).alive == ("shard-0",)


@pytest.mark.parametrize("volume", ["volume-2", "volume-2-anew"])
def test_it_is_asked_for_again(volume: str) -> None:
    """An empty volume joins; the forgotten one only when the word is taken back, and what to do is said."""
    cluster = dead()
    cluster.edit(forgottenVolumes=[WORD])
    at_rest(cluster)
    cluster.crashed.clear()
    cluster.volumes[2] = volume
    cluster.edit(replicas=3, pins=[])
    if volume == "volume-2":
        steps(cluster, 60)
        assert not is_member(cluster)
        assert cluster.said("Degraded") == ("True", "MapHeld")
        assert cluster.verdict is not None
        assert "shard-2 announces volume volume-2, which people had the ring forget" in cluster.verdict.sentence
        cluster.edit(forgottenVolumes=[])
    at_rest(cluster)
    assert cluster.map is not None
    member = cluster.map.member(NAME)
    assert member is not None
    assert member.volume_id == volume
    assert balanced(cluster, 3)
