"""The plan of a ring with cordoned nodes or shards, or with pins: what moves, what stays, what is said.

The model asserts at each map that only confirmed moves change owners (`modelcluster.py`, `playedring.py`).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlm_common.kubeapi import Object
from tests.test_operator.modelcluster import HANDOVER
from tests.test_operator.test_ringmoves import STEPS_MAX, at_rest, balanced, owned, settled


def test_a_drain_moves_nothing_to_a_node_that_is_drained_next() -> None:
    """A pool of three nodes of four is cordoned at once and drained: each shard's slots go to the fourth only."""
    cluster = settled({"replicas": 4})
    cluster.cordoned_nodes = {"node0", "node1", "node2"}
    assert cluster.step() == ()
    cluster.evict(0)
    at_rest(cluster)
    after = owned(cluster)
    assert (after["shard-1"], after["shard-2"]) == (128, 128), "theirs wait for their own drain"
    assert after["shard-3"] + after["shard-0"] == 256, "shard-0 is back, on a node that takes pods"
    for number in (1, 2):
        cluster.evict(number)
        at_rest(cluster)
    assert {pod.spec.node_name for pod in cluster.pods.values()} == {"node3", "spare"}
    assert balanced(cluster, 4)
    cluster.cordoned_nodes.clear()
    assert cluster.step() == ()


def test_node_cordons_that_leave_nobody_count_for_nobody() -> None:
    """Whoever may own slots stands on a cordoned node: a shard that leaves gives its slots to them all the same."""
    cluster = settled()
    cluster.cordoned_nodes = {"node0", "node1"}
    cluster.edit(replicas=2)
    at_rest(cluster)
    assert balanced(cluster, 2)


def test_shards_without_new_slots_are_named() -> None:
    """Why a ring at rest is uneven stands in its sentence; it is as asked all the same."""
    cluster = settled({"replicas": 4})
    cluster.cordoned_nodes = {"node1"}
    cluster.edit(replicas=3)
    at_rest(cluster)
    assert owned(cluster)["shard-1"] == 128
    assert cluster.said("Progressing") == ("False", "Settled")
    assert cluster.verdict is not None
    assert cluster.verdict.sentence.endswith("all ready; on cordoned nodes, so without new slots: shard-1")
    cluster.cordoned_nodes.clear()
    cluster.step()
    at_rest(cluster)
    assert balanced(cluster, 3)


def test_a_cordoned_shard_is_emptied_and_stays() -> None:
    """Its slots go to the others while it stands in the spec; pod, volume and membership stay."""
    cluster = settled({"cordoned": ["shard-1", "shard-9"]})
    assert set(owned(cluster)) == {"shard-0", "shard-2"}
    assert len(cluster.pods) == 3
    assert cluster.ring_object["status"]["members"] == 3
    cluster.edit(cordoned=[])
    assert cluster.step()
    assert cluster.said("Progressing") == ("True", "Rebalancing")
    at_rest(cluster)
    assert balanced(cluster, 3)


def test_cordons_that_leave_nobody_are_ignored_and_it_is_said() -> None:
    """Nothing moves; fewer shards are emptied onto cordoned ones; taking one of the names back is enough."""
    cluster = settled()
    cluster.edit(cordoned=["shard-0", "shard-1", "shard-2"])
    assert cluster.step() == ()
    assert cluster.said("Progressing") == ("False", "CordonsIgnored")
    assert cluster.said("Degraded") == ("False", "AllWell")
    assert cluster.verdict is not None
    assert cluster.verdict.sentence.startswith("spec.cordoned names every shard, so none of it counts")
    assert balanced(cluster, 3)
    cluster.edit(cordoned=["shard-0", "shard-1"], replicas=2)
    for _ in range(STEPS_MAX):
        cluster.step()
        if len(cluster.pods) == 2 and cluster.said("Progressing") == ("False", "CordonsIgnored"):
            break
    assert balanced(cluster, 2)
    cluster.edit(cordoned=["shard-0"])
    cluster.step()
    at_rest(cluster)
    assert set(owned(cluster)) == {"shard-1"}


