"""The plan of a ring whose slots move: more shards, fewer, hand-over before a pod goes, changes of mind at any step.

The model asserts at each map that only confirmed moves change owners, and at each pod that is given up that its shard
is no member (`modelcluster.py`, `playedring.py`).
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import LEASES
from fleetlm_operator.observed import ContainerState, ContainerStatus, Terminated, is_ready
from fleetlm_operator.resources import PODS
from fleetlm_operator.ringplan import Apply, Delete, SwapMap
from fleetlm_operator.rolling import STARTS_AGAIN_MAX
from tests.test_operator.modelcluster import ModelCluster

STEPS_MAX = 600


def settled(spec: Object | None = None) -> ModelCluster:
    """A ring that is up."""
    cluster = ModelCluster(spec, bad=lambda image: image.endswith(":bad"))
    at_rest(cluster)
    return cluster


def at_rest(cluster: ModelCluster) -> None:
    """Steps until everything is as asked."""
    for _ in range(STEPS_MAX):
        if not cluster.step() and cluster.said("Progressing") == ("False", "Settled"):
            assert cluster.said("Ready") == ("True", "Serving")
            return
    raise AssertionError(f"not at rest: {cluster.verdict}")


def owned(cluster: ModelCluster) -> dict[str, int]:
    """Slots by shard."""
    assert cluster.map is not None
    return dict(Counter(found.owner for found in cluster.map.owners()))


def balanced(cluster: ModelCluster, shards: int) -> bool:
    """Whether so many shards have their share, within one."""
    counts = owned(cluster)
    names = {f"shard-{number}" for number in range(shards)}
    return set(counts) == names and max(counts.values()) - min(counts.values()) <= 1


def moving(cluster: ModelCluster, state: str = "Copying") -> None:
    """Steps until a move is in a state."""
    for _ in range(STEPS_MAX):
        if cluster.map is not None and any(move.state == state for move in cluster.map.moves):
            return
        cluster.step()
    raise AssertionError(f"no move is {state}")


def test_more_shards_get_their_share() -> None:
    """Pods first, then members, then slots; the ring is Ready all the time."""
    cluster = settled()
    cluster.edit(replicas=5)
    assert any(isinstance(action, Apply) and action.child.key == "StatefulSet demo-shard" for action in cluster.step())
    assert cluster.map is not None
    assert cluster.map.epoch == 1
    assert cluster.said("Progressing") == ("True", "Scaling")
    for _ in range(STEPS_MAX):
        cluster.step()
        assert cluster.said("Ready") == ("True", "Serving")
        assert cluster.said("Degraded") == ("False", "AllWell")
        if cluster.said("Progressing") == ("False", "Settled"):
            break
    assert balanced(cluster, 5)
    assert cluster.ring_object["status"]["members"] == 5


def test_fewer_shards_give_everything_away_first() -> None:
    """A pod goes when its shard is no member any more; its Lease goes, its volume stays."""
    cluster = settled({"replicas": 5})
    cluster.edit(replicas=2)
    least = 5
    for _ in range(STEPS_MAX):
        actions = cluster.step()
        assert cluster.map is not None
        least = min(least, len(cluster.pods))
        assert len(cluster.pods) >= len(cluster.map.members)
        if not actions and cluster.said("Progressing") == ("False", "Settled"):
            break
        assert cluster.said("Ready") == ("True", "Serving")
    assert least == 2
    assert balanced(cluster, 2)
    assert sorted(cluster.claims) == [0, 1, 2, 3, 4]
    assert sum(key.startswith("Lease ") for key in cluster.children) == 2


def test_giving_pods_up_is_refused_to_who_looked_too_early() -> None:
    """Fewer pods are asked for with the version of the StatefulSet that was seen; more of them without."""
    cluster = settled()
    cluster.edit(replicas=4)
    up = [action for action in cluster.step() if isinstance(action, Apply) and action.child.key.startswith("Stateful")]
    assert [action.guarded for action in up] == [False]
    at_rest(cluster)
    cluster.edit(replicas=3)
    down: list[Apply] = []
    for _ in range(STEPS_MAX):
        down += [each for each in cluster.step() if isinstance(each, Apply) and each.child.key.startswith("Stateful")]
        if cluster.said("Progressing") == ("False", "Settled"):
            break
    assert [action.guarded for action in down if action.child.body["spec"]["replicas"] == 3] == [True]


def test_a_shard_that_comes_again_with_a_new_volume() -> None:
    """`whenScaled: Delete`: what it announced before is not taken for its word; it joins with what it has now."""
    cluster = settled({"replicas": 4, "volumeRetention": {"whenScaled": "Delete"}})
    cluster.edit(replicas=3)
    at_rest(cluster)
    assert sorted(cluster.claims) == [0, 1, 2]
    cluster.edit(replicas=4)
    at_rest(cluster)
    assert cluster.map is not None
    member = cluster.map.member(cluster.map.members[-1].name)
    assert member is not None
    assert member.volume_id == "volume-3-anew"
    assert balanced(cluster, 4)


def test_a_word_that_outlived_its_pod_binds_nothing() -> None:
    """A Lease that was left with the word of an earlier pod: its shard joins when the pod of today has spoken."""
    cluster = settled({"replicas": 4, "volumeRetention": {"whenScaled": "Delete"}})
    left, word = cluster.children["Lease demo-shard-3"], cluster.announced[3]
    cluster.edit(replicas=3)
    at_rest(cluster)
    cluster.children["Lease demo-shard-3"], cluster.announced[3] = left, word
    cluster.refuses = lambda action: "no" if isinstance(action, Delete) and action.resource == LEASES else ""
    cluster.step()
    cluster.edit(replicas=4)
    for _ in range(3):
        swaps = [action for action in cluster.step() if isinstance(action, SwapMap) and action.new is not None]
        assert all(member.volume_id != "volume-3" for swap in swaps if swap.new for member in swap.new.members)


@pytest.mark.parametrize(("first", "second"), [(5, 2), (2, 5), (5, 3), (2, 3)])
@pytest.mark.parametrize("state", ["Copying", "Sealing"])
def test_a_change_of_mind_before_it_ended(first: int, second: int, state: str) -> None:
    """Up then down, down then up, and back: it ends as asked last."""
    cluster = settled()
    cluster.edit(replicas=first)
    moving(cluster, state)
    cluster.edit(replicas=second)
    at_rest(cluster)
    assert balanced(cluster, second)
    assert len(cluster.pods) == second


def test_a_new_shard_that_cannot_start() -> None:
    """It is said; the ring serves on, and asking for fewer ends it."""
    cluster = settled()
    cluster.edit(replicas=4, version="bad")
    for _ in range(30):
        cluster.step()
    assert cluster.said("Stalled") == ("True", "ImageUnavailable")
    assert cluster.said("Ready") == ("True", "Serving")
    assert owned(cluster) == owned(settled())
    cluster.edit(replicas=3, version="1.0.0")
    at_rest(cluster)
    assert len(cluster.pods) == 3


def test_another_image_in_the_middle_of_fewer_shards() -> None:
    """Shards that leave are not changed any more; the others are, one at a time."""
    cluster = settled({"replicas": 5})
    cluster.edit(replicas=3)
    moving(cluster)
    cluster.edit(version="2.0.0")
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3
    assert not {"demo-shard-3", "demo-shard-4"} & set(cluster.deleted)
    assert balanced(cluster, 3)


def test_what_is_sealed_is_ended_also_while_paused() -> None:
    """Its writers wait: paused means that nothing begins. Resumed, it goes on."""
    cluster = settled()
    cluster.edit(replicas=5)
    moving(cluster, "Sealing")
    cluster.edit(paused=True)
    for _ in range(20):
        actions = cluster.step()
        assert all(isinstance(action, SwapMap) for action in actions)
    assert cluster.map is not None
    assert all(move.state == "Copying" for move in cluster.map.moves)
    assert cluster.step() == ()
    cluster.edit(paused=False)
    at_rest(cluster)
    assert balanced(cluster, 5)


def test_slots_are_handed_over_before_a_pod_goes() -> None:
    """The default: no pod that owns slots goes, so the ring is Ready throughout; at the end all is even."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    order: list[str] = []
    for _ in range(STEPS_MAX):
        before = owned(cluster)
        actions = cluster.step()
        gone = [action.name for action in actions if isinstance(action, Delete) and action.resource == PODS]
        assert not [name for name in gone if name.removeprefix("demo-") in before]
        order += gone
        assert cluster.said("Ready") == ("True", "Serving")
        if not actions and cluster.said("Progressing") == ("False", "Settled"):
            break
    assert order == ["demo-shard-2", "demo-shard-1", "demo-shard-0"]
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3
    assert balanced(cluster, 3)


