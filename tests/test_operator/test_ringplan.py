"""The plan of one ring in every state that people and machines bring it into."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlm_common.kubeapi import Object
from fleetlm_operator.observed import ContainerStatus, ShardWord, is_ready
from fleetlm_operator.resources import PODS
from fleetlm_operator.ringplan import Action, Apply, Create, Delete, Grow, SwapMap
from tests.test_operator.modelcluster import DEFAULTS, ModelCluster, ring_object

GOOD = "registry.example/fleetlm-shard:1.0.0"


def settled(spec: Object | None = None) -> ModelCluster:
    """A ring that is up; changed in place, for this is about pods: `test_ringmoves.py` has those that hand over."""
    asked = dict(spec or {})
    asked["update"] = {"strategy": "InPlace", **asked.get("update", {})}
    cluster = ModelCluster(asked, bad=lambda image: image.endswith(":bad"))
    cluster.settle()
    assert cluster.said("Ready") == ("True", "Serving")
    return cluster


def deletions(actions: tuple[Action, ...]) -> list[str]:
    """Pods that were deleted."""
    return [action.name for action in actions if isinstance(action, Delete) and action.resource == PODS]


def test_a_ring_comes_up_from_nothing() -> None:
    """Children first, the map when every volume is known, then at rest; twelve kinds of objects."""
    cluster = ModelCluster()
    first = cluster.step()
    assert all(isinstance(action, Apply | Create) for action in first)
    assert cluster.verdict is not None
    assert cluster.verdict.phase == "Pending"
    assert cluster.said("Progressing") == ("True", "BringUp")
    cluster.settle()
    assert cluster.map is not None
    assert cluster.map.epoch == 1
    assert len(cluster.map.members) == 3
    assert cluster.verdict.phase == "Ready"
    assert cluster.said("Progressing") == ("False", "Settled")
    assert cluster.verdict.sentence == "steady at epoch 1, 512 slots on 3 shards, all ready"
    assert cluster.images() == [GOOD] * 3


def test_at_rest_nothing_is_done() -> None:
    """Not a single write, however often one looks; the status does not change either."""
    cluster = settled()
    before = cluster.ring_object["status"]
    assert cluster.step() == ()
    assert cluster.ring_object["status"] == before


@pytest.mark.parametrize("key", sorted(settled().children))
def test_a_deleted_child_comes_back(key: str) -> None:
    """Each kind; the RingMap does not: a new one would not know who owns what."""
    cluster = settled()
    del cluster.children[key]
    actions = cluster.step()
    if key == "RingMap demo":
        assert actions == ()
        assert cluster.said("Stalled") == ("True", "RingMapLost")
    else:
        assert [action.child.key for action in actions if isinstance(action, Apply | Create)] == [key]
        cluster.settle()
        assert cluster.said("Ready")[0] == "True"


def test_what_somebody_changed_is_put_back() -> None:
    """A field of ours is ours; a label of somebody else's stays his."""
    cluster = settled()
    cluster.children["StatefulSet demo-shard"]["spec"]["replicas"] = 5
    cluster.children["Service demo-gateway"]["metadata"]["labels"]["team"] = "chat"
    actions = cluster.step()
    assert [action.child.key for action in actions if isinstance(action, Apply)] == ["StatefulSet demo-shard"]


def test_a_new_version_reaches_one_shard_at_a_time() -> None:
    """From the highest ordinal down, each only after the one before is ready; gateways follow the shards."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    order: list[str] = []
    for _ in range(20):
        gone = deletions(cluster.step())
        assert len(gone) <= 1
        order += gone
        assert sum(is_ready(pod) for pod in cluster.pods.values()) >= 2 or gone
    assert order == ["demo-shard-2", "demo-shard-1", "demo-shard-0"]
    assert cluster.images() == ["registry.example/fleetlm-shard:2.0.0"] * 3
    gateway = cluster.children["Deployment demo-gateway"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert gateway == "registry.example/fleetlm-gateway:2.0.0"
    assert cluster.said("Progressing") == ("False", "Settled")


def test_no_step_of_an_upgrade_says_that_it_is_over() -> None:
    """A step that still changes something does not call it settled: not between the last shard and the gateways."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    for _ in range(20):
        actions = cluster.step()
        assert not actions or cluster.said("Progressing")[0] == "True", actions
    assert cluster.said("Progressing") == ("False", "Settled")


