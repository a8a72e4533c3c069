"""The plan of a ring with cordoned nodes: what moves, what stays, what is said.

The model asserts at each map that only confirmed moves change owners (`modelcluster.py`, `playedring.py`).
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_operator.modelcluster import HANDOVER
from tests.test_operator.test_ringmoves import at_rest, balanced, owned, settled


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