@pytest.mark.parametrize("strategy", ["InPlace", "Handover"])
def test_a_shard_is_told_before_it_is_replaced_in_place(strategy: str) -> None:
    """Its pod waits for nobody then; with `Handover`, and when all is done, nobody is named."""
    cluster = settled({"update": {"strategy": strategy}})
    cluster.edit(version="2.0.0")
    gone = 0
    for _ in range(STEPS_MAX):
        actions = cluster.step()
        told: tuple[str, ...] = ()
        for action in actions:
            told = action.in_place if isinstance(action, SwapMap) else told
            if isinstance(action, Delete) and action.resource == PODS:
                gone += 1
                assert told == ((action.name.removeprefix("demo-"),) if strategy == "InPlace" else ())
        if not actions and cluster.said("Progressing") == ("False", "Settled"):
            break
    assert (gone, cluster.in_place) == (3, ())


def test_who_waits_for_a_hand_over_is_said() -> None:
    """While slots move away before a pod goes, `blockedBy` says so; asking for InPlace ends the wait."""
    cluster = settled({"update": {"strategy": "Handover"}})
    cluster.edit(version="2.0.0")
    moving(cluster)
    cluster.step()
    assert cluster.verdict is not None
    assert [block.predicate for block in cluster.verdict.blocks] == ["SlotsHandedOver"]
    assert cluster.said("Progressing") == ("True", "RollingUpgrade")
    cluster.edit(update={"strategy": "InPlace"})
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3