def test_a_gateway_of_before_is_part_of_the_rollout() -> None:
    """Every new one is there, an old one still holds clients: not settled yet."""
    cluster = settled()
    cluster.gateways_left = 1
    cluster.step()
    assert cluster.said("Progressing") == ("True", "GatewayRollout")
    cluster.gateways_left = 0
    cluster.step()
    assert cluster.said("Progressing") == ("False", "Settled")


def test_gateways_wait_for_the_shards() -> None:
    """While a shard has the old image the gateways keep theirs."""
    cluster = settled()
    cluster.edit(version="bad")
    for _ in range(5):
        cluster.step()
    gateway = cluster.children["Deployment demo-gateway"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert gateway == "registry.example/fleetlm-gateway:1.0.0"


def test_a_bad_image_stops_at_the_first_pod() -> None:
    """And says so; the others serve on."""
    cluster = settled()
    cluster.edit(version="bad")
    for _ in range(20):
        cluster.step()
    assert cluster.deleted == ["demo-shard-2"]
    assert cluster.said("Stalled") == ("True", "ImageUnavailable")
    assert cluster.said("Degraded") == ("True", "ShardsNotReady")
    assert cluster.verdict is not None
    assert "no such image" in cluster.verdict.sentence
    assert [block.predicate for block in cluster.verdict.blocks] == ["ChangedPodsReady", "OtherShardsReady"]


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_a_change_of_mind_heals_without_hands(version: str) -> None:
    """Back, or on to a third version: the broken pod goes at once, whatever the others do."""
    cluster = settled()
    cluster.edit(version="bad")
    for _ in range(5):
        cluster.step()
    cluster.edit(version=version)
    cluster.settle()
    assert cluster.images() == [f"registry.example/fleetlm-shard:{version}"] * 3
    assert cluster.said("Stalled") == ("False", "NotStalled")
    assert cluster.deleted[:2] == ["demo-shard-2", "demo-shard-2"]


def test_a_bad_image_from_the_start_heals() -> None:
    """No pod ever served: all of them may be replaced at once."""
    cluster = ModelCluster({"version": "bad"}, bad=lambda image: image.endswith(":bad"))
    for _ in range(4):
        cluster.step()
    assert cluster.said("Stalled") == ("True", "ImageUnavailable")
    cluster.edit(version="1.0.0")
    cluster.settle()
    assert cluster.images() == [GOOD] * 3


def test_no_pod_goes_while_another_is_away() -> None:
    """A shard that crashed holds the upgrade up, and the status says so."""
    cluster = settled()
    cluster.break_pod(0)
    cluster.edit(log={"fsync": "interval"})
    cluster.step()
    cluster.break_pod(0)
    cluster.step()
    assert cluster.deleted == ["demo-shard-0"], "the broken one is outdated: replacing it harms nobody"


def test_minimum_time_between_two_pods() -> None:
    """A pod that was changed must be ready for a while before the next goes."""
    cluster = settled({"update": {"minReadySeconds": 10}})
    cluster.edit(version="2.0.0")
    times = [cluster.now.timestamp() for _ in range(60) if deletions(cluster.step())]
    gaps = [two - one for one, two in pairwise(times)]
    assert len(gaps) == 2
    assert min(gaps) >= 10


def test_a_pod_that_is_never_ready_stalls_after_the_deadline() -> None:
    """It does not crash, it just does not come."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    cluster.step()
    cluster.step()
    cluster.volumes[2] = "another"  # the shard waits for its volume
    cluster.step()
    cluster.now += timedelta(seconds=601)
    cluster.step()
    assert cluster.said("Stalled") == ("True", "ProgressDeadlineExceeded")


@pytest.mark.parametrize("change", [{"version": "2.0.0"}, {"replicas": 5}, {"storage": {"size": "20Gi"}}])
def test_paused_changes_nothing(change: Object) -> None:
    """Whatever is asked meanwhile; it is all done afterwards."""
    cluster = settled()
    cluster.edit(paused=True, **change)
    assert cluster.step() == ()
    assert cluster.said("Paused") == ("True", "PausedBySpec")
    assert cluster.said("Ready") == ("True", "Serving")
    cluster.edit(paused=False)
    assert cluster.step() != ()


def test_paused_in_the_middle_of_a_roll() -> None:
    """It stops where it is and goes on from there."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    while not cluster.deleted:
        cluster.step()
    cluster.edit(paused=True)
    for _ in range(5):
        assert cluster.step() == ()
    assert len(cluster.deleted) == 1
    cluster.edit(paused=False)
    cluster.settle()
    assert len(cluster.deleted) == 3


def test_deletion_waits_for_nothing() -> None:
    """A ring on its way out (somebody's finalizer holds it) is not touched."""
    cluster = settled()
    cluster.edit(version="2.0.0")
    cluster.ring_object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert cluster.step() == ()
    assert cluster.verdict is not None
    assert cluster.verdict.phase == "Deleting"


def test_children_leave_with_the_ring() -> None:
    """By owner reference; the RingMap stays with retained volumes; Orphan lets everything run on."""

    def owned(spec: Object) -> set[str]:
        cluster = settled(spec)
        return {key for key, body in cluster.children.items() if "ownerReferences" in body["metadata"]}

    everything = set(settled().children)
    assert owned({}) == everything - {"RingMap demo"}
    assert owned({"volumeRetention": {"whenDeleted": "Delete"}}) == everything
    assert owned({"deletionPolicy": "Orphan"}) == set()


def test_before_the_first_map_replicas_may_change() -> None:
    """No slot has an owner yet."""
    cluster = ModelCluster()
    cluster.step()
    cluster.edit(replicas=5)
    cluster.settle()
    assert cluster.map is not None
    assert len(cluster.map.members) == 5


def test_volumes_grow() -> None:
    """Each claim, and the claim template for shards to come; no pod is replaced."""
    cluster = settled()
    cluster.edit(storage={"size": "20Gi"})
    cluster.settle()
    assert {claim.requested_bytes for claim in cluster.claims.values()} == {20 * 1024**3}
    shard_set = cluster.children["StatefulSet demo-shard"]["spec"]["volumeClaimTemplates"][0]
    assert shard_set["spec"]["resources"]["requests"]["storage"] == "20Gi"
    assert "demo-shard-0" not in cluster.deleted
    assert cluster.said("Progressing") == ("False", "Settled")


def test_a_class_that_cannot_grow_volumes() -> None:
    """It is said in the server's words; the ring stays ready."""
    cluster = settled()
    cluster.refuses = lambda action: "class cannot expand" if isinstance(action, Grow) else ""
    cluster.edit(storage={"size": "20Gi"})
    for _ in range(6):
        cluster.step()
    assert cluster.said("Progressing") == ("False", "StorageNotExpandable")
    assert cluster.said("Ready") == ("True", "Serving")
    assert cluster.verdict is not None
    assert "class cannot expand" in cluster.verdict.sentence


def test_a_lost_volume_is_never_bound_anew() -> None:
    """Nothing is overwritten; Degraded says which."""
    cluster = settled()
    cluster.volumes[1] = "empty"
    cluster.step()
    cluster.step()
    assert cluster.said("Degraded") == ("True", "VolumeLost")
    assert cluster.map is not None
    assert cluster.map.members[1].volume_id == "volume-1"
    assert not any(isinstance(action, SwapMap) for action in cluster.step())


WORDS: list[tuple[ShardWord, str, str]] = [
    (ShardWord(ok=False, reason="VolumeLost", message="the log is gone"), "VolumeLost", "VolumeLost"),
    (ShardWord(ok=False, reason="ForeignVolume", message="of another ring"), "VolumeLost", "VolumeLost"),
    (ShardWord(ok=False, reason="LogUnreadable", message="not a log"), "VolumeUnreadable", "ShardsNotReady"),
    (ShardWord(ok=False, reason="VolumeUnreadable", message="no file"), "VolumeUnreadable", "ShardsNotReady"),
    (ShardWord(ok=False, reason="DiskFull", message="no space"), "DiskFull", "ShardsNotReady"),
    (ShardWord(ok=False, reason="MapUnavailable", message="no API server"), "ShardsNotReady", "ShardsNotReady"),
    (ShardWord(ok=True, reason="LogDamaged", message="2 ranges"), "LogDamaged", "Serving"),
    (ShardWord(ok=True, reason="ArchiveAway", message="no such file: url"), "ArchiveAway", "Serving"),
    (ShardWord(ok=True, reason="ArchiveRefused", message="of another ring"), "ArchiveRefused", "Serving"),
    (ShardWord(ok=True, reason="ArchiveDiverged", message="slot 7"), "ArchiveDiverged", "Serving"),
]


@pytest.mark.parametrize(("word", "degraded", "ready"), WORDS, ids=lambda each: getattr(each, "reason", each))
def test_what_a_shard_says_of_itself_is_said(word: ShardWord, degraded: str, ready: str) -> None:
    """Its word and its sentence stand in the conditions; a shard with an empty volume announces nothing else."""
    cluster = settled()
    cluster.words[1] = word
    if not word.ok:
        cluster.break_pod(1, container=ContainerStatus(name="shard"))
    assert cluster.step() == (), "words move nothing"
    assert cluster.said("Degraded") == ("True", degraded)
    assert cluster.said("Ready")[1] == ready
    assert cluster.verdict is not None
    assert cluster.verdict.phase == "Degraded"
    assert f"shard-1: {word.reason}: {word.message}" in cluster.verdict.sentence
    cluster.words.clear()
    cluster.crashed.clear()
    cluster.settle()
    assert cluster.verdict.phase == "Ready"


def test_a_pod_that_never_gets_ready_says_what_it_waits_for() -> None:
    """Its word stands beside the deadline's."""
    cluster = settled()
    cluster.edit(update={"progressDeadlineSeconds": 30}, version="2.0.0")
    cluster.step()
    cluster.step()
    cluster.break_pod(2, container=ContainerStatus(name="shard"))
    cluster.words[2] = ShardWord(ok=False, reason="TakingVolume", message="its last owner may still have to leave")
    cluster.now += timedelta(seconds=31)
    cluster.step()
    assert cluster.said("Stalled") == ("True", "ProgressDeadlineExceeded")
    assert cluster.verdict is not None
    assert "TakingVolume: its last owner" in cluster.verdict.sentence


def test_a_gateway_that_merely_starts_degrades_nothing() -> None:
    """In a bring-up and in a rollout for as long as it takes; later half a minute while another one serves."""
    cluster = ModelCluster()
    cluster.lose_gateways(1)
    cluster.settle()
    cluster.now += timedelta(minutes=5)
    cluster.step()
    assert cluster.verdict is not None
    assert (cluster.verdict.phase, cluster.said("Progressing")) == ("Pending", ("True", "BringUp"))
    assert cluster.said("Degraded") == ("False", "AllWell")
    cluster.lose_gateways(0)
    cluster.settle()
    assert cluster.verdict.phase == "Ready"
    assert cluster.at_rest()
    cluster.lose_gateways(1)
    cluster.step()
    assert (cluster.verdict.phase, cluster.said("Ready")) == ("Ready", ("True", "Serving"))
    assert not cluster.at_rest(), "looked at again soon"
    cluster.now += timedelta(seconds=31)
    cluster.step()
    assert cluster.said("Degraded") == ("True", "GatewaysNotReady")
    cluster.lose_gateways(2)
    cluster.step()
    assert cluster.said("Degraded") == ("True", "GatewaysNotReady"), "nobody can connect: at once"


@pytest.mark.parametrize("key", sorted(settled().children))
def test_an_object_of_somebody_else_is_not_touched(key: str) -> None:
    """A name that is taken stalls the ring before anything is made."""
    cluster = ModelCluster()
    kind, _, name = key.partition(" ")
    cluster.children[key] = {"kind": kind, "metadata": {"name": name, "uid": "theirs", "labels": {}}}
    if key.startswith(("StatefulSet", "Deployment")):
        cluster.children[key] |= settled().children[key] | {"metadata": cluster.children[key]["metadata"]}
    assert cluster.step() == ()
    assert cluster.said("Stalled") == ("True", "ForeignObject")
    assert cluster.verdict is not None
    assert key in cluster.verdict.sentence


def test_children_of_an_earlier_ring_of_this_name_are_waited_for() -> None:
    """They are being collected; adopting them would be losing them a moment later."""
    cluster = settled()
    cluster.ring_object = ring_object(uid="another")
    assert cluster.step() == ()
    assert cluster.said("Stalled") == ("True", "EarlierRingLeaves")


def test_a_new_ring_adopts_what_was_retained() -> None:
    """The RingMap keeps its uid and its epoch; the volumes keep their data."""
    cluster = settled()
    kept = cluster.children["RingMap demo"]
    cluster.children, cluster.pods = {"RingMap demo": kept}, {}
    cluster.ring_object = ring_object(uid="another")
    cluster.settle()
    assert cluster.map is not None
    assert (cluster.map.uid, cluster.map.epoch) == ("ring-uid", 1)
    assert cluster.said("Ready") == ("True", "Serving")


def test_a_retained_map_with_other_slots_is_not_adopted() -> None:
    """The number of slots is fixed for life."""
    cluster = settled()
    kept = cluster.children["RingMap demo"]
    cluster.children, cluster.pods = {"RingMap demo": kept}, {}
    cluster.ring_object = ring_object({"slots": 256}, uid="another")
    assert cluster.step() == ()
    assert cluster.said("Stalled") == ("True", "RingMapMismatch")


def test_a_new_operator_changes_nothing() -> None:
    """Its version and registry are for new rings only."""
    cluster = settled()
    cluster.defaults = msgspec.structs.replace(DEFAULTS, version="9.9.9", registry="elsewhere.example")
    assert cluster.step() == ()
    cluster.ring_object["status"] = {}
    assert cluster.step() == (), "also when the status was lost"


def test_policies_can_be_switched_off() -> None:
    """They go, and come back."""
    cluster = settled()
    cluster.edit(networkPolicy={"enabled": False})
    cluster.settle()
    assert not [key for key in cluster.children if key.startswith("NetworkPolicy")]
    cluster.edit(networkPolicy={"enabled": True})
    cluster.settle()
    assert len([key for key in cluster.children if key.startswith("NetworkPolicy")]) == 2


def test_what_the_server_refuses_is_said() -> None:
    """In its own words, and the rest goes on."""
    cluster = ModelCluster()
    cluster.refuses = lambda action: "forbidden: quota" if "Service demo-gateway" in action.why else ""
    cluster.step()
    assert cluster.said("Stalled") == ("True", "ChangeRefused")
    assert "StatefulSet demo-shard" in cluster.children


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["step", "step", "step", "good", "other", "bad", "crash", "heal", "pause", "resume"]),
        max_size=40,
    )
)
def test_whatever_people_do_at_most_one_good_pod_is_away(moves: list[str]) -> None:
    """Random changes of mind: two pods that served are never deleted one before the other is back; it always ends."""
    cluster = settled()
    for move in moves:
        match move:
            case "good" | "other" | "bad":
                cluster.edit(version={"good": "1.0.0", "other": "2.0.0", "bad": "bad"}[move])
            case "crash":
                cluster.break_pod(1)
            case "heal":
                cluster.crashed.clear()
            case "pause" | "resume":
                cluster.edit(paused=move == "pause")
            case _:
                serving = {pod.metadata.name for pod in cluster.pods.values() if is_ready(pod)}
                gone = set(deletions(cluster.step()))
                assert len(gone & serving) <= 1
                if gone & serving:
                    assert serving == {"demo-shard-0", "demo-shard-1", "demo-shard-2"}
    cluster.crashed.clear()
    cluster.edit(version="3.0.0", paused=False, replicas=3)
    cluster.settle()
    assert cluster.said("Ready") == ("True", "Serving")
    assert cluster.images() == ["registry.example/fleetlm-shard:3.0.0"] * 3