def test_trouble_of_the_last_shard_moves_nothing_back() -> None:
    """People said that the others shall own nothing; it comes back, after a crash as after a drain."""
    cluster = settled({"cordoned": ["shard-0", "shard-1"]})
    for trouble in (cluster.break_pod, cluster.evict):
        trouble(2)
        for _ in range(10):
            cluster.step()
            assert cluster.map is not None
            assert not cluster.map.moves
        cluster.crashed.clear()
    assert set(owned(cluster)) == {"shard-2"}


@pytest.mark.parametrize("spec", [{"replicas": 1}, {"replicas": 2, "cordoned": ["shard-0"]}])
def test_a_drain_that_leaves_nobody_asks_for_nothing(spec: Object) -> None:
    """The shard that goes is the only one that may own slots: they stay with it, and nothing is held."""
    cluster = settled(spec)
    cluster.evict(spec["replicas"] - 1)
    assert cluster.step() == ()
    assert cluster.plan is not None
    assert cluster.plan.decision is not None
    assert cluster.plan.decision.reason == "Steady"


def test_a_hand_over_does_not_wait_for_cordoned_shards() -> None:
    """Nobody may take the slots: the shard is replaced in place."""
    cluster = settled({"update": {"strategy": "Handover"}, "cordoned": ["shard-0", "shard-1"]})
    cluster.edit(version="2.0.0")
    cluster.step()
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3
    assert set(owned(cluster)) == {"shard-2"}


def pinned(first: int, last: int, shard: str) -> Object:
    """A pin as people write it."""
    return {"first": first, "last": last, "shard": shard}


def test_pins_move_their_slots_and_hold_them() -> None:
    """Others share the rest, also when there are more; a pin to a shard that is not there waits for it."""
    cluster = settled({"pins": [pinned(0, 255, "shard-2"), pinned(300, 300, "shard-3")]})
    assert owned(cluster) == {"shard-0": 128, "shard-1": 128, "shard-2": 256}
    cluster.edit(replicas=4)
    cluster.step()
    at_rest(cluster)
    assert cluster.map is not None
    owners = [found.owner for found in cluster.map.owners()]
    assert {*owners[:256], owners[300]} == {"shard-2", "shard-3"}
    assert sorted(owned(cluster).values()) == [85, 85, 86, 256]
    cluster.edit(pins=[])
    cluster.step()
    at_rest(cluster)
    assert balanced(cluster, 4)


def test_a_pin_waits_for_a_cordoned_node() -> None:
    """It moves nothing there, and takes nothing away that is there already."""
    cluster = settled({"pins": [pinned(0, 199, "shard-0")]})
    cluster.cordoned_nodes = {"node0"}
    cluster.edit(pins=[pinned(0, 249, "shard-0")])
    assert cluster.step() == ()
    cluster.cordoned_nodes.clear()
    cluster.step()
    at_rest(cluster)
    assert owned(cluster) == {"shard-0": 250, "shard-1": 131, "shard-2": 131}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("cordon"), st.sets(st.integers(0, 5), max_size=4)),
            st.tuples(st.just("evict"), st.integers(0, 5)),
            st.tuples(st.just("scale"), st.integers(1, 6)),
            st.tuples(st.just("steps"), st.integers(1, 8)),
        ),
        max_size=12,
    )
)
def test_whatever_nodes_do_the_ring_is_even_in_the_end(wishes: list[tuple[str, int | set[int]]]) -> None:
    """Cordons, drains and other numbers of shards in any order, at any step; uncordoned, each has its share."""
    cluster = settled()
    for wish, value in wishes:
        match wish, value:
            case "cordon", set():
                cluster.cordoned_nodes = {f"node{number}" for number in value}
            case "evict", int() if value in cluster.pods:
                cluster.evict(value)
            case "scale", int():
                cluster.edit(replicas=value)
            case "steps", int():
                for _ in range(value):
                    cluster.step()
            case _:
                pass
    cluster.cordoned_nodes.clear()
    cluster.edit(replicas=3)
    for _ in range(HANDOVER.seconds):
        cluster.step()
    at_rest(cluster)
    assert balanced(cluster, 3)