STARTED_AGAIN = ContainerStatus(name="shard", restart_count=1)
ENDED = ContainerStatus(name="shard", state=ContainerState(terminated=Terminated(exit_code=137)))


def pods_gone(cluster: ModelCluster, steps: int) -> list[str]:
    """Pods that the operator replaces within so many steps, each a second."""
    done = [action for _ in range(steps) for action in cluster.step()]
    return [action.name for action in done if isinstance(action, Delete) and action.resource == PODS]


@pytest.mark.parametrize("container", [STARTED_AGAIN, ENDED], ids=["runs again", "has ended"])
def test_a_shard_that_is_killed_while_it_hands_over_starts_once(container: ContainerStatus) -> None:
    """It would serve within seconds: replaced as it is, its writers would wait for the next pod's start as well."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    moving(cluster)
    cluster.break_pod(2, container=container)
    assert pods_gone(cluster, 10) == []
    assert cluster.verdict is not None
    assert "SlotsHandedOver" in [block.predicate for block in cluster.verdict.blocks]
    cluster.mend_pod(2)
    while "shard-2" in owned(cluster):
        assert pods_gone(cluster, 1) == []
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3


def test_a_shard_that_starts_again_and_does_not_serve_is_replaced() -> None:
    """After STARTS_AGAIN_MAX: what people change must reach it."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    moving(cluster)
    cluster.break_pod(2, container=STARTED_AGAIN)
    assert pods_gone(cluster, int(STARTS_AGAIN_MAX.total_seconds()) + 2) == ["demo-shard-2"]
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3


def test_in_place_a_shard_that_starts_again_is_replaced_at_once() -> None:
    """Its slots wait for a start of the new template in any case."""
    cluster = settled({"update": {"strategy": "InPlace"}})
    cluster.break_pod(2, container=STARTED_AGAIN)
    cluster.edit(version="2.0.0")
    assert pods_gone(cluster, 3)[:1] == ["demo-shard-2"]


def test_a_single_shard_is_changed_in_place() -> None:
    """Nobody could take its slots."""
    cluster = settled({"replicas": 1, "update": {"strategy": "Handover"}})
    cluster.edit(version="2.0.0")
    for _ in range(20):
        cluster.step()
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["InPlace", "Handover"]),
    st.lists(
        st.sampled_from(
            ["step", "step", "steps", "up", "down", "more", "good", "other", "bad", "crash", "heal", "pause", "resume"]
        ),
        max_size=40,
    ),
)
def test_whatever_people_do_it_ends_as_asked(strategy: str, wishes: list[str]) -> None:
    """Changes of number, image, pause and crashes at any step: nothing is given up that owns, and it always ends."""
    cluster = settled({"update": {"strategy": strategy}})
    for wish in wishes:
        match wish:
            case "up" | "down" | "more":
                cluster.edit(replicas={"up": 4, "down": 2, "more": 6}[wish])
            case "good" | "other" | "bad":
                cluster.edit(version={"good": "1.0.0", "other": "2.0.0", "bad": "bad"}[wish])
            case "crash":
                cluster.break_pod(1)
            case "heal":
                cluster.crashed.clear()
            case "pause" | "resume":
                cluster.edit(paused=wish == "pause")
            case _:
                for _ in range(1 if wish == "step" else 8):
                    owners, serving = (
                        set(owned(cluster)),
                        {p.metadata.name for p in cluster.pods.values() if is_ready(p)},
                    )
                    gone = {a.name for a in cluster.step() if isinstance(a, Delete) and a.resource == PODS}
                    assert len({name for name in gone & serving if name.removeprefix("demo-") in owners}) <= 1
    cluster.crashed.clear()
    cluster.edit(version="3.0.0", paused=False, replicas=3)
    at_rest(cluster)
    assert cluster.images() == ["registry.example/fleetlm-shard:3.0.0"] * 3
    assert balanced(cluster, 3)
